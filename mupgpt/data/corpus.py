"""The text that a run reads: found, tokenized, split, and known by a fingerprint."""

import glob
import gzip
import hashlib
import importlib.util
import json
import sysconfig
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mupgpt.config.plain import load_toml
from mupgpt.config.schema import DataConfig
from mupgpt.data.token_files import VAL_SHARD, read_shard, write_shard
from mupgpt.data.tokenizers import ENCODERS, EOT, VOCAB
from mupgpt.errors import ConfigError

__all__ = ["Corpus", "load_corpus", "write_corpus"]


VAL_SHARE = 20  # one file in 20 is held out


NOT_CORPUS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Tokens of a corpus, split into training and held-out part, and where they come from."""

    name: str
    train: np.ndarray
    val: np.ndarray
    tokenizer: str
    sha256: str
    bytes: int
    """Bytes of the text (of the shards, where only tokens are known)."""
    bytes_per_token: float | None
    """Measured on the held-out text; None for shards that do not say."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Names the data; losses under different fingerprints are never compared."""
        return {
            "name": self.name,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "tokenizer": self.tokenizer,
        }

    @cached_property
    def vocab_used(self) -> int:
        """One more than the largest token (of the first 2²⁸ of a part)."""
        return 1 + max(int(part[: 2**28].max(initial=0)) for part in (self.train, self.val))

    def check(self, vocab_size: int, seq_len: int) -> "Corpus":
        """This corpus, or an error when it does not suit a model's vocabulary and context."""
        for part in ("train", "val"):
            tokens = len(getattr(self, part))
            if tokens <= seq_len:
                raise ConfigError(
                    f"data.source = {self.name!r}: its {part} part has {tokens} tokens, fewer than "
                    f"one sequence of model.seq_len = {seq_len}; "
                    "give more text or a shorter context"
                )
        if self.vocab_used > vocab_size:
            raise ConfigError(
                f"model.vocab_size = {vocab_size}: {self.name} as {self.tokenizer} has token "
                f"{self.vocab_used - 1}; set model.vocab_size to at least "
                f"{VOCAB.get(self.tokenizer, self.vocab_used)}"
            )
        return self


@lru_cache(maxsize=4)
def load_corpus(config: DataConfig | str) -> Corpus:
    """The corpus that ``config`` (or a source's name alone) names, read, tokenized and split.

    ``stdlib`` is the installed Python standard library (without tests and site-packages),
    ``package:NAME`` the sources of an installed package; else a file, a folder, a glob, ``.gz``
    text, or token shards (``.bin`` of nanoGPT or llm.c). Files go to the held-out part by a hash of
    their relative path; a corpus of fewer than 20 files holds out its last 5 %. Raises
    `ConfigError` for a source that is not there.

    >>> corpus = load_corpus("package:json")
    >>> corpus.tokenizer, corpus.train.ndim, corpus.vocab_used <= 257
    ('bytes', 1, True)
    """
    if isinstance(config, str):
        return load_corpus(DataConfig(source=config))
    files = find_files(config.source)
    if files[0][1].suffix == ".bin":
        return _from_shards(config, [path for _, path in files])
    texts = [(name, _read(path)) for name, path in files]
    digest = hashlib.sha256()
    for name, text in texts:
        digest.update(name.encode() + b"\0" + text)
    train, val, bytes_per_token = _split(config.tokenizer, texts)
    return Corpus(
        name=config.source,
        train=train,
        val=val,
        tokenizer=config.tokenizer,
        sha256=digest.hexdigest(),
        bytes=sum(len(text) for _, text in texts),
        bytes_per_token=bytes_per_token,
    )


def find_files(source: str) -> list[tuple[str, Path]]:
    """(name, path) of each file of a source, sorted by name; at least one, or an error."""
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = _sources(root)
    elif source.startswith("package:"):
        files = _sources(_package_root(source.removeprefix("package:")))
    elif Path(source).is_dir():
        root = Path(source)
        found = (p for p in root.rglob("*") if p.is_file() and not p.name.startswith("."))
        files = [(str(p.relative_to(root)), p) for p in found]
    else:
        # Path.glob wants the fixed part apart from the pattern; this takes the whole.
        found = glob.glob(source, recursive=True)  # noqa: PTH207
        files = [(Path(p).name, Path(p)) for p in found]
        files = [(name, path) for name, path in files if path.is_file()]
    if not files:
        raise ConfigError(
            f"data.source = {source!r}: no such file, folder or glob; "
            "give a path, 'stdlib', or 'package:NAME'"
        )
    return sorted(files)


def _sources(root: Path) -> list[tuple[str, Path]]:
    found = ((p.relative_to(root), p) for p in root.rglob("*.py"))
    return [(str(rel), p) for rel, p in found if not NOT_CORPUS & set(rel.parts)]


def _package_root(name: str) -> Path:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"data.source = 'package:{name}': no installed package {name!r}")
    return Path(next(iter(spec.submodule_search_locations)))


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix in (".gz", ".dz") else data
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"data.source: cannot read {path}: {error}") from error


def _split(
    tokenizer: str, texts: list[tuple[str, bytes]]
) -> tuple[np.ndarray, np.ndarray, float | None]:
    """Training tokens, held-out tokens, and bytes per held-out token."""
    if not any(text for _, text in texts):
        raise ConfigError(f"data.source: {len(texts)} files, all of them empty; give some text")
    encode, eot = ENCODERS[tokenizer], EOT[tokenizer]
    held = {name for name, _ in texts if is_held_out(name)}
    if len(texts) < VAL_SHARE or not held or len(held) == len(texts):
        whole = b"\n".join(text for _, text in texts)
        cut = len(whole) - len(whole) // VAL_SHARE
        texts, held = [("head", whole[:cut]), ("tail", whole[cut:])], {"tail"}
    parts: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for name, text in texts:
        tokens = np.append(encode(text), np.uint16(eot))
        parts[name in held].append(tokens)
    train, val = np.concatenate(parts[False]), np.concatenate(parts[True])
    val_bytes = sum(len(text) for name, text in texts if name in held)
    return train, val, val_bytes / len(val)


def is_held_out(name: str) -> bool:
    """Whether the file of that relative name belongs to the held-out part."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % VAL_SHARE == 0


def _from_shards(config: DataConfig, paths: list[Path]) -> Corpus:
    digest = hashlib.sha256()
    shards = [(path, read_shard(path)) for path in paths]
    for path, tokens in shards:
        digest.update(f"{path.name}\0{len(tokens)}\0".encode())
        digest.update(tokens[: 2**20].tobytes() + tokens[-(2**20) :].tobytes())
    held = [tokens for path, tokens in shards if VAL_SHARD.search(path.stem)]
    train = [tokens for path, tokens in shards if not VAL_SHARD.search(path.stem)]
    if not held:
        cut = len(train[-1]) - len(train[-1]) // VAL_SHARE
        held, train[-1] = [train[-1][cut:]], train[-1][:cut]
    if not train:
        raise ConfigError(f"data.source = {config.source!r}: only held-out shards (named 'val')")
    manifest = paths[0].with_suffix(".json")
    facts = load_toml(manifest) if manifest.is_file() else {}
    return Corpus(
        name=config.source,
        train=train[0] if len(train) == 1 else np.concatenate(train),
        val=held[0] if len(held) == 1 else np.concatenate(held),
        tokenizer=facts.get("tokenizer", config.tokenizer),
        sha256=digest.hexdigest(),
        bytes=facts.get("bytes", 2 * sum(len(tokens) for _, tokens in shards)),
        bytes_per_token=facts.get("bytes_per_token"),
    )


def write_corpus(corpus: Corpus, prefix: Path) -> list[tuple[Path, int]]:
    """Write ``PREFIX_train.bin`` and ``PREFIX_val.bin`` with a JSON of facts beside each.

    Returns each shard's path and number of tokens; ``data.source = "PREFIX_*.bin"`` reads them.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "source": corpus.name,
        "tokenizer": corpus.tokenizer,
        "bytes": corpus.bytes,
        "sha256": corpus.sha256,
        "bytes_per_token": corpus.bytes_per_token,
    }
    written = []
    for part, tokens in (("train", corpus.train), ("val", corpus.val)):
        path = prefix.with_name(f"{prefix.name}_{part}.bin")
        write_shard(path, tokens)
        path.with_suffix(".json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        written.append((path, len(tokens)))
    return written
