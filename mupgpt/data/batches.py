"""Batches of a corpus: ``batch(step)`` is a pure function of (seed, step)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mupgpt.config.phases import PhaseConfig, longest
from mupgpt.data.corpus import Corpus

__all__ = ["Batches", "eval_batch"]


@dataclass(frozen=True)
class Batches:
    """Training batches of a corpus: a function of (seed, step), with no state to save.

    The tokens are cut into windows of the longest context at an offset that differs by epoch; each
    epoch visits every window once, in an order given by a keyed permutation. A phase of a shorter
    context reads a batch of windows part by part, in as many steps, and the next phase goes on
    after them: no phase reads again what another has read in the same epoch.
    """

    corpus: Corpus
    course: Sequence[PhaseConfig]
    seed: int

    @property
    def window(self) -> int:
        """Tokens in one window."""
        return longest(self.course)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets of ``step``, each (B, T) int64, B and T those of its phase."""
        phase, first, part = self._place(step)
        starts = self.starts(np.arange(first, first + phase.batch_size))
        return _gather(self.corpus.train, starts + part * phase.seq_len, phase.seq_len)

    def _place(self, step: int) -> tuple[PhaseConfig, int, int]:
        """The phase of a step, its first window, and the part of each window that it reads."""
        read, phase, parts = 0, self.course[0], 1
        for phase in self.course:
            parts = self.window // phase.seq_len
            if step < phase.steps:
                break
            step -= phase.steps
            read += -(-phase.steps // parts) * phase.batch_size
        turn, part = divmod(step, parts)
        return phase, read + turn * phase.batch_size, part

    def starts(self, windows: np.ndarray) -> np.ndarray:
        """Where these windows begin in the corpus, counted from the start of the run."""
        tokens, length = len(self.corpus.train), self.window
        count = (tokens - 1) // length - 1 or 1
        starts = np.empty(len(windows), dtype=np.int64)
        for epoch in np.unique(windows // count):
            mine = windows // count == epoch
            key = _key(self.seed, int(epoch))
            slack = tokens - count * length
            starts[mine] = permute(windows[mine] % count, count, key) * length + key % slack
        return starts


def _key(seed: int, epoch: int) -> int:
    digest = hashlib.blake2b(f"data/{seed}/{epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """A keyed permutation of range(n) at ``index``: four Feistel rounds, walked back into range.

    >>> sorted(permute(np.arange(10), 10, key=7).tolist()) == list(range(10))
    True
    """
    half = max(1, (max(1, n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    walk = np.asarray(index, dtype=np.uint64)
    outside = np.ones(walk.shape, dtype=bool)
    while outside.any():
        left, right = walk[outside] >> np.uint64(half), walk[outside] & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(right, key, turn) & mask)
        walk[outside] = (left << np.uint64(half)) | right
        outside = walk >= n
    return walk.astype(np.int64)


def _mix(x: np.ndarray, key: int, turn: int) -> np.ndarray:
    """splitmix64's finalizer of x under a round key."""
    with np.errstate(over="ignore"):
        z = x + np.uint64((key + turn * 0x9E3779B97F4A7C15) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def eval_batch(corpus: Corpus, tokens: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """The fixed held-out windows of a run, spread evenly over the held-out part, (N, T) each."""
    count = max(1, min(tokens, len(corpus.val) - 1) // seq_len)
    starts = np.linspace(0, len(corpus.val) - 1 - seq_len, count).astype(np.int64)
    return _gather(corpus.val, starts, seq_len)


def _gather(tokens: np.ndarray, starts: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
    rows = np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64)
    both = torch.from_numpy(rows)
    return both[:, :-1], both[:, 1:]
