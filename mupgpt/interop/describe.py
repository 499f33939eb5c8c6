"""Roles, fans and sites of the parameters of any module, from its classes and two sizes of it.

Width is what differs between two modules that differ in nothing else. What a parameter does to
width follows from its class and from which of its dimensions are width. Where it does not follow it
is declared: nothing is guessed from names or sizes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from mupgpt.errors import ConfigError, unknown
from mupgpt.interop.modules import axes, is_norm, is_table, locate, named, owners, stacks
from mupgpt.interop.mup import base_shapes
from mupgpt.interop.reading import PLACES, Part, Place, Reading, Shape, misfit
from mupgpt.parametrization.layout import ParamSpec
from mupgpt.parametrization.words import ROLES, Role

__all__ = ["describe", "read"]

ROLE_OF: dict[Place, Role] = {"query": "hidden", "residual_out": "hidden", "final_norm": "norm"}
"""The role of a parameter of no known class of which the place alone is declared."""
VECTORS: tuple[Role, ...] = ("bias", "norm")


def describe(
    module: nn.Module,
    *,
    base: nn.Module,
    delta: nn.Module,
    roles: Mapping[str, str] | None = None,
) -> list[ParamSpec]:
    """Every parameter of your own ``module``, in order, as `mupgpt.layout` gives them for our GPT.

    ``base`` and ``delta`` are modules of its kind, on any device, that differ in every width and in
    nothing else; ``roles`` declares what classes do not say, as for `mupgpt.adopt`.

    >>> mlp = lambda d: nn.Sequential(nn.Linear(7, d), nn.ReLU(), nn.Linear(d, 3, bias=False))
    >>> for p in describe(mlp(64), base=mlp(8), delta=mlp(16)):
    ...     print(p.name, p.role, p.fan_in, p.fan_out)
    0.weight input 1 64
    0.bias bias 1 64
    2.weight output 64 1
    """
    return read(base, delta, roles or {}).specs(module)


def read(base: nn.Module, delta: nn.Module, roles: Mapping[str, str]) -> Reading:
    """What base and delta say, with what ``roles`` declares; a `ConfigError` where that is open."""
    layers = frozenset(stacks(base) & stacks(delta))
    small, large = (
        {locate(name, layers)[0]: tuple(p.shape) for name, p in named(module).items()}
        for module in (base, delta)
    )
    if odd := sorted(small.keys() ^ large.keys()):
        where = "base" if odd[0] in small else "delta"
        raise ConfigError(f"{odd[0]} is only in {where}: they must differ in width alone")
    if small == large:
        raise ConfigError("delta: every shape is as in base; give two different widths")
    width = base_shapes(small, large)
    evidence: dict[str, _Evidence] = {}
    for names in owners(base).values():
        site, layer = locate(names[0], layers)
        parents = [name.rpartition(".") for name in names]
        evidence[site] = _Evidence(
            site=site,
            module=site.rpartition(".")[0],
            uses=[(base.get_submodule(parent), key) for parent, _, key in parents],
            base=small[site],
            delta=large[site],
            width=width[site],
            in_layer=layer is not None,
        )
    declared = _declared(roles, evidence)
    parts = {site: found.part(declared[site]) for site, found in evidence.items()}
    _refuse_vocabulary(evidence, parts, declared)
    return Reading(parts, layers, frozenset(s for s, found in evidence.items() if found.is_tied))


@dataclass(frozen=True, kw_only=True)
class _Evidence:
    """All that tells the role of the parameters at one site."""

    site: str
    module: str
    uses: Sequence[tuple[nn.Module, str]]
    """The modules that own one of them, each with its name there."""
    base: Shape
    delta: Shape
    width: Any
    in_layer: bool

    @property
    def use(self) -> tuple[nn.Module, str]:
        """The use that decides: that of an embedding, if there is one."""
        return next((use for use in self.uses if is_table(use[0])), self.uses[0])

    @property
    def is_tied(self) -> bool:
        """Whether it is an embedding and something else."""
        return len({is_table(module) for module, _ in self.uses}) == 2

    @property
    def wide(self) -> list[int]:
        """The dimensions that are width; never the rows of an embedding."""
        rows = {0} if is_table(self.use[0]) else set()
        return [i for i, dim in enumerate(self.width) if dim.isinf() and i not in rows]

    def part(self, declared: Sequence[str]) -> Part:
        """What there is to know, with what is declared."""
        places = frozenset(place for place in PLACES if place in declared)
        role = self._role([value for value in ROLES if value in declared], places)
        if "final_norm" in places and role != "norm":
            raise self.odd(f"a {role} is no final_norm", "declare the norm in front of the head")
        if "query" in places and isinstance(self.use[0], nn.MultiheadAttention):
            raise self.odd("its module makes q, k and v at once", "keep d_head and attn_mult = 1")
        shift = "bias" in self.use[1]
        constants: dict[Role, float] = {"bias": 0.0, "norm": 0.0 if shift else 1.0}
        return Part(
            module=self.module,
            role=role,
            places=places,
            shape=self.base,
            width=self.width,
            constant=constants.get(role),
            **self._axes(role),
        )

    def _role(self, declared: list[Role], places: frozenset[Place]) -> Role:
        if len(declared) > 1:
            raise self.odd(f"roles says {' and '.join(declared)} of it", "declare one")
        vector = self._vector()
        if vector and not (declared and declared[0] in VECTORS):
            return vector  # a module's bias stays one, whatever is declared of its weight
        role = next(iter(declared), None) or self._matrix()
        if role is None and places:
            role = ROLE_OF[next(iter(places))]
        if role is None:
            raise self.odd("its class does not say its role", self.remedy("hidden"))
        return role

    def _vector(self) -> Role | None:
        if len(self.base) != 1:
            return None
        module, key = self.use
        return "norm" if is_norm(module) else "bias" if "bias" in key else None

    def _matrix(self) -> Role | None:
        """What its class makes it; None where the class is not known."""
        uses = [self.use] if is_table(self.use[0]) else self.uses
        found = {self._of_class(*use) for use in uses}
        if len(found) > 1:
            what = f"modules that share it make it {' and '.join(sorted(map(str, found)))}"
            raise self.odd(what, self.remedy("hidden"))
        return found.pop()

    def _of_class(self, module: nn.Module, key: str) -> Role | None:
        known = axes(module, key)
        if known is None:
            return None
        out, into = (axis in self.wide for axis in known)
        role: Role = "input" if is_table(module) or (out and not into) else "hidden"
        if into and not out:
            role = "output"
        if role != "hidden" and self.in_layer:
            what = f"only its fan-{'out' if out else 'in'} is width, inside a layer"
            raise self.odd(what, self.remedy("hidden", role))
        return role

    def _axes(self, role: Role) -> dict[str, Any]:
        known = axes(*self.use)
        if known is not None and role not in VECTORS:
            out, into = (axis if axis in self.wide else None for axis in known)
            return {
                "out": None if role == "output" else out,
                "into": None if role == "input" else into,
            }
        if role == "hidden" and len(self.wide) == 2:
            return {"out": self.wide[0], "into": self.wide[1], "loose": True}
        if len(self.wide) > (role != "hidden"):
            what = f"{len(self.wide)} of its dimensions are width: which one does it sum over?"
            raise self.odd(what, "make it the weight of an nn.Linear")
        axis = self.wide[0] if self.wide else None
        return {"into" if role == "output" else "out": axis}

    def remedy(self, *roles: str) -> str:
        """What to declare."""
        return "declare " + " or ".join(f'roles={{"{self.site}": "{role}"}}' for role in roles)

    def odd(self, what: str, remedy: str) -> ConfigError:
        """The error that names it."""
        return misfit(self.site, {"base": self.base, "delta": self.delta}, what, remedy)


def _declared(roles: Mapping[str, str], evidence: Mapping[str, _Evidence]) -> dict[str, list[str]]:
    """Site → all that is declared of it or of its module; a pattern that serves nowhere fails."""
    found: dict[str, list[str]] = {site: [] for site in evidence}
    for pattern, value in roles.items():
        if value not in (*ROLES, *PLACES):
            raise unknown("role", value, (*ROLES, *PLACES))
        served = [
            site
            for site, seen in evidence.items()
            if fnmatchcase(site, pattern) or fnmatchcase(seen.module, pattern)
        ]
        if not served:
            known = {name for site, seen in evidence.items() for name in (site, seen.module)}
            raise unknown("parameter or module in roles", pattern, known)
        for site in served:
            found[site].append(value)
    return found


def _refuse_vocabulary(
    evidence: Mapping[str, _Evidence],
    parts: Mapping[str, Part],
    declared: Mapping[str, Sequence[str]],
) -> None:
    """A readout whose rows grew with the vocabulary looks like a hidden matrix."""
    rows = {(seen.base[0], seen.delta[0]) for seen in evidence.values() if is_table(seen.use[0])}
    for site, seen in evidence.items():
        if parts[site].role == "hidden" and "hidden" not in declared[site] and seen.base:
            sizes = (seen.base[0], seen.delta[0])
            if sizes[0] != sizes[1] and sizes in rows:
                what = "it has as many rows as an embedding, whose rows are not width"
                remedy = f"give base and delta one vocabulary, or {seen.remedy('output')}"
                raise seen.odd(what, remedy)
