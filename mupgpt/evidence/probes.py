"""What a coordinate check measures: the root mean square of everything that a rule scales."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mupgpt.config.schema import GPTConfig
from mupgpt.model.gpt import GPT, Cache
from mupgpt.model.init import init_weights
from mupgpt.model.losses import token_loss
from mupgpt.optim.make import make_optimizer
from mupgpt.parametrization.table import ParamRow, ParamTable
from mupgpt.training.step import Batch, train_step

__all__ = ["Backend", "Measures", "activations", "generation_gap", "measure"]

SEQUENCES = 2
"""Sequences of a batch: a handful of tokens, so that widths exceed their number."""
Backend = str | Callable[..., Any] | None
"""A backend of torch.compile; None compiles nothing."""
Measures = dict[tuple[str, str], Tensor]
"""(measure, probe) → RMS of each member, (K)."""


def measure(
    shape: GPTConfig,
    table: ParamTable,
    seeds: Sequence[int],
    *,
    steps: int,
    backend: Backend = None,
) -> tuple[Measures, float]:
    """All measures of one shape with one member a seed, and the model's `generation_gap`.

    ``weights`` and ``init`` are levels before training; ``gradient``, ``step``, ``rate`` and
    ``damping`` belong to the first step; ``change`` and ``update`` are differences over all steps,
    of activations and of weights. Every step sees the same batch.
    """
    model = GPT(shape, members=len(seeds))
    init_weights(model, table, list(seeds))
    if backend is not None:
        torch.compiler.reset()  # all models share one code object, and its cache is small
        model.compile(backend=backend)
    optimizer = make_optimizer(model, table)
    batch = random_batch(shape, seeds, SEQUENCES)

    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    init = activations(model, batch)
    measures = _by_role("weights", start.items(), table) | _rms("init", init)
    for step in range(steps):
        train_step(model, optimizer, batch, lr_factor=1.0, grad_clip=0.0)
        if step == 0:
            measures |= _by_role("gradient", _gradients(model), table)
            measures |= _by_role("step", _moved(model, start), table)
            measures |= _by_role("damping", _damping(model, table), table)
            measures |= _rate(measures)
    end = activations(model, batch)
    measures |= _rms("change", {probe: end[probe] - init[probe] for probe in end})
    measures |= _by_role("update", _moved(model, start), table)
    return measures, generation_gap(model, batch)


def random_batch(shape: GPTConfig, seeds: Sequence[int], sequences: int) -> Batch:
    """Uniformly random tokens and targets, (K, B, T), that depend on seed and context alone."""
    drawn = [
        torch.randint(
            shape.vocab_size,
            (sequences, shape.seq_len + 1),
            generator=torch.Generator().manual_seed(seed),
            device="cpu",  # the same tokens wherever the models are
        )
        for seed in seeds
    ]
    tokens = torch.stack(drawn).to(torch.get_default_device())
    return tokens[..., :-1], tokens[..., 1:]


@torch.no_grad()
def activations(model: GPT, batch: Batch) -> dict[str, Tensor]:
    """Probe → its values in the training forward, (K, n), all layers of one matmul together.

    The forward is the eager one, whatever has been compiled: a compiled one skips hooks, and the
    weights are what the compiled steps have made of them. ``logits`` leaves out the logit of the
    input token itself, with which a tied head is aligned from the start.
    """
    tokens, targets = batch
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(
            lambda _module, _args, out, probe=probe: seen.setdefault(probe, []).append(out)
        )
        for probe, module in _probed(model)
    ]
    first_block = model.blocks[0]
    handles.append(
        first_block.register_forward_pre_hook(lambda _module, args: seen.update(emb=[args[0]]))
    )
    try:
        with _Scores(model.config.d_head) as scores:
            model.forward(tokens, targets)
    finally:
        for handle in handles:
            handle.remove()
    seen["scores"] = scores.seen
    stream = [*seen["emb"], *(seen[probe][0] for probe in seen if probe.startswith("residual."))]
    seen["branch"] = [after - before for before, after in itertools.pairwise(stream)]
    seen["logits"] = [seen["logits"][0].scatter(-1, tokens.unsqueeze(-1), 0.0)]
    return {
        probe: torch.cat([value.reshape(len(tokens), -1) for value in values], dim=1)
        for probe, values in seen.items()
    }


def _probed(model: GPT) -> Iterator[tuple[str, nn.Module]]:
    yield "logits", model.head
    last = len(model.blocks) - 1
    for i, block in enumerate(model.blocks):
        for name in ("q", "k", "v", "o"):
            yield name, block.get_submodule(f"attn.{name}")
        for name, module in block.get_submodule("mlp").named_children():
            yield "up" if name == "gate" else name, module
        yield f"residual.{'last' if i == last else i}", block


class _Scores(TorchFunctionMode):
    """Keeps the causal attention logits of each layer, as the fused kernel computes them."""

    def __init__(self, d_head: int) -> None:
        super().__init__()
        self.d_head = d_head  # what follows in q and k says where tokens stand
        self.seen: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k = (x[..., : self.d_head] for x in args[:2])  # (K·B, H, T, E)
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            factor = kwargs.get("scale") or self.d_head**-0.5
            self.seen.append((q @ k.mT * factor).tril())
        return func(*args, **kwargs)


def _rms(measure: str, values: Mapping[str, Tensor]) -> Measures:
    return {(measure, probe): value.square().mean(1).sqrt() for probe, value in values.items()}


def _by_role(measure: str, values: Iterable[tuple[str, Tensor]], table: ParamTable) -> Measures:
    """RMS over all parameters of a role, hidden matrices and norms in the kinds that differ."""
    squares: dict[str, Tensor] = {}
    count: dict[str, int] = {}
    for name, value in values:
        if name.endswith("attn.k.bias"):
            continue  # softmax does not see it: its gradient is rounding noise
        kind = _kind(table.rows[name])
        squares[kind] = value.square().flatten(1).sum(1) + squares.get(kind, 0.0)
        count[kind] = value[0].numel() + count.get(kind, 0)
    return {(measure, kind): (squares[kind] / count[kind]).sqrt() for kind in squares}


def _kind(row: ParamRow) -> str:
    if row.name.endswith(("attn.q.weight", "attn.k.weight")):
        return "qk"
    if row.name.startswith("ln_f"):
        return "norm.final"
    if row.name.endswith(("q_norm.weight", "k_norm.weight")):
        return "norm.qk"
    return "residual_out" if row.residual_out else row.role


def _gradients(model: GPT) -> Iterator[tuple[str, Tensor]]:
    return ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)


def _moved(model: GPT, start: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name, p.detach() - start[name]) for name, p in model.named_parameters())


def _damping(model: GPT, table: ParamTable) -> Iterator[tuple[str, Tensor]]:
    """√v/(√v + ε) of Adam's weights at the first step, where √v = |gradient|: what ε leaves."""
    for name, grad in _gradients(model):
        row = table.rows[name]
        if row.optimizer == "adamw":
            yield name, grad.abs() / (grad.abs() + row.eps)


def _rate(measures: Measures) -> Measures:
    """Step over gradient."""
    kinds = [kind for measure, kind in measures if measure == "step"]
    return {("rate", k): measures["step", k] / measures["gradient", k] for k in kinds}


@torch.no_grad()
def generation_gap(model: GPT, batch: Batch) -> float:
    """Largest difference, in nats, that generating forwards make to the loss of a token.

    The training forward gets targets; generation gets none, and reads its context piecewise
    through a cache.
    """
    tokens, targets = batch
    cache = Cache()
    pieces = tokens.split(max(1, tokens.shape[-1] // 2), dim=-1)
    cached = torch.cat([model.forward(piece, cache=cache) for piece in pieces], dim=-2)
    trained = model(tokens, targets)
    return max(
        float((token_loss(logits, targets) - trained).abs().max())
        for logits in (model.forward(tokens), cached)
    )
