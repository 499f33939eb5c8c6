"""The long run: executes a config, and can be stopped and continued at any step.

``python -m mupgpt.trainer target.toml [FOLDER]`` needs torch, numpy and safetensors only;
``torchrun --nproc-per-node=N -m mupgpt.trainer …`` executes the same run on N processes.
"""

import json
import math
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mupgpt.checkpoint.reader import Checkpoint
from mupgpt.checkpoint.state import load_model, load_optimizer, state_groups
from mupgpt.checkpoint.verify import load_newest
from mupgpt.checkpoint.writer import Writer
from mupgpt.config.phases import longest
from mupgpt.config.plain import load_toml, to_dict
from mupgpt.config.schedules import LrFactor, schedule_of
from mupgpt.config.schema import TrainConfig
from mupgpt.data.batches import Batches, eval_batch
from mupgpt.data.corpus import load_corpus
from mupgpt.distributed.parallel import materialize, parallelize
from mupgpt.distributed.processes import (
    Grid,
    agree,
    any_rank,
    global_mean,
    is_main,
    join_group,
    leave_group,
    on_main,
    say,
    together,
)
from mupgpt.errors import CheckpointError, ConfigError, Diverged, Interrupted
from mupgpt.model.gpt import GPT
from mupgpt.model.init import init_weights
from mupgpt.optim.make import MakeOptimizer, make_optimizer
from mupgpt.optim.rates import assert_rates
from mupgpt.optim.solo import by_kind
from mupgpt.parametrization.layout import count_params
from mupgpt.parametrization.table import parametrize
from mupgpt.planning.flops import run_flops
from mupgpt.resolve import train_config
from mupgpt.training.cadence import Cadence, Pace
from mupgpt.training.device import compute, param_dtype, pick_device, settle_cpu
from mupgpt.training.folder import claim, locked, require_room, require_same_run
from mupgpt.training.forecast import Forecast
from mupgpt.training.health import activations, measure
from mupgpt.training.metrics import (
    FLOPS,
    GRAD_NORM,
    STEP,
    TOKENS,
    TOKENS_PER_S,
    TRAIN_LOSS,
    TRAIN_LR,
    VAL_BPB,
    VAL_LOSS,
    MetricsLog,
    Wandb,
)
from mupgpt.training.step import token_losses, train_step
from mupgpt.training.storage import stored_here
from mupgpt.training.watch import Watch
from mupgpt.util.progress import Progress
from mupgpt.util.stopping import STOPPED, Stop, stop_flag
from mupgpt.util.text import label

__all__ = ["Trainer"]


class Trainer:
    """One run in one folder.

    The folder holds ``config.json``, ``metrics.jsonl`` and ``checkpoints/``. A folder that already
    has checkpoints of the same config is continued, bit for bit as if it had never stopped; on
    another number of processes up to rounding. Under torchrun every process makes a Trainer.
    ``model``, ``optimizer`` and ``step`` are those in training; before `fit` they have no values.

    ``schedule`` is a learning-rate schedule of your own: step, from 0 → factor of the peak (see
    `schedule_of`); ``optimizers`` are your own in the place of ours (see `make_optimizer`). Both
    are part of what is continued: the folder takes no other ones later.

    >>> from tempfile import mkdtemp
    >>> shape = {"n_layer": 1, "d_model": 8, "n_head": 1, "vocab_size": 257, "seq_len": 8}
    >>> config = train_config({"model": shape, "steps": 4, "tracking": {"wandb": "off"}})
    >>> triangle = lambda step: 1 - abs(step - 2) / 3
    >>> run = Trainer(config, mkdtemp(), schedule=triangle, optimizers={"adamw": torch.optim.RAdam})
    >>> run.fit()["step"], run.config.schedule.shape
    (4, 'own')

    Raises `ConfigError` for what cannot be trained here: memory, corpus, processes.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path | str = "runs/train",
        *,
        schedule: LrFactor | None = None,
        optimizers: Mapping[str, MakeOptimizer] | None = None,
    ) -> None:
        join_group()
        self.config, self._lr_factor = schedule_of(config, schedule)
        self.folder = Path(folder)
        self.device = pick_device()
        self._stored = together(lambda: stored_here(self.config, self.device))
        self._autocast = compute(config.precision, self.device, self._stored.memory)
        self.grid = Grid.of(config, self.device)
        self.corpus = together(
            lambda: load_corpus(config.data).check(config.model.vocab_size, longest(config.course))
        )
        self._own = dict(optimizers or {})
        alike = {"corpus": self.corpus.fingerprint, "optimizers": sorted(self._own)}
        for name, value in {**to_dict(self.config), **alike}.items():
            agree(name, value)
        self.table = parametrize(config.model, config.base, config.hparams, config.rule)
        self._batches = Batches(self.corpus, config.course, config.seed)
        self._cadence = Cadence.of(config)
        self._pace = Pace()
        self._watch = Watch(self.config)
        self._forecast = Forecast(config)
        self.step = 0
        self.model = self._empty_model()
        self.optimizer = self._fresh_optimizer()

    def fit(self) -> dict[str, Any]:
        """Train to the end; returns the final metrics: ``step``, ``tokens``, ``flops`` and
        ``val/loss`` in nats per token, with ``val/bpb`` where the tokens' bytes are known.

        Called again it continues from the newest checkpoint, or starts over where there is none;
        a finished run is evaluated only. SIGINT and SIGTERM, to any of the processes, save a
        checkpoint after the step in hand and raise `Interrupted`; `Diverged` is a loss that is no
        longer finite, `CheckpointError` one that cannot be written or read.
        """
        with ExitStack() as stack:
            on_main(lambda: stack.enter_context(locked(self.folder)))
            stop = stack.enter_context(stop_flag())
            on_main(lambda: claim(self.folder, self.config))
            on_main(lambda: require_room(self.folder, self._stored))
            self._begin()
            if self.step < self.config.steps:
                self._train(stop)
            return self._place() | self._evaluate()

    def _begin(self) -> None:
        """Take the newest checkpoint, or initial weights; what an earlier `fit` left is gone."""
        self._build()
        if (done := load_newest(self.folder / "checkpoints")) is not None:
            self._restore(done)

    def _empty_model(self) -> GPT:
        """The model as it is stored here, whole or this process's part, without values yet."""
        c = self._stored
        half = isinstance(self._autocast, torch.autocast) or c.memory != "exact"
        with torch.device("meta"):
            model = GPT(c.model).to(param_dtype(c.precision, c.memory))
        parallelize(model, c.parallel, self.grid, half)
        materialize(model, self.device)
        return model

    def _fresh_optimizer(self) -> torch.optim.Optimizer:
        c = self._stored
        backend = "inductor" if c.parallel.compile else None
        return make_optimizer(self.model, self.table, c.memory, c.seed, backend, self._own)

    def _build(self) -> None:
        """The state before the first step."""
        self.step = 0
        self._watch, self._forecast = Watch(self.config), Forecast(self.config)
        init_weights(self.model, self.table, self.config.seed)
        self.optimizer = self._fresh_optimizer()
        assert_rates(self.model, self.optimizer, self.table, 1.0)

    def _train(self, stop: Stop) -> None:
        """Step, record, save, until the last step or until ``stop`` is asked."""
        steps, track = self.config.steps, self.config.tracking
        self._pace = Pace(self.config.tokens_at(self.step))
        for line in self._watch.opening():
            say(line)
        with ExitStack() as stack:
            root = self.folder / "checkpoints"
            writer = stack.enter_context(Writer(root, track.keep, track.keep_steps))
            sinks = self._sinks(stack) if is_main() else []
            progress = stack.enter_context(Progress(f"train {self.folder.name}"))
            while self.step < steps:
                with self._pace:
                    loss, norm = self._train_one()
                record = self._record(loss, norm)
                for sink in sinks if record else []:
                    sink.log(record)
                stopped = any_rank(stop.asked)
                if stopped or self._cadence.saves(self.step):
                    self._save(writer)
                if is_main():
                    progress.update(self.step, steps, f"steps, loss {loss:.4f}")
                if stopped and self.step < steps:
                    writer.wait()
                    raise Interrupted(f"stopped at step {self.step} of {steps}")

    def _sinks(self, stack: ExitStack) -> list[Any]:
        """Where records go: the file that is the truth, and its mirror."""
        sinks = [
            MetricsLog(self.folder / "metrics.jsonl", self.step),
            Wandb(self.config.tracking, self.folder, self.folder.name, self._facts()),
        ]
        for sink in sinks:
            stack.callback(sink.close)
        return sinks

    def _record(self, loss: float, norm: float) -> dict[str, Any]:
        """What is to be recorded of the step just taken; mostly nothing."""
        record: dict[str, Any] = {}
        if self._cadence.logs(self.step):
            record |= self._metrics(loss, norm)
        if self._cadence.measures(self.step):
            record |= self._place() | measure(self.optimizer, self.table)
        if self._cadence.evaluates(self.step):
            with activations(self.model) as carried:
                record |= self._place() | self._evaluate() | self._forecast.facts()
            record |= carried
            if line := self._forecast.left_by(record):
                say(line)
        if record:
            held, alarms = self._watch(record)
            record |= held
            for line in alarms:
                say(line)
        return record

    def _train_one(self) -> tuple[float, float]:
        """One step; returns its loss in nats per token and the gradient's norm, before clipping."""
        c = self.config
        with self._autocast:
            loss, norm = train_step(
                self.model,
                self.optimizer,
                self._move(self.grid.share(self._batches(self.step))),
                lr_factor=self._lr_factor(self.step),
                grad_clip=c.grad_clip,
                accumulate=c.accumulate,
            )
        loss = global_mean(loss)
        if not (math.isfinite(float(loss)) and math.isfinite(float(norm))):
            raise Diverged(
                f"the loss is {float(loss)} at step {self.step}, its gradient {float(norm)}. Lower "
                f"hparams.lr (now {c.hparams.lr:g} at the base) or lengthen schedule.warmup, and "
                f"start in another folder; checkpoints of before are in {self.folder}"
            )
        self.step += 1
        if self._own and self.step == 1:  # what no checkpoint can hold is said at once
            state_groups(self.model, self.optimizer)
        return float(loss), float(norm)

    def _metrics(self, loss: float, norm: float) -> dict[str, Any]:
        used = self._lr_factor(self.step - 1)
        assert_rates(self.model, self.optimizer, self.table, used)
        return self._place() | {
            TRAIN_LOSS: loss,
            GRAD_NORM: norm,
            TRAIN_LR: self.config.hparams.lr * used,
            TOKENS_PER_S: round(self._pace.rate(self.config.tokens_at(self.step)), 1),
        }

    def _place(self) -> dict[str, Any]:
        """Where the run is: step, tokens, and training FLOPs under the convention ``palm``."""
        c = self.config
        return {STEP: self.step, TOKENS: c.tokens_at(self.step), FLOPS: run_flops(c, self.step)}

    def _evaluate(self) -> dict[str, float]:
        """Held-out loss at the context of the phase that was trained last."""
        context = self.config.phase_at(self.step - 1).seq_len
        tokens, targets = eval_batch(self.corpus, self.config.data.eval_tokens, context)
        places, count = self.grid.spread(len(tokens))
        with self._autocast:
            losses = token_losses(self.model, self._move((tokens[places], targets[places])))[:count]
        loss = float(global_mean(losses))
        if self.corpus.bytes_per_token is None:
            return {VAL_LOSS: loss}
        return {VAL_LOSS: loss, VAL_BPB: loss / math.log(2) / self.corpus.bytes_per_token}

    def _move(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return batch[0].to(self.device), batch[1].to(self.device)

    def _facts(self) -> dict[str, Any]:
        return {
            **to_dict(self.config),
            "corpus": self.corpus.fingerprint,
            "n_params": count_params(self.config.model),
            "width_ratio": self.config.model.d_model / self.config.base.d_model,
        }

    def _save(self, writer: Writer) -> None:
        writer.save(self.step, state_groups(self.model, self.optimizer), self._identity())

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint says of the run that it belongs to."""
        made = by_kind(self.optimizer)
        return {
            "config": to_dict(self.config),
            "table": self.table.to_dict(),
            "corpus": self.corpus.fingerprint,
            "memory": self._stored.memory,
            "optimizers": {kind: type(made[kind]).__qualname__ for kind in sorted(self._own)},
        }

    def _restore(self, checkpoint: Checkpoint) -> None:
        require_same_run(checkpoint, self.table, self._identity())
        load_model(self.model, checkpoint)
        load_optimizer(self.optimizer, checkpoint)
        self.step = checkpoint.step
        say(f"continuing {self.folder} at step {self.step}")


def main() -> None:
    """``python -m mupgpt.trainer CONFIG [FOLDER]``."""
    if not 2 <= len(sys.argv) <= 3:
        print("usage: python -m mupgpt.trainer CONFIG [FOLDER]", file=sys.stderr)
        sys.exit(2)
    settle_cpu()
    name = sys.argv[1]
    try:
        join_group()
        config = train_config(load_toml(name))
        result = Trainer(config, sys.argv[2] if len(sys.argv) > 2 else f"runs/{label(name)}").fit()
    except (ConfigError, OSError) as error:
        say(f"error: {error}")
        sys.exit(2)
    except (CheckpointError, Diverged) as error:
        say(f"error: {error}")
        sys.exit(1)
    except Interrupted as stop:
        say(f"{stop}; the same command continues")
        leave_group()
        sys.exit(STOPPED)
    if is_main():
        print(json.dumps(result))
    leave_group()


if __name__ == "__main__":
    main()
