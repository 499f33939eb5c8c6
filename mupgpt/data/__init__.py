"""Text on this machine to token batches."""

from mupgpt.data.batches import Batches, eval_batch
from mupgpt.data.corpus import Corpus, load_corpus
from mupgpt.data.token_files import read_shard
from mupgpt.data.tokenizers import EOT, VOCAB, encode_bytes

__all__ = [
    "EOT",
    "VOCAB",
    "Batches",
    "Corpus",
    "encode_bytes",
    "eval_batch",
    "load_corpus",
    "read_shard",
]
