"""What a scaling law reads: finished training runs, checked once and counted in one convention."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "FloatArray",
    "IntArray",
    "Runs",
    "as_columns",
    "distinct",
    "need_distinct",
    "need_runs",
    "positive",
    "read_any",
    "read_replication",
    "read_runs",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]

COLUMNS = ("n_params", "tokens", "flops", "loss")
REPLICATION_COLUMNS = {"n_params": "Model Size", "flops": "Training FLOP", "loss": "loss"}
REPLICATION_OUTLIERS = 5
# Published FLOPs carry two digits, so 6ND agrees with them to a few percent at best.
SIX_ND_RTOL = 0.05


def positive(name: str, values: ArrayLike) -> FloatArray:
    """Return `values` as a one-dimensional float array of finite positive numbers.

    Raises ValueError naming the field, the first bad value and its place.

    >>> positive("loss", [2.5, 2.25])
    array([2.5 , 2.25])
    """
    array = np.array(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}: give one number per run, at least one")
    bad = np.flatnonzero(~(np.isfinite(array) & (array > 0)))
    if bad.size:
        i = int(bad[0])
        raise ValueError(
            f"{name}[{i}] = {array[i]:g}: every {name} must be finite and above zero; "
            "drop that run or correct the value"
        )
    return array


def as_columns(**given: ArrayLike) -> dict[str, FloatArray]:
    """Return the named columns as `positive` gives them, all of one length.

    Raises ValueError for a value that is not finite and positive, and unequal lengths.

    >>> as_columns(loss=[2.5, 2.25], tokens=[1e9, 2e9])["tokens"].tolist()
    [1000000000.0, 2000000000.0]
    """
    checked = {name: positive(name, values) for name, values in given.items()}
    sizes = {name: len(column) for name, column in checked.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"columns differ in length ({listed}): give each run one value of each")
    return checked


def distinct(values: FloatArray) -> int:
    """Return how many values differ by more than a part in a million."""
    return len(np.unique(np.round(np.log(values), 6)))


def need_distinct(name: str, values: FloatArray, at_least: int, law: str) -> None:
    """Raise ValueError when a column has too few different values for the law to be fitted."""
    found = distinct(values)
    if found < at_least:
        shown = ", ".join(f"{value:g}" for value in np.unique(values)[:3])
        raise ValueError(
            f"{name} has {found} distinct value{'s' * (found != 1)} ({shown}): {law} needs at "
            f"least {at_least}; add runs that vary {name}"
        )


def need_runs(name: str, values: FloatArray, at_least: int, law: str) -> None:
    """Raise ValueError when a column has too few entries for the law to be fitted."""
    if len(values) < at_least:
        raise ValueError(
            f"{name} has {len(values)} values: {law} needs at least {at_least} runs; add runs"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Runs:
    """Finished runs, one entry per run in each column: the input of every law of loss.

    `n_params` and `tokens` are counts, `flops` the training FLOPs of the whole run, `loss` nats
    per token. `convention` names how parameters and FLOPs were counted, once or once per run.
    Under "6N", C = 6ND, a missing one of the three counts is derived from the other two.

    Raises ValueError for a value that is not finite and positive, columns of different length,
    the same run twice, or conventions that are mixed.

    >>> runs = Runs(n_params=[1e8, 2e8], tokens=[2e9, 4e9], loss=[3.5, 3.2])
    >>> runs.column("flops").tolist()
    [1.2e+18, 4.8e+18]
    """

    loss: FloatArray
    n_params: FloatArray | None = None
    tokens: FloatArray | None = None
    flops: FloatArray | None = None
    convention: str | Sequence[str] = "6N"

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in COLUMNS if getattr(self, name) is not None}
        checked = as_columns(**given)
        for name, values in checked.items():
            object.__setattr__(self, name, values)
        object.__setattr__(self, "convention", _one_convention(self.convention))
        _refuse_duplicates(checked)
        if self.convention == "6N" and len(checked) == len(COLUMNS):
            _check_six_nd(checked)

    def __len__(self) -> int:
        return len(self.loss)

    def column(self, name: str) -> FloatArray:
        """Return a column, deriving the missing one of flops, n_params, tokens under "6N"."""
        values = getattr(self, name)
        return self._derive(name) if values is None else values

    def take(self, index: ArrayLike) -> "Runs":
        """Return the runs at `index` (places or a mask), in that order.

        >>> Runs(flops=[1e18, 1e19, 1e20], loss=[3.0, 2.6, 2.3]).take([0, 2]).loss
        array([3. , 2.3])
        """
        rows = {n: c[np.asarray(index)] for n in COLUMNS if (c := getattr(self, n)) is not None}
        return Runs(**rows, convention=self.convention)

    def _derive(self, name: str) -> FloatArray:
        others = {n: getattr(self, n) for n in ("flops", "n_params", "tokens") if n != name}
        if self.convention != "6N" or any(values is None for values in others.values()):
            raise ValueError(
                f"{name} is missing and convention is {self.convention!r}: give the {name} of "
                f'every run, or both {" and ".join(others)} counted as "6N"'
            )
        if name == "flops":
            return 6 * others["n_params"] * others["tokens"]
        (divisor,) = (values for other, values in others.items() if other != "flops")
        return others["flops"] / (6 * divisor)


def _one_convention(convention: str | Sequence[str]) -> str:
    names = {convention} if isinstance(convention, str) else set(convention)
    if len(names) != 1:
        raise ValueError(
            f"convention mixes {', '.join(sorted(names)) or 'nothing'}: a law holds within one "
            "way of counting; recount the runs in one, or fit each group alone"
        )
    return names.pop()


def _refuse_duplicates(columns: Mapping[str, FloatArray]) -> None:
    rows = list(zip(*columns.values(), strict=True))
    first: dict[tuple[float, ...], int] = {}
    for i, row in enumerate(rows):
        if (j := first.setdefault(row, i)) != i:
            shown = ", ".join(f"{n} {v:g}" for n, v in zip(columns, row, strict=True))
            raise ValueError(
                f"runs {j} and {i} are the same ({shown}): a run counted twice makes the interval "
                "too narrow; drop one (seeds of one configuration differ in loss)"
            )


def _check_six_nd(columns: Mapping[str, FloatArray]) -> None:
    ratio = columns["flops"] / (6 * columns["n_params"] * columns["tokens"])
    bad = np.flatnonzero(np.abs(ratio - 1) > SIX_ND_RTOL)
    if bad.size:
        i = int(bad[0])
        raise ValueError(
            f'flops[{i}] is {ratio[i]:.3g} times 6·n_params·tokens but convention is "6N": name '
            "the convention that counted it, or leave the flops out"
        )


def read_runs(
    path: str | Path, columns: Mapping[str, str] | None = None, convention: str = "6N"
) -> Runs:
    """Return the runs of a CSV file with a header line.

    `columns` maps n_params, tokens, flops, loss to the file's own headings; by default the
    headings are those names, and those absent from the file are left out.

    Raises ValueError for a heading or a number that cannot be read, with its line.
    """
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no runs: give a header line and one line per run")
    wanted = columns or {name: name for name in COLUMNS if name in rows[0]}
    for name in ("loss", *wanted):
        if (heading := wanted.get(name, name)) not in rows[0]:
            raise ValueError(f"{path} has no column {heading!r} for {name}; it has {list(rows[0])}")
    table = {
        name: [_number(path, i, r, h) for i, r in enumerate(rows)] for name, h in wanted.items()
    }
    return Runs(**{n: np.array(v) for n, v in table.items()}, convention=convention)


def read_any(path: str | Path, convention: str = "6N") -> Runs:
    """Return the runs of a CSV file: the replication's when it has its headings, else our own."""
    with Path(path).open(newline="") as file:
        headings = set(next(csv.reader(file), []))
    if set(REPLICATION_COLUMNS.values()) <= headings:
        return read_replication(path)
    return read_runs(path, convention=convention)


def _number(path: str | Path, row: int, cells: Mapping[str, str | None], heading: str) -> float:
    try:
        return float(cells[heading] or "")
    except ValueError:
        shown = cells[heading]
        raise ValueError(
            f"{path} line {row + 2}: {heading} is {shown!r}; write a number such as 1.5e18"
        ) from None


def read_replication(path: str | Path) -> Runs:
    """Return the 240 runs that the Chinchilla replication fits, read from its published CSV.

    Besiroglu et al. (arXiv 2404.10102) extracted 245 points from a figure: "Model Size",
    "Training FLOP" and "loss", tokens being C/(6N). They leave out the five highest losses. The
    file has no licence and is not shipped: pass the path of your own copy.
    """
    runs = read_runs(path, REPLICATION_COLUMNS)
    if len(runs) <= REPLICATION_OUTLIERS:
        raise ValueError(f"{path} has {len(runs)} runs: the replication's file has 245")
    return runs.take(np.sort(np.argsort(runs.loss, kind="stable")[:-REPLICATION_OUTLIERS]))
