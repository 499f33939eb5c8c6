"""The plan is arithmetic that a traced step agrees with, and its choice is the best that fits."""

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mupgpt.model.gpt as model_module
from mupgpt.cli import run as cli
from mupgpt.config.schema import GPTConfig
from mupgpt.errors import ConfigError
from mupgpt.evidence.memory_trace import trace_peak
from mupgpt.evidence.stored_run import six_nd
from mupgpt.model.gpt import GPT
from mupgpt.parametrization.layout import count_block_weights, count_kept, count_params
from mupgpt.parametrization.words import POINTS
from mupgpt.planning.flops import flops_per_token, run_flops
from mupgpt.planning.memory import CHECKPOINTING, SCHEMES, moments
from mupgpt.planning.plan import GIB, Machine, decide_storage, options, plan, state_bytes
from mupgpt.resolve import get_preset, train_config

BIG = "cerebras-gpt-13b"
RANK = [(memory, way) for memory in SCHEMES for way in CHECKPOINTING]


def config(model=BIG, **changes):
    return train_config({"model": model, **changes})


@pytest.mark.parametrize(("memory", "gib"), [("exact", 191.5), ("split", 119.7), ("lean", 95.8)])
def test_state_of_13b(memory, gib):
    """16, 10 and 8 bytes for each of 12,853,386,240 parameters."""
    assert sum(state_bytes(config(memory=memory)).values()) / GIB == pytest.approx(gib, abs=0.05)


def test_masks_are_a_byte_for_each_weight_that_could_be_dropped():
    """They are state, they lie whole on every device, and they are saved."""
    dense, sparse = (config({"preset": "proxy-32", "density": d}) for d in (1, 0.5))
    blocks = dense.model.n_layer * 12 * dense.model.d_model**2
    assert state_bytes(sparse) == {**state_bytes(dense), "masks": blocks}
    ours, theirs = (plan(c, Machine(gpus=2)) for c in (sparse, dense))
    assert ours.state_gib["masks"] * GIB == blocks
    assert (ours.checkpoint_gib - theirs.checkpoint_gib) * GIB == pytest.approx(blocks)


def test_13b_on_one_gpu():
    """A proof step (8 sequences) keeps exact masters; the published batch needs the lean scheme."""
    proof = plan(config(batch_size=8))
    assert (proof.taken.memory, proof.taken.checkpointing) == ("split", "full")
    assert proof.checkpoint_gib == pytest.approx(8 * proof.n_params / GIB)
    whole = plan(config())
    assert whole.taken.memory == "lean" and whole.taken.accumulate > 1
    assert whole.stored.accumulate == whole.taken.accumulate
    assert not any(option.fits for option in whole.options if option.memory == "exact")
    with pytest.raises(ConfigError, match=r"accumulate = 1: 139 GiB .*; \d+ would fit"):
        decide_storage(config(), Machine())
    assert decide_storage(whole.stored, Machine()) == whole.stored


def test_the_choice_is_the_best_that_fits():
    """Less memory never brings a better choice, and what is taken stays below the limit."""
    before = -1
    for hbm in (400, 250, 200, 160, 139, 128, 110, 100):
        needs = plan(config(batch_size=4), Machine(hbm=hbm))
        assert [(o.memory, o.checkpointing) for o in needs.options] == RANK
        fitting = [RANK.index((o.memory, o.checkpointing)) for o in needs.options if o.fits]
        if not fitting:
            assert needs.taken is None and not needs.to_dict()["fits"]
            break
        taken = RANK.index((needs.taken.memory, needs.taken.checkpointing))
        assert taken == fitting[0] >= before
        assert needs.taken.peak.total <= 0.95 * hbm * GIB
        before = taken
    assert hbm == 100 and before == RANK.index(("lean", "full"))


def test_micro_batches_are_the_fewest_that_fit():
    machine = Machine(hbm=8.0)
    for option in options(config("cerebras-gpt-111m", memory="exact"), machine):
        k = option.accumulate
        assert option.fits and 120 % k == 0
        fewer = [j for j in range(1, k) if 120 % j == 0]
        run = config("cerebras-gpt-111m", accumulate=fewer[-1])
        peaks = moments(run, option.memory, option.checkpointing)
        assert max(need.total for need in peaks) > 0.95 * 8 * GIB


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_a_step_is_all_its_micro_batches(gpus):
    batch = plan(config(), Machine(gpus=gpus)).batch()
    assert batch["data_parallel"] * batch["micro_batches"] * batch["micro_batch"] == 720
    assert batch["tokens"] == 720 * 2048


def test_more_devices_never_need_more_each():
    def peak(gpus, memory, way):
        run = config(batch_size=16)
        return max(need.total for need in moments(run, memory, way, gpus))

    for memory, way in RANK:
        peaks = [peak(gpus, memory, way) for gpus in (2, 4, 8, 16)]
        assert peaks == sorted(peaks, reverse=True)
    # Heads and d_ffn divided instead of sequences: the same state, activations but the stream's.
    whole, halved = (
        next(iter(moments(config(batch_size=2, parallel={"tensor": t}), "exact", "none", 2)))
        for t in (1, 2)
    )
    assert whole.parts["weights"] == halved.parts["weights"]
    assert whole.parts["activations"] < halved.parts["activations"] < 2 * whole.parts["activations"]


def test_the_largest_phase_counts():
    phases = [{"steps": 5, "seq_len": 1024}, {"steps": 5, "seq_len": 2048, "batch_size": 4}]
    run = config(batch_size=4, phases=phases)
    assert list(moments(run, "lean", "full")) == list(moments(config(batch_size=4), "lean", "full"))


def test_a_cpu_keeps_everything_exact():
    run = decide_storage(config())
    assert (run.memory, run.parallel.checkpointing) == ("exact", "none")
    asked = config(memory="lean", parallel={"checkpointing": "full"})
    assert decide_storage(asked) == asked


@pytest.mark.parametrize(
    ("changes", "machine", "message"),
    [
        ({"memory": "lean", "precision": "fp32"}, {}, "memory = 'lean': must be 'exact' with prec"),
        ({"memory": "exact"}, {}, r"need 2\d\d GiB on each of 1 devices at least, which have 139"),
        ({}, {"hbm": 20}, "take a smaller preset"),
        ({}, {"gpus": 7}, "batch_size = 720: must be a multiple of 7 data-parallel devices"),
        ({}, {"reserve": 1.0}, "reserve = 1.0: must be in"),
    ],
)
def test_what_cannot_be_is_said(changes, machine, message):
    with pytest.raises(ConfigError, match=message):
        decide_storage(config(**changes), Machine(**machine))


def test_bf16_gradients_are_not_added_up_across_devices():
    """FSDP2 adds micro-batches up in the weights' dtype."""
    found = options(config(memory="lean", accumulate=2), Machine(gpus=8))
    assert not any(option.fits for option in found)
    assert any(option.fits for option in options(config(memory="lean"), Machine(gpus=8)))


SMALL = {"n_layer": 2, "d_model": 256, "n_head": 4, "vocab_size": 2000, "seq_len": 256}
LLAMA = {**SMALL, "activation": "swiglu", "positions": "rope", "bias": False, "tied": False}
WORDY = {**SMALL, "d_model": 128, "vocab_size": 50257}  # its loss is computed in chunks
STATE = {**SMALL, "n_layer": 3, "d_model": 512, "vocab_size": 300, "seq_len": 32}


def against_trace(model, memory, way, accumulate, gpus, batch_size=8, tensor=1, rel=0.03):
    run = config(model, memory=memory, parallel={"checkpointing": way, "tensor": tensor},
                 accumulate=accumulate, batch_size=batch_size)  # fmt: skip
    planned = max(moments(run, memory, way, gpus), key=lambda need: need.total)
    traced = trace_peak(run, gpus)
    assert planned.total == pytest.approx(traced["Total"], rel=rel)
    kinds = {kind.split()[-1].lower(): size for kind, size in traced.items()}
    kept = planned.parts["weights"]
    sharded = "parameter" not in kinds
    assert traced["Sharded Param" if sharded else "Parameter"] == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize(
    ("model", "memory", "way", "accumulate"),
    [(SMALL, "exact", "none", 1), (SMALL, "lean", "full", 2), (STATE, "split", "selective", 1)],
)
def test_plan_and_trace_agree(model, memory, way, accumulate):
    against_trace(model, memory, way, accumulate, gpus=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "memory", "way", "accumulate", "gpus"),
    [
        (LLAMA, "exact", "selective", 1, 1),
        (LLAMA, "lean", "none", 2, 1),
        (WORDY, "exact", "full", 1, 1),
        (WORDY, "lean", "none", 2, 1),
        (STATE, "exact", "none", 2, 1),
        (SMALL, "exact", "none", 1, 2),
        (STATE, "exact", "full", 2, 4),
        (SMALL, "lean", "full", 1, 2),
    ],
)
def test_plan_and_trace_agree_everywhere(model, memory, way, accumulate, gpus):
    against_trace(model, memory, way, accumulate, gpus)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "memory", "way", "gpus", "tensor"),
    [
        (SMALL, "exact", "none", 2, 2),
        (SMALL, "split", "selective", 4, 2),
        (LLAMA, "lean", "full", 4, 2),
        (STATE, "split", "full", 4, 2),
        (STATE, "split", "full", 8, 1),
        (STATE, "lean", "none", 4, 1),
        ({**LLAMA, "n_kv_head": 2}, "lean", "selective", 2, 1),
        ({**SMALL, "positions": "alibi"}, "split", "full", 2, 1),
    ],
)
def test_plan_and_trace_agree_on_grids(model, memory, way, gpus, tensor):
    against_trace(model, memory, way, 1, gpus, tensor=tensor, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "gpus", "batch_size"), [("split", 1, 4), ("exact", 8, 16)])
def test_plan_and_trace_agree_on_13b(memory, gpus, batch_size):
    """12.85 billion parameters on one device, and on eight, without any."""
    against_trace(BIG, memory, "full", 1, gpus, batch_size)


def test_a_slice_is_of_what_a_device_holds():
    needs = (moments(config(STATE, memory="split"), "split", "full", gpus) for gpus in (1, 8))
    one, eight = (next(n.parts["slices"] for n in ns if n.moment == "optimizer") for ns in needs)
    assert one == 8 * eight


def counted(shape, monkeypatch):
    """FLOPs per token that PyTorch counts in a forward and backward (its loss in one piece)."""
    monkeypatch.setattr(model_module, "CHUNK", 10**12)
    with torch.device("meta"):
        model = GPT(shape)
        model._floats = dict.fromkeys(POINTS, 1.0)
        tokens = torch.zeros(1, shape.seq_len, dtype=torch.long)
        with FlopCounterMode(display=False) as flops:
            model(tokens, tokens).mean().backward()
    return flops.get_total_flops() / shape.seq_len


@pytest.mark.parametrize("name", ["cerebras-gpt-1.3b", BIG])
def test_flops_are_those_that_pytorch_counts(name, monkeypatch):
    shape = get_preset(name).shape
    assert flops_per_token(shape) == pytest.approx(counted(shape, monkeypatch), rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_kv_head": 2, "activation": "swiglu", "positions": "rope"}, {"tied": False}],
)
def test_palm_is_the_counted_flops_and_the_embeddings(changes, monkeypatch):
    """6N counts parameters that multiply nothing: they are all of the difference."""
    shape = GPTConfig(
        **{"n_layer": 2, "d_model": 64, "n_head": 4, "vocab_size": 257, "seq_len": 64, **changes}
    )
    multiplied = shape.n_layer * count_block_weights(shape) + shape.vocab_size * shape.d_model
    palm, others = flops_per_token(shape), count_params(shape) - multiplied
    assert palm - 6 * others == pytest.approx(counted(shape, monkeypatch), rel=1e-12)


def test_a_run_costs_the_same_wherever_it_is_said():
    """BTLM trains three quarters of its tokens at a quarter of its context."""
    btlm = train_config({"model": "btlm-3b-8k"})
    parts = [
        p.steps * p.tokens_per_step * flops_per_token(btlm.model, "palm", p.seq_len)
        for p in btlm.course
    ]
    assert run_flops(btlm) == pytest.approx(sum(parts), rel=1e-12)
    assert flops_per_token(btlm.model) * btlm.tokens / run_flops(btlm) == pytest.approx(
        1.23, abs=5e-3
    )
    masked = train_config({"model": {"preset": "proxy-256", "density": 0.25}})
    assert six_nd(masked) == 6 * count_params(masked.model) * masked.tokens
    assert run_flops(masked, convention="6N") == 6 * count_kept(masked.model) * masked.tokens


def test_the_command_prints_and_traces(capsys):
    assert cli(["plan", BIG, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["options"]) == 9 and data["taken"] == data["options"][7]
    assert data["assumed"]["mfu"] == 0.4
    assert cli(["plan", BIG, "--hbm", "40"]) == 0
    assert "does not fit in 40 GiB" in capsys.readouterr().out
    assert cli(["plan", "proxy-32", "--trace"]) == 0
    text = capsys.readouterr().out
    assert "memory = exact, checkpointing = none" in text
    assert "inputs, not measurements" in text
    assert "traced on fake tensors: 0.0" in text


def test_plan_follows_what_the_config_says():
    run = config(batch_size=8, memory="exact", parallel={"checkpointing": "full"})
    (only,) = plan(run, Machine(hbm=400)).options
    assert (only.memory, only.checkpointing, only.fits) == ("exact", "full", True)
    doubled = dataclasses.replace(run, precision="fp64")
    assert sum(state_bytes(doubled).values()) == 2 * sum(state_bytes(run).values())
