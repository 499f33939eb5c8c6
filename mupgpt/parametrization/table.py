"""The table: one row per parameter, one per named point of the forward. Everything reads it."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mupgpt.config.schema import Base, GPTConfig, HParams
from mupgpt.errors import ConfigError, unknown
from mupgpt.parametrization.layout import ParamSpec, layout
from mupgpt.parametrization.rules import Rule, get_rule
from mupgpt.parametrization.words import MODEL_QUANTITIES, Optimizer, Point, Power
from mupgpt.util.text import align, number

__all__ = ["Multiplier", "ParamRow", "ParamTable", "parametrize", "parametrize_layout"]

TUNED: dict[Point, str] = {
    "emb": "emb_mult",
    "attn": "attn_mult",
    "residual.attn": "residual_mult",
    "residual.mlp": "residual_mult",
    "readout": "output_mult",
}
"""Point of the forward → the hyperparameter that its multiplier starts from."""


@dataclass(frozen=True, kw_only=True)
class ParamRow:
    """What initialization and optimizer do with one parameter, and why."""

    name: str
    site: str
    role: str
    residual_out: bool
    shape: tuple[int, ...]
    optimizer: Optimizer
    """What turns its gradients into steps."""
    init: str
    """``normal``, ``truncated`` (at ±2σ), ``zeros`` or ``ones``."""
    init_std: float
    lr: float
    weight_decay: float
    eps: float
    """Adam's ε; 0 where another optimizer has none."""
    why: str

    @property
    def lr_wd(self) -> float:
        """Fraction by which one step at the peak shrinks the weight."""
        return self.lr * self.weight_decay


@dataclass(frozen=True)
class Multiplier:
    """The factor at one named point of the forward, and why."""

    value: float
    why: str


@dataclass(frozen=True, kw_only=True)
class ParamTable:
    """A parametrization applied to one shape: plain data, and all that other code knows of µP."""

    rule: str
    betas: tuple[float, float]
    params: tuple[ParamRow, ...]
    multipliers: Mapping[str, Multiplier]

    @functools.cached_property
    def rows(self) -> dict[str, ParamRow]:
        """Rows by parameter name."""
        return {row.name: row for row in self.params}

    def site(self, site: str) -> ParamRow:
        """The row that all layers at ``site`` share (its name is the first layer's).

        Raises `ConfigError` for a site that no parameter has, with the nearest one.
        """
        for row in self.params:
            if row.site == site:
                return row
        raise unknown("site", site, {row.site for row in self.params})

    def sites(self) -> Iterator[tuple[ParamRow, int]]:
        """Each site's row once, with the number of layers that share it."""
        count: dict[str, int] = {}
        for row in self.params:
            count[row.site] = count.get(row.site, 0) + 1
        seen: set[str] = set()
        for row in self.params:
            if row.site not in seen:
                seen.add(row.site)
                yield row, count[row.site]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: ``params`` (a list of rows), ``multipliers`` (name → factor), their whys."""
        return {
            "rule": self.rule,
            "betas": list(self.betas),
            "params": [asdict(row) for row in self.params],
            "multipliers": {name: m.value for name, m in self.multipliers.items()},
            "multipliers_why": {name: m.why for name, m in self.multipliers.items()},
        }

    def lines(self, markdown: bool = False) -> list[str]:
        """The table as text: one site a line, then the forward's multipliers, each with its why."""
        points = [(name, number(m.value), m.why) for name, m in self.multipliers.items()]
        rows = align([HEADER, *(_cells(*site) for site in self.sites())], RIGHT, markdown)
        return [*rows, "", *align([("forward", "×", "why"), *points], {1}, markdown)]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def diff(self, other: Mapping[str, Any], rtol: float = 1e-9) -> list[str]:
        """Differences from another table's `to_dict`, one readable line each; empty when equal."""
        mine, lines = self.to_dict(), []
        ours = {row["name"]: row for row in mine["params"]}
        theirs = {row["name"]: row for row in other["params"]}
        for name in sorted(ours.keys() ^ theirs.keys()):
            lines.append(f"{name}: only in {'this' if name in ours else 'the other'} table")
        both = [name for name in ours if name in theirs]
        keys = ("init_std", "lr", "weight_decay", "eps", "init", "shape", "optimizer")
        pairs: list[tuple[str, Any, Any]] = [(name, ours[name], theirs[name]) for name in both]
        pairs.append(("multipliers", mine["multipliers"], other["multipliers"]))
        pairs.append(("table", {"betas": mine["betas"]}, {"betas": other["betas"]}))
        for name, a, b in pairs:
            for key in keys if name in ours else a:
                if not _same(a[key], b.get(key), rtol):
                    lines.append(f"{name}: {key} {_show(a[key])} here, {_show(b.get(key))} there")
        return lines


HEADER = ("site", "×", "role", "shape", "init", "std", "lr", "wd", "lr·wd", "eps", "why")
RIGHT = {1, 5, 6, 7, 8, 9}


def _cells(row: ParamRow, layers: int) -> tuple[str, ...]:
    return (
        row.site,
        str(layers) if layers > 1 else "",
        row.role + (" → residual" if row.residual_out else ""),
        "×".join(map(str, row.shape)),
        row.init,
        *map(number, (row.init_std, row.lr, row.weight_decay, row.lr_wd, row.eps)),
        row.why,
    )


def _same(a: Any, b: Any, rtol: float) -> bool:
    if isinstance(a, float) and isinstance(b, float | int):
        return math.isclose(a, b, rel_tol=rtol, abs_tol=0.0)
    return (list(a) if isinstance(a, tuple) else a) == (list(b) if isinstance(b, tuple) else b)


def _show(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def parametrize(model: GPTConfig, base: Base, hparams: HParams, rule: str | Rule) -> ParamTable:
    """The table of ``model`` when ``hparams`` were tuned at ``base`` under ``rule``.

    Under ``cerebras`` this is Cerebras-GPT's appendix G (arXiv 2304.03208):

    >>> model = GPTConfig(n_layer=40, d_model=5120, n_head=40, vocab_size=50257, seq_len=2048)
    >>> base = Base(d_model=256, d_ffn=1024, n_head=4, d_head=64, n_kv_head=4, n_layer=24)
    >>> table = parametrize(model, base, HParams(), "cerebras")
    >>> row = table.site("blocks.*.mlp.down.weight")
    >>> f"{row.lr:.1e} {row.init_std:.3f} {table.multipliers['readout'].value}"
    '3.0e-04 0.002 0.05'
    """
    quantities = {
        "m_d": model.d_model / base.d_model,
        "m_L": model.n_layer / base.n_layer,
        "m_dh": model.d_head / base.d_head,
        "d_head": float(model.d_head),
        "2L": 2.0 * model.n_layer,
    }
    return parametrize_layout(layout(model), layout(model, base), quantities, hparams, rule)


def parametrize_layout(
    target: Sequence[ParamSpec],
    base: Sequence[ParamSpec],
    quantities: Mapping[str, float],
    hparams: HParams,
    rule: str | Rule,
) -> ParamTable:
    """The table of any layout: a row for each spec of ``target``, in order.

    ``base`` has every site of ``target`` at the base. ``quantities`` are those of the model, all
    ratios to the base but for ``d_head`` and ``2L``; one that ``rule`` does not use may be left
    out. Raises `ConfigError` for a quantity that is unknown or missing, and for an unknown site.
    """
    rule = get_rule(rule)
    _check_quantities(quantities, rule)
    by_site = {spec.site: spec for spec in base}
    rows: dict[str, ParamRow] = {}
    params = []
    for spec in target:
        if spec.site not in by_site:
            raise unknown("site of the base", spec.site, by_site)
        if spec.site not in rows:
            rows[spec.site] = _row(spec, by_site[spec.site], quantities, hparams, rule)
        site_row = rows[spec.site]
        params.append(replace(site_row, name=spec.name))
    return ParamTable(
        rule=rule.name,
        betas=(hparams.beta1, hparams.beta2),
        params=tuple(params),
        multipliers=_multipliers(quantities, hparams, rule),
    )


def _check_quantities(quantities: Mapping[str, float], rule: Rule) -> None:
    for name in quantities:
        if name not in MODEL_QUANTITIES:
            raise unknown("quantity of the model", name, MODEL_QUANTITIES)
    for name in MODEL_QUANTITIES:
        if name in rule.quantities and name not in quantities:
            raise ConfigError(f"quantities: rule {rule.name!r} needs {name}; give it")


def _row(
    spec: ParamSpec,
    base: ParamSpec,
    quantities: Mapping[str, float],
    hparams: HParams,
    rule: Rule,
) -> ParamRow:
    q = {
        **quantities,
        "m_in": spec.fan_in / base.fan_in,
        "m_out": spec.fan_out / base.fan_out,
        "m_rho": spec.density / base.density,
    }
    std = [rule.init_std.get(spec.role, {}), rule.residual_out_std if spec.residual_out else {}]
    lr = [rule.lr.get(spec.role, {}), rule.block_lr if spec.in_block else {}]
    wd = rule.weight_decay.get(spec.role, {})
    eps = [rule.eps, rule.block_eps if spec.in_block else {}]
    lr_mult = getattr(hparams, f"lr_mult_{spec.role}")
    decayed = hparams.weight_decay if spec.role in rule.decayed else 0.0
    random = spec.constant is None
    optimizer = _optimizer(spec, rule)
    why = [
        optimizer if rule.optimizer != "adamw" else "",
        _why("std", *std, q=q) if random else "",
        _why("lr", *lr, q=q, extra=lr_mult),
        _why("wd", wd, q=q) if decayed else "",
        _why("eps", *eps, q=q) if optimizer == "adamw" else "",
    ]
    return ParamRow(
        name=spec.name,
        site=spec.site,
        role=spec.role,
        residual_out=spec.residual_out,
        shape=tuple(int(n) for n in spec.shape),
        optimizer=optimizer,
        init=_init_kind(spec, rule),
        init_std=_scaled(hparams.init_std, *std, q=q) if random else 0.0,
        lr=_scaled(hparams.lr * lr_mult, *lr, q=q),
        weight_decay=_scaled(decayed, wd, q=q),
        eps=_scaled(hparams.eps, *eps, q=q) if optimizer == "adamw" else 0.0,
        why="; ".join(w for w in why if w) or "as at the base",
    )


def _optimizer(spec: ParamSpec, rule: Rule) -> Optimizer:
    """The rule's; but Muon takes hidden matrices only."""
    return "adamw" if rule.optimizer == "muon" and spec.role != "hidden" else rule.optimizer


def _init_kind(spec: ParamSpec, rule: Rule) -> str:
    if spec.constant is None:
        return "truncated" if rule.truncated else "normal"
    return "ones" if spec.constant else "zeros"


def _multipliers(
    quantities: Mapping[str, float], hparams: HParams, rule: Rule
) -> dict[str, Multiplier]:
    table: dict[str, Multiplier] = {}
    for point, name in TUNED.items():
        power = rule.forward.get(point, {})
        factors = " ".join(_factor(k, e, quantities[k]) for k, e in power.items())
        why = f"{name} {factors}".strip()
        if point == "attn":
            why += ", on q before q·k/√d_head"
        table[point] = Multiplier(_scaled(getattr(hparams, name), power, q=quantities), why)
    return table


def _scaled(start: float, *powers: Power, q: Mapping[str, float]) -> float:
    for power in powers:
        for key, exponent in power.items():
            start *= q[key] ** exponent
    return start


def _why(label: str, *powers: Power, q: Mapping[str, float], extra: float = 1.0) -> str:
    factors = [_factor(k, e, q[k]) for power in powers for k, e in power.items()]
    if extra != 1.0:
        factors.insert(0, f"×{extra:.4g}")
    return f"{label} {' '.join(factors)}" if factors else ""


def _factor(key: str, exponent: float, value: float) -> str:
    """A power in words: ``÷√20 (m_in)``."""
    sign = "÷" if exponent < 0 else "×"
    size = abs(exponent)
    number = f"{value:.4g}"
    body = {1.0: number, 0.5: f"√{number}"}.get(size, f"{number}^{size:g}")
    return f"{sign}{body} ({key})"
