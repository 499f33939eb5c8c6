"""One GPT, for one model or for K members of one shape."""

from mupgpt.model.gpt import GPT
from mupgpt.model.init import init_weights

__all__ = ["GPT", "init_weights"]
