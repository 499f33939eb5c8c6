"""Training FLOPs per token under named conventions. A figure is never given without its name."""

from collections.abc import Callable

from mupgpt.config.schema import GPTConfig, TrainConfig
from mupgpt.errors import unknown
from mupgpt.parametrization.layout import count_kept, count_kept_block, count_params

__all__ = ["CONVENTIONS", "flops_per_token", "run_flops"]


def _six_n(m: GPTConfig, _context: int) -> float:
    return 6.0 * count_kept(m)


def _six_n_stored(m: GPTConfig, _context: int) -> float:
    return 6.0 * count_params(m)


def _palm(m: GPTConfig, context: int) -> float:
    return 6.0 * count_kept(m) + 12.0 * m.n_layer * m.d_attn * context


def _chinchilla(m: GPTConfig, context: int) -> float:
    linears = 2 * count_kept_block(m)
    scores = 4 * context * m.d_attn + 3 * m.n_head * context
    return 3.0 * (4 * m.vocab_size * m.d_model + m.n_layer * (linears + scores))


def _cerebras(m: GPTConfig, context: int) -> float:
    # The card's figures: attention scores counted twice (24 instead of 12), one softmax pass, and
    # no gradient into the input embedding. Reproduces every printed digit of the card.
    linears = 6 * count_kept_block(m)
    attention = 24 * context * m.d_attn + 9 * m.n_head * context
    return 10.0 * m.vocab_size * m.d_model + m.n_layer * (linears + attention)


CONVENTIONS: dict[str, Callable[[GPTConfig, int], float]] = {
    "6N": _six_n,
    "6N-stored": _six_n_stored,
    "palm": _palm,
    "chinchilla": _chinchilla,
    "cerebras": _cerebras,
}
"""Convention → training FLOPs per token of a shape in a context of so many tokens.

``6N``: six per parameter. ``6N-stored``: those that masks drop counted too, which is the 6·N·D of
laws in N and D (arXiv 2001.08361), where N is what a checkpoint holds. ``palm``: 6N + 12 L d T
(arXiv 2204.02311, appendix B; the default). ``chinchilla``: arXiv 2203.15556, appendix F.
``cerebras``: reproduces the Cerebras-GPT model card.
"""


def flops_per_token(model: GPTConfig, convention: str = "palm", context: int = 0) -> float:
    """Training FLOPs (forward and backward) per token under ``convention``.

    ``context`` is that of the sequences, 0 the model's own.

    >>> model = GPTConfig(n_layer=10, d_model=768, n_head=12, vocab_size=50257, seq_len=2048)
    >>> f"{flops_per_token(model, 'cerebras') * 9037 * 120 * 2048:.4e}"
    '2.6437e+18'
    """
    if convention not in CONVENTIONS:
        raise unknown("FLOPs convention", convention, CONVENTIONS)
    return CONVENTIONS[convention](model, context or model.seq_len)


def run_flops(config: TrainConfig, step: int | None = None, convention: str = "palm") -> float:
    """Training FLOPs of the first ``step`` steps of a run (default: of all).

    Each phase counts at its own context. Every figure of a run's cost comes from here. Raises
    `ConfigError` for an unknown ``convention``.

    >>> from mupgpt.resolve import train_config
    >>> quarter = train_config({"model": {"preset": "proxy-256", "density": 0.25}})
    >>> round(run_flops(quarter, convention="6N-stored") / run_flops(quarter, convention="6N"), 2)
    3.44
    """
    step = config.steps if step is None else step
    total = 0.0
    for phase in config.course:
        done = min(step, phase.steps)
        each = flops_per_token(config.model, convention, phase.seq_len)
        total += done * phase.tokens_per_step * each
        step -= done
    return total
