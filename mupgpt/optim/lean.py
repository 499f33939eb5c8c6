"""AdamW on bf16 weights that loses no update, and never unpacks more than a slice of the model.

A bf16 number has 8 significant bits, and an update is often less than half the last one: added
plainly it vanishes. There are two remedies. A remainder, the 16 bits that bf16 drops, is kept as an
int16 beside the weight: together they are the fp32 master, exactly. Or the bits are dropped by
stochastic rounding, up or down with the probabilities that make the mean right. Moments in bf16 are
rounded so in either case: with β₂ = 0.999 a second moment rounded to the nearest never falls.

Arithmetic is fp32, `SLICE` elements at a time: fp32 copies of a 13B model's weights, moments and
gradients would take 200 GB.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mupgpt.model.shards import local
from mupgpt.planning.memory import SLICE

__all__ = ["LeanAdamW", "join", "round_stochastic", "split"]


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 master that a bf16 ``weight`` and its int16 ``remainder`` stand for.

    >>> master = torch.tensor([1 / 3, -2.7e-8])
    >>> weight, remainder = master.bfloat16(), torch.zeros(2, dtype=torch.int16)
    >>> split(master, weight, remainder)
    >>> torch.equal(join(weight, remainder), master)
    True
    """
    high = weight.view(torch.int16).to(torch.int32) << 16
    return (high + remainder).view(torch.float32)


def split(master: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """Write ``master`` (fp32) into bf16 ``weight``, the nearest, and int16 ``remainder``.

    A master halfway between two bf16 numbers goes to the one of larger magnitude, not to the even
    one: then 65537 masters would share an even weight, one more than an int16 can tell apart.
    """
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    weight.view(torch.int16).copy_(high)
    remainder.copy_(bits - (high << 16))


def round_stochastic(x: Tensor, out: Tensor, noise: Tensor) -> None:
    """Write ``x`` (fp32) into bf16 ``out``, rounded up or down so that the mean is ``x``.

    ``noise`` is int32, uniform in [0, 2¹⁶): it is added to the 16 bits that are then cut off.
    """
    out.view(torch.int16).copy_((x.view(torch.int32) + noise) >> 16)


class Slice(NamedTuple):
    """A piece of what a parameter is stored in, flat."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    remainder: Tensor | None


Noise = tuple[Tensor | None, Tensor | None, Tensor | None]
"""For weight, exp_avg and exp_avg_sq; None for what is not rounded."""


def update(
    stored: Slice,
    noise: Noise,
    scalars: tuple[Tensor, Tensor, Tensor],
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One AdamW step of one slice, in place: what ``torch.optim.AdamW`` does, in its order.

    ``scalars`` are 1 − lr·λ, −lr/(1 − β₁ᵗ) and √(1 − β₂ᵗ): 0-d tensors, since they change at every
    step and a compiled update should not.
    """
    weight, grad, exp_avg, exp_avg_sq, remainder = stored
    decay, step_size, correction = scalars
    master = weight.float() if remainder is None else join(weight, remainder)
    mean, square, wide = exp_avg.float(), exp_avg_sq.float(), grad.float()
    master.mul_(decay)
    mean.lerp_(wide, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(wide, wide, value=1 - betas[1])
    root = (square.sqrt() / correction).add_(eps)
    master.add_((mean * step_size).div_(root))
    del root, wide  # room for what storing takes
    if remainder is not None:
        split(master, weight, remainder)
    pairs = ((master, weight), (mean, exp_avg), (square, exp_avg_sq))
    for (x, out), bits in zip(pairs, noise, strict=True):
        if bits is not None:
            round_stochastic(x, out, bits)


class LeanAdamW(torch.optim.Optimizer):
    """``torch.optim.AdamW`` for bf16 parameters, in slices of what this process holds of them.

    With ``remainder`` the state has an int16 of that name and weights are exact fp32 masters;
    without, they are rounded stochastically. ``moments`` is the dtype of exp_avg and exp_avg_sq:
    fp32 ones make the masters bit-equal to AdamW's. Rounding depends on ``seed``, the step and the
    place of a number alone, so a continued run repeats it. ``backend`` compiles `update`.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        remainder: bool,
        moments: torch.dtype = torch.bfloat16,
        seed: int = 0,
        slice_size: int = SLICE,
        backend: str | Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(groups, defaults={})
        self.remainder, self.moments = remainder, moments
        self.seed, self.slice_size = seed, slice_size
        self._update: Callable[..., None] = update
        if backend is not None:
            self._update = torch.compile(update, backend=backend, fullgraph=True, dynamic=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        assert closure is None, "no closures: a step is one backward"
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                if p.grad is not None:
                    self._step_one(group, name, p)

    def _step_one(self, group: dict[str, Any], name: str, p: Tensor) -> None:
        state = self.state[p]
        if "exp_avg" not in state:
            state.update(self._fresh(p))
        step, (beta1, beta2) = int(state["step"]) + 1, group["betas"]
        state["step"] = torch.tensor(float(step))
        scalars = (
            torch.tensor(1 - group["lr"] * group["weight_decay"]),
            torch.tensor(-group["lr"] / (1 - beta1**step)),
            torch.tensor((1 - beta2**step) ** 0.5),
        )
        tensors = (p, p.grad, state["exp_avg"], state["exp_avg_sq"], state.get("remainder"))
        for start, stored in self._slices(tensors):
            noise = self._noise(stored.weight, f"{self.seed}/{step}/{name}/{start}")
            self._update(stored, noise, scalars, (beta1, beta2), group["eps"])

    def _fresh(self, p: Tensor) -> dict[str, Any]:
        """The state before the first step; the remainder of a weight that was bf16 is zero."""
        assert p.dtype == torch.bfloat16, f"a {p.dtype} parameter has no use for this optimizer"
        state = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(p, dtype=self.moments),
            "exp_avg_sq": torch.zeros_like(p, dtype=self.moments),
        }
        if self.remainder:
            state["remainder"] = torch.zeros_like(p, dtype=torch.int16)
        return state

    def _slices(self, tensors: tuple[Any, ...]) -> Iterator[tuple[int, Slice]]:
        """Flat views of what this process holds, slice by slice, with each one's start."""
        flat = [None if t is None else local(t).view(-1) for t in tensors]  # a view or an error
        for start in range(0, local(tensors[0]).numel(), self.slice_size):
            stop = start + self.slice_size
            parts: list[Any] = [None if t is None else t[start:stop] for t in flat]
            yield start, Slice(*parts)

    def _noise(self, like: Tensor, key: str) -> Noise:
        """Fresh random bits; the key has no rank in it, so that replicas round alike."""
        generator = torch.Generator(like.device)
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "little"))

        def bits(rounded: bool) -> Tensor | None:
            if not rounded:
                return None
            return torch.randint(
                2**16, like.shape, generator=generator, dtype=torch.int32, device=like.device
            )

        rough = self.moments == torch.bfloat16
        return bits(not self.remainder), bits(rough), bits(rough)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would turn a remainder into bf16; here a state keeps its dtype."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in enumerate(params):
            for key, value in state_dict["state"].get(i, {}).items():
                if key != "step":
                    self.state[p][key] = value.to(p.device, copy=True)
