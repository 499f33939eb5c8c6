"""Token shards on disk: llm.c's and nanoGPT's, read and written."""

import re
from pathlib import Path

import numpy as np

from mupgpt.errors import ConfigError

__all__ = ["VAL_SHARD", "read_shard", "write_shard"]


SHARD_MAGIC = 20240520  # llm.c's token shards: 256 int32 of header, then uint16 tokens


SHARD_HEADER = 256


VAL_SHARD = re.compile(r"(^|[^a-z])val([^a-z]|$)")  # train.bin and val.bin, toy_val_000.bin


def read_shard(path: Path) -> np.ndarray:
    """A token shard as a read-only memory map of uint16: llm.c's (by its magic) or nanoGPT's."""
    size = path.stat().st_size
    if size < 2 or size % 2:
        raise ConfigError(f"{path}: {size} bytes is no whole number of uint16 tokens")
    header = np.fromfile(path, dtype="<i4", count=3)
    if len(header) < 3 or header[0] != SHARD_MAGIC:
        return np.memmap(path, dtype="<u2", mode="r")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=4 * SHARD_HEADER)
    if len(tokens) != header[2]:
        raise ConfigError(f"{path}: its header says {header[2]} tokens, but it has {len(tokens)}")
    return tokens


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write tokens as a self-describing shard of llm.c's format."""
    header = np.zeros(SHARD_HEADER, dtype="<i4")
    header[:3] = SHARD_MAGIC, 1, len(tokens)
    with path.open("wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype("<u2").tobytes())
