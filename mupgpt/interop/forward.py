"""How much wider, deeper and in the heads larger a module is, and what carries which multiplier."""

from collections.abc import Sequence

from mupgpt.errors import ConfigError
from mupgpt.interop.fold import Load
from mupgpt.interop.reading import Reading
from mupgpt.parametrization.layout import ParamSpec

__all__ = ["depths", "loads", "readout_ratio"]


def readout_ratio(reading: Reading, specs: Sequence[ParamSpec]) -> float:
    """The ratio to the base of the width that readouts sum over: that of d_model."""
    found: dict[str, float] = {}
    for spec in specs:
        part, tied = reading.parts[spec.site], spec.site in reading.tied
        axis = part.out if tied else part.into
        if axis is not None and (tied or part.role == "output"):
            found[spec.site] = spec.shape[axis] / part.shape[axis]
    if len(set(found.values())) != 1:
        ratios = ", ".join(f"{site} ×{ratio:.4g}" for site, ratio in found.items()) or "none is"
        raise ConfigError(
            f"readouts must sum over one width: {ratios} known; "
            'declare what is a readout and what is not: roles={"head": "output"}'
        )
    return next(iter(found.values()))


def depths(
    reading: Reading, base: Sequence[ParamSpec], specs: Sequence[ParamSpec]
) -> tuple[int, int]:
    """Number of layers that write into the residual stream, in the base and in ``specs``."""
    before, now = _layers(reading, base), _layers(reading, specs)
    writers = [(s, reading.locate(s.name)[1]) for s in specs if s.residual_out]
    if not writers and before != now:
        raise ConfigError(
            f"the base's layers are {before}, this module's {now}: declare what writes into the "
            'residual stream, roles={"*.o_proj": "residual_out", "*.down_proj": "residual_out"}'
        )
    if loose := [spec.name for spec, layer in writers if layer is None]:
        raise ConfigError(
            f"{loose[0]} is residual_out, but in no list of like layers, so depth is not known: "
            "hold the layers in an nn.ModuleList"
        )
    found = {(before[layer[0]], now[layer[0]]) for _, layer in writers if layer}
    if len(found) > 1:
        raise ConfigError(f"stacks of layers are of different depths, {now}: a rule knows one")
    return next(iter(found), (1, 1))


def _layers(reading: Reading, specs: Sequence[ParamSpec]) -> dict[str, int]:
    """Outermost stack → number of its layers."""
    layers = {layer for s in specs if (layer := reading.locate(s.name)[1])}
    return {stack: sum(of == stack for of, _ in layers) for stack, _ in sorted(layers)}


def loads(reading: Reading, specs: Sequence[ParamSpec]) -> dict[str, Load]:
    """Name → the multipliers that the parameter carries.

    What multiplies a module's output is carried by its weight and its bias. A tied weight carries
    ``emb``, being the embedding's; the final norm's gain turns it into ``readout`` for the head.
    """
    carried: dict[str, Load] = {}
    for spec in specs:
        part = reading.parts[spec.site]
        along = spec.role in ("bias", "norm")
        mates = [p for p in reading.parts.values() if p.module == part.module] if along else [part]
        places = {place for mate in mates for place in mate.places}
        load: dict[str, int] = {}
        if "input" in {mate.role for mate in mates}:
            load["emb"] = 1
        if part.role == "output":
            load["readout"] = 1
        if "query" in places:
            load["attn"] = 1
        if "residual_out" in places:
            load |= {"residual.attn": 1, "residual.mlp": 0}  # the two are one
        if "final_norm" in places and reading.tied:
            load |= {"readout": 1, "emb": -1}
        carried[spec.name] = load
    return carried
