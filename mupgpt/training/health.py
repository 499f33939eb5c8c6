"""What each kind of parameter does at a step, and what the residual stream carries.

All about parameters is read off the optimizer after its step: weights, the gradients it was given,
AdamW's moments, the group's rate. Nothing is copied beforehand, so it costs a few passes over the
weights on the steps that ask for it, and no memory beside a slice.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed as dist

from mupgpt.model.gpt import GPT
from mupgpt.model.shards import copies, local
from mupgpt.optim.lean import LeanAdamW
from mupgpt.optim.solo import by_kind
from mupgpt.parametrization.table import ParamRow, ParamTable
from mupgpt.training.metrics import HEALTH

__all__ = ["activations", "kind", "measure"]

ADAMW = (torch.optim.AdamW, LeanAdamW)  # whose moments say what the step was
SLICE = 2**24  # elements taken at a time: bounds the temporaries beside a large model


def kind(row: ParamRow) -> str:
    """The name under which a parameter is counted: its role, or ``residual_out``."""
    return "residual_out" if row.residual_out else row.role


@torch.no_grad()
def measure(optimizer: torch.optim.Optimizer, table: ParamTable) -> dict[str, float]:
    """``health/KIND/QUANTITY`` → value, for the step that ``optimizer`` has just taken.

    ``weight_rms``    root mean square of the weights after the step
    ``grad_rms``      of the gradients that the optimizer was given: after clipping
    ``update_rms``    of weights after less weights before, weight decay included
    ``update_ratio``  update_rms / weight_rms
    ``eps_ratio``     ε / √mean(v̂): ε over the RMS of the gradients that AdamW remembers
    ``lost_in_bf16``  share of weights that would have stood still had plain bf16 held them, because
                      the update is below half a unit in the last place (one of 0 is not lost)

    Each is over all elements of a kind, of sharded ones over all processes, which have to call this
    together. The last four follow from AdamW's moments and are there for its parameters only. A
    value that is not finite is left out.
    """
    adamw = {k for k, part in by_kind(optimizer).items() if isinstance(part, ADAMW)}
    sums: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        moments = group.get("optimizer", "adamw") in adamw
        for name, p in zip(group["names"], group["params"], strict=True):
            state = optimizer.state[p] if moments else {}
            more, name = _sums(p, state, group), kind(table.rows[name])
            sums[name] = sums[name] + more if name in sums else more
    totals = _everywhere(torch.stack(list(sums.values()))).tolist()
    values = {
        f"{HEALTH}/{name}/{quantity}": value
        for name, total in zip(sums, totals, strict=True)
        for quantity, value in _quantities(total).items()
    }
    return {key: value for key, value in values.items() if math.isfinite(value)}


def _quantities(total: Sequence[float]) -> dict[str, float]:
    """The quantities of one kind from what `_sums` says of all of it."""
    count, weight, grad, update, seen, lost = total
    return {
        "weight_rms": math.sqrt(weight / count),
        "grad_rms": math.sqrt(grad / count),
        "update_rms": math.sqrt(update / count),
        "update_ratio": math.sqrt(update / weight) if weight else math.inf,
        "eps_ratio": math.sqrt(count / seen) if seen else math.inf,
        "lost_in_bf16": lost / count,
    }


def _sums(p: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
    """Elements, Σ weight², Σ gradient², Σ update², Σ (v̂/ε²) and lost updates of a parameter, (6,).

    Of a parameter that several processes hold alike each gives its share.
    """
    own, weight = local(p), _square(p)
    grad = weight.new_tensor(math.nan) if p.grad is None else _square(p.grad)
    level = torch.stack([weight.new_tensor(own.numel()), weight, grad])
    moved = level.new_full((3,), math.nan)
    if "exp_avg_sq" in state:
        tensors = (own, local(state["exp_avg"]), local(state["exp_avg_sq"]))
        slices = zip(*(t.flatten().split(SLICE) for t in tensors), strict=True)
        step = float(state["step"])
        moved = torch.stack([_moved(w, m, v, step, group) for w, m, v in slices]).sum(0)
    return torch.cat([level, moved]) / copies(p)


def _square(t: Tensor) -> Tensor:
    """Σ t² over this process's elements, () float64."""
    return torch.linalg.vector_norm(local(t), dtype=_wide(t)).double().square()


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _moved(
    weight: Tensor, average: Tensor, square: Tensor, step: float, group: dict[str, Any]
) -> Tensor:
    """Σ update², Σ (v̂/ε²) and the number of lost updates of a slice, (3,) float64.

    AdamW: after = (1 − lr·λ) before − lr·m̂/(√v̂ + ε), here solved for after − before.
    """
    w, m, v = (t.to(_wide(t)) for t in (weight, average, square))
    lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
    seen = v / (1 - beta2**step)
    direction = m / (1 - beta1**step) / (seen.sqrt() + group["eps"])
    update = (direction + decay * w) * (-lr / (1 - lr * decay))
    before = (w - update).bfloat16()
    lost = ((before.to(w.dtype) + update).bfloat16() == before) & (update != 0)
    sums = [x.sum(dtype=torch.float64) for x in (update.square(), seen, lost)]
    return torch.stack([sums[0], sums[1] / group["eps"] ** 2, sums[2]])


@contextmanager
def activations(model: GPT) -> Iterator[dict[str, float]]:
    """A dict that holds, on leaving, ``health/act/PROBE`` → RMS of all that has passed ``model``.

    ``emb`` is the input of the first block, ``residual`` the stream after the last one. Both are
    borders of blocks, which stay in place however a block is sharded, compiled or recomputed.
    """
    seen: dict[str, Tensor] = {}

    def note(probe: str, x: Tensor) -> None:
        square = _square(x.detach())
        more = torch.stack([square.new_tensor(x.numel()), square])
        seen[probe] = seen[probe] + more if probe in seen else more

    handles = [
        model.blocks[0].register_forward_pre_hook(lambda _, args: note("emb", args[0])),
        model.blocks[-1].register_forward_hook(lambda _, __, out: note("residual", out)),
    ]
    found: dict[str, float] = {}
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for probe, (count, square) in zip(
        seen, _everywhere(torch.stack(list(seen.values()))).tolist(), strict=True
    ):
        found[f"{HEALTH}/act/{probe}"] = math.sqrt(square / count)


def _everywhere(sums: Tensor) -> Tensor:
    """Sums over all processes."""
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums
