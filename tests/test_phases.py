"""Phases: one learning-rate line over contexts and batches that change, resumed bit for bit."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from mupgpt.checkpoint.verify import load_newest
from mupgpt.config.phases import PhaseConfig
from mupgpt.config.plain import to_dict
from mupgpt.config.schedules import factor, lr_factor, warmup_steps
from mupgpt.data.batches import Batches
from mupgpt.data.corpus import Corpus, load_corpus
from mupgpt.errors import ConfigError
from mupgpt.planning.flops import flops_per_token, run_flops
from mupgpt.resolve import train_config
from mupgpt.runs.branch import branch_config
from mupgpt.runs.generate import load_run, sample
from mupgpt.trainer import Trainer
from mupgpt.training.metrics import FLOPS, TOKENS, TRAIN_LR
from mupgpt.training.population import Population

TWO = [{"steps": 6, "seq_len": 16, "batch_size": 8}, {"steps": 4, "seq_len": 64, "batch_size": 2}]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} squared is {i * i}; " for i in range(900)))
    return str(path)


def raw(text, phases=TWO, **changes):
    return {
        "model": {"preset": "btlm-proxy-48", "seq_len": 64},
        "phases": phases,
        "data": {"source": text, "eval_tokens": 256},
        "tracking": {"wandb": "off", "log_every": 1, "eval_every": 2, "checkpoint_every": 1},
        **changes,
    }  # fmt: skip


def configured(text="stdlib", phases=TWO, **changes):
    return train_config(raw(text, phases, **changes))


def test_a_run_without_phases_is_one_phase():
    config = train_config({"model": "proxy-32", "steps": 7})
    (whole,) = config.course
    assert (whole.steps, whole.seq_len, whole.batch_size) == (7, 64, 8)
    assert config.tokens == 7 * 8 * 64 and config.tokens_at(3) == 3 * 512
    assert train_config({"model": "proxy-32"}).steps == 200


def test_what_a_phase_leaves_out_is_the_run_s():
    config = configured(phases=[{"steps": 3}, {"steps": 2, "batch_size": 4}], batch_size=16)
    assert [(p.seq_len, p.batch_size) for p in config.course] == [(64, 16), (64, 4)]
    assert (config.steps, config.tokens) == (5, 3 * 16 * 64 + 2 * 4 * 64)
    assert train_config(to_dict(config)) == config


def test_btlm_3b_8k():
    """arXiv 2309.11568: 470.8B tokens at 2048, 156.9B at 8192, one line from step 95 to 0.85 %."""
    config = train_config({"model": "btlm-3b-8k"})
    assert config.steps == 159_636
    assert {p.tokens_per_step for p in config.course} == {1920 * 2048}
    assert config.phase_at(119_726).seq_len == 2048
    assert config.phase_at(119_727).seq_len == 8192
    assert config.tokens_at(119_727) == pytest.approx(470.8e9, rel=1e-4)
    assert config.tokens - config.tokens_at(119_727) == pytest.approx(156.9e9, rel=1e-3)
    assert warmup_steps(config.schedule, config.steps, config.tokens_per_step) == 95
    end = 0.00010198 / 0.012
    for step in (95, 1000, 119_726, 119_727, 159_635, 159_636):
        expected = 1 + (end - 1) * (step - 95) / 159_541
        assert lr_factor(config, step) == pytest.approx(expected, rel=1e-12)


def test_cerebras_gpt_13b_s_batch_change():
    """57 000 steps of 720 count as 38 000 of 1080; 78 223 more make 116 223 at the same tokens."""
    phases = [{"steps": 57_000}, {"steps": 78_223, "batch_size": 1080}]
    changed = train_config({"model": "cerebras-gpt-13b", "phases": phases})
    constant = train_config({"model": "cerebras-gpt-13b"})
    assert changed.tokens == pytest.approx(constant.tokens, rel=1e-5)

    def counter(step):
        return changed.tokens_at(step) / (1080 * 2048)

    assert counter(57_000) == 38_000 and counter(135_223) == 116_223
    # The line is that of the whole run counted at either batch, through its own 254 or 169 steps.
    total = changed.tokens / changed.tokens_per_step
    for step in (0, 100, 57_000):
        assert lr_factor(changed, step) == factor(constant.schedule, step, total, 720 * 2048)
    for step in (60_000, 100_000, 135_223):
        at_1080 = factor(constant.schedule, counter(step), 116_223, 1080 * 2048)
        assert lr_factor(changed, step) == pytest.approx(at_1080, rel=1e-4)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.lists(st.tuples(*(st.integers(1, 9),) * 3), min_size=1, max_size=4), st.integers(0, 40))
def test_tokens_add_up_step_by_step(shapes, step):
    phases = [{"steps": s, "seq_len": t, "batch_size": b} for s, t, b in shapes]
    config = configured(phases=phases)
    sizes = [p.tokens_per_step for p in config.course for _ in range(p.steps)]
    assert config.steps == len(sizes) and config.tokens == sum(sizes)
    assert config.tokens_at(step) == sum(sizes[:step])
    if step < config.steps:
        assert config.phase_at(step).tokens_per_step == sizes[step]


def test_one_line_whatever_the_phases_are():
    """Equal tokens per step: the schedule does not see the phases, to the last bit."""
    config = configured(phases=[{"steps": 30, "seq_len": 16, "batch_size": 8},
                                {"steps": 10, "seq_len": 64, "batch_size": 2}])  # fmt: skip
    whole = configured(phases=[], steps=40, batch_size=2)
    for step in range(41):
        assert lr_factor(config, step) == lr_factor(whole, step)


@pytest.mark.parametrize(
    ("phases", "more", "message"),
    [
        (TWO, {"steps": 9}, r"steps = 9: must be 10, as phases add up to"),
        ([{"steps": 0}], {}, r"phases\[0\]\.steps = 0: must be >= 1"),
        ([{"steps": 2, "batch_size": 3}], {"accumulate": 2}, r"accumulate = 2: must divide"),
        ([{"steps": 2, "seq_len": 128}], {"model": "proxy-32"},
         r"phases\.seq_len = 128: must be at most model\.seq_len = 64, where learned positions"),
        (TWO, {"tokens": 1e6}, r"tokens = 1000000\.0: must be left out where phases"),
    ],
)  # fmt: skip
def test_mistakes_are_named(phases, more, message):
    with pytest.raises(ConfigError, match=message):
        train_config({"model": "btlm-proxy-48", "phases": phases, **more})


def counting(n):
    tokens = np.arange(n, dtype=np.uint16)
    return Corpus("counting", tokens, tokens[:300], "bytes", "0" * 64, n, 1.0)


def course(*shapes):
    return [PhaseConfig(steps=s, seq_len=t, batch_size=b) for s, t, b in shapes]


def test_no_phase_reads_again_what_another_has_read():
    """Short, middle, long: every token at most once an epoch, in the phase's shape."""
    phases = course((8, 4, 6), (3, 8, 4), (2, 16, 3))
    batches = Batches(counting(2000), phases, seed=0)
    seen = []
    for step in range(13):
        x, y = batches(step)
        phase = phases[0] if step < 8 else phases[1] if step < 11 else phases[2]
        assert x.shape == y.shape == (phase.batch_size, phase.seq_len)
        assert torch.equal(y - x, torch.ones_like(x))
        starts = x[:, 0].tolist()
        assert len(set(starts)) == len(starts)  # a batch never has two parts of one window
        seen += x.flatten().tolist()
    assert len(seen) == len(set(seen)) == 8 * 24 + 3 * 32 + 2 * 48


def test_batches_do_not_know_how_long_the_last_phase_is():
    """A longer run begins with the shorter one's batches: branches see the same data."""
    short, long = (Batches(counting(2000), course((4, 4, 2), (n, 8, 2)), 0) for n in (3, 30))
    for step in range(7):
        assert torch.equal(short(step)[0], long(step)[0])


def test_a_branch_leaves_inside_a_phase():
    stem = configured(phases=[{"steps": 30, "seq_len": 16, "batch_size": 4}, {"steps": 70}],
                      schedule={"shape": "constant", "warmup": 0.02}, batch_size=8)  # fmt: skip
    for at, steps in ((20, 25), (50, 60), (90, 140)):
        branched = branch_config(stem, at=at, steps=steps, end=0.0)
        assert branched.steps == steps == sum(p.steps for p in branched.phases)
        assert [lr_factor(branched, s) for s in range(at)] == [
            lr_factor(stem, s) for s in range(at)
        ]
        assert lr_factor(branched, steps) == pytest.approx(0.0, abs=1e-12)
        assert lr_factor(branched, at + 1) < 1


def test_flops_count_each_phase_at_its_context():
    config = configured()
    per = [flops_per_token(config.model, "palm", c) for c in (16, 64)]
    assert run_flops(config, 8) == pytest.approx(6 * 128 * per[0] + 2 * 128 * per[1], rel=1e-12)
    assert per[1] - per[0] == 12 * config.model.n_layer * config.model.d_attn * 48
    assert flops_per_token(config.model) == per[1]


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final(folder):
    checkpoint = load_newest(folder / "checkpoints")
    return {**checkpoint.tensors("model"), **checkpoint.tensors("optimizer")}


def clean(record):
    return {k: v for k, v in record.items() if "per_s" not in k and "time" not in k}


@pytest.mark.parametrize("stop", [3, 6, 8])
def test_resuming_inside_a_phase_is_as_if_it_had_never_stopped(text, tmp_path, stop, monkeypatch):
    """Stopped in the first phase, at the change, and in the second: equal to the last bit."""
    config = configured(text)
    Trainer(config, tmp_path / "whole").fit()
    trainer = Trainer(config, tmp_path / "parts")
    once = Trainer._train_one

    def killed(self):
        if self.step == stop:
            raise KeyboardInterrupt
        return once(self)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "_train_one", killed)
        trainer.fit()
    Trainer(config, tmp_path / "parts").fit()
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    a, b = records(tmp_path / "whole"), records(tmp_path / "parts")
    assert [clean(r) for r in a] == [clean(r) for r in b]


def test_a_run_s_records_follow_its_phases(text, tmp_path):
    config = configured(text, phases=[{"steps": 2, "seq_len": 16, "batch_size": 2}, {"steps": 3}],
                        batch_size=1)  # fmt: skip
    Trainer(config, tmp_path / "run").fit()
    trained = [r for r in records(tmp_path / "run") if TRAIN_LR in r]
    assert [r[TOKENS] for r in trained] == [32, 64, 128, 192, 256]
    assert [r[FLOPS] for r in trained] == [run_flops(config, s) for s in range(1, 6)]
    for step, record in enumerate(trained):
        assert record[TRAIN_LR] == pytest.approx(config.hparams.lr * lr_factor(config, step))


def test_a_population_has_phases_too(text):
    """Members train as the solo run does, through the change of context."""
    configs = [dataclasses.replace(configured(text), seed=s) for s in (0, 1)]
    corpus = load_corpus(configs[0].data)
    together = Population(configs, corpus)
    together.train()
    for config in configs:
        alone = Population([config], corpus)
        alone.train()
        assert together.evaluate()[config.seed] == pytest.approx(alone.evaluate()[0], abs=1e-5)


def test_a_run_reads_longer_contexts_than_it_saw(text, tmp_path):
    """Weights stay; only what divides distances and where the context is cut are changed."""
    phases = [{"steps": 2, "seq_len": 16, "batch_size": 2}]
    Trainer(configured(text, phases), tmp_path / "run").fit()
    as_trained, _ = load_run(tmp_path / "run")
    longer, _ = load_run(tmp_path / "run", context=256, alibi_scaling=4.0)
    x = torch.arange(200).view(1, -1)
    assert (longer.config.seq_len, longer.config.alibi_scaling) == (256, 4.0)
    assert not torch.allclose(longer(x), as_trained(x))
    assert len(list(sample(longer, x[0], 20))) == 20
    learned = {"model": "proxy-32", "phases": phases}
    Trainer(configured(text, **learned), tmp_path / "learned").fit()
    with pytest.raises(ConfigError, match="context = 128: must be left out: learned positions"):
        load_run(tmp_path / "learned", context=128)
