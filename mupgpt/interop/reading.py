"""What base and delta say of a kind of module: enough to describe it at any size, by names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from mupgpt.errors import ConfigError
from mupgpt.interop.modules import locate, named
from mupgpt.interop.mup import width_ratios
from mupgpt.parametrization.layout import ParamSpec
from mupgpt.parametrization.words import Role

__all__ = ["PLACES", "Part", "Place", "Reading", "Shape", "misfit"]

Place = Literal["query", "residual_out", "final_norm"]
"""Where in the forward a module stands that can carry one of a rule's multipliers."""
PLACES: tuple[Place, ...] = get_args(Place)
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is known of the parameters at one site."""

    module: str
    """Site of the module that owns them."""
    role: Role
    places: frozenset[Place]
    """Declared places of that module."""
    shape: Shape
    """At the base."""
    width: Any
    """`mup`'s base shape: which dimensions are width."""
    out: int | None = None
    """Axis of the width that they produce; None where they produce none."""
    into: int | None = None
    """Axis of the width that they sum over; None where they sum over none."""
    loose: bool = False
    """Whether the two axes may be the other way round: a matrix of no known class."""
    constant: float | None = None
    """Initial value of one that starts constant."""

    def spec(self, name: str, site: str, shape: Shape) -> ParamSpec:
        """What a rule must know of the parameter ``name`` of this ``shape``."""
        return ParamSpec(
            name=name,
            role=self.role,
            shape=shape,
            fan_in=1 if self.into is None else shape[self.into],
            fan_out=1 if self.out is None else shape[self.out],
            residual_out="residual_out" in self.places and self.role == "hidden",
            constant=self.constant,
            site=site,
        )


@dataclass(frozen=True)
class Reading:
    """A kind of module as its base and delta show it."""

    parts: Mapping[str, Part]
    """Site → what is known of its parameters."""
    stacks: frozenset[str]
    """Sites of the containers of layers."""
    tied: frozenset[str]
    """Sites of embeddings whose weight is a readout's too."""

    def specs(self, model: nn.Module) -> list[ParamSpec]:
        """Every parameter of ``model`` as `mupgpt.layout` would give it, in order.

        A `ConfigError` where the structure is another one than the base's, or where a dimension
        grows that does not from base to delta. Rows of embeddings and readouts may differ.
        """
        shapes = {name: tuple(p.shape) for name, p in named(model).items()}
        sites = {name: self.locate(name)[0] for name in shapes}
        if odd := sorted(self.parts.keys() ^ set(sites.values())):
            where = "the base" if odd[0] in self.parts else "this module"
            raise ConfigError(
                f"{odd[0]} is only in {where}: they must differ in size alone (to_empty and "
                "load_state_dict(assign=True) untie shared weights: tie them again)"
            )
        by_site = {site: shapes[name] for name, site in sites.items()}
        ratios = width_ratios({site: part.width for site, part in self.parts.items()}, by_site)
        for site, shape in by_site.items():
            self._check(site, shape, ratios[site])
        return [self.parts[site].spec(name, site, shapes[name]) for name, site in sites.items()]

    def locate(self, name: str) -> tuple[str, tuple[str, int] | None]:
        """The site of the parameter ``name``, and the outermost stack and layer it is in."""
        return locate(name, self.stacks)

    def _check(self, site: str, shape: Shape, ratios: tuple[float | None, ...]) -> None:
        part = self.parts[site]
        ends = {p.module for p in self.parts.values() if p.role in ("input", "output")}
        fixed = [i for i, ratio in enumerate(ratios) if ratio is None and shape[i] != part.shape[i]]
        what = remedy = ""
        if fixed and part.module not in ends:
            what = f"dimension {fixed[0]} grows here, but not from base to delta"
            remedy = "let delta differ from base in every width"
        if part.loose and len(set(ratios) - {None}) > 1:
            what = "its widths grow by different ratios, and which one it sums over is not known"
            remedy = "let them grow alike, or make it the weight of an nn.Linear"
        if what:
            raise misfit(site, {"the base": part.shape, "this module": shape}, what, remedy)


def misfit(site: str, shapes: Mapping[str, Shape], what: str, remedy: str) -> ConfigError:
    """The error for a parameter of which something is not known; ``shapes`` by where they are."""
    sizes = [f"{'×'.join(map(str, s)) or 'a scalar'} in {where}" for where, s in shapes.items()]
    return ConfigError(f"{site} is {' and '.join(sizes)}: {what}; {remedy}")
