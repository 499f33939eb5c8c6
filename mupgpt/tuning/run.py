"""Running a sweep: fill the queue, spawn workers, show how far they are."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import optuna
import torch
from optuna.trial import TrialState

from mupgpt.data.batches import eval_batch
from mupgpt.data.corpus import load_corpus
from mupgpt.errors import ConfigError, require
from mupgpt.training.device import visible_gpus
from mupgpt.tuning.samplers import SamplerFactory, find_sampler, importable_name, make_sampler
from mupgpt.tuning.spec import SweepSpec, load_spec
from mupgpt.tuning.study import DONE, Sweep, earlier_sweep
from mupgpt.tuning.trial_queue import fill
from mupgpt.tuning.urls import STORAGE, given_url
from mupgpt.tuning.worker import work
from mupgpt.util.host import cores
from mupgpt.util.progress import Progress

__all__ = ["run_sweep"]

POLL_S = 1.0


def run_sweep(
    spec: str | Path | SweepSpec,
    *,
    workers: int | None = None,
    storage: str | None = None,
    sampler: SamplerFactory | str | None = None,
) -> optuna.Study | dict[str, optuna.Study]:
    """Run (or continue) a sweep to exactly its budget; returns its study.

    ``spec`` is a shipped name, a TOML file or a `SweepSpec`. Workers are processes of one thread
    (default: one a GPU, which it has to itself; else one a core); with ``workers=1`` the work is
    done in this process. ``storage`` is Optuna's URL (default: MUPGPT_STORAGE, or SQLite in
    runs/sweeps/NAME). ``sampler`` stands in for the spec's: a function from a seed to an
    `optuna.samplers.BaseSampler`, or its name ``"module:function"``; several workers import it by
    that name. A spec with ``[structure]`` has several studies: then they come as a dict by name.
    Everything that finished is in the storage, whatever ends this call. Raises ConfigError for what
    cannot be run.

    >>> run_sweep("smoke", workers=0)
    Traceback (most recent call last):
    mupgpt.errors.ConfigError: workers = 0: must be >= 1
    """
    spec = load_spec(spec)
    require(workers is None or workers >= 1, "workers", workers, "be >= 1")
    workers = workers or len(visible_gpus()) or cores()
    factory = _own_sampler(sampler, spec, workers)
    if spec.study.warm_start:  # a name that is wrong is said before anything is written
        earlier_sweep(spec, given_url(storage))
    sweep = Sweep.create(spec, storage, sampler=factory)
    if dear := _dear_evaluation(spec):
        print(f"sweep {spec.name}: {dear}", file=sys.stderr)
    fill(sweep)
    if workers == 1:
        _work_here(sweep)
    else:
        _spawn(sweep, workers)
    studies = sweep.studies()
    return studies if spec.structure else next(iter(studies.values()))


def _own_sampler(
    sampler: SamplerFactory | str | None, spec: SweepSpec, workers: int
) -> SamplerFactory | None:
    if sampler is None:
        return None
    factory = find_sampler(sampler) if isinstance(sampler, str) else sampler
    if spec.study.sampler == "grid":
        raise ConfigError("sampler: a grid has its points; set study.sampler to another one")
    make_sampler(spec.study, own=factory)  # what is wrong is refused before anything is written
    if workers > 1:
        importable_name(factory)
    return factory


def _dear_evaluation(spec: SweepSpec) -> str:
    """What to say of an evaluation that costs more than the training before it; else nothing."""
    for config in (cell.config() for cell in spec.cells):
        corpus, length = load_corpus(config.data), config.model.seq_len
        held_out = eval_batch(corpus, config.data.eval_tokens, length)[0].numel()
        times = held_out / 3 / config.tokens  # a forward pass is a third of a step
        if times > 1:
            return (
                f"one evaluation ({held_out:,} held-out tokens) costs {times:.1f} times the "
                f"training before it ({config.tokens:,} tokens); lower train.data.eval_tokens"
            )
    return ""


def _work_here(sweep: Sweep) -> None:
    """Be the one worker, and leave torch's threads as they were."""
    threads = torch.get_num_threads()
    try:
        with Progress(f"sweep {sweep.spec.name}") as progress:
            work(sweep, tell=lambda: _show(sweep, progress))
            _show(sweep, progress, final=True)
    finally:
        torch.set_num_threads(threads)


def _show(sweep: Sweep, progress: Progress, final: bool = False) -> None:
    """Update the progress line, when it is time (counting asks the storage)."""
    if not (final or progress.due()):
        return
    counts = sweep.counts()
    done = sum(counts[s] for s in DONE)
    total = done + counts[TrialState.RUNNING] + _to_begin(sweep)
    pruned = f", {counts[TrialState.PRUNED]} stopped early" if counts[TrialState.PRUNED] else ""
    progress.update(done, total, f"trials{pruned}")


def _to_begin(sweep: Sweep) -> int:
    return sum(sweep.to_begin(cell) for cell in sweep.spec.cells)


def _spawn(sweep: Sweep, workers: int) -> None:
    """Run worker processes to the end; an interrupt reaches them, and they put trials back."""
    gpus = visible_gpus()
    sharing = -(-workers // len(gpus)) if gpus else workers
    command = [sys.executable, "-m", "mupgpt.tuning.worker", sweep.spec.name]
    own = [importable_name(sweep.sampler)] if sweep.sampler else []
    logs = [sweep.folder / f"worker-{i}.log" for i in range(workers)]
    with ExitStack() as files:
        children = [
            _start(
                [*command, str(i), str(workers), str(sharing), *own],
                _environment(sweep, gpus[i % len(gpus)] if gpus else None),
                files.enter_context(log.open("a", encoding="utf-8")),
            )
            for i, log in enumerate(logs)
        ]
        _watch(sweep, children)
    failed = [i for i, child in enumerate(children) if child.returncode]
    left = _to_begin(sweep) + sweep.counts()[TrialState.RUNNING]
    if failed and left:
        first = failed[0]
        raise RuntimeError(
            f"{len(failed)} of {workers} workers failed (exit {children[first].returncode}; "
            f"{logs[first]} says why); {left} trials are left: the same command "
            "continues"
        )


def _environment(sweep: Sweep, gpu: str | None) -> dict[str, str]:
    """A worker's: one thread, where the trials are, its own GPU, and where its modules are."""
    device = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    path = os.pathsep.join(os.path.abspath(p) for p in sys.path)  # noqa: PTH100 (zip files too)
    paths = {"PYTHONPATH": path} if sweep.sampler else {}
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return {**os.environ, **threads, **device, **paths, STORAGE: sweep.url}


def _start(
    command: list[str], environment: dict[str, str], log: IO[str]
) -> subprocess.Popen[bytes]:
    """A worker in a session of its own: a terminal's Ctrl-C reaches it once, through us."""
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=log, stderr=log
    )


def _watch(sweep: Sweep, children: list[subprocess.Popen[bytes]]) -> None:
    """Show progress until all workers have ended; pass an interrupt on to them."""
    try:
        with Progress(f"sweep {sweep.spec.name}") as progress:
            while any(child.poll() is None for child in children):
                _show(sweep, progress)
                time.sleep(POLL_S)
            _show(sweep, progress, final=True)
    except BaseException:
        for child in children:
            child.send_signal(signal.SIGINT)
        for child in children:
            child.wait()
        raise
