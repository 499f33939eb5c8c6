"""Configurations: frozen dataclasses with every field's meaning, default and bounds."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal, Self

from mupgpt.config.fields import (
    BATCH,
    CONTEXT,
    LAYERS,
    SEED,
    STEPS,
    TOKENS,
    VOCABULARY,
    WIDTH,
    decides,
)
from mupgpt.config.phases import PhaseConfig, phase_at, tokens_at
from mupgpt.config.plain import settle
from mupgpt.errors import ConfigError, require

__all__ = [
    "Base",
    "DataConfig",
    "GPTConfig",
    "HParams",
    "ParallelConfig",
    "Prediction",
    "Schedule",
    "TrackingConfig",
    "TrainConfig",
]


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape of one GPT; a field left at 0 is derived from the others.

    >>> GPTConfig(n_layer=2, d_model=64, d_head=32, vocab_size=257, seq_len=64).n_head
    2
    """

    n_layer: int = field(metadata=decides("result", above=0, high=LAYERS))
    """Number of blocks."""
    d_model: int = field(metadata=decides("result", above=0, high=WIDTH))
    """Width of the residual stream."""
    vocab_size: int = field(metadata=decides("result", above=0, high=VOCABULARY))
    """Number of token ids."""
    seq_len: int = field(metadata=decides("result", above=0, high=CONTEXT))
    """Context length in tokens."""
    n_head: int = field(default=0, metadata=decides("result", 0, WIDTH))
    """Number of query heads; 0 means d_model / d_head."""
    d_head: int = field(default=0, metadata=decides("result", 0, WIDTH))
    """Width of one head; 0 means d_model / n_head."""
    n_kv_head: int = field(default=0, metadata=decides("result", 0, WIDTH))
    """Number of key and value heads; 0 means n_head."""
    d_ffn: int = field(default=0, metadata=decides("result", 0, 10 * WIDTH))
    """Width inside the MLP; 0 means 4 d_model, or 8/3 d_model with ``swiglu`` (as many weights)."""
    bias: bool = field(default=True, metadata=decides("result"))
    """Biases in every linear layer and LayerNorm."""
    positions: Literal["learned", "alibi", "rope", "none"] = field(
        default="learned", metadata=decides("result")
    )
    """How order is known: an embedding of each place, a bias on attention scores that grows with
    distance (arXiv 2108.12409), a rotation of queries and keys (arXiv 2104.09864), or not at all
    but for the causal mask."""
    alibi_scaling: float = field(default=1.0, metadata=decides("result", 0))
    """``alibi`` only: distances are divided by it, to read contexts that many times longer than
    the trained one (arXiv 2310.13017); 0 means by T / seq_len in a context of T > seq_len."""
    norm: Literal["layernorm", "rmsnorm"] = field(default="layernorm", metadata=decides("result"))
    """Norm in front of each branch and of the head."""
    activation: Literal["gelu", "swiglu", "relu2"] = field(
        default="gelu", metadata=decides("result")
    )
    """Inside the MLP: gelu(up), silu(gate) · up (arXiv 2002.05202), or relu(up)²
    (arXiv 2109.08668)."""
    qk_norm: bool = field(default=False, metadata=decides("result"))
    """Norm each head of queries and keys, with one gain per layer for each (arXiv 2302.05442).
    Neither weights nor ``init_std`` move the scores then. Under ``mup`` they stay within
    ``attn_mult`` times √d_head of the base at every size, while gains are 1: ``attn_mult`` is the
    temperature, and a value tuned without this norm does not carry over."""
    tied: bool = field(default=True, metadata=decides("result"))
    """Whether the head shares the token embedding's weight."""
    zero_init_q: bool = field(default=False, metadata=decides("result"))
    """Start the query projections at zero (attention starts uniform at every width)."""
    density: float = field(default=1.0, metadata=decides("result", above=0, high=1))
    """Share of the weights in the blocks' matrices that static masks keep; 1 masks nothing."""
    density_attn: float = field(default=0.0, metadata=decides("result", 0, 1))
    """The same of q, k, v and o alone; 0 means ``density``."""
    density_mlp: float = field(default=0.0, metadata=decides("result", 0, 1))
    """The same of gate, up and down alone; 0 means ``density``."""

    def __post_init__(self) -> None:
        settle(self, "model")
        if not self.n_head and not self.d_head:
            raise ConfigError("model: give n_head or d_head (the other one is derived)")
        derived = {
            "n_head": self.n_head or _divide(self.d_model, "d_head", self.d_head),
            "d_head": self.d_head or _divide(self.d_model, "n_head", self.n_head),
            "d_ffn": self.d_ffn or (8 * self.d_model // 3 if self.gated else 4 * self.d_model),
        }
        derived["n_kv_head"] = self.n_kv_head or derived["n_head"]
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        _divide(self.n_head, "n_kv_head", self.n_kv_head)
        self._check_attention()

    def _check_attention(self) -> None:
        even = self.positions != "rope" or self.d_head % 2 == 0
        require(even, "model.d_head", self.d_head, "be even: rope turns pairs of elements")
        require(self.alibi_scaling == 0 or self.alibi_scaling >= 1, "model.alibi_scaling",
                self.alibi_scaling, "be >= 1, or 0 for T / seq_len")  # fmt: skip
        used = self.positions == "alibi" or self.alibi_scaling == 1
        require(used, "model.alibi_scaling", self.alibi_scaling, "be 1 unless positions = 'alibi'")
        require(not (self.qk_norm and self.zero_init_q), "model.zero_init_q", True,
                "be false with qk_norm, which blows the first step of a zero query up")  # fmt: skip

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate: a third matrix."""
        return self.activation == "swiglu"

    @property
    def d_attn(self) -> int:
        """Width of the concatenated heads: the attention output's fan-in."""
        return self.n_head * self.d_head

    def widen(self, d_model: int) -> Self:
        """This shape at another width: same d_head, same ratios of FFN and key-value heads."""
        n_head = _divide(d_model * self.d_attn // self.d_model, "d_head", self.d_head)
        return dataclasses.replace(
            self,
            d_model=d_model,
            n_head=n_head,
            n_kv_head=max(1, n_head * self.n_kv_head // self.n_head),
            d_ffn=self.d_ffn * d_model // self.d_model,
        )


def _divide(numerator: int, name: str, denominator: int) -> int:
    if denominator <= 0 or numerator % denominator:
        small = [d for d in range(1, math.isqrt(numerator) + 1) if numerator % d == 0]
        near = {*small, *(numerator // d for d in small)}
        best = sorted(near, key=lambda d: (abs(d - denominator), d))[:2]
        raise ConfigError(
            f"model.{name} = {denominator} does not divide {numerator}; "
            f"the nearest that do: {', '.join(map(str, sorted(best)))}"
        )
    return numerator // denominator


@dataclass(frozen=True, kw_only=True)
class Base:
    """Dimensions at which the hyperparameters were tuned; they may be fractional (682.6).

    >>> Base(d_model=256, d_ffn=682.6, n_head=4, d_head=64, n_kv_head=4, n_layer=24).density
    1.0
    """

    d_model: float = field(metadata=decides("result", above=0, high=WIDTH))
    """Width of the residual stream."""
    d_ffn: float = field(metadata=decides("result", above=0, high=10 * WIDTH))
    """Width inside the MLP."""
    n_head: float = field(metadata=decides("result", above=0, high=WIDTH))
    """Number of query heads."""
    d_head: float = field(metadata=decides("result", above=0, high=WIDTH))
    """Width of one head."""
    n_kv_head: float = field(metadata=decides("result", above=0, high=WIDTH))
    """Number of key and value heads."""
    n_layer: float = field(metadata=decides("result", above=0, high=LAYERS))
    """Number of blocks."""
    density: float = field(default=1.0, metadata=decides("result", above=0, high=1))
    """Share of the weights that static masks keep."""
    density_attn: float = field(default=0.0, metadata=decides("result", 0, 1))
    """The same of q, k, v and o alone; 0 means ``density``."""
    density_mlp: float = field(default=0.0, metadata=decides("result", 0, 1))
    """The same of gate, up and down alone; 0 means ``density``."""

    def __post_init__(self) -> None:
        settle(self, "base")

    @classmethod
    def of(cls, model: GPTConfig) -> "Base":
        """The dimensions of ``model`` itself.

        >>> Base.of(GPTConfig(n_layer=2, d_model=64, d_head=32, vocab_size=9, seq_len=8)).d_ffn
        256.0
        """
        return cls(**{f.name: getattr(model, f.name) for f in dataclasses.fields(cls)})


@dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters at the base; a rule turns them into one number per parameter.

    The defaults are Cerebras-GPT's (Dey et al. 2023, arXiv 2304.03208).

    >>> HParams(lr=1e-3).init_std
    0.08
    """

    lr: float = field(default=6e-3, metadata=decides("result", above=0))
    """Peak learning rate at the base."""
    init_std: float = field(default=0.08, metadata=decides("result", 0))
    """Standard deviation of the initial weights at the base."""
    emb_mult: float = field(default=10.0, metadata=decides("result", above=0))
    """Multiplies the sum of token and position embedding."""
    attn_mult: float = field(default=1.0, metadata=decides("result", 0))
    """Multiplies the attention scores."""
    residual_mult: float = field(default=1.0, metadata=decides("result", above=0))
    """Multiplies what each branch adds to the residual stream."""
    output_mult: float = field(default=1.0, metadata=decides("result", above=0))
    """Multiplies the logits."""
    weight_decay: float = field(default=0.1, metadata=decides("result", 0))
    """AdamW's λ at the base (each step shrinks a weight by lr·λ)."""
    lr_mult_input: float = field(default=1.0, metadata=decides("result", above=0))
    """Learning-rate multiplier of the embeddings."""
    lr_mult_hidden: float = field(default=1.0, metadata=decides("result", above=0))
    """Learning-rate multiplier of the matrices inside the blocks."""
    lr_mult_output: float = field(default=1.0, metadata=decides("result", above=0))
    """Learning-rate multiplier of an untied head."""
    lr_mult_bias: float = field(default=1.0, metadata=decides("result", above=0))
    """Learning-rate multiplier of the biases."""
    lr_mult_norm: float = field(default=1.0, metadata=decides("result", above=0))
    """Learning-rate multiplier of the norms."""
    beta1: float = field(default=0.9, metadata=decides("result", 0, below=1))
    """Decay of the first moment; the momentum of SGD and Muon."""
    beta2: float = field(default=0.95, metadata=decides("result", 0, below=1))
    """Adam's decay of the second moment."""
    eps: float = field(default=1e-8, metadata=decides("result", above=0))
    """Adam's ε at the base."""

    def __post_init__(self) -> None:
        settle(self, "hparams")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning-rate factor over the run: linear warm-up, then ``shape``.

    >>> from mupgpt.config.schedules import factor
    >>> halved = Schedule(shape="linear", warmup=0.1, end=0.0)
    >>> [round(factor(halved, step, 100), 3) for step in (4, 9, 55)]
    [0.5, 1.0, 0.5]
    """

    shape: Literal["constant", "linear", "cosine", "wsd", "own"] = field(
        default="linear", metadata=decides("result")
    )
    """What follows the warm-up; ``own`` is all a function that was given from Python."""
    warmup: float = field(default=0.1, metadata=decides("result", 0, 1))
    """Warm-up as a fraction of the run."""
    warmup_tokens: int = field(default=0, metadata=decides("result", 0, TOKENS))
    """Warm-up in tokens; when given it replaces ``warmup``."""
    end: float = field(default=0.1, metadata=decides("result", 0, 1))
    """Final factor of the peak (0: to zero)."""
    decay: float = field(default=0.1, metadata=decides("result", 0, 1))
    """``wsd`` only: the fraction of what follows the warm-up that is spent in the final decay."""
    decay_shape: Literal["linear", "1-sqrt", "exponential", "cosine"] = field(
        default="linear", metadata=decides("result")
    )
    """``wsd`` only: how the factor falls from 1 to ``end``."""
    digest: str = field(default="", metadata=decides("result"))
    """``own`` only: hash of the function's factors at every step of the run."""

    def __post_init__(self) -> None:
        settle(self, "schedule")
        geometric = self.shape == "wsd" and self.decay_shape == "exponential"
        require(self.end > 0 or not geometric, "schedule.end", self.end,
                "be > 0 under an exponential decay, which never reaches 0")  # fmt: skip
        given = (self.shape == "own") == bool(self.digest)
        require(given, "schedule.shape", self.shape,
                "be one that has a name; a function of yours goes in from Python, "
                "Trainer(config, folder, schedule=function)")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens come from.

    >>> DataConfig(source="package:json", eval_tokens=1024).tokenizer
    'bytes'
    """

    source: str = field(default="stdlib", metadata=decides("result"))
    """``stdlib``, ``package:NAME``, a file, a folder, a glob, or token shards (``*.bin``)."""
    tokenizer: Literal["bytes", "gpt2"] = field(default="bytes", metadata=decides("result"))
    """How text becomes tokens (shards carry theirs)."""
    eval_tokens: int = field(default=8192, metadata=decides("measure", above=0, high=TOKENS))
    """Held-out tokens that every evaluation uses."""

    def __post_init__(self) -> None:
        settle(self, "data")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What a run records, and how often.

    >>> TrackingConfig(log_every=100, wandb="off").keep
    2
    """

    log_every: int = field(default=10, metadata=decides("record", above=0, high=STEPS))
    """Steps between two records of training metrics."""
    health_every: int = field(default=0, metadata=decides("record", 0, STEPS))
    """Steps between two measurements of weights and updates; 0 means as ``log_every``."""
    watch: tuple[str, ...] = field(default=(), metadata=decides("record"))
    """Folders of narrower runs of this config: alarms say where this run leaves what they did."""
    eval_every: int = field(default=0, metadata=decides("record", 0, STEPS))
    """Steps between two evaluations; 0 means ten in a run."""
    checkpoint_every: int = field(default=0, metadata=decides("record", 0, STEPS))
    """Steps between two checkpoints; 0 means five in a run."""
    keep: int = field(default=2, metadata=decides("record", above=0, high=STEPS))
    """Verified checkpoints to keep."""
    keep_steps: tuple[int, ...] = field(default=(), metadata=decides("record", above=0, high=STEPS))
    """Steps whose checkpoints are written and stay beside those of ``keep``: branch points."""
    wandb: Literal["off", "offline", "online"] = field(
        default="offline", metadata=decides("record")
    )
    """Mirror to Weights & Biases (the variable WANDB_MODE wins)."""
    project: str = field(default="mupgpt", metadata=decides("record"))
    """wandb's project."""

    def __post_init__(self) -> None:
        settle(self, "tracking")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a run is spread over processes and memory; it changes results by rounding only.

    >>> ParallelConfig(tensor=8).checkpointing
    'auto'
    """

    tensor: int = field(default=1, metadata=decides("execution", above=0, high=WIDTH))
    """Processes that share one model's heads and d_ffn; the others divide the batch."""
    checkpointing: Literal["auto", "none", "selective", "full"] = field(
        default="auto", metadata=decides("execution")
    )
    """What the backward computes again instead of keeping: nothing, all but matrix products and
    attention, or whole blocks. ``auto``: the first that fits the GPU; nothing on a CPU."""
    compile: bool = field(default=False, metadata=decides("execution"))
    """Compile each block (GPU)."""

    def __post_init__(self) -> None:
        settle(self, "parallel")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The final loss said before the run, in nats per token; the run is held against it.

    Falsy when nothing was predicted.

    >>> print(Prediction(loss=1.3, low=1.2, high=1.4, source="a ladder"))
    1.3000, 95 % interval [1.2000, 1.4000] (a ladder)
    >>> bool(Prediction())
    False
    """

    loss: float = field(default=0.0, metadata=decides("record", 0))
    """The expected held-out loss; 0 means that nothing was predicted."""
    low: float = field(default=0.0, metadata=decides("record", 0))
    """Lower end of its interval."""
    high: float = field(default=0.0, metadata=decides("record", 0))
    """Upper end of its interval."""
    level: float = field(default=0.95, metadata=decides("record", above=0, high=1))
    """Share of runs that the interval is meant to hold."""
    source: str = field(default="", metadata=decides("record"))
    """The law, and the runs that it was fitted to."""

    def __post_init__(self) -> None:
        settle(self, "prediction")
        ordered = self.low <= self.loss <= self.high
        require(ordered, "prediction.loss", self.loss, "lie between prediction.low and .high")

    def __bool__(self) -> bool:
        return self.loss > 0

    def __str__(self) -> str:
        return (
            f"{self.loss:.4f}, {100 * self.level:g} % interval [{self.low:.4f}, {self.high:.4f}] "
            f"({self.source})"
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides one run.

    >>> model = GPTConfig(n_layer=1, d_model=8, n_head=1, vocab_size=9, seq_len=64)
    >>> short, long = PhaseConfig(steps=30, seq_len=16, batch_size=4), PhaseConfig(steps=10)
    >>> run = TrainConfig(model=model, base=Base.of(model), batch_size=1, phases=(short, long))
    >>> run.steps, run.phase_at(30).seq_len, run.tokens_at(31)
    (40, 64, 1984)
    """

    model: GPTConfig
    """Shape of the model."""
    base: Base
    """Dimensions at which ``hparams`` hold."""
    rule: str = field(default="mup", metadata=decides("result"))
    """The parametrization."""
    hparams: HParams = field(default_factory=HParams)
    """Hyperparameters at the base."""
    schedule: Schedule = field(default_factory=Schedule)
    """Learning rate over the run."""
    batch_size: int = field(default=8, metadata=decides("result", above=0, high=BATCH))
    """Sequences per optimizer step."""
    steps: int = field(default=0, metadata=decides("result", 0, STEPS))
    """Optimizer steps; 0 means 200, or what ``phases`` add up to."""
    phases: tuple[PhaseConfig, ...] = field(default=(), metadata=decides("result"))
    """Parts with contexts and batches of their own, in order, under one learning-rate line."""
    accumulate: int = field(default=1, metadata=decides("execution", above=0, high=BATCH))
    """Micro-batches per step; must divide batch_size."""
    grad_clip: float = field(default=1.0, metadata=decides("result", 0))
    """Largest global gradient norm; 0 turns clipping off."""
    data: DataConfig = field(default_factory=DataConfig)
    """Corpus and tokenizer."""
    precision: Literal["auto", "fp32", "fp64", "bf16"] = field(
        default="auto", metadata=decides("result")
    )
    """``auto`` is bf16 compute on a GPU and fp32 on a CPU."""
    memory: Literal["auto", "exact", "split", "lean"] = field(
        default="auto", metadata=decides("execution")
    )
    """How the run is stored. ``exact``: all in fp32. ``split``: bf16 weights with the rest of the
    fp32 master beside them, bf16 gradients and moments. ``lean``: bf16 weights rounded
    stochastically. ``auto``: the first that fits the GPU (`mupgpt plan`); exact on a CPU."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Processes and recomputation."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Records and checkpoints."""
    seed: int = field(default=0, metadata=decides("result", 0, SEED))
    """Decides initialization and data order."""
    prediction: Prediction = field(default_factory=Prediction)
    """What a law expects of this run."""

    def __post_init__(self) -> None:
        settle(self)
        self._resolve()
        half = self.precision in ("auto", "bf16") or self.memory in ("auto", "exact")
        require(half, "memory", self.memory, f"be 'exact' with precision = {self.precision!r}")
        for phase in self.course:
            whole, parts = phase.batch_size, self.accumulate
            require(whole % parts == 0, "accumulate", parts, f"divide batch_size = {whole}")
            self._check_context(phase)
        for name in ("n_head", "n_kv_head", "d_ffn"):
            whole, parts = getattr(self.model, name), self.parallel.tensor
            require(whole % parts == 0, "parallel.tensor", parts, f"divide model.{name} = {whole}")

    def _resolve(self) -> None:
        """Fill in what was left at 0."""
        phases = tuple(
            dataclasses.replace(
                phase,
                seq_len=phase.seq_len or self.model.seq_len,
                batch_size=phase.batch_size or self.batch_size,
            )
            for phase in self.phases
        )
        total = sum(phase.steps for phase in phases)
        fits = not phases or self.steps in (0, total)
        require(fits, "steps", self.steps, f"be {total}, as phases add up to (or be left out)")
        object.__setattr__(self, "phases", phases)
        object.__setattr__(self, "steps", self.steps or total or 200)

    def _check_context(self, phase: PhaseConfig) -> None:
        fits = self.model.positions != "learned" or phase.seq_len <= self.model.seq_len
        require(fits, "phases.seq_len", phase.seq_len,
                f"be at most model.seq_len = {self.model.seq_len}, where learned positions end; "
                "raise that, or take model.positions = 'alibi' or 'rope'")  # fmt: skip

    @property
    def course(self) -> tuple[PhaseConfig, ...]:
        """The phases in order: one, where none are given."""
        whole = PhaseConfig(
            steps=self.steps, seq_len=self.model.seq_len, batch_size=self.batch_size
        )
        return self.phases or (whole,)

    def phase_at(self, step: int) -> PhaseConfig:
        """The phase of step ``step`` (0-based); after the end, the last one."""
        return phase_at(self.course, step)

    def tokens_at(self, step: int) -> int:
        """Tokens in the first ``step`` steps."""
        return tokens_at(self.course, step)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimizer step (of the first phase)."""
        return self.course[0].tokens_per_step

    @property
    def tokens(self) -> int:
        """Tokens in the whole run."""
        return self.tokens_at(self.steps)
