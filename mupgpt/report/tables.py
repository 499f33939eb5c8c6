"""Tables as text: the µP table, the presets, and their Markdown."""

import math
from collections.abc import Sequence

from mupgpt.config.schema import TrainConfig
from mupgpt.parametrization.layout import count_params
from mupgpt.parametrization.table import ParamTable
from mupgpt.planning.model_card import model_card
from mupgpt.presets import PRESETS
from mupgpt.resolve import train_config
from mupgpt.util.text import align, number

__all__ = ["card_text", "compare_text", "table_text"]


def table_text(config: TrainConfig, table: ParamTable, markdown: bool = False) -> str:
    """The whole table for a terminal (or as Markdown): sites, then the forward's multipliers."""
    base, model = config.base, config.model
    title = (
        f"rule {table.rule}: {count_params(model):,} parameters, {model.n_layer} layers × "
        f"{model.d_model} wide, base {base.n_layer:g} × {base.d_model:g} "
        f"(lr {config.hparams.lr:g}, std {config.hparams.init_std:g}, "
        f"emb × {config.hparams.emb_mult:g})"
    )
    return "\n".join([title, "", *table.lines(markdown)])


def compare_text(tables: Sequence[ParamTable]) -> str:
    """Sites on which two rules differ, one line a site, figures side by side."""
    a, b = tables
    rows: list[tuple[str, ...]] = [("site", "figure", a.rule, b.rule, "ratio")]
    for (x, _), (y, _) in zip(a.sites(), b.sites(), strict=True):
        for key in ("init_std", "lr", "weight_decay", "eps"):
            rows += _difference(x.site, key, getattr(x, key), getattr(y, key))
        if x.init != y.init:
            rows.append((x.site, "init", x.init, y.init, ""))
    for point, m in a.multipliers.items():
        rows += _difference(f"forward {point}", "×", m.value, b.multipliers[point].value)
    if len(rows) == 1:
        return f"{a.rule} and {b.rule} agree on every figure"
    return "\n".join(align(rows, {2, 3, 4}))


def _difference(site: str, key: str, x: float, y: float) -> list[tuple[str, ...]]:
    if math.isclose(x, y, rel_tol=1e-9):
        return []
    return [(site, key, number(x), number(y), f"×{y / x:.4g}" if x else "")]


def card_text() -> str:
    """All presets; for Cerebras-GPT the model card, from formulas."""
    head = ("preset", "parameters", "L", "d", "heads×d_head", "d_ffn", "lr", "batch", "steps",
            "tokens", "FLOPs (cerebras)", "FLOPs (palm)", "Pile loss")  # fmt: skip
    rows: list[tuple[str, ...]] = [head]
    for row in model_card():
        batch = row["batch_seqs"]
        rows.append((
            row["preset"], f"{row['n_params']:,}", str(row["n_layer"]), str(row["d_model"]),
            f"{row['n_head']}×{row['d_head']}", str(row["d_ffn"]), f"{row['lr']:.1e}",
            "→".join(map(str, batch)) if isinstance(batch, list) else str(batch),
            str(row["steps"]), row["tokens"], row["flops"], row["flops_palm"],
            f"{row['pile_test_xent']:.3f}",
        ))  # fmt: skip
    for preset in PRESETS.values():
        if not preset.card:
            s = preset.shape
            run = train_config({"model": preset.name})
            batches = dict.fromkeys(str(phase.batch_size) for phase in run.course)
            rows.append((
                preset.name, f"{count_params(s):,}", str(s.n_layer), str(s.d_model),
                f"{s.n_head}×{s.d_head}", str(s.d_ffn), f"{preset.hparams.lr:.1e}",
                "→".join(batches), str(run.steps), f"{run.tokens:.2E}", "", "", "",
            ))  # fmt: skip
    notes = [
        "lr: published standard-parametrization peak (Cerebras-GPT, Llama 2), µP base lr (others)",
        "13B: 174335 steps are counted at batch 720; the run went on at 1080",
        "FLOPs: 'cerebras' reproduces the card (attention counted twice); 'palm' is 6N + 12LdT",
    ]
    return "\n".join([*align(rows, set(range(1, len(head)))), "", *notes])
