"""K short runs of one shape as one model, each a member of it."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mupgpt.config.fields import differing
from mupgpt.config.schedules import LrFactor, schedule_of
from mupgpt.config.schema import TrainConfig
from mupgpt.data.batches import Batches, eval_batch
from mupgpt.data.corpus import Corpus
from mupgpt.errors import ConfigError
from mupgpt.model.gpt import GPT
from mupgpt.model.init import init_weights
from mupgpt.optim.make import MakeOptimizer, all_adamw, make_optimizer
from mupgpt.optim.members import MemberAdamW, PerMember
from mupgpt.optim.rates import set_lr
from mupgpt.parametrization.table import ParamTable, parametrize
from mupgpt.training.cuda_graph import Captured, capturable
from mupgpt.training.device import compute, param_dtype, pick_device
from mupgpt.training.step import Batch, evaluate, update

__all__ = ["Population"]

OWN = ("rule", "base", "hparams", "seed")
"""What decides a member's result and is its own: its table, and its seed."""


@dataclass
class _Member:
    """What tells one member from the others."""

    config: TrainConfig
    step: int = 0

    def __post_init__(self) -> None:
        c = self.config
        self.table = parametrize(c.model, c.base, c.hparams, c.rule)


class Population:
    """Runs that differ only in rule, base, hyperparameters and seed, trained side by side.

    Each member's trajectory is the one it would have alone, at a clock of its own: the steps that
    it has taken. Members are named by numbers in the order of their coming, those of ``configs``
    first, and keep them. On a GPU a step is one CUDA graph.

    ``schedule`` and ``optimizers`` are your own, as the `Trainer`'s, for all members alike: each is
    at its own step of the one, and has one of the others to itself.

    >>> from mupgpt.data.corpus import load_corpus
    >>> from mupgpt.resolve import train_config
    >>> shape = {"n_layer": 1, "d_model": 8, "n_head": 1, "vocab_size": 257, "seq_len": 8}
    >>> raw = {"model": shape, "steps": 2, "data": {"eval_tokens": 64}}
    >>> configs = [train_config({**raw, "hparams": {"lr": lr}}) for lr in (1e-3, 1e-2)]
    >>> own = {"adamw": torch.optim.RAdam}
    >>> population = Population(configs, load_corpus(configs[0].data),
    ...                         schedule=lambda step: 1 / (1 + step), optimizers=own)
    >>> population.train().shape, list(population.evaluate())
    (torch.Size([2]), [0, 1])

    Raises `ConfigError` for configs that differ in anything else.
    """

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        corpus: Corpus,
        *,
        schedule: LrFactor | None = None,
        optimizers: Mapping[str, MakeOptimizer] | None = None,
    ) -> None:
        self.config = configs[0]
        self._lr_factor = schedule_of(self.config, schedule)[1]
        self.device = pick_device()
        self._corpus = corpus
        self._batches: dict[int, Batches] = {}
        self._check(configs)
        self._held = [_Member(config) for config in configs]
        self.members = list(range(len(configs)))
        self._next = len(configs)
        self.model = self._make_model(self._held)
        optimizer = make_optimizer(self.model, self._tables, optimizers=optimizers)
        assert isinstance(optimizer, MemberAdamW | PerMember)
        self.optimizer = optimizer
        self._update = _stepper(self.config, self.model, optimizer, self.device)
        one_shape = len(self.config.course) == 1
        if self.device.type == "cuda" and one_shape and capturable(self.model, optimizer):
            self._update = Captured(self._update)

    @property
    def clocks(self) -> dict[int, int]:
        """The steps that each member has taken."""
        return {m: own.step for m, own in zip(self.members, self._held, strict=True)}

    @property
    def step(self) -> int:
        """The steps that the first of them has taken."""
        return max(member.step for member in self._held)

    def train(self, until: int | None = None) -> Tensor:
        """Step all members until the first of them has taken ``until`` steps (default: its run's).

        Returns the last training losses in nats per token, (K).
        """
        stop = min(until or self.config.steps, self.config.steps)
        loss = torch.full((len(self.members),), math.nan)
        while self.step < stop:
            set_lr(self.optimizer, [self._lr_factor(m.step) for m in self._held])
            loss = self._update(self._batch())
            for member in self._held:
                member.step += 1
        return loss

    def evaluate(self, members: Sequence[int] | None = None) -> dict[int, float]:
        """Held-out loss in nats per token of these members (default: of all)."""
        members = self.members if members is None else members
        places = [self.members.index(m) for m in members]
        model = self.model
        if places != list(range(len(self.members))):
            model = copy.deepcopy(model)
            model.keep_members(places)
        (context,) = {self.config.phase_at(self._held[i].step - 1).seq_len for i in places}
        held_out = eval_batch(self._corpus, self.config.data.eval_tokens, context)
        tokens, targets = (t.expand(len(places), *t.shape) for t in held_out)
        with compute(self.config.precision, self.device):
            losses = evaluate(model, (tokens.to(self.device), targets.to(self.device)))
        return dict(zip(members, losses.tolist(), strict=True))

    def keep(self, members: Sequence[int]) -> None:
        """Go on with these members alone; the others cost nothing from here on."""
        places = [self.members.index(m) for m in members]
        if places == list(range(len(self.members))):
            return
        self.members = [self.members[i] for i in places]
        self._held = [self._held[i] for i in places]
        self.model.keep_members(places)
        self.optimizer.keep(places)
        self._forget()

    def replace(self, members: Sequence[int], configs: Sequence[TrainConfig]) -> list[int]:
        """Begin the runs of ``configs`` in the places of ``members``; returns the new members."""
        self._check(configs)
        if len(self.config.course) > 1:
            raise ConfigError("phases: members of one population would be in different ones")
        places = [self.members.index(m) for m in members]
        assert len(places) == len(configs), f"{len(configs)} runs for {len(places)} places"
        fresh = [_Member(config) for config in configs]
        if isinstance(self.optimizer, MemberAdamW) and not all_adamw(
            [member.table for member in fresh]
        ):
            raise ConfigError(
                "rule: a new member takes another optimizer than AdamW, which all members of this "
                "population have; begin a new one"
            )
        for i, member in zip(places, fresh, strict=True):
            self._held[i], self.members[i] = member, self._next
            self._next += 1
        self.model.put_members(places, self._make_model(fresh))
        self.model.apply_table(self._tables)
        self.optimizer.renew(places, self.model, self._tables)
        self._forget()
        return [self.members[i] for i in places]

    @property
    def _tables(self) -> list[ParamTable]:
        return [member.table for member in self._held]

    def _check(self, configs: Sequence[TrainConfig]) -> None:
        for config in configs:
            _same_shape(self.config, config)

    def _make_model(self, held: Sequence[_Member]) -> GPT:
        with self.device:
            model = GPT(self.config.model, members=len(held))
            model.to(param_dtype(self.config.precision))
        init_weights(model, [m.table for m in held], [m.config.seed for m in held])
        return model

    def _forget(self) -> None:
        """What was recorded is of other members."""
        if isinstance(self._update, Captured):
            self._update.forget()

    def _batch(self) -> Batch:
        wanted = [(member.config.seed, member.step) for member in self._held]
        for seed in {seed for seed, _ in wanted} - self._batches.keys():
            self._batches[seed] = Batches(self._corpus, self.config.course, seed)
        distinct = list(dict.fromkeys(wanted))
        drawn = [self._batches[seed](step) for seed, step in distinct]
        which = torch.tensor([distinct.index(key) for key in wanted], device=self.device)
        tokens, targets = (torch.stack(t).to(self.device) for t in zip(*drawn, strict=True))
        return tokens[which], targets[which]


def _stepper(
    config: TrainConfig, model: GPT, optimizer: torch.optim.Optimizer, device: torch.device
) -> Callable[[Batch], Tensor]:
    """The step of a batch; it knows no population, which would keep itself alive by it."""

    def step(batch: Batch) -> Tensor:
        with compute(config.precision, device):
            return update(model, optimizer, batch, config.grad_clip, config.accumulate)[0]

    return step


def _same_shape(a: TrainConfig, b: TrainConfig) -> None:
    for name, one, other in differing(a, b, "result", "measure", "execution", apart=OWN):
        raise ConfigError(
            f"{name} differs between members of one population ({one!r}, {other!r}); "
            "put it under [structure], which makes one population per value"
        )
