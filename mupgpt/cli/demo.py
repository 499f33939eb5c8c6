"""The main job from end to end: sweep proxies, check the transfer, transfer, train the target."""

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mupgpt.config.plain import to_dict
from mupgpt.evidence.verdict import Verdict, judge_sweep
from mupgpt.mutransfer.transfer import TransferPlan, transfer
from mupgpt.mutransfer.tuned import Tuned
from mupgpt.parametrization.layout import count_params
from mupgpt.report.page import Section, inline_svg, write_page
from mupgpt.report.pictures import verdict_picture
from mupgpt.report.tables import table_text
from mupgpt.resolve import train_config
from mupgpt.trainer import Trainer
from mupgpt.tuning.best import best_hparams
from mupgpt.tuning.run import run_sweep
from mupgpt.tuning.study import Sweep

__all__ = ["run_demo"]

CURVES, JOINT = "demo-lr", "demo-joint"
TARGET = {"model": "proxy-256", "steps": 200}
BIG = "cerebras-gpt-13b"
TOLERANCE = 0.3  # three seeds cannot resolve less; `mupgpt verdict lr` has five and takes 0.2


@dataclass
class Account:
    """What the demo says, on the terminal and in the report."""

    out: Path
    sections: list[Section] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def step(self, number: int, text: str) -> None:
        """Announce a step."""
        print(f"\n[{number}/5] {text}  ({time.monotonic() - self.started:.0f} s)", flush=True)

    def say(self, section: Section, brief: str | None = None) -> None:
        """Print a section (or its brief form) and keep it for the report."""
        for part in (section.text, section.pre if brief is None else brief):
            if part:
                print(part, flush=True)
        self.sections.append(section)

    def write(self, name: str, data: Any) -> None:
        """Write a result as JSON."""
        text = json.dumps(data, indent=1, allow_nan=False)
        (self.out / name).write_text(text, encoding="utf-8")


def run_demo(out: Path, workers: int | None = None) -> None:
    """Do the whole job and leave its results under ``out``; interrupted, it goes on from there."""
    out.mkdir(parents=True, exist_ok=True)
    account = Account(out)
    account.step(1, "joint Optuna sweep of five hyperparameters on the width-32 proxy")
    tuned = _sweep(account, workers)
    account.step(2, "loss against learning rate at widths 32, 64, 128, under mup and sp-fanin")
    verdict = _curves(account, workers)
    account.step(3, "transfer of the best hyperparameters to width 256")
    plan = _transfer(account, tuned)
    account.step(4, "training the target")
    _train(account, plan)
    account.step(5, "the 13B config from Cerebras-GPT's published base values")
    _big(account)
    write_page(out / "report.html", "mupgpt: tuned small, trained large", account.sections)
    took = time.monotonic() - account.started
    print(f"\n{verdict.rule}: {verdict.verdict}. Everything is in {out} ({took:.0f} s); "
          f"open {out / 'report.html'}")  # fmt: skip


def _sweep(account: Account, workers: int | None) -> Tuned:
    run_sweep(JOINT, workers=workers)
    sweep = Sweep.open(JOINT)
    space = sweep.spec.space
    tuned = best_hparams(sweep.studies()[JOINT])
    text = (
        f"Trial {tuned.trial} of {sweep.spec.study.trials} is best: "
        f"{tuned.loss:.3f} ± {tuned.spread:.3f} nats per byte on three fresh seeds."
    )
    changed = {key: getattr(tuned.config.hparams, key.removeprefix("hparams.")) for key in space}
    brief = ", ".join(f"{k.removeprefix('hparams.')} {v:.3g}" for k, v in changed.items())
    account.say(Section(heading="1. Joint sweep on the proxy", text=text, pre=str(tuned)), brief)
    return tuned


def _curves(account: Account, workers: int | None) -> Verdict:
    run_sweep(CURVES, workers=workers)
    verdict = judge_sweep(Sweep.open(CURVES), TOLERANCE)
    svg, _ = verdict_picture(verdict, account.out / "lr-vs-width")
    account.write("verdict.json", verdict.to_dict())
    rules = verdict.rules
    text = (
        "Under mup the best learning rate of width 32 is that of every width; under sp-fanin it "
        f"runs away by {rules['sp-fanin'].shift:+.2f} octaves per doubling of width."
        if (verdict.verdict, rules["sp-fanin"].verdict) == ("PASS", "FAIL")
        else f"mup: {verdict.verdict}, the control sp-fanin: {rules['sp-fanin'].verdict}."
    )
    account.say(
        Section(heading="2. Does it transfer?", text=text, pre=str(verdict), svg=inline_svg(svg))
    )
    return verdict


def _transfer(account: Account, tuned: Tuned) -> TransferPlan:
    plan = transfer(tuned, TARGET)
    account.write("transfer.json", plan.to_dict())
    (account.out / "target.toml").write_text(plan.to_toml(), encoding="utf-8")
    pre = f"{plan}\n\n{table_text(plan.config, plan.table)}"
    account.say(Section(heading="3. Transfer to the target", pre=pre), brief=str(plan))
    return plan


def _train(account: Account, plan: TransferPlan) -> None:
    folder = account.out / "target"
    resolved = folder / "config.json"
    if resolved.is_file() and json.loads(resolved.read_text()) != to_dict(plan.config):
        shutil.rmtree(folder)  # of an earlier demo with another outcome
    result = Trainer(plan.config, folder).fit()
    metrics = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    (account.out / "metrics.jsonl").write_text(metrics, encoding="utf-8")
    text = (
        f"{count_params(plan.config.model):,} parameters after {result['tokens']:,} tokens: "
        f"{result['val/loss']:.4f} nats per byte held out, {result['val/bpb']:.4f} bits per byte."
    )
    account.say(Section(heading="4. The target, trained", text=text))


def _big(account: Account) -> None:
    source = train_config({"model": "cerebras-gpt-40m"})
    plan = transfer(source, BIG)
    (account.out / f"{BIG}.toml").write_text(plan.to_toml(), encoding="utf-8")
    pre = f"{plan}\n\n{table_text(plan.config, plan.table)}"
    text = f"Execute it on a machine that holds it: mupgpt train {account.out / f'{BIG}.toml'}"
    account.say(Section(heading="5. The 13B config", text=text, pre=pre),
                brief=table_text(plan.config, plan.table))  # fmt: skip
