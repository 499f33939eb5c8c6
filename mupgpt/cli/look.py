"""Commands that show and copy what is there; none of them needs torch."""

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from mupgpt.cli.shared import print_json, read_config
from mupgpt.config.plain import to_dict
from mupgpt.errors import require
from mupgpt.presets import PRESETS
from mupgpt.resolve import base_dims, overlay, train_config
from mupgpt.util.bundled import bundled, find_bundled

if TYPE_CHECKING:
    from mupgpt.planning.plan import Plan

__all__ = ["COMMANDS", "prepare"]


def presets(json: bool = False) -> None:
    """Print every preset; for Cerebras-GPT the model card, computed from formulas.

    Args:
        json: Print machine-readable data.
    """
    from mupgpt.parametrization.layout import count_params
    from mupgpt.planning.model_card import model_card
    from mupgpt.report.tables import card_text

    if not json:
        print(card_text())
        return
    others = [p for p in PRESETS.values() if not p.card]
    rows = [
        {"name": p.name, "n_params": count_params(p.shape), **dataclasses.asdict(p.shape)}
        for p in others
    ]
    print_json({"models": model_card(), "proxies": rows})


def table(
    preset: Positional[str],
    rule: str | None = None,
    base: str | None = None,
    compare: str | None = None,
    json: bool = False,
    markdown: bool = False,
) -> None:
    """Print what a rule makes of each parameter, one site a line, and why.

    Args:
        preset: A preset's name or a config file.
        rule: The parametrization (default: the preset's own).
        base: Preset at whose dimensions the hyperparameters hold.
        compare: Print where this other rule differs.
        json: Print machine-readable data, one row per parameter.
        markdown: Print Markdown.
    """
    from mupgpt.parametrization.table import parametrize
    from mupgpt.report.tables import compare_text, table_text

    raw = read_config(preset)
    config = train_config(overlay(raw, {"rule": rule} if rule else {}))
    if base is not None:
        config = dataclasses.replace(config, base=base_dims(base))
    rows = parametrize(config.model, config.base, config.hparams, config.rule)
    other = compare and parametrize(config.model, config.base, config.hparams, compare)
    if json:
        beside = {"compare": other.to_dict()} if other else {}
        print_json({**rows.to_dict(), "base": to_dict(config.base), **beside})
    elif other:
        print(compare_text([rows, other]))
    else:
        print(table_text(config, rows, markdown))


def plan(
    config: Positional[str],
    gpus: int = 1,
    hbm: float = 139.0,
    peak_flops: float = 9.89e14,
    mfu: float = 0.4,
    reserve: float = 0.05,
    trace: bool = False,
    json: bool = False,
) -> None:
    """Print what a run will need and how it fits: parameters, FLOPs, bytes, days. Instant.

    Args:
        config: A preset's name or a config file.
        gpus: Devices; state is divided evenly among them.
        hbm: Memory of one device, GiB.
        peak_flops: Peak of one device, FLOP/s.
        mfu: Share of the peak that training reaches.
        reserve: Share of hbm to leave free.
        trace: Count the peak a second way: the real step on fake tensors, without a GPU (minutes).
        json: Print machine-readable data.
    """
    from mupgpt.planning.plan import Machine, plan as plan_of

    machine = Machine(gpus=gpus, hbm=hbm, peak_flops=peak_flops, mfu=mfu, reserve=reserve)
    needs = plan_of(train_config(read_config(config)), machine)
    traced = _traced(needs) if trace else {}
    if json:
        print_json({**needs.to_dict(), **({"traced_gib": traced} if trace else {})})
        return
    print(needs)
    if trace:
        parts = ", ".join(f"{kind} {size:.2f}" for kind, size in traced.items() if kind != "Total")
        print(f"traced on fake tensors: {traced['Total']:.2f} GiB together ({parts})")


def _traced(needs: "Plan") -> dict[str, float]:
    """GiB by PyTorch's kind at the peak of a step, as the plan stores and recomputes it."""
    from mupgpt.evidence.memory_trace import trace_peak
    from mupgpt.planning.plan import GIB

    peak = trace_peak(needs.stored, needs.machine.gpus)
    return {kind: size / GIB for kind, size in peak.items()}


def ls() -> None:
    """List the sweeps and examples that come with the package."""
    for kind in ("sweeps", "examples"):
        print(kind)
        files = bundled(kind)
        width = max(map(len, files), default=0)
        for name, path in files.items():
            print(f"  {name:<{width}}  {_first_line(path)}")


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].strip("#\"'. ")


def cp(name: Positional[str], to: Positional[Path]) -> None:
    """Copy a shipped sweep or example, to change it.

    Args:
        name: Its name, as `mupgpt ls` prints it.
        to: The new file.
    """
    require(not to.exists(), "to", str(to), "not exist yet: nothing is overwritten")
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(find_bundled(name), to)
    print(f"wrote {to}")


def prepare(
    source: Positional[str],
    out: Positional[Path],
    tokenizer: Literal["bytes", "gpt2"] = "gpt2",
) -> None:
    """Turn text into token shards that a run reads: OUT_train.bin and OUT_val.bin.

    Args:
        source: stdlib, package:NAME, a file, a folder or a glob.
        out: Prefix of the two shards.
        tokenizer: GPT-2's BPE (needs the extra mupgpt[gpt2]), or bytes.
    """
    from mupgpt.config.schema import DataConfig
    from mupgpt.data.corpus import load_corpus, write_corpus

    corpus = load_corpus(DataConfig(source=source, tokenizer=tokenizer))
    for path, tokens in write_corpus(corpus, out):
        print(f"wrote {path}: {tokens:,} tokens")


COMMANDS = (presets, table, plan, ls, cp)
