"""What a run will need, from its config alone: parameters, FLOPs, bytes, time. No torch."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mupgpt.config.schema import TrainConfig
from mupgpt.errors import ConfigError, require
from mupgpt.parametrization.layout import count_params
from mupgpt.planning.flops import flops_per_token, run_flops
from mupgpt.planning.memory import CHECKPOINTING, SCHEMES, Need, count_masked, moments, scheme_of
from mupgpt.util.text import align

__all__ = ["GIB", "Machine", "Option", "Plan", "decide_storage", "options", "plan", "state_bytes"]

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the run is meant for; every figure is an assumption that the plan repeats."""

    gpus: int = 1
    """Devices; state is divided evenly among them."""
    hbm: float = 139.0
    """Memory of one device, GiB."""
    peak_flops: float = 9.89e14
    """Peak of one device in the compute precision, FLOP/s."""
    mfu: float = 0.4
    """Share of the peak that training FLOPs (convention ``palm``) reach."""
    reserve: float = 0.05
    """Share of ``hbm`` left to the driver, the libraries and gaps between tensors."""

    def __post_init__(self) -> None:
        require(self.gpus >= 1, "gpus", self.gpus, "be >= 1")
        require(self.hbm > 0, "hbm", self.hbm, "be > 0 (GiB)")
        require(self.peak_flops > 0, "peak_flops", self.peak_flops, "be > 0")
        require(0 < self.mfu <= 1, "mfu", self.mfu, "be in (0, 1]")
        require(0 <= self.reserve < 1, "reserve", self.reserve, "be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to store and recompute a run, at the fewest micro-batches with which it fits."""

    memory: str
    checkpointing: str
    accumulate: int
    """Micro-batches a step: the config's, or the fewest that fit; if none do, the most."""
    peak: Need
    """What a device holds at the moment that needs most."""
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data, sizes in GiB."""
        parts = {part: size / GIB for part, size in self.peak.parts.items()}
        together = {"moment": self.peak.moment, "gib": parts, "together": self.peak.total / GIB}
        return {**vars(self), "peak": together}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The needs of one run on one machine."""

    config: TrainConfig
    machine: Machine
    n_params: int
    flops_per_token: float
    """Training FLOPs per token at the first phase's context, convention ``palm``."""
    options: tuple[Option, ...]
    """All ways that the config allows, the best first."""
    taken: Option | None
    """The first that fits; None if none does."""
    step_seconds: float
    days: float

    @property
    def stored(self) -> TrainConfig:
        """The config as the taken option (or the thriftiest) runs it."""
        return _as(self.config, self.taken or self.options[-1])

    @property
    def state_gib(self) -> dict[str, float]:
        """State by part on each device, GiB; what a step adds is in ``options``."""
        whole = {"masks": 1}  # FSDP2 does not divide them
        gpus = self.machine.gpus
        return {k: v / whole.get(k, gpus) / GIB for k, v in state_bytes(self.stored).items()}

    @property
    def checkpoint_gib(self) -> float:
        """Weights, masks and moments, on disk."""
        saved = self.n_params * scheme_of(self.stored, self.stored.memory).saved
        return (saved + count_masked(self.config.model)) / GIB

    def batch(self) -> dict[str, int]:
        """How a step's sequences are divided, in the first phase."""
        run, gpus = self.stored, self.machine.gpus
        rows = max(1, gpus // run.parallel.tensor)
        return {
            "sequences": run.course[0].batch_size,
            "tokens": run.tokens_per_step,
            "data_parallel": rows,
            "micro_batches": run.accumulate,
            "micro_batch": -(-run.course[0].batch_size // (rows * run.accumulate)),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "n_params": self.n_params,
            "flops_per_token": self.flops_per_token,
            "convention": "palm",
            "tokens": self.config.tokens,
            "batch": self.batch(),
            "state_gib": self.state_gib,
            "options": [option.to_dict() for option in self.options],
            "taken": self.taken and self.taken.to_dict(),
            "fits": self.taken is not None,
            "checkpoint_gib": self.checkpoint_gib,
            "step_seconds": self.step_seconds,
            "days": self.days,
            "assumed": vars(self.machine),
        }

    def __str__(self) -> str:
        m, batch = self.machine, self.batch()
        return "\n".join([
            f"{self.n_params:,} parameters; {self.flops_per_token:.4g} FLOPs per token (palm); "
            f"{self.config.tokens:,} tokens",
            f"a step: {batch['sequences']} sequences, {batch['tokens']:,} tokens = "
            f"{batch['data_parallel']} data-parallel × {batch['micro_batches']} micro-batches × "
            f"{batch['micro_batch']} sequences",
            "",
            f"GiB on each device at the worst moment of a step (of {m.hbm:g}, less "
            f"{100 * m.reserve:g} % in reserve)",
            *align(list(_rows(self.options)), set(range(2, 12))),
            "",
            self._verdict(),
            f"a checkpoint takes {self.checkpoint_gib:.1f} GiB of disk",
            f"{self.step_seconds:.3g} s a step, {self.days:.3g} days: assumed {m.gpus} × "
            f"{m.peak_flops:.3g} FLOP/s at an MFU of {m.mfu:g} (inputs, not measurements)",
        ])  # fmt: skip

    def _verdict(self) -> str:
        if self.taken is None:
            return f"does not fit in {self.machine.hbm:g} GiB: more devices, or a smaller model"
        more = self.taken.accumulate != self.config.accumulate
        remedy = f", with accumulate = {self.taken.accumulate}" if more else ""
        return (
            f"fits in {self.machine.hbm:g} GiB: memory = {self.taken.memory}, "
            f"checkpointing = {self.taken.checkpointing}{remedy}"
        )


COLUMNS = ("weights", "remainder", "gradients", "moments", "activations", "loss")


def _rows(found: tuple[Option, ...]) -> Iterator[tuple[str, ...]]:
    head = ("memory", "checkpointing", "micro-batches", *COLUMNS, "other", "together", "fits")
    yield head
    for option in found:
        parts = option.peak.parts
        other = option.peak.total - sum(parts.get(part, 0.0) for part in COLUMNS)
        sizes = [*(parts.get(part, 0.0) for part in COLUMNS), other, option.peak.total]
        cells = (f"{size / GIB:.2f}" if size else "" for size in sizes)
        fits = "yes" if option.fits else "no"
        yield (option.memory, option.checkpointing, str(option.accumulate), *cells, fits)


def state_bytes(config: TrainConfig) -> dict[str, int]:
    """Bytes of the whole run's weights, masks, gradients and moments, by part.

    ``memory = "auto"`` counts as exact.

    >>> from mupgpt.resolve import train_config
    >>> lean = train_config({"model": "cerebras-gpt-13b", "memory": "lean"})
    >>> {part: round(size / GIB, 1) for part, size in state_bytes(lean).items()}
    {'weights': 23.9, 'gradients': 23.9, 'moments': 47.9}
    """
    scheme = scheme_of(config, "exact" if config.memory == "auto" else config.memory)
    parts = ("weights", "remainder", "gradients", "moments")
    sizes = {part: count_params(config.model) * getattr(scheme, part) for part in parts}
    sizes["masks"] = count_masked(config.model)
    return {part: size for part, size in sizes.items() if size}


def options(config: TrainConfig, machine: Machine) -> tuple[Option, ...]:
    """Every way to store and recompute the run that ``config`` leaves open, the best first.

    Less exact storage comes after any recomputation: that costs time alone.
    """
    half = config.precision in ("auto", "bf16")
    memories = list(SCHEMES if half else ["exact"]) if config.memory == "auto" else [config.memory]
    asked = config.parallel.checkpointing
    ways = CHECKPOINTING if asked == "auto" else (asked,)
    return tuple(_option(config, machine, memory, way) for memory in memories for way in ways)


def _option(config: TrainConfig, machine: Machine, memory: str, checkpointing: str) -> Option:
    limit = machine.hbm * (1 - machine.reserve) * GIB
    counts = _divisions(config, machine.gpus)
    sharded = memory != "exact" and machine.gpus > 1

    def option(accumulate: int) -> Option:
        run = dataclasses.replace(config, accumulate=accumulate)
        peak = max(moments(run, memory, checkpointing, machine.gpus), key=lambda need: need.total)
        # FSDP2 adds bf16 gradients of micro-batches up in bf16, where a sum stops growing.
        fits = peak.total <= limit and not (sharded and accumulate > 1)
        return Option(
            memory=memory,
            checkpointing=checkpointing,
            accumulate=accumulate,
            peak=peak,
            fits=fits,
        )

    found = option(counts[0])
    for accumulate in counts[1:]:
        if found.fits or sharded:
            break
        found = option(accumulate)
    return found


def _divisions(config: TrainConfig, gpus: int) -> list[int]:
    """Numbers of micro-batches, from the config's on, that divide what each device takes a step."""
    rows = max(1, gpus // config.parallel.tensor)
    for phase in config.course:
        require(phase.batch_size % rows == 0, "batch_size", phase.batch_size,
                f"be a multiple of {rows} data-parallel devices")  # fmt: skip
    share = math.gcd(*(phase.batch_size // rows for phase in config.course))
    even = [k for k in range(config.accumulate + 1, share + 1) if share % k == 0]
    return [config.accumulate, *even]


def _as(config: TrainConfig, option: Option) -> TrainConfig:
    return _stored(config, option.memory, option.checkpointing, option.accumulate)


def _stored(config: TrainConfig, memory: Any, checkpointing: Any, accumulate: int) -> TrainConfig:
    parallel = dataclasses.replace(config.parallel, checkpointing=checkpointing)
    return dataclasses.replace(config, memory=memory, parallel=parallel, accumulate=accumulate)


def decide_storage(config: TrainConfig, machine: Machine | None = None) -> TrainConfig:
    """``config`` with ``memory`` and ``checkpointing`` decided for ``machine``; None is a CPU.

    A CPU keeps all in fp32 and recomputes nothing, unless told to. Raises `ConfigError` where
    nothing fits, or not without more micro-batches than ``accumulate``: what a user may set.

    >>> from mupgpt.resolve import train_config
    >>> config = train_config({"model": "cerebras-gpt-13b", "batch_size": 4})
    >>> run = decide_storage(config, Machine())
    >>> run.memory, run.parallel.checkpointing
    ('split', 'selective')
    """
    if machine is None:
        kept = config.parallel.checkpointing.replace("auto", "none")
        return _stored(config, config.memory.replace("auto", "exact"), kept, config.accumulate)
    found = options(config, machine)
    ready = [o for o in found if o.fits and o.accumulate == config.accumulate]
    if ready:
        return _as(config, ready[0])
    for option in found:
        if option.fits:
            raise ConfigError(
                f"accumulate = {config.accumulate}: {machine.hbm:.0f} GiB are too little for so "
                f"large micro-batches; {option.accumulate} would fit (`mupgpt plan`)"
            )
    least = min(found, key=lambda o: o.peak.total)
    raise ConfigError(
        f"model: {count_params(config.model):,} parameters need {least.peak.total / GIB:.0f} GiB "
        f"on each of {machine.gpus} devices at least, which have {machine.hbm:.0f}; take a smaller "
        "preset (`mupgpt presets`) or more devices (`mupgpt plan`)"
    )


def plan(config: TrainConfig, machine: Machine | None = None) -> Plan:
    """The plan of ``config`` on ``machine``; seconds = tokens · FLOPs / (devices · peak · MFU).

    >>> from mupgpt.resolve import train_config
    >>> needs = plan(train_config({"model": "cerebras-gpt-13b", "batch_size": 8}))
    >>> needs.taken.memory, needs.taken.checkpointing, needs.batch()["micro_batch"]
    ('split', 'full', 8)
    """
    machine = machine or Machine()
    found = options(config, machine)
    flops = flops_per_token(config.model, "palm", config.course[0].seq_len)
    rate = machine.gpus * machine.peak_flops * machine.mfu
    return Plan(
        config=config,
        machine=machine,
        n_params=count_params(config.model),
        flops_per_token=flops,
        options=found,
        taken=next((option for option in found if option.fits), None),
        step_seconds=config.tokens_per_step * flops / rate,
        days=run_flops(config, config.steps) / rate / 86400,
    )
