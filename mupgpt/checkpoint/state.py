"""The state of a run as named tensors, to and from checkpoints of any number of processes."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mupgpt.checkpoint.reader import Checkpoint
from mupgpt.errors import ConfigError
from mupgpt.model.gpt import GPT

__all__ = ["load_model", "load_optimizer", "state_groups"]


def state_groups(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds: ``model``, weights and masks by name; ``optimizer``, moments by
    KEY.NAME.

    Raises ConfigError for an optimizer (of the user's own) that keeps something else: continued, it
    would silently be another run.
    """
    moments: dict[str, Tensor] = {}
    for name, p in _named(optimizer):
        for key, value in optimizer.state[p].items():
            if key == "step" and isinstance(value, Tensor):
                continue  # the checkpoint's own
            if not isinstance(value, Tensor) or value.shape != p.shape:
                raise ConfigError(
                    f"optimizers: {key!r} of {name} is {_shown(value)}; must be a tensor of the "
                    "parameter's shape (or the number of steps, a tensor called 'step'): a "
                    "checkpoint keeps no other state"
                )
            moments[f"{key}.{name}"] = value
    return {"model": _state(model), "optimizer": moments}


def _shown(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def load_model(model: GPT, checkpoint: Checkpoint) -> None:
    """Fill ``model``, whole or sharded; names and shapes must agree exactly."""
    checkpoint.load("model", _state(model))


def load_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Give an optimizer that has not stepped yet the moments of ``checkpoint``, and its step."""
    params = dict(_named(optimizer))
    for p in params.values():
        optimizer.state[p]["step"] = torch.tensor(float(checkpoint.step), device=p.device)
    moments: dict[str, Tensor] = {}
    for entry, dtype in checkpoint.dtypes("optimizer").items():
        key, _, name = entry.partition(".")
        moments[entry] = torch.empty_like(params[name], dtype=dtype)
        optimizer.state[params[name]][key] = moments[entry]
    checkpoint.load("optimizer", moments)


def _state(model: GPT) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **model.masks()}


def _named(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)
