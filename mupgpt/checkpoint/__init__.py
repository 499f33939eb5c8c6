"""Verified atomic checkpoints: safetensors and JSON, no pickle, manifest last, then one rename."""

from mupgpt.checkpoint.reader import Checkpoint
from mupgpt.checkpoint.verify import checkpoints, load_newest, verify
from mupgpt.checkpoint.writer import Writer, save
from mupgpt.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Writer",
    "checkpoints",
    "load_newest",
    "save",
    "verify",
]
