"""Sampling from a trained run, through the same forward that trained it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mupgpt.checkpoint.state import load_model
from mupgpt.checkpoint.verify import load_newest
from mupgpt.data.tokenizers import ENCODERS, EOT, gpt2_encoding
from mupgpt.errors import ConfigError, require
from mupgpt.model.gpt import GPT, Cache
from mupgpt.parametrization.table import parametrize
from mupgpt.resolve import train_config

__all__ = ["decode", "encode_prompt", "load_run", "sample"]


def load_run(
    folder: Path | str, context: int = 0, alibi_scaling: float | None = None
) -> tuple[GPT, str]:
    """The model of a run's newest good checkpoint, table applied, and its tokenizer.

    ``context`` and ``alibi_scaling`` replace `GPTConfig.seq_len` and `GPTConfig.alibi_scaling`, to
    read longer contexts than the run was trained on.
    """
    checkpoint = load_newest(Path(folder) / "checkpoints", set_aside=False)
    if checkpoint is None:
        raise ConfigError(f"{folder} has no checkpoint; train there first: mupgpt train …")
    config = train_config(checkpoint.manifest["config"])
    ends = config.model.positions == "learned" and context
    require(not ends, "context", context, "be left out: learned positions end where they end")
    shape = replace(
        config.model,
        seq_len=context or config.model.seq_len,
        alibi_scaling=config.model.alibi_scaling if alibi_scaling is None else alibi_scaling,
    )
    model = GPT(shape)
    load_model(model, checkpoint)
    model.apply_table(parametrize(shape, config.base, config.hparams, config.rule))
    return model.eval(), config.data.tokenizer


@torch.no_grad()
def sample(
    model: GPT,
    prompt: Tensor,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    eot: int | None = None,
) -> Iterator[int]:
    """Tokens that continue ``prompt`` (T), one at a time, until ``max_tokens`` or ``eot``.

    ``temperature`` 0 takes the most likely token; ``top_k`` keeps that many (0: all). A context
    that is full is cut to its second half and read again.
    """
    require(temperature == 0 or temperature >= 1e-3, "temperature", temperature, "be 0 or >= 1e-3")
    require(top_k >= 0, "top_k", top_k, "be >= 0 (0 keeps all)")
    require(max_tokens >= 0, "max_tokens", max_tokens, "be >= 0")
    generator = torch.Generator().manual_seed(seed)
    limit = model.config.seq_len
    history, cache, fresh = prompt.tolist()[-limit:], Cache(), prompt[-limit:]
    for _ in range(max_tokens):
        if cache.length + len(fresh) > limit:
            history = history[-limit // 2 :]
            cache, fresh = Cache(), torch.tensor(history)
        logits = model(fresh[None], cache=cache)[0, -1].double()
        token = _pick(logits, temperature, top_k, generator)
        if token == eot:
            return
        yield token
        history.append(token)
        fresh = torch.tensor([token])


def _pick(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        floor = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def encode_prompt(text: str, tokenizer: str) -> Tensor:
    """The prompt's tokens (T); an empty prompt is the end-of-text token."""
    tokens = ENCODERS[tokenizer](text.encode()).astype("int64") if text else [EOT[tokenizer]]
    return torch.as_tensor(tokens)


def decode(tokens: list[int], tokenizer: str) -> str:
    """The text of tokens; what is no text is left out."""
    if tokenizer == "bytes":
        return bytes(t for t in tokens if t < 256).decode("utf-8", errors="replace")
    return gpt2_encoding().decode([t for t in tokens if t < EOT["gpt2"]])
