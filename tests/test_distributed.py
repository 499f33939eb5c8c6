"""One run on one, two and four processes: the same weights, steps, records and checkpoints."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from ranks import launch
from torch import distributed as dist

import mupgpt.checkpoint.writer as checkpoint
from mupgpt.checkpoint.state import state_groups
from mupgpt.checkpoint.verify import load_newest
from mupgpt.config.plain import to_dict
from mupgpt.config.schema import ParallelConfig
from mupgpt.distributed.parallel import materialize, parallelize
from mupgpt.distributed.processes import Grid, on_main
from mupgpt.errors import CheckpointError, ConfigError, Interrupted
from mupgpt.model.gpt import GPT
from mupgpt.model.init import init_weights
from mupgpt.model.shards import piece
from mupgpt.optim.rates import assert_rates
from mupgpt.resolve import overlay, train_config
from mupgpt.trainer import Trainer
from mupgpt.training.device import param_dtype
from mupgpt.training.metrics import read_metrics

RAW = {
    # Odd sizes: 257 rows are two blocks and a row, 50 do not divide by four; clipping is active.
    "model": {"n_layer": 2, "d_model": 24, "n_head": 4, "d_ffn": 50, "vocab_size": 257,
              "seq_len": 16},
    "base": {"d_model": 12, "d_ffn": 25, "n_head": 2, "d_head": 6, "n_kv_head": 2, "n_layer": 2},
    "batch_size": 8,
    "steps": 10,
    "grad_clip": 0.5,
    "precision": "fp64",
    "data": {"tokenizer": "bytes", "eval_tokens": 80},  # five windows
    "tracking": {"log_every": 1, "eval_every": 5, "checkpoint_every": 5, "wandb": "off"},
}  # fmt: skip
MODERN = {
    "model": {"n_kv_head": 2, "positions": "rope", "activation": "swiglu", "norm": "rmsnorm",
              "qk_norm": True, "tied": False, "bias": False},
    "base": {"n_kv_head": 1},
    "steps": 4,
}  # fmt: skip
ALIBI = {"model": {"positions": "alibi", "qk_norm": True}, "steps": 4}
TP, AGAIN = {"parallel": {"tensor": 2}}, {"parallel": {"checkpointing": "full"}}
BOTH = {"parallel": {"tensor": 2, "checkpointing": "selective"}, "accumulate": 2}

ALONE = {"plain": {}, "fp32": {"precision": "fp32"}, "modern": MODERN, "alibi": ALIBI}
ON_TWO = {
    "fsdp2": ("plain", AGAIN),
    "tp2": ("plain", TP),
    "modern-tp2": ("modern", TP),
    "alibi-tp2": ("alibi", TP),
    "fp32-fsdp2": ("fp32", {}),
}
ON_FOUR = {
    "2x2": ("plain", BOTH),
    "fp32-2x2": ("fp32", TP),
    "modern-fsdp4": ("modern", {}),  # a gain of 6 elements on four: one holds none
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the text, and in it each run of the tables above."""
    home = tmp_path_factory.mktemp("runs")
    (home / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(700)))
    train(home, ALONE)
    for world, table in ((2, ON_TWO), (4, ON_FOUR)):
        launch(world, train, home, {n: overlay(ALONE[of], how) for n, (of, how) in table.items()})
    return home


def config(home, changes):
    return train_config(overlay(overlay(RAW, {"data": {"source": f"{home}/text.txt"}}), changes))


def train(home, runs):
    for name, changes in runs.items():
        Trainer(config(home, changes), home / name).fit()


def records(folder):
    return read_metrics(folder / "metrics.jsonl")


def assert_same_records(folder, reference, rel):
    for mine, whole in zip(records(folder), records(reference), strict=True):
        assert mine.keys() == whole.keys()
        for key in mine.keys() - {"perf/tokens_per_s"}:
            same = pytest.approx(whole[key], rel=rel)
            if key.startswith("health/act"):  # of five windows on two ranks one passes twice
                same = pytest.approx(whole[key], rel=0.05)
            if key.endswith("lost_in_bf16"):  # counts on which side of a threshold numbers lie
                same = pytest.approx(whole[key], abs=0.02)
            assert mine[key] == same, (mine["step"], key)


@pytest.mark.parametrize("name", [n for n in {**ON_TWO, **ON_FOUR} if "fp32" not in n])
def test_every_record_is_that_of_one_process(home, name):
    """Losses, norms, rates, held-out loss and health, in float64."""
    reference = {**ON_TWO, **ON_FOUR}[name][0]
    assert_same_records(home / name, home / reference, rel=1e-10)


@pytest.mark.parametrize("name", ["fp32-fsdp2", "fp32-2x2"])
def test_in_fp32_up_to_rounding(home, name):
    mine, whole = ([r["train/loss"] for r in records(home / n)] for n in (name, "fp32"))
    assert mine[0] == pytest.approx(whole[0], rel=1e-6)
    assert mine == pytest.approx(whole, rel=1e-4)


def test_clipping_was_active(home):
    norms = [r["train/grad_norm"] for r in records(home / "plain")]
    assert max(norms) > RAW["grad_clip"] * 1.2


def built(home, changes):
    """A Trainer with its model and optimizer, before the first step."""
    made = Trainer(config(home, changes), home / "built")
    made._build()
    return made


def same_start(made):
    """Compare this process's initial weights with those of a whole model, bit for bit."""
    whole = GPT(made.config.model).to(param_dtype(made.config.precision))
    init_weights(whole, made.table, made.config.seed)
    assert made.model._floats == whole._floats
    held = 0
    for (name, p), q in zip(made.model.named_parameters(), whole.parameters(), strict=True):
        mine = piece(p)
        ends = zip(mine.offset, mine.data.shape, strict=True)
        assert torch.equal(mine.data, q[tuple(slice(a, a + n) for a, n in ends)]), name
        assert torch.equal(p.full_tensor(), q), name  # as torch itself puts it together
        held += mine.data.numel()
    share = held / sum(q.numel() for q in whole.parameters())
    assert share < 1.15 / made.grid.line.size(), "each holds its part only"


def loaded(made, folder):
    """Compare what a saved state becomes, put together by torch, with the files, bit for bit."""
    saved = load_newest(folder / "checkpoints")
    made._restore(saved)
    for group, tensors in state_groups(made.model, made.optimizer).items():
        whole = saved.tensors(group)
        assert whole.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor.full_tensor(), whole[name]), (group, name)


def start(home, changes):
    for rule in ("mup", "cerebras"):  # normal, truncated
        same_start(built(home, {**changes, "rule": rule, "precision": "fp32"}))
    made = built(home, changes)
    made._evaluate()  # after it everything is its shard again
    assert_rates(made.model, made.optimizer, made.table, 1.0)
    loaded(made, home / "2x2")
    shares = [made.grid.share(made._batches(step))[0].numpy() for step in range(3)]
    return made.grid.data_rank, shares


@pytest.mark.parametrize(("world", "changes"), [(2, {}), (2, TP), (4, {}), (4, TP)])
def test_weights_states_and_batches_are_those_of_one_process(home, world, changes):
    """Initial weights and loaded states bit for bit; the rows' batches together are the batch."""
    by_row = dict(launch(world, start, home, changes))
    batches = built(home, {})._batches
    for step in range(3):
        together = np.concatenate([by_row[row][step] for row in sorted(by_row)])
        assert (together == batches(step)[0].numpy()).all()


def stop_at(home, name, step, changes):
    """Train until before ``step``, as if killed there."""
    original = Trainer._train_one

    def limited(self):
        if self.step == step:
            raise StopIteration
        return original(self)

    Trainer._train_one = limited
    with pytest.raises(StopIteration):
        Trainer(config(home, changes), home / name).fit()


def test_saved_on_four_continued_on_one_and_two(home):
    launch(4, stop_at, home, "four", 7, TP)
    on_disk = load_newest(home / "four" / "checkpoints")
    assert on_disk.step == 5
    names = {f.partition("-")[0] for f in on_disk.manifest["files"]}
    assert names == {"model", "optimizer"} and len(on_disk.manifest["files"]) == 8
    for name in ("one", "two"):
        shutil.copytree(home / "four", home / name)
    train(home, {"one": {}})
    launch(2, train, home, {"two": {}})
    for name in ("one", "two"):
        assert_same_records(home / name, home / "plain", rel=1e-10)
    whole = load_newest(home / "plain" / "checkpoints")
    for name in ("2x2", "one", "two"):
        mine = load_newest(home / name / "checkpoints")
        for group in ("model", "optimizer"):
            for key, tensor in whole.tensors(group).items():
                torch.testing.assert_close(
                    mine.tensors(group)[key], tensor, rtol=1e-9, atol=1e-12, msg=f"{name} {key}"
                )


def damaged_one_by_one(home):
    """Flip a bit in the middle of some files of a checkpoint; every rank takes the older one."""
    files = ["model-00002.safetensors", "optimizer-00003.safetensors", "manifest.json"]
    for i, file in enumerate(files):
        copy = home / f"damaged{i}"
        on_main(lambda copy=copy: shutil.copytree(home / "2x2" / "checkpoints", copy))
        on_main(lambda path=copy / "step-00000010" / file: flip_a_bit(path))
        assert load_newest(copy).step == 5
        assert (copy / "bad-step-00000010").is_dir()


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def fail_to_write(home, name):
    """Rank 1 cannot write its second checkpoint: all ranks stop, and none thinks that it stands."""
    original, turns = checkpoint._write_own, []

    def write_own(folder, own):
        turns.append(1)
        if dist.get_rank() == 1 and len(turns) == 2:
            raise OSError("disk full")
        return original(folder, own)

    checkpoint._write_own = write_own
    with pytest.raises(CheckpointError, match=r"cannot write .*step-00000010: disk full"):
        Trainer(config(home, {}), home / name).fit()


def planting(build, plant, made):
    build()
    plant(made)


def planted(home, name):
    """A rate that is not the table's, in one group; a parameter that was replaced."""

    def one_rate(made):
        made.optimizer.param_groups[-1]["table_lr"] *= 1.01

    def one_parameter(made):
        made.model.ln_f.weight = torch.nn.Parameter(made.model.ln_f.weight.detach().clone())

    for plant, said in ((one_rate, r"lr of .* the table says"), (one_parameter, "not the model's")):
        # After its first forward a sharded model would take its own parameter back.
        made = Trainer(config(home, {}), home / name)
        made._build = functools.partial(planting, made._build, plant, made)
        with pytest.raises(AssertionError, match=said):
            made.fit()


def told_to_stop(home, name):
    """Only rank 1 hears the signal; all stop after the same step."""
    original = Trainer._train_one

    def signalled(self):
        if self.step == 6 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    Trainer._train_one = signalled
    with pytest.raises(Interrupted, match="stopped at step 7 of 10"):
        Trainer(config(home, {}), home / name).fit()


def test_what_befalls_one_rank_befalls_all(home):
    launch(2, damaged_one_by_one, home)
    launch(2, fail_to_write, home, "full")
    assert load_newest(home / "full" / "checkpoints").step == 5
    assert not list((home / "full" / "checkpoints").glob(".tmp*"))
    launch(2, planted, home, "planted")
    launch(2, told_to_stop, home, "told")
    assert load_newest(home / "told" / "checkpoints").step == 7
    train(home, {"told": {}})
    assert_same_records(home / "told", home / "plain", rel=1e-10)


def killed(home, name):
    original = Trainer._train_one

    def dying(self):
        if self.step == 7:
            while not (home / name / "checkpoints" / "step-00000005").is_dir():
                time.sleep(0.01)
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(self)

    Trainer._train_one = dying
    with pytest.raises(RuntimeError):  # gloo's: the connection is closed
        Trainer(config(home, {}), home / name).fit()
    os.kill(os.getpid(), signal.SIGKILL)  # as torchrun does


def test_a_killed_rank_ends_the_job_and_the_next_one_continues(home):
    launch(2, killed, home, "killed")
    assert load_newest(home / "killed" / "checkpoints").step == 5
    launch(2, train, home, {"killed": {}})
    assert_same_records(home / "killed", home / "plain", rel=1e-10)


def in_bf16(home, tensor, rel):
    """A step whose blocks are gathered in bf16 is one of autocast, with gradients in fp32."""
    # On a CPU autocast widens no LayerNorm, so that its gains could not be bf16 beside fp32.
    changes = {"precision": "fp32", "model": {"norm": "rmsnorm"}, "parallel": {"tensor": tensor}}
    made = built(home, changes)
    losses, grads, seen = [], [], []
    for grid, half in ((made.grid, True), (Grid(), False)):
        with torch.device("meta"):
            model = GPT(made.config.model)
        how = ParallelConfig(checkpointing="none", tensor=tensor if half else 1)
        parallelize(model, how, grid, half)
        materialize(model, made.device)
        init_weights(model, made.table)
        attention = model.blocks[0].attn
        attention.register_forward_pre_hook(lambda m, _: seen.append(m.q.weight.dtype))
        tokens, targets = made.grid.share(made._batches(0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(tokens, targets).mean()
        loss.backward()
        losses.append(float(loss.detach()))
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=rel)
    assert seen == [torch.bfloat16, torch.float32]
    for name, plain in grads[1].items():
        sharded = grads[0][name]
        dist.all_reduce(plain)
        assert sharded.dtype == torch.float32
        whole, mean = sharded.full_tensor(), plain / dist.get_world_size()
        error, size = (float(torch.linalg.vector_norm(t)) for t in (whole - mean, mean))
        # Keys' biases have no gradient (softmax does not see them) but rounding.
        assert error < 0.02 * size + 1e-3, name


def test_bf16_is_gathered_for_compute_and_reduced_in_fp32(home):
    launch(2, in_bf16, home, 1, 0.0)
    launch(2, in_bf16, home, 2, 1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel": {"tensor": 3}}, r"parallel\.tensor = 3: must divide model\.n_head = 4"),
        (
            {"parallel": {"tensor": 2}},
            r"parallel\.tensor = 2: must divide the number of processes, 1",
        ),
    ],
)
def test_a_grid_that_cannot_be_is_refused(home, changes, said):
    with pytest.raises(ConfigError, match=said):
        Trainer(config(home, changes), home / "refused")


def odd_batch(home):
    with pytest.raises(ConfigError, match=r"batch_size = 6: must be a multiple of 4 data-parallel"):
        Trainer(config(home, {"batch_size": 6}), home / "refused")
    text = home / ("text.txt" if dist.get_rank() else "other.txt")
    with pytest.raises(ConfigError, match=r"data differs between processes: .* on rank 0"):
        Trainer(config(home, {"data": {"source": str(text)}}), home / "refused")


def test_processes_that_do_not_fit_together_are_refused(home):
    (home / "other.txt").write_text("other text " * 500)
    launch(4, odd_batch, home)


def compiled(home, name, changes):
    """Train with blocks traced by dynamo and AOTAutograd; code generation would take minutes."""
    warnings.simplefilter("default")  # dynamo looks at attributes that warn
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    Trainer(config(home, changes), home / name).fit()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_compiled_blocks_compute_the_same(home, kind):
    how = {"tensor": 2, "checkpointing": kind, "compile": True}
    launch(2, compiled, home, f"compiled-{kind}", {**ALIBI, "parallel": how})
    assert_same_records(home / f"compiled-{kind}", home / "alibi", rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "rel"),
    [("mup-sgd", 1e-4), ("mup-lion", 1e-4), ("mup-muon", 1e-3)],  # Muon multiplies in bf16
)
def test_other_optimizers_shard_too(home, rule, rel):
    changes = {"rule": rule, "precision": "fp32"}
    train(home, {rule: changes})
    launch(4, train, home, {f"{rule}-2x2": {**changes, **TP}})
    losses = [[r["train/loss"] for r in records(home / n)] for n in (rule, f"{rule}-2x2")]
    assert losses[1] == pytest.approx(losses[0], rel=rel)


@pytest.mark.slow
def test_torchrun_stops_at_a_signal_and_continues_to_the_same_end(home):
    """The real launcher: SIGTERM in the middle, then to the end; one line of output, once."""
    changes = {"steps": 150, "tracking": {"checkpoint_every": 20}}
    whole = Trainer(config(home, changes), home / "whole").fit()
    (home / "c.json").write_text(json.dumps(to_dict(config(home, changes))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "mupgpt.trainer", str(home / "c.json")]
    command.append(str(home / "torchrun"))
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as job:
        while not list(home.glob("torchrun/checkpoints/step-*")):
            assert job.poll() is None
            time.sleep(0.02)
        job.terminate()
    assert job.returncode != 0
    stopped = load_newest(home / "torchrun" / "checkpoints").step
    assert 0 < stopped < 150
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert json.loads(done.stdout) == pytest.approx(whole, rel=1e-9)
    assert f"at step {stopped}" in done.stderr and done.stderr.count("continuing") == 1
