"""The coordinate check passes what scales as promised, and names what does not."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch

from mupgpt.cli import run
from mupgpt.cli.checks import SMALL as SMALL_FLAGS
from mupgpt.config.schema import Base, GPTConfig
from mupgpt.errors import ConfigError
from mupgpt.evidence.coordinates import HPARAMS, SHAPES, _settings, coord_check
from mupgpt.evidence.probes import activations, generation_gap, measure, random_batch
from mupgpt.evidence.slopes import ALLOWANCE, MAX_ERROR, Slope, fit_slopes, is_zero
from mupgpt.model.gpt import GPT, scale
from mupgpt.model.init import init_weights
from mupgpt.optim.solo import OPTIMIZERS, _momentum as momentum_groups
from mupgpt.parametrization.axes import AXES
from mupgpt.parametrization.expected_slopes import expected_slopes
from mupgpt.parametrization.rules import RULES
from mupgpt.parametrization.table import parametrize
from mupgpt.report.coord_picture import coord_picture

MUP = RULES["mup"]
SMALL = {"sizes": (32, 64, 128), "seeds": range(4)}
UNTIED = {"tied": False}
LARGE_EPS, HUGE_EPS = (dataclasses.replace(HPARAMS, eps=eps) for eps in (3e-4, 3e-3))
slow = pytest.mark.slow
ATTN, READOUT = {"attn": {"m_dh": -0.5}}, {"readout": {"m_d": -1}}
HIDDEN = {"hidden": {"m_in": -1}}

SHAPE = GPTConfig(n_layer=2, d_model=32, d_head=16, vocab_size=11, seq_len=6)


@functools.cache
def small(rule="mup", tied=True):
    return coord_check(rule, shape={"tied": tied}, **SMALL)


def changed(**fields):
    return dataclasses.replace(MUP, **fields)


def off(check):
    return {(s.setting, s.measure, s.probe) for s in check.slopes if not s.ok}


@pytest.mark.parametrize("rule", ["mup", "cerebras", "mup-package"])
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=slow)])
def test_shipped_rules_pass(rule, tied):
    check = small(rule, tied)
    assert check.passed and not check.suspects, str(check)
    assert all(abs(s.slope - s.expected) < 0.2 for s in check.slopes)


@pytest.mark.parametrize(
    ("rule", "suspects"),
    [
        ("sp", {"lr.hidden", "forward.readout", "forward.attn", "init_std.hidden"}),
        pytest.param("sp-fanin", {"lr.hidden", "forward.readout", "forward.attn"}, marks=slow),
    ],
)
def test_controls_fail_by_what_they_lack(rule, suspects):
    check = small(rule)
    assert not check.passed
    assert set(check.suspects) == suspects


PLANTED = {
    "lr.hidden": changed(lr={}),
    "forward.readout": changed(forward=ATTN),
    "forward.attn": changed(forward=READOUT),
    "init_std.hidden": changed(init_std={}),
    "lr.input": changed(lr={**HIDDEN, "input": {"m_d": -1}}),
    "lr.bias": changed(lr={**HIDDEN, "bias": {"m_d": -1}}),
    "lr.norm": changed(lr={**HIDDEN, "norm": {"m_d": 0.5}}),
    "residual_out_std": changed(residual_out_std={"m_in": 0.5}),
    "init_std.input": changed(init_std={**MUP.init_std, "input": {"m_d": -0.5}}),
    "forward.emb": changed(forward={**ATTN, **READOUT, "emb": {"m_d": -0.5}}),
}


FIRST = ("lr.hidden", "forward.readout", "forward.attn", "init_std.hidden", "lr.input")


@pytest.mark.parametrize(
    "part", [part if part in FIRST else pytest.param(part, marks=slow) for part in PLANTED]
)
def test_a_planted_mistake_is_named(part):
    """The rule declares, a changed literal is applied: that part alone is suspected."""
    check = coord_check("mup", PLANTED[part], **SMALL)
    assert not check.passed
    assert list(check.suspects) == [part], str(check)
    assert str(check).endswith("FAILED") and f"likely broken: {part} (" in str(check)
    if part == "forward.attn":
        assert {setting for setting, *_ in off(check)} == {"n_head fixed"}


@slow
@pytest.mark.parametrize("part", ["lr.output", "init_std.output"])
def test_a_planted_mistake_in_a_readout_of_its_own_is_named(part):
    applied = {
        "lr.output": changed(lr={**HIDDEN, "output": {"m_d": -1}}),
        "init_std.output": changed(init_std={**MUP.init_std, "output": {"m_d": 0.5}}),
    }[part]
    assert list(coord_check("mup", applied, shape=UNTIED, **SMALL).suspects) == [part]


def test_epsilon_that_does_not_shrink_is_named_when_large():
    check = coord_check("mup", changed(eps={}), hparams=LARGE_EPS, **SMALL)
    assert list(check.suspects) == ["eps"]
    assert ("d_head fixed", "damping", "hidden") in off(check)


def test_epsilon_over_width_is_right_but_for_q_and_k_of_growing_heads():
    """There their gradients begin as width^-3/2, so that a large ε damps them even under µP."""
    check = coord_check("mup", hparams=LARGE_EPS, **SMALL)
    assert {(s, probe) for s, _, probe in off(check)} <= {("n_head fixed", "qk")}


def forward_without_readout_multiplier(self, tokens, targets=None, cache=None, *, when):
    """GPT.forward, its readout multiplier missing where nanoGPT-mup's is: in generation."""
    if not when(targets, cache):
        return FORWARD(self, tokens, targets, cache)
    logits = FORWARD(self, tokens, None, cache)
    return logits / self.factors()["readout"]


FORWARD = GPT.forward


@pytest.mark.parametrize(
    "when",
    [
        lambda targets, cache: targets is None,
        pytest.param(lambda targets, cache: cache is not None, marks=slow),
        pytest.param(lambda targets, cache: targets is None and cache is None, marks=slow),
    ],
)
def test_a_multiplier_that_generation_lacks_is_named(monkeypatch, when):
    broken = functools.partialmethod(forward_without_readout_multiplier, when=when)
    monkeypatch.setattr(GPT, "forward", broken)
    check = coord_check("mup", **SMALL)
    assert not check.passed and not off(check)
    assert list(check.suspects) == ["generation"]


@slow
def test_code_that_ignores_a_multiplier_is_named(monkeypatch):
    """Not only literals are checked: the forward's own arithmetic is."""
    monkeypatch.setattr(GPT, "readout", lambda self, h: self.head(h))
    assert list(coord_check("mup", **SMALL).suspects) == ["forward.readout"]


def counting_backend(graphs):
    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    return backend


def test_compiled_steps_leave_the_same_numbers():
    table = parametrize(SHAPE, Base.of(SHAPE), HPARAMS, "mup")
    graphs = []
    run = functools.partial(measure, SHAPE, table, [0, 1], steps=10)
    (compiled, gap), (eager, _) = run(backend=counting_backend(graphs)), run()
    assert len(graphs) >= 2  # with gradients and without
    assert gap < 1e-4
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value, rtol=2e-3, atol=1e-7)


@slow
def test_compiled_models_are_checked():
    graphs = []
    compiled = coord_check("mup", backend=counting_backend(graphs), **SMALL)
    assert len(graphs) >= 12  # six models, each twice: none falls back to eager
    assert compiled.passed
    for a, b in zip(compiled.slopes, small().slopes, strict=True):
        assert a.by_seed == pytest.approx(b.by_seed, abs=2e-3)


@slow
def test_a_mistake_in_a_compiled_model_is_named():
    check = coord_check("mup", changed(lr={}), backend="aot_eager", **SMALL)
    assert list(check.suspects) == ["lr.hidden"]


@pytest.mark.parametrize("rule", ["completep", "minicpm", "mup-lion", "mup-sgd"])
def test_other_rules_and_optimizers_pass_over_width(rule):
    check = small(rule)
    assert check.passed and not check.suspects, str(check)
    claimed = {"d_head fixed", "n_head fixed"} if rule != "minicpm" else {"d_head fixed"}
    assert {slope.setting for slope in check.slopes} == claimed


def test_a_gain_that_heads_share_has_exponents_of_its_own():
    """Those of a norm as wide as the model would fail a table that is right (SGD, d_head fixed)."""
    check = coord_check("mup-sgd", shape={"qk_norm": True}, **SMALL)
    assert check.passed and not check.suspects, str(check)
    assert {s.measure for s in check.slopes if s.probe == "norm.qk"} == {
        "gradient", "rate", "update",
    }  # fmt: skip


def test_a_probe_without_an_exponent_borrows_none():
    """But for the stream, which may have one for all layers."""
    run = [{("step", p): torch.ones(3) * 2**i for p in PROBES} for i in range(3)]
    expected = {"step": {"norm": 1.0, "residual": 1.0, "residual.last": 0.5}}
    found = {s.probe: s.expected for s in fit_slopes("d_head fixed", (1, 2, 4), run, expected)}
    assert found == {"norm": 1.0, "residual.0": 1.0, "residual.last": 0.5}


PROBES = ("norm", "norm.qk", "norm.final", "residual.0", "residual.last")


@slow
@pytest.mark.parametrize("rule", ["completep-eps", "depth-mup", "supar", "mup-muon"])
def test_the_rest_pass_over_width(rule):
    assert small(rule).passed and not small(rule).suspects, str(small(rule))


@slow
@pytest.mark.parametrize(
    ("rule", "lr", "suspects"),
    [
        ("mup-sgd", HIDDEN, {"lr.input", "lr.hidden", "lr.bias", "lr.norm"}),
        ("mup-sgd", {}, {"lr.input", "lr.bias", "lr.norm"}),
        ("mup-lion", {}, {"lr.hidden"}),
        ("mup-muon", HIDDEN, {"lr.hidden"}),
    ],
)
def test_exponents_of_another_optimizer_are_named(rule, lr, suspects):
    """Adam's width rule is wrong for SGD and for Muon's matrices, and no rule is wrong for Lion."""
    check = coord_check(rule, dataclasses.replace(RULES[rule], lr=lr), **SMALL)
    assert not check.passed and set(check.suspects) == suspects, str(check)


@slow
def test_muon_that_matches_adams_rms_does_not_transfer(monkeypatch):
    """torch's other adjustment, 0.2·√max(out, in), lets steps grow as √width."""
    monkeypatch.setitem(
        OPTIMIZERS,
        "muon",
        lambda groups: torch.optim.Muon(momentum_groups(groups), adjust_lr_fn="match_rms_adamw"),
    )
    check = coord_check("mup-muon", **SMALL)
    steps = [s for s in check.slopes if (s.measure, s.probe) == ("step", "hidden")]
    assert not check.passed and list(check.suspects) == ["lr.hidden"]
    assert all(s.slope - s.expected == pytest.approx(0.5, abs=0.1) for s in steps)


DEPTH = {"axis": "depth", "sizes": (2, 4, 8), "seeds": range(4)}
STEPS = {"lr.hidden", "lr.bias", "lr.norm"}


@functools.cache
def deep(rule):
    return coord_check(rule, **DEPTH)


def change(check, probe):
    return next(s.slope for s in check.slopes if (s.measure, s.probe) == ("change", probe))


@pytest.mark.parametrize(
    "rule", ["completep", "depth-mup", pytest.param("completep-eps", marks=slow)]
)
def test_rules_of_depth_pass_over_depth(rule):
    assert deep(rule).passed and not deep(rule).suspects, str(deep(rule))


@pytest.mark.parametrize("rule", ["mup", "sp", "cerebras", "supar"])
def test_depth_needs_its_own_rule(rule):
    """1/√(2L) at initialization is not enough: the steps of all layers add up."""
    assert set(deep(rule).suspects) == STEPS
    assert ("depth", "change", "residual.last") in off(deep(rule))
    assert change(deep(rule), "residual.last") > 0.3


COMPLETEP = RULES["completep"]
DEEP = {  # completep's depth part with the width part of another optimizer
    "mup-lion": dataclasses.replace(COMPLETEP, optimizer="lion"),
    "mup-muon": dataclasses.replace(COMPLETEP, optimizer="muon", lr={}, weight_decay={}),
    "mup-sgd": dataclasses.replace(
        RULES["mup-sgd"],
        residual_out_std={},
        forward=COMPLETEP.forward,
        block_lr={"m_L": 1},  # undoes the 1/m_L of the gradient
    ),
}


@pytest.mark.parametrize("rule", DEEP)
def test_every_optimizer_needs_and_has_a_depth_part(rule):
    """Width rules of SGD, Lion and Muon fail over depth as Adam's does; with 1/m_L they pass."""
    assert set(deep(rule).suspects) == STEPS
    assert change(deep(rule), "residual.last") > 0.15
    check = coord_check(DEEP[rule], **DEPTH)
    assert check.passed and not check.suspects, str(check)


def test_minicpm_is_half_a_rule_of_depth():
    """Its branches are divided by √depth, its learning rate is not: the stream grows, if slower."""
    assert set(deep("minicpm").suspects) == STEPS
    grows = change(deep("minicpm"), "residual.last")
    assert change(deep("completep"), "residual.last") + 0.2 < grows
    assert grows < change(deep("mup"), "residual.last") - 0.2


def test_branches_are_lazy_at_half_the_depth_exponent():
    """What CompleteP's paper holds against α = 1/2: deep branches stop learning features.

    The check allows it, as no learning rate can mend it: only a stronger multiplier does.
    """
    for probe in ("down", "scores"):
        assert abs(change(deep("completep"), probe)) < 0.1
        assert change(deep("depth-mup"), probe) < -0.25
    lazy = next(s for s in deep("depth-mup").slopes if (s.measure, s.probe) == ("change", "down"))
    assert (lazy.lowest, lazy.expected) == (-0.5, 0.0) and lazy.ok
    assert not dataclasses.replace(lazy, lowest=0.0).ok
    assert "-0.5 … +0.0" in str(deep("depth-mup"))


PLANTED_DEPTH = {
    "forward.residual": {"forward": {**ATTN, **READOUT}},
    "residual_out_std": {"residual_out_std": {"m_L": 0.5}},
    "init_std.hidden": {"init_std": {"hidden": {"m_in": -0.5, "m_L": 0.5}}},
    "lr.input": {"lr": {**HIDDEN, "input": {"m_L": -1}}},
}


@slow
@pytest.mark.parametrize("part", PLANTED_DEPTH)
def test_a_mistake_over_depth_is_named(part):
    check = coord_check(COMPLETEP, dataclasses.replace(COMPLETEP, **PLANTED_DEPTH[part]), **DEPTH)
    assert not check.passed
    assert next(iter(check.suspects)) == part, str(check)


@slow
def test_epsilon_over_depth_must_shrink_inside_blocks_alone():
    """At ε near the gradients CompleteP's choice holds; outside blocks gradients do not shrink."""
    damping = {}
    for where in ({}, {"block_eps": {}}, {"block_eps": {}, "eps": {"m_L": -1}}):
        applied = dataclasses.replace(COMPLETEP, **where)
        check = coord_check(COMPLETEP, applied, hparams=HUGE_EPS, **DEPTH)
        damping[len(where)] = {s.probe: s.slope for s in check.slopes if s.measure == "damping"}
        assert list(check.suspects) == (["eps"] if len(where) == 1 else [])
    assert all(abs(slope) < 0.05 for slope in damping[0].values())
    assert damping[1]["hidden"] < -0.3 and damping[2]["input"] > 0.1


@slow
def test_epsilon_over_width_must_shrink_outside_blocks_too():
    """Why completep-eps exists: under the 1/m readout the embedding's gradient shrinks as well."""
    paper = coord_check("completep", hparams=HUGE_EPS, **SMALL)
    assert list(paper.suspects) == ["eps"]
    assert ("d_head fixed", "damping", "input") in off(paper)
    everywhere = coord_check("completep-eps", hparams=HUGE_EPS, **SMALL)
    assert {(s, probe) for s, _, probe in off(everywhere)} <= {("n_head fixed", "qk")}


def test_exponents_of_mup():
    slopes = expected_slopes(MUP, d_head_grows=True, tied=True)
    assert slopes["init"] == {
        **dict.fromkeys(("emb", "q", "k", "v", "up", "o", "down", "branch", "residual"), 0.0),
        "scores": -0.5,
        "logits": -0.5,
    }
    assert set(slopes["change"].values()) == {0.0}
    gradient = slopes["gradient"]
    assert gradient.pop("qk") == gradient.pop("norm.qk") == -1.5
    assert set(gradient.values()) == {-1.0}
    assert slopes["update"]["hidden"] == -1.0 and slopes["update"]["input"] == 0.0
    fixed = expected_slopes(MUP, d_head_grows=False, tied=True)
    assert fixed["init"]["scores"] == 0.0 and fixed["gradient"]["qk"] == -1.0


def declared(rule, axis, role):
    """A literal's own exponent of the learning rate of a role inside blocks."""
    powers = (rule.lr.get(role, {}), rule.block_lr if role in ("hidden", "bias", "norm") else {})
    return sum(power.get(quantity, 0.0) for power in powers for quantity in AXES[axis].grows)


CLAIMS = [(r, axis) for r in RULES.values() for axis in SHAPES if axis in r.covers]


@pytest.mark.parametrize(("rule", "axis"), CLAIMS, ids=[f"{r.name}-{a}" for r, a in CLAIMS])
@pytest.mark.parametrize("tied", [True, False])
def test_rules_declare_what_theory_derives(rule, axis, tied):
    """The literals' own lr and multipliers are those that keep all changes at 0."""
    slopes = expected_slopes(rule, axis, d_head_grows=axis == "width", tied=tied)
    muon = ("hidden",) if rule.optimizer == "muon" else ()  # its step has its own width in it
    measure = "rate" if rule.optimizer == "sgd" else "step"
    masks = 0.5 if axis == "density" else 0.0  # over all elements, of which few are kept
    for role in {"input", "hidden", "output", "bias", "norm"} - set(muon):
        kept = masks * (role == "hidden")
        assert slopes[measure][role] - kept == declared(rule, axis, role), role
    if axis == "width":
        assert slopes["init"]["logits"] == rule.forward["readout"]["m_d"] + 0.5


def test_minicpm_does_not_declare_what_theory_derives_over_depth():
    slopes = expected_slopes(RULES["minicpm"], "depth", d_head_grows=False, tied=True)
    assert slopes["step"]["hidden"] == -0.5 != declared(RULES["minicpm"], "depth", "hidden")


def test_exponents_of_completep_over_depth():
    slopes = expected_slopes(COMPLETEP, "depth", d_head_grows=False, tied=True)
    assert set(slopes["update"].values()) == {0.0}
    assert slopes["init"].pop("branch") == -1.0 and slopes["change"].pop("branch") == -1.0
    assert slopes["init"].pop("residual.last") == (-0.5, 0.0)  # √depth / depth, or embeddings
    assert set(slopes["init"].values()) == set(slopes["change"].values()) == {0.0}
    inside = ("hidden", "qk", "residual_out", "bias", "norm")
    assert {slopes["gradient"][kind] for kind in inside} == {-1.0}
    half = expected_slopes(RULES["depth-mup"], "depth", d_head_grows=False, tied=True)
    assert {half["step"][kind] for kind in inside} == {-0.5}
    assert half["step"]["input"] == half["step"]["norm.final"] == 0.0
    assert half["change"]["up"] == (-0.5, 0.0) and half["change"]["logits"] == 0.0
    assert half["change"]["branch"] == (-1.0, -0.5)


def test_exponents_of_supar_over_density():
    slopes = expected_slopes(RULES["supar"], "density", d_head_grows=False, tied=True)
    assert set(slopes["init"].values()) == set(slopes["change"].values()) == {0.0}
    # kept weights: std ρ^-1/2, gradient ρ^0, step ρ^-1; over all elements ρ^1/2 more
    assert slopes["weights"]["hidden"] == 0.0
    assert slopes["gradient"]["hidden"] == 0.5 and slopes["gradient"]["bias"] == 0.0
    assert slopes["update"]["hidden"] == -0.5 and slopes["update"]["norm"] == 0.0


def test_q_and_k_start_slower_under_sgd():
    """Under the others their step does not know their gradient's size."""
    slopes = expected_slopes(RULES["mup-sgd"], d_head_grows=True, tied=True)
    assert slopes["update"]["qk"] == (-1.5, -1.0) and slopes["change"]["scores"] == (-0.5, 0.0)
    assert slopes["rate"]["qk"] == slopes["rate"]["hidden"] == 0.0
    assert slopes["rate"]["input"] == slopes["rate"]["bias"] == 1.0
    assert "step" not in slopes and "damping" not in slopes


def test_the_test_of_a_slope_keeps_its_level():
    """At the edge of the allowance 0.27 % are rejected on both sides together, whatever n."""
    draws = np.random.default_rng(0).normal(ALLOWANCE, 0.1, (4000, 5))
    assert np.mean([not is_zero(d) for d in draws]) < 0.005
    assert not any(is_zero(d) for d in draws[:200] * 0.01 + 0.3)


def test_a_slope_from_known_numbers():
    slope = Slope(
        setting="d_head fixed",
        measure="init",
        probe="q",
        by_seed=(0.4, 0.5, 0.6),
        expected=0.0,
        lowest=0.0,
        log2_rms=(0.0, 0.5, 1.0),
    )
    assert slope.slope == pytest.approx(0.5)
    assert slope.se == pytest.approx(0.1 / np.sqrt(3))
    # within 0.15 + t(2 degrees of freedom, 0.99865) · se = 0.15 + 19.2 · 0.0577 = 1.26
    assert slope.ok and not dataclasses.replace(slope, expected=-0.8, lowest=-0.8).ok
    # any power from -0.8 to 0.45 will do: the seeds deviate by 0, 0.05 and 0.15
    band = dataclasses.replace(slope, expected=0.45, lowest=-0.8)
    assert band.deviation == pytest.approx([0.0, 0.05, 0.15])


def test_seeds_that_do_not_agree_are_no_agreement():
    """A slope of 3 ± 4, as of a model on the verge of diverging, is not one of 0."""
    wild = Slope(
        setting="d_head fixed", measure="change", probe="q", by_seed=(-3.0, 1.0, 11.0, 3.0),
        expected=0.0, lowest=0.0, log2_rms=(0.0, 3.0, 6.0),
    )  # fmt: skip
    assert is_zero(wild.deviation) and wild.se > MAX_ERROR and not wild.ok


def model_and_batch():
    shape = dataclasses.replace(SHAPE, d_model=64, n_head=2, d_head=32, n_kv_head=2, d_ffn=256)
    model = GPT(shape, members=3).double()
    init_weights(model, parametrize(shape, Base.of(SHAPE), HPARAMS, "mup"), [0, 1, 2])
    return model, random_batch(shape, [0, 1, 2], 2)


def test_probes_are_the_forwards_own_values():
    model, (tokens, targets) = model_and_batch()
    seen = activations(model, (tokens, targets))
    x = scale(model.wte(tokens) + model.wpe(torch.arange(6).expand(3, 1, 6)), 10.0)
    torch.testing.assert_close(seen["emb"], x.flatten(1))
    block = model.blocks[0]
    h = block.ln1(x)
    q, k = (f(h).unflatten(-1, (2, 32)).transpose(-2, -3) for f in (block.attn.q, block.attn.k))
    scores = (q @ k.mT).tril() * HPARAMS.attn_mult * (16 / 32) ** 0.5 / 32**0.5
    first_layer = seen["scores"][:, : scores[0].numel()]
    torch.testing.assert_close(first_layer, scores.flatten(1))
    logits = model(tokens)
    others = torch.ones_like(logits).scatter(-1, tokens.unsqueeze(-1), 0.0)
    torch.testing.assert_close(seen["logits"], (logits * others).flatten(1))
    assert not any(module._forward_hooks for module in model.modules())


def test_generation_agrees_with_training():
    assert generation_gap(*model_and_batch()) < 1e-12


def test_all_widths_see_the_same_tokens():
    narrow, wide = (
        GPTConfig(n_layer=1, d_model=d, n_head=1, vocab_size=50, seq_len=7) for d in (8, 64)
    )
    for a, b in zip(random_batch(narrow, [3, 4], 2), random_batch(wide, [3, 4], 2), strict=True):
        assert torch.equal(a, b)
    alone, beside = random_batch(narrow, [4], 2)[0][0], random_batch(narrow, [3, 4], 2)[0][1]
    assert torch.equal(alone, beside)


def test_a_run_that_diverges_fails_and_is_still_data():
    wild = dataclasses.replace(HPARAMS, lr=1e20)
    check = coord_check("mup", hparams=wild, sizes=(32, 64, 96), seeds=range(3))
    assert not check.passed
    assert not json.loads(json.dumps(check.to_dict(), allow_nan=False))["passed"]
    assert "FAILED" in str(check)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": (32, 64)}, "widths = .*three"),
        ({"seeds": (0, 0, 1)}, "seeds = .*three"),
        ({"steps": 9}, "steps = 9.*10"),
        ({"axis": "dept"}, "unknown axis of a coordinate check 'dept'; did you mean 'depth'"),
        ({"sizes": (32, 48, 64)}, "d_head = 32 does not divide 48"),
        ({"shape": {"activaton": "gelu"}}, "'shape.activaton'; did you mean 'shape.activation'"),
        ({"shape": {"d_model": 64}}, "shape.d_model = 64: must be left to widths"),
        ({"shape": {"n_layer": 2}, "axis": "depth"}, "shape.n_layer = 2: must be left to depths"),
    ],
)
def test_mistakes_of_the_user(arguments, message):
    with pytest.raises(ConfigError, match=message):
        coord_check("mup", **arguments)


def test_a_changed_shape_keeps_its_ratios_over_width():
    """Grouped heads stay as many to a group, and a given FFN stays as wide for its model."""
    shapes = _settings(MUP, "width", (64, 128, 256), {"n_kv_head": 1, "d_ffn": 96, "bias": False})
    fixed, grown = shapes["d_head fixed"], shapes["n_head fixed"]
    assert [(m.n_head, m.n_kv_head, m.d_head) for m in fixed] == [
        (2, 1, 32),
        (4, 2, 32),
        (8, 4, 32),
    ]
    assert [(m.n_head, m.n_kv_head, m.d_head) for m in grown] == [
        (2, 1, 32),
        (2, 1, 64),
        (2, 1, 128),
    ]
    assert [m.d_ffn for m in fixed] == [m.d_ffn for m in grown] == [96, 192, 384]
    assert not any(m.bias for m in fixed + grown)
    heads = _settings(MUP, "width", (64, 128, 256), {"n_head": 4})
    assert [m.d_head for m in heads["d_head fixed"]] == [16] * 3
    assert [m.d_head for m in heads["n_head fixed"]] == [16, 32, 64]


def test_the_commands_smallest_model_is_the_checks():
    for shape in SHAPES.values():
        for field in shape.keys() - {"d_model"}:
            assert getattr(SMALL_FLAGS, field) == shape[field]


CLI = ["coord-check", "--widths", "32", "64", "128", "--seeds", "0", "1", "2", "3"]


def test_the_command_says_passed(capsys):
    assert run([*CLI, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["passed"] is True and said["rule"] == "mup" and said["suspects"] == []
    assert {p["setting"] for p in said["probes"]} == {"d_head fixed", "n_head fixed"}
    assert {"slope", "se", "expected", "ok"} <= said["probes"][0].keys()


def test_the_command_says_failed(capsys):
    assert run([*CLI, "--rule", "sp", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["passed"] is False and "lr.hidden" in said["suspects"]


def test_the_command_takes_a_block_and_an_axis(capsys):
    flags = ["--seeds", "0", "1", "2", "--model.no_tied", "--model.n_kv_head", "1", "--json"]
    depths = ["--axis", "depth", "--depths", "1", "2", "4", "--rule", "completep"]
    assert run(["coord-check", *depths, *flags]) in (0, 1)
    said = json.loads(capsys.readouterr().out)
    assert said["sizes"] == [1, 2, 4] and said["axis"] == "depth"
    assert ("step", "output") in {(p["measure"], p["probe"]) for p in said["probes"]}


def test_the_command_refuses_sizes_of_the_other_axis(capsys):
    assert run(["coord-check", "--depths", "2", "4", "8"]) == 2
    assert "depths" in capsys.readouterr().err


@slow
def test_the_picture_is_the_same_bytes_again(tmp_path):
    assert run([*CLI, "--picture", str(tmp_path / "command.png")]) == 0
    for path in coord_picture(small(), tmp_path / "function.svg"):
        assert path.read_bytes() == path.with_stem("command").read_bytes()


@slow
@pytest.mark.parametrize("rule", ["mup", "cerebras", "mup-package"])
def test_the_default_size(rule):
    check = coord_check(rule)
    assert check.passed, str(check)
    assert max(abs(s.slope - s.expected) for s in check.slopes) < 0.15


@slow
@pytest.mark.parametrize("rule", ["completep", "depth-mup"])
def test_the_default_depths(rule):
    assert coord_check(rule, axis="depth").passed


@slow
@pytest.mark.parametrize("rule", ["mup", "cerebras", "mup-package"])
def test_no_false_alarm_on_other_seeds(rule):
    for first in range(100, 124, 4):
        assert coord_check(rule, sizes=(32, 64, 128), seeds=range(first, first + 4)).passed
