"""Commands around the laws: what to train, what it will reach, and one run with many horizons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from mupgpt.errors import ConfigError, require, unknown

if TYPE_CHECKING:
    from mupgpt.mutransfer.transfer import TransferPlan
    from mupgpt.scaling.chinchilla import ChinchillaFit
    from mupgpt.scaling.report import LawReport

__all__ = ["COMMANDS"]

ANNEALING = "annealing"
Out = Annotated[Path, arg(aliases=["-o"])]


def branch(
    run: Positional[Path],
    steps: int,
    out: Out,
    at: int | None = None,
    decay_shape: Literal["linear", "1-sqrt", "exponential", "cosine"] = "linear",
    end: float = 0.1,
) -> None:
    """Branch a decay off a stable run and train it: bit for bit the run planned so from the start.

    Args:
        run: Folder of a run that is still at its peak rate (schedule.shape constant or wsd).
        steps: Steps of the whole branched run; it decays from the branch point on.
        out: Folder of the new run; the same command continues it.
        at: The step to leave at (default: the newest checkpoint; tracking.keep_steps keeps more).
        decay_shape: How the rate falls.
        end: Final factor of the peak.
    """
    from mupgpt.cli.shared import one_thread, print_json
    from mupgpt.runs.branch import branch as start
    from mupgpt.trainer import Trainer

    one_thread()
    config = start(run, out, steps, at, decay_shape=decay_shape, end=end)
    print_json(Trainer(config, out).fit())


def fit(
    runs: Positional[tuple[Path, ...]],
    law: str,
    predict: tuple[str, ...] = (),
    convention: str = "6N",
    begin: int = 0,
    json: bool = False,
    picture: Path | None = None,
) -> None:
    """Fit a scaling law to finished runs, and predict one that has not been trained.

    Laws: chinchilla, isoflop, envelope, power, compute, overtraining, annealing; downstream,
    critical-batch, batch, timescale, optimal, step-time (docs/laws.md says what each one reads).

    Args:
        runs: A CSV file with a header (flops, n_params, tokens, loss as the law needs them), or run
            folders of `mupgpt train`.
        law: The law's name.
        predict: Where to predict: 1e21, or n_params=1e9 tokens=2e10; for annealing a config file.
        convention: How FLOPs are counted: 6N, 6N-stored, palm, chinchilla, cerebras.
    begin: For annealing, the step after which the curves count (0: three warm-ups).
        json: Print machine-readable data.
        picture: Write measured and fitted losses there, as SVG and PNG.
    """
    from mupgpt.cli.shared import print_json

    require(len(runs) > 0, "runs", "", "be a CSV file or run folders")
    with _bad_data(", ".join(map(str, runs))):
        found = _annealing(runs, predict, begin) if law == ANNEALING else _law(
            runs, law, predict, convention
        )  # fmt: skip
    if picture is not None:
        from mupgpt.report.law_picture import law_picture

        law_picture(found, picture)
    if json:
        print_json(found.to_dict())
    else:
        print(found)


@contextmanager
def _bad_data(origin: str) -> Iterator[None]:
    """A law's complaint about its data is the user's to mend: one line."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"{origin}: {error}") from error


def _law(runs: Sequence[Path], name: str, predict: Sequence[str], convention: str) -> LawReport:
    from mupgpt.planning.flops import CONVENTIONS
    from mupgpt.runs.folders import read_folders
    from mupgpt.scaling.named import LAWS
    from mupgpt.scaling.report import report
    from mupgpt.scaling.runs import read_any

    if name not in LAWS:
        raise unknown("law", name, [*LAWS, ANNEALING])
    if convention not in CONVENTIONS:
        raise unknown("FLOPs convention", convention, CONVENTIONS)
    law = LAWS[name]
    at = _inputs(predict, list(law.predict))
    if not _is_table(runs):
        require(law.columns == ("runs",), "runs", str(runs[0]), f"be a CSV with {law.columns}")
        return report(name, read_folders(runs, convention), at)
    if law.columns == ("runs",):
        return report(name, read_any(runs[0], convention), at)
    return report(name, read_columns(runs[0], law.columns), at, convention)


def _is_table(runs: Sequence[Path]) -> bool:
    return len(runs) == 1 and not runs[0].is_dir()


def read_columns(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """The named columns of a CSV file with a header line, as float arrays."""
    import csv

    import numpy as np

    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name in names:
        if not rows or name not in rows[0]:
            have = ", ".join(rows[0]) if rows else "nothing"
            raise ConfigError(f"{path} has no column {name!r}; it has {have}")
    try:
        return {name: np.array([float(row[name]) for row in rows]) for name in names}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}; write numbers such as 1.5e18") from error


def _inputs(words: Sequence[str], known: list[tuple[str, ...]]) -> dict[str, float]:
    """Inputs by name: ``name=value`` each, or bare values in the order of the law."""
    if not words:
        return {}
    names = next((names for names in known if len(names) == len(words)), None)
    pairs = [word.split("=", 1) if "=" in word else [None, word] for word in words]
    if all(name is None for name, _ in pairs) and names:
        pairs = [[name, value] for name, (_, value) in zip(names, pairs, strict=True)]
    if any(name is None for name, _ in pairs):
        choices = " or ".join(" ".join(f"{name}=…" for name in names) for names in known)
        raise ConfigError(f"predict = {' '.join(words)}: give {choices}")
    return {str(name): _positive(f"predict {name}", str(value)) for name, value in pairs}


def _positive(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    require(0 < value < float("inf"), name, text, "be a positive number")
    return value


def _annealing(runs: Sequence[Path], predict: Sequence[str], begin: int) -> LawReport:
    from mupgpt.cli.shared import read_config
    from mupgpt.resolve import train_config
    from mupgpt.runs.folders import read_curves, step_rates
    from mupgpt.scaling.report import annealing_report

    require(not _is_table(runs), "runs", str(runs[0]), "be run folders: the law reads whole curves")
    require(len(predict) <= 1, "predict", " ".join(predict), "be one config file")
    target = [step_rates(train_config(read_config(name))) for name in predict]
    return annealing_report(read_curves(runs, begin), *target)


def predicted(plan: TransferPlan, ladder: str) -> TransferPlan:
    """The plan with its target's loss predicted from a ladder under the plan's hyperparameters."""
    from mupgpt.cli.shared import one_thread
    from mupgpt.evidence.ladder import load_ladder, run_ladder

    one_thread()
    spec = load_ladder(ladder).like(plan.config)
    return plan.expecting(run_ladder(spec).predict(plan.config))


def propose(
    flops: float = 0.0,
    hours: float = 0.0,
    gpus: int = 1,
    peak_flops: float = 989e12,
    mfu: float = 0.4,
    loss: float = 0.0,
    inference_tokens: float = 0.0,
    like: str = "cerebras-gpt-40m",
    runs: tuple[Path, ...] = (),
    batch_size: int = 0,
    out: Annotated[Path | None, arg(aliases=["-o"])] = None,
    json: bool = False,
) -> None:
    """Propose what to train on a budget, with the loss to expect and all that it assumes.

    Args:
        flops: Training FLOPs (6ND).
        hours: Or hours on so many accelerators.
        gpus: Accelerators.
        peak_flops: Peak FLOP/s of one (default: bf16 of an H100 or H200, without sparsity).
        mfu: Share of that peak which training reaches.
        loss: Or the loss to reach, nats per token.
        inference_tokens: Tokens of the model's later use, paid for beside training.
        like: Preset whose vocabulary, context, data, base and hyperparameters are taken.
        runs: Fit the law to these runs (a CSV file or run folders) instead of published constants.
        batch_size: Sequences per step (default: the published recipes' trend).
        out: The config (TOML).
        json: Print machine-readable data.
    """
    from mupgpt.cli.shared import print_json
    from mupgpt.scaling.propose import Budget, propose as propose_run

    budget = Budget(
        flops=flops, hours=hours, gpus=gpus, peak_flops=peak_flops, mfu=mfu, loss=loss,
        inference_tokens=inference_tokens,
    )  # fmt: skip
    with _bad_data(", ".join(map(str, runs))):
        law = _chinchilla(runs) if runs else None
    found = propose_run(budget, like=like, fit=law, batch_size=batch_size)
    if out is not None:
        import tomli_w

        said = "".join(f"# {line}\n" for line in str(found).splitlines())
        out.write_text(f"{said}\n{tomli_w.dumps(found.to_dict()['config'])}", encoding="utf-8")
    if json:
        print_json(found.to_dict())
        return
    print(found)
    if out is not None:
        print(f"\nwrote {out}; execute it with: mupgpt train {out}")


def _chinchilla(runs: Sequence[Path]) -> ChinchillaFit:
    from mupgpt.runs.folders import read_folders
    from mupgpt.scaling.chinchilla import fit_chinchilla
    from mupgpt.scaling.runs import read_any

    return fit_chinchilla(read_any(runs[0]) if _is_table(runs) else read_folders(runs))


COMMANDS = (branch, fit, propose)
