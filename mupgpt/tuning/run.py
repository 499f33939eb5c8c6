"""Running a sweep: fill the queue, spawn workers, show how far they are."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import optuna
import torch
from optuna.trial import TrialState

from mupgpt.data.batches import eval_batch
from mupgpt.data.corpus import load_corpus
from mupgpt.errors import require
from mupgpt.tuning.spec import SweepSpec, load_spec
from mupgpt.tuning.study import DONE, Sweep, earlier_sweep
from mupgpt.tuning.worker import fill, work
from mupgpt.util.progress import Progress

__all__ = ["run_sweep"]

POLL_S = 1.0


def run_sweep(
    spec: str | Path | SweepSpec, *, workers: int | None = None, storage: str | None = None
) -> optuna.Study | dict[str, optuna.Study]:
    """Run (or continue) a sweep to exactly its budget; returns its study.

    ``spec`` is a shipped name, a TOML file or a `SweepSpec`. Workers are one-thread processes
    (default: one a core, or one for a GPU); with ``workers=1`` the work is done in this process. A
    spec with ``[structure]`` has several studies: then they come as a dict by name. Everything
    that finished is in the storage, whatever ends this call.

    >>> run_sweep("smoke", workers=0)
    Traceback (most recent call last):
    mupgpt.errors.ConfigError: workers = 0: must be >= 1
    """
    spec = load_spec(spec)
    require(workers is None or workers >= 1, "workers", workers, "be >= 1")
    if spec.study.warm_start:  # a name that is wrong is said before anything is written
        earlier_sweep(spec, storage)
    sweep = Sweep.create(spec, storage)
    if dear := _dear_evaluation(spec):
        print(f"sweep {spec.name}: {dear}", file=sys.stderr)
    fill(sweep)
    workers = workers or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    if workers == 1:
        _work_here(sweep)
    else:
        _spawn(sweep, workers)
    studies = sweep.studies()
    return studies if spec.structure else next(iter(studies.values()))


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
            work(sweep, stop=lambda: progress.due() and _show(sweep, progress))
            _show(sweep, progress)
    finally:
        torch.set_num_threads(threads)


def _show(sweep: Sweep, progress: Progress) -> bool:
    """Update the progress line; False, so that it can stand where a worker may be stopped."""
    counts = sweep.counts()
    done = sum(counts[s] for s in DONE)
    total = done + counts[TrialState.RUNNING] + _to_begin(sweep)
    pruned = f", {counts[TrialState.PRUNED]} stopped early" if counts[TrialState.PRUNED] else ""
    progress.update(done, total, f"trials{pruned}")
    return False


def _to_begin(sweep: Sweep) -> int:
    return sum(sweep.to_begin(cell) for cell in sweep.spec.cells)


def _spawn(sweep: Sweep, workers: int) -> None:
    """Run worker processes to the end; an interrupt reaches them, and they put trials back."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mupgpt.tuning.worker", sweep.spec.name, sweep.url]
    logs = [sweep.folder / f"worker-{i}.log" for i in range(workers)]
    with ExitStack() as files:
        # Sessions of their own: a terminal's Ctrl-C reaches them once, through this process.
        children = [
            subprocess.Popen(
                [*command, str(i), str(workers)],
                env=environment,
                start_new_session=True,
                stdout=(file := files.enter_context(log.open("a", encoding="utf-8"))),
                stderr=file,
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


def _watch(sweep: Sweep, children: list[subprocess.Popen[bytes]]) -> None:
    """Show progress until all workers have ended; pass an interrupt on to them."""
    try:
        with Progress(f"sweep {sweep.spec.name}") as progress:
            while any(child.poll() is None for child in children):
                if progress.due():
                    _show(sweep, progress)
                time.sleep(POLL_S)
            _show(sweep, progress)
    except BaseException:
        for child in children:
            child.send_signal(signal.SIGINT)
        for child in children:
            child.wait()
        raise
