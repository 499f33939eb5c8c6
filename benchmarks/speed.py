"""Run every speed benchmark, then write docs/speed.md from their records.

    python benchmarks/speed.py         # under eight minutes on two quiet cores
    python benchmarks/speed.py page    # the page alone, from the records on disk

The page's figures are the records'; its sentences are benchmarks/speed.md.jinja.
"""

import json
import subprocess
import sys
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from measure import HERE, RESULTS

PAGE = HERE.parent / "docs" / "speed.md"
BENCHMARKS = ("start_times", "gemm_share", "rule_overhead", "versus_hf", "sweep_throughput")


def main() -> None:
    if sys.argv[1:] != ["page"]:
        for name in BENCHMARKS:
            print(f"== {name}", flush=True)
            subprocess.run([sys.executable, str(HERE / f"{name}.py")], check=True)
    records = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in BENCHMARKS}
    PAGE.write_text(page(records), encoding="utf-8")
    print(f"wrote {PAGE}")


def page(records: dict[str, Any]) -> str:
    """docs/speed.md: every figure from the records, every sentence from the template."""
    room = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    room.filters |= {"times": times, "percent": percent, "thousands": thousands}
    return room.get_template("speed.md.jinja").render(records)


def times(spread: dict[str, float], digits: int = 2) -> str:
    """Median and quartiles.

    >>> times({"median": 1.5, "low": 1.25, "high": 1.75})
    '1.50 (1.25–1.75)'
    """
    median, low, high = (f"{spread[key]:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} ({low}–{high})"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def thousands(rate: float) -> str:
    return f"{rate / 1000:.1f} k"


if __name__ == "__main__":
    main()
