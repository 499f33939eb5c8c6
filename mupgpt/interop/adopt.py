"""Your own module under a rule: its table, initial weights and optimizer groups, all by name.

The rule's forward multipliers are folded into the weights (`mupgpt.interop.fold`), so nothing is
attached to the module and its forward is not touched. What belongs to a parameter is looked up by
its name whenever it is asked for: a copy, a compiled or sharded module and a loaded checkpoint are
like any other.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mupgpt.config.schema import HParams
from mupgpt.errors import ConfigError, require
from mupgpt.interop.describe import read
from mupgpt.interop.fold import CONSTANTS, Load, factors, fold
from mupgpt.interop.forward import depths, loads, readout_ratio
from mupgpt.interop.modules import is_norm, named, unwrapped
from mupgpt.interop.reading import Reading
from mupgpt.model.init import fill
from mupgpt.model.shards import piece
from mupgpt.optim.groups import param_groups
from mupgpt.optim.make import make_optimizer
from mupgpt.parametrization.layout import ParamSpec
from mupgpt.parametrization.rules import Rule, get_rule
from mupgpt.parametrization.table import ParamRow, ParamTable, parametrize_layout

__all__ = ["Adopted", "adopt"]

HeadWidth = Callable[[nn.Module], float]
HEAD_WIDTHS = ("head_dim", "d_head", "head_size", "attention_head_size")
"""Attributes in which attention modules commonly keep the width of a head."""


@dataclass(frozen=True, kw_only=True)
class Adopted:
    """A kind of module under a rule, as `adopt` returns it; each ``model`` is a module of it.

    >>> mlp = lambda d: nn.Sequential(nn.Linear(7, d), nn.ReLU(), nn.Linear(d, 3))
    >>> adopted = adopt(mlp, base=64, delta=128)
    >>> model = adopted.build(256, seed=0)
    >>> [len(group["names"]) for group in adopted.param_groups(model)]
    [1, 1, 1, 1]
    """

    model_fn: Callable[[Any], nn.Module]
    rule: Rule
    hparams: HParams
    reading: Reading
    base: Sequence[ParamSpec]
    """The base's parameters."""
    d_head: HeadWidth | None
    base_d_head: float

    def build(self, size: Any, seed: int = 0) -> nn.Module:
        """``model_fn(size)`` with its initial weights."""
        model = self.model_fn(size)
        self._check_norms(model)
        self.init_weights(model, seed)
        return model

    @torch.no_grad()
    def init_weights(self, model: nn.Module, seed: int = 0) -> None:
        """Fill every parameter, whole or sharded; a number depends on seed, name and place alone.

        A module that was made on the meta device comes here after ``to_empty``, which leaves its
        buffers without values and its shared weights apart.
        """
        rows = self.table(model).rows
        for name, p in named(model).items():
            _fill(p, rows[name], seed)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer that the rule names, over `param_groups`; made after sharding."""
        return make_optimizer(model, self._with_names_of(model))

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Groups for an optimizer of your own, of the kind that the rule names."""
        return param_groups(model, self._with_names_of(model))

    def table(self, model: nn.Module) -> ParamTable:
        """What holds for every parameter of ``model``, which may be on the meta device.

        Raises `ConfigError` where it is not of this kind, or where something must be declared.
        """
        return fold(*self._unfolded(model))

    def carried(self, model: nn.Module) -> dict[str, float]:
        """Name → the forward multipliers that the parameter carries, as one factor."""
        return factors(*self._unfolded(model))

    def _unfolded(self, model: nn.Module) -> tuple[ParamTable, dict[str, Load]]:
        specs = self.reading.specs(model)
        before, now = depths(self.reading, self.base, specs)
        quantities = {
            "m_d": readout_ratio(self.reading, specs),
            "m_L": now / before,
            "2L": 2.0 * now,
            "m_dh": 1.0,
        }
        if self.d_head is not None:
            d_head = float(self.d_head(unwrapped(model)))
            quantities |= {"d_head": d_head, "m_dh": d_head / self.base_d_head}
        table = parametrize_layout(specs, self.base, quantities, self.hparams, self.rule)
        attn, mlp = (table.multipliers[f"residual.{branch}"].value for branch in ("attn", "mlp"))
        require(
            attn == mlp, "residual.mlp", mlp, f"be residual.attn's {attn:g}: branches are alike"
        )
        return table, loads(self.reading, specs)

    def _with_names_of(self, model: nn.Module) -> ParamTable:
        """The table under the names that parameters have in a ``model`` that may be wrapped."""
        table = self.table(model)
        now = (name for name, _ in model.named_parameters())
        pairs = zip(named(model), now, strict=True)
        return replace(table, params=tuple(replace(table.rows[n], name=name) for n, name in pairs))

    def _check_norms(self, model: nn.Module) -> None:
        """A norm that does not start at gain 1 multiplies by something else than its gain."""
        for spec in self.reading.specs(model):
            p, owner = model.get_parameter(spec.name), spec.name.rpartition(".")[0]
            if spec.role == "norm" and is_norm(model.get_submodule(owner)) and not p.is_meta:
                first = float(p.detach().reshape(-1)[0])
                if first != spec.constant:
                    raise ConfigError(
                        f"{spec.name} starts at {first:g} in its constructor, not at "
                        f'{spec.constant:g}; if it is an offset, roles={{"{spec.site}": "bias"}} '
                        "starts it at 0"
                    )


def adopt(
    model_fn: Callable[[Any], nn.Module],
    *,
    base: Any,
    delta: Any,
    rule: str | Rule = "mup",
    hparams: HParams | None = None,
    roles: Mapping[str, str] | None = None,
    d_head: HeadWidth | None = None,
) -> Adopted:
    """``rule`` for your own module: tables, initial weights and optimizers of every size of it.

    ``model_fn`` makes the module of a size: of a width, a config, or whatever it takes. ``base`` is
    the size at which ``hparams`` hold; ``delta`` differs from it in everything that is width, and
    in nothing else: one vocabulary, one context, one depth. Both are made on the meta device where
    the constructor allows it.

    ``roles`` declares what classes do not say: pattern (as a shell's) of parameter or module → a
    role (``input hidden output bias norm``) or a place in the forward. ``residual_out`` is a module
    that writes into the residual stream (÷√(2L) under ``mup``, and residual multipliers), ``query``
    one that makes queries alone (needed where their multiplier is not 1), ``final_norm`` the norm
    with a gain in front of a tied head. Layers are ``*`` in names: ``layers.*.mlp.down_proj``.
    ``d_head`` gives the width of a head of a module, and is needed where it grows.

    Matrices start normal, biases at 0, norms at gain 1, whatever the constructor did. Your forward
    must not have multipliers of its own that depend on width, but for q·k/√d_head.

    >>> mlp = lambda d: nn.Sequential(nn.Linear(7, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU(),
    ...                               nn.Linear(d, 3))
    >>> adopted = adopt(mlp, base=64, delta=128, hparams=HParams(lr=1e-2))
    >>> model = adopted.build(1024)
    >>> optimizer = adopted.optimizer(model)
    >>> row = adopted.table(model).rows["2.weight"]
    >>> row.role, row.lr, row.init_std
    ('hidden', 0.000625, 0.02)

    Raises `ConfigError` for what it cannot know, with the declaration that settles it.
    """
    rule = get_rule(rule)
    small, large = _make(model_fn, base), _make(model_fn, delta)
    reading = read(small, large, roles or {})
    _check_heads(rule, small, large, d_head)
    adopted = Adopted(
        model_fn=model_fn,
        rule=rule,
        hparams=hparams or HParams(),
        reading=reading,
        base=reading.specs(small),
        d_head=d_head,
        base_d_head=float(d_head(small)) if d_head else 1.0,
    )
    adopted.table(large)  # what must be declared is asked for now
    return adopted


def _make(model_fn: Callable[[Any], nn.Module], size: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            return model_fn(size)
    except (RuntimeError, NotImplementedError):  # its constructor looks at values
        return model_fn(size)


def _check_heads(rule: Rule, base: nn.Module, delta: nn.Module, d_head: HeadWidth | None) -> None:
    """Attention is divided by d_head, so one that grows, or that a rule divides by, is declared."""
    attention = rule.forward.get("attn", {})
    remedy = "declare it, as a function of the module: d_head=lambda model: model.config.head_dim"
    if d_head is not None or not attention:
        return
    if "d_head" in attention:
        raise ConfigError(f"d_head: rule {rule.name!r} divides attention scores by it; {remedy}")
    wider = dict(delta.named_modules())
    for name, module in base.named_modules():
        for key in HEAD_WIDTHS:
            sizes = [getattr(m, key, None) for m in (module, wider.get(name))]
            if all(isinstance(size, int) for size in sizes) and sizes[0] != sizes[1]:
                raise ConfigError(
                    f"d_head: {name}.{key} is {sizes[0]} in base and {sizes[1]} in delta; {remedy}"
                )


def _fill(p: Tensor, row: ParamRow, seed: int) -> None:
    """Write initial values into what this process holds of ``p``."""
    part = piece(p)
    data, offset, shape = part.data, part.offset, part.shape
    if row.init not in ("normal", "truncated"):
        data.fill_(CONSTANTS[row.init] if row.init in CONSTANTS else float(row.init))
    elif len(shape) == 2:
        fill(data.unsqueeze(0), [row], [seed], offset, shape)
    else:  # as a matrix: rows are along the first axis, which alone may be cut
        rows, columns = (*data.shape, 1)[0], math.prod(shape[1:])
        flat = data.new_empty(1, rows, columns)
        fill(flat, [row], [seed], ((*offset, 0)[0], 0), ((*shape, 1)[0], columns))
        data.copy_(flat.view(data.shape))
