"""The long run: executes a config, and can be stopped and continued at any step.

``python -m mupgpt.trainer target.toml [FOLDER]`` needs torch, numpy and safetensors only;
``torchrun --nproc-per-node=N -m mupgpt.trainer …`` executes the same run on N processes.
"""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from mupgpt.checkpoint.reader import Checkpoint
from mupgpt.checkpoint.state import load_model, load_optimizer, state_groups
from mupgpt.checkpoint.verify import checkpoints, load_newest
from mupgpt.checkpoint.writer import Writer
from mupgpt.config.fields import differing
from mupgpt.config.phases import longest
from mupgpt.config.plain import load_toml, to_dict
from mupgpt.config.schedules import lr_factor
from mupgpt.config.schema import TrainConfig
from mupgpt.data.batches import Batches, eval_batch
from mupgpt.data.corpus import load_corpus
from mupgpt.distributed.parallel import materialize, parallelize
from mupgpt.distributed.processes import (
    Grid,
    agree,
    any_rank,
    gather,
    global_mean,
    is_main,
    join_group,
    leave_group,
    on_main,
    say,
    together,
    world_size,
)
from mupgpt.errors import CheckpointError, ConfigError, Diverged, Interrupted
from mupgpt.model.gpt import GPT
from mupgpt.model.init import init_weights
from mupgpt.optim.make import make_optimizer
from mupgpt.optim.rates import assert_rates
from mupgpt.parametrization.layout import count_params
from mupgpt.parametrization.table import parametrize
from mupgpt.planning.flops import run_flops
from mupgpt.planning.memory import scheme_of
from mupgpt.planning.plan import GIB, Machine, decide_storage, state_bytes
from mupgpt.resolve import train_config
from mupgpt.training.device import compute, param_dtype, pick_device, settle_cpu
from mupgpt.training.health import activations, measure
from mupgpt.training.metrics import (
    FLOPS,
    GRAD_NORM,
    PREDICT_HIGH,
    PREDICT_LOW,
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
from mupgpt.training.watch import Watch
from mupgpt.util.host import memory
from mupgpt.util.progress import Progress
from mupgpt.util.stopping import STOPPED, Stop, stop_flag

__all__ = ["Trainer"]


class Trainer:
    """One run in one folder.

    The folder holds ``config.json``, ``metrics.jsonl`` and ``checkpoints/``. A folder that already
    has checkpoints of the same config is continued, bit for bit as if it had never stopped; on
    another number of processes up to rounding. Under torchrun every process makes a Trainer.
    """

    def __init__(self, config: TrainConfig, folder: Path | str = "runs/train") -> None:
        join_group()
        self.config = config
        self.folder = Path(folder)
        self.device = pick_device()
        self._stored = together(lambda: _stored(config, self.device))
        self._autocast = compute(config.precision, self.device, self._stored.memory)
        self.grid = Grid.of(config, self.device)
        self.corpus = together(
            lambda: load_corpus(config.data).check(config.model.vocab_size, longest(config.course))
        )
        for name, value in {**to_dict(config), "corpus": self.corpus.fingerprint}.items():
            agree(name, value)
        self.table = parametrize(config.model, config.base, config.hparams, config.rule)
        self.step = 0
        self._warned = False
        self._watch = Watch(config)

    def fit(self) -> dict[str, Any]:
        """Train to the end; returns the final metrics.

        SIGINT and SIGTERM, to any of the processes, save a checkpoint after the step in hand and
        raise `Interrupted`.
        """
        track = self.config.tracking
        with ExitStack() as stack:
            on_main(lambda: stack.enter_context(_locked(self.folder)))
            stop = stack.enter_context(stop_flag())
            on_main(self._check_folder)
            on_main(self._check_disk)
            self._build()
            done = load_newest(self.folder / "checkpoints")
            if done is not None:
                self._restore(done)
            for line in self._watch.opening():
                say(line)
            root = self.folder / "checkpoints"
            self._writer = stack.enter_context(Writer(root, track.keep, track.keep_steps))
            sinks: list[Any] = []
            if is_main():
                sinks.append(MetricsLog(self.folder / "metrics.jsonl", self.step))
                sinks.append(Wandb(track, self.folder, self.folder.name, self._facts()))
            for sink in sinks:
                stack.callback(sink.close)
            return self._loop(sinks, stop)

    def _build(self) -> None:
        c = self._stored
        half = isinstance(self._autocast, torch.autocast) or c.memory != "exact"
        with torch.device("meta"):
            self.model = GPT(c.model).to(param_dtype(c.precision, c.memory))
        parallelize(self.model, c.parallel, self.grid, half)
        materialize(self.model, self.device)
        init_weights(self.model, self.table, c.seed)
        backend = "inductor" if c.parallel.compile else None
        self.optimizer = make_optimizer(self.model, self.table, c.memory, c.seed, backend)
        assert_rates(self.model, self.optimizer, self.table, 1.0)
        self._batches = Batches(self.corpus, c.course, c.seed)

    def _loop(self, sinks: list[Any], stop: Stop) -> dict[str, Any]:
        c, track = self.config, self.config.tracking
        eval_every = track.eval_every or max(1, c.steps // 10)
        save_every = track.checkpoint_every or max(1, c.steps // 5)
        record: dict[str, Any] = {}
        clock, clock_step = time.monotonic(), self.step
        with Progress(f"train {self.folder.name}") as progress:
            while self.step < c.steps:
                loss, norm = self._train_one()
                last = self.step == c.steps
                if last or self.step % track.log_every == 0:
                    elapsed = time.monotonic() - clock
                    rate = (c.tokens_at(self.step) - c.tokens_at(clock_step)) / elapsed
                    record |= self._metrics(loss, norm, rate)
                    clock, clock_step = time.monotonic(), self.step
                if last or self.step % (track.health_every or track.log_every) == 0:
                    record |= self._place() | measure(self.optimizer, self.table)
                if last or self.step % eval_every == 0:
                    with activations(self.model) as carried:
                        record |= self._place() | self._evaluate() | self._predicted()
                    record |= carried
                    self._hold_against(record[VAL_LOSS], last)
                if record:
                    record |= self._watched(record)
                    for sink in sinks:
                        sink.log(record)
                    record = {}
                due = self.step % save_every == 0 or self.step in track.keep_steps
                stopped = any_rank(stop.asked)
                if last or stopped or due:
                    self._save()
                if is_main():
                    progress.update(self.step, c.steps, f"steps, loss {loss:.4f}")
                if stopped and not last:
                    self._writer.wait()
                    raise Interrupted(f"stopped at step {self.step} of {c.steps}")
        self._writer.wait()
        return self._place() | self._evaluate()

    def _train_one(self) -> tuple[float, float]:
        c = self.config
        with self._autocast:
            loss, norm = train_step(
                self.model,
                self.optimizer,
                self._move(self.grid.share(self._batches(self.step))),
                lr_factor=self._lr_factor(),
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
        return float(loss), float(norm)

    def _lr_factor(self, step: int | None = None) -> float:
        return lr_factor(self.config, self.step if step is None else step)

    def _metrics(self, loss: float, norm: float, rate: float) -> dict[str, Any]:
        used = self._lr_factor(self.step - 1)
        assert_rates(self.model, self.optimizer, self.table, used)
        return self._place() | {
            TRAIN_LOSS: loss,
            GRAD_NORM: norm,
            TRAIN_LR: self.config.hparams.lr * used,
            TOKENS_PER_S: round(rate, 1),
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

    def _predicted(self) -> dict[str, float]:
        said = self.config.prediction
        return {PREDICT_LOW: said.low, PREDICT_HIGH: said.high} if said else {}

    def _hold_against(self, loss: float, last: bool) -> None:
        """Warn once when the run has left the band: at its end, or as soon as it lies below it."""
        said = self.config.prediction
        if said and not self._warned and (loss < said.low or (last and loss > said.high)):
            self._warned = True
            say(f"step {self.step}: loss {loss:.4f} has left the prediction {said}")

    def _watched(self, record: dict[str, Any]) -> dict[str, float]:
        """How the record compares with narrower runs'; alarms are said at once."""
        facts, alarms = self._watch(record)
        for line in alarms:
            say(line)
        return facts

    def _move(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return batch[0].to(self.device), batch[1].to(self.device)

    def _facts(self) -> dict[str, Any]:
        return {
            **to_dict(self.config),
            "corpus": self.corpus.fingerprint,
            "n_params": count_params(self.config.model),
            "width_ratio": self.config.model.d_model / self.config.base.d_model,
        }

    def _check_folder(self) -> None:
        """Write the config, or refuse a folder that belongs to another one."""
        path, mine = self.folder / "config.json", to_dict(self.config)
        if path.is_file() and checkpoints(self.folder / "checkpoints"):
            theirs = train_config(load_toml(path))
            for name, there, here in differing(theirs, self.config, "result"):
                raise ConfigError(
                    f"{self.folder} belongs to another config: {name} is {there!r} there and "
                    f"{here!r} here; name another folder with --run"
                )
        whole = path.with_suffix(".json.tmp")
        whole.write_text(json.dumps(mine, indent=1), encoding="utf-8")
        whole.replace(path)

    def _check_disk(self) -> None:
        """Refuse a run whose first checkpoint could not be written, before it has cost anything."""
        root = self.folder / "checkpoints"
        scheme = scheme_of(self._stored, self._stored.memory)
        need = count_params(self.config.model) * scheme.saved
        if not checkpoints(root) and (free := shutil.disk_usage(self.folder).free) < 1.1 * need:
            raise ConfigError(
                f"{root}: a checkpoint of this run takes {need / GIB:.1f} GiB and "
                f"{free / GIB:.1f} GiB are free; name a folder on a larger disk with --run"
            )

    def _save(self) -> None:
        facts = {
            "config": to_dict(self.config),
            "table": self.table.to_dict(),
            "corpus": self.corpus.fingerprint,
            "memory": self._stored.memory,
        }
        self._writer.save(self.step, state_groups(self.model, self.optimizer), facts)

    def _restore(self, checkpoint: Checkpoint) -> None:
        if lines := self.table.diff(checkpoint.manifest["table"]):
            raise ConfigError(
                f"{checkpoint.folder} was written under another table: {lines[0]} "
                f"({len(lines)} differences); name another folder with --run"
            )
        saved, mine = checkpoint.manifest.get("memory", "exact"), self._stored.memory
        if saved != mine:
            raise ConfigError(
                f"memory = {mine!r}: {checkpoint.folder} was written under {saved!r}; set memory "
                f"to {saved!r}, or name another folder with --run"
            )
        if checkpoint.manifest["corpus"] != self.corpus.fingerprint:
            raise ConfigError(
                f"{checkpoint.folder} was trained on another corpus "
                f"({checkpoint.manifest['corpus']}); this one is {self.corpus.fingerprint}"
            )
        load_model(self.model, checkpoint)
        load_optimizer(self.optimizer, checkpoint)
        self.step = checkpoint.step
        say(f"continuing {self.folder} at step {self.step}")


def _stored(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The config with storage and recomputation decided; a run that cannot fit is refused."""
    world = world_size()
    if device.type == "cuda":
        free = min(gather(torch.cuda.mem_get_info(device)[0]))
        return decide_storage(config, Machine(gpus=world, hbm=free / GIB))
    stored = decide_storage(config)
    need = sum(state_bytes(stored).values())
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world > 1 else 1
    free = memory() * world // beside
    where = f"this {device.type}" if world == 1 else f"that of {world} processes"
    if need > free:
        raise ConfigError(
            f"model: {count_params(config.model):,} parameters need {need / GIB:.0f} GiB for "
            f"weights, gradients and moments, and {where} has {free / GIB:.0f} GiB; "
            "take a smaller preset (`mupgpt presets`) or a larger machine"
        )
    return stored


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, or say who holds it; the lock of a dead process is free."""
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / ".lock"
    lock = FileLock(holder, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"{folder} is in use by process {holder.read_text(encoding='utf-8').strip() or '?'}; "
            "wait for it, or name another folder with --run"
        ) from error
    try:
        holder.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        lock.release()


def main() -> None:
    """``python -m mupgpt.trainer CONFIG [FOLDER]``."""
    if not 2 <= len(sys.argv) <= 3:
        print("usage: python -m mupgpt.trainer CONFIG [FOLDER]", file=sys.stderr)
        sys.exit(2)
    settle_cpu()
    name = Path(sys.argv[1])
    try:
        join_group()
        config = train_config(load_toml(name))
        result = Trainer(config, sys.argv[2] if len(sys.argv) > 2 else f"runs/{name.stem}").fit()
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
