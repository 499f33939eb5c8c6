"""The trainer: stopped and continued it is the unbroken run, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import mupgpt.trainer as trainer_module
from mupgpt.checkpoint.verify import load_newest
from mupgpt.cli import guarded, run
from mupgpt.config.plain import load_toml
from mupgpt.errors import CheckpointError, ConfigError, Crashed, Diverged, Interrupted
from mupgpt.resolve import overlay, train_config
from mupgpt.runs.generate import decode, encode_prompt, load_run, sample
from mupgpt.trainer import Trainer
from mupgpt.training.folder import locked
from mupgpt.training.metrics import MetricsLog, Wandb, read_metrics

RAW = {
    "model": {"n_layer": 2, "d_model": 16, "n_head": 2, "vocab_size": 257, "seq_len": 16},
    "base": {"d_model": 8, "d_ffn": 32, "n_head": 1, "d_head": 8, "n_kv_head": 1, "n_layer": 2},
    "batch_size": 4,
    "steps": 20,
    "data": {"source": "text.txt", "eval_tokens": 256},
    "tracking": {"log_every": 4, "eval_every": 8, "checkpoint_every": 5, "wandb": "off"},
}


@pytest.fixture(autouse=True)
def _text(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(700)))


def config(**changes):
    return train_config(overlay(RAW, changes))


def weights(folder):
    return load_newest(folder / "checkpoints").tensors("model")


def metrics(folder):
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "perf/tokens_per_s"} for r in records]


class StopAt(Exception):
    pass


def stop_after(monkeypatch, step):
    """Die at a step boundary without a word, as after kill −9."""
    original = Trainer._train_one

    def limited(self):
        if self.step == step:
            raise StopAt
        return original(self)

    monkeypatch.setattr(Trainer, "_train_one", limited)


@pytest.mark.parametrize(
    ("died_at", "rule"),
    [(1, "mup"), (7, "mup"), (15, "mup"), (19, "mup"),
     (7, "mup-sgd"), (7, "mup-lion"), (7, "mup-muon")],
)  # fmt: skip
def test_resumed_is_unbroken_bit_for_bit(tmp_path, monkeypatch, died_at, rule):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = Trainer(config(rule=rule), whole).fit()
    with monkeypatch.context() as patch:
        stop_after(patch, died_at)
        with pytest.raises(StopAt):
            Trainer(config(rule=rule), broken).fit()
    assert Trainer(config(rule=rule), broken).fit() == result
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(broken)[name]), name
    assert metrics(whole) == metrics(broken)
    assert [r["step"] for r in metrics(whole)] == [4, 8, 12, 16, 20]


@pytest.mark.parametrize(("died_at", "kept"), [(3, 0), (7, 5)])
def test_a_second_fit_is_the_unbroken_run(tmp_path, monkeypatch, died_at, kept):
    """One Trainer after a failure: at its checkpoint, or at 0 with the weights of step 0."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = Trainer(config(), whole).fit()
    trainer = Trainer(config(), broken)
    with monkeypatch.context() as patch:
        stop_after(patch, died_at)
        with pytest.raises(StopAt):
            trainer.fit()
    assert trainer.step == died_at
    begun = []
    original = Trainer._train_one
    monkeypatch.setattr(Trainer, "_train_one", lambda t: begun.append(t.step) or original(t))
    assert trainer.fit() == result
    assert begun == list(range(kept, 20))
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(broken)[name]), name
    assert metrics(whole) == metrics(broken)


def test_a_finished_run_is_evaluated_and_leaves_no_empty_wandb_run(tmp_path, monkeypatch):
    trainer = Trainer(config(), tmp_path / "run")
    first = trainer.fit()
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    monkeypatch.setattr(trainer_module, "Wandb", None)  # opened, it would be an error
    monkeypatch.setattr(Trainer, "_train_one", None)
    assert trainer.fit() == first == Trainer(config(), tmp_path / "run").fit()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("eval_every", [1, 20])
def test_tokens_per_second_are_those_of_training(tmp_path, monkeypatch, eval_every):
    """A step takes two seconds, and a look or a save a hundred: 64 tokens a step are 32 a second,
    however often the run is looked at."""
    now = [0.0]

    def taking(seconds, method):
        def slowed(*args):
            now[0] += seconds
            return method(*args)

        return slowed

    monkeypatch.setattr("mupgpt.training.cadence.time.monotonic", lambda: now[0])
    for name, seconds in {"_train_one": 2.0, "_evaluate": 100.0, "_save": 100.0}.items():
        monkeypatch.setattr(Trainer, name, taking(seconds, getattr(Trainer, name)))
    often = {"eval_every": eval_every, "checkpoint_every": eval_every}
    Trainer(config(tracking=often), tmp_path / "run").fit()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    found = [r["perf/tokens_per_s"] for r in records if "perf/tokens_per_s" in r]
    assert found == [32.0] * 5 and now[0] > 200


def triangle(step):
    return 1 - abs(step - 8) / 20


def test_a_schedule_of_ones_own_is_followed_and_continued(tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = Trainer(config(), whole, schedule=triangle).fit()
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(StopAt):
            Trainer(config(), broken, schedule=triangle).fit()
    assert Trainer(config(), broken, schedule=triangle).fit() == result
    assert metrics(whole) == metrics(broken)
    lr = config().hparams.lr
    assert [r["train/lr"] for r in metrics(whole)] == [lr * triangle(s) for s in range(3, 20, 4)]


def test_a_run_is_not_continued_under_another_schedule(tmp_path):
    run = tmp_path / "run"
    Trainer(config(), run, schedule=triangle).fit()
    with pytest.raises(ConfigError, match="belongs to another config: schedule"):
        Trainer(config(), run, schedule=lambda step: triangle(step) * (step != 19)).fit()
    with pytest.raises(ConfigError, match="belongs to another config: schedule"):
        Trainer(config(), run).fit()
    with pytest.raises(ConfigError, match=r"schedule\.shape = 'own': .*schedule=function"):
        Trainer(train_config(load_toml(run / "config.json")), run)
    opened = Trainer(train_config(load_toml(run / "config.json")), run, schedule=triangle)
    assert opened.fit()["step"] == 20
    with pytest.raises(ConfigError, match=r"schedule\.shape = 'own': must .*schedule=function"):
        config(schedule={"shape": "own"})


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), None, "1"])
def test_a_factor_that_is_none_is_said_before_anything_is_trained(value, tmp_path):
    with pytest.raises(ConfigError, match=r"schedule\(13\) = .*: must be a finite number >= 0"):
        Trainer(config(), tmp_path / "run", schedule=lambda step: value if step == 13 else 1.0)
    assert not (tmp_path / "run").exists()


def radam(groups):
    return torch.optim.RAdam(groups, decoupled_weight_decay=True)


def test_an_optimizer_of_ones_own_trains_and_is_continued(tmp_path, monkeypatch):
    whole, broken, own = tmp_path / "whole", tmp_path / "broken", {"adamw": radam}
    result = Trainer(config(), whole, optimizers=own).fit()
    assert result["val/loss"] != Trainer(config(), tmp_path / "ours").fit()["val/loss"]
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(StopAt):
            Trainer(config(), broken, optimizers=own).fit()
    assert Trainer(config(), broken, optimizers=own).fit() == result
    assert metrics(whole) == metrics(broken)
    health = {key for r in metrics(whole) for key in r if key.startswith("health/hidden")}
    assert health == {"health/hidden/weight_rms", "health/hidden/grad_rms"}  # no AdamW's updates


def test_a_run_is_not_continued_under_another_optimizer(tmp_path):
    with pytest.raises(ConfigError, match=r"optimizers: 'mu_product' of .* is a tensor \(\)"):
        Trainer(config(), tmp_path / "lost", optimizers={"adamw": torch.optim.NAdam}).fit()
    Trainer(config(), tmp_path / "run", optimizers={"adamw": radam}).fit()
    for own in ({}, {"adamw": torch.optim.Adamax}):
        with pytest.raises(ConfigError, match=r"was written under \{'adamw': 'RAdam'\}"):
            Trainer(config(), tmp_path / "run", optimizers=own).fit()
    Trainer(config(), tmp_path / "ours").fit()
    with pytest.raises(ConfigError, match=r"'RAdam'\}: .* under those of the rule"):
        Trainer(config(), tmp_path / "ours", optimizers={"adamw": radam}).fit()


def test_accumulation_is_one_batch(tmp_path):
    losses = []
    for pieces in (1, 4):
        c = config(accumulate=pieces, precision="fp64")
        losses.append(Trainer(c, tmp_path / str(pieces)).fit()["val/loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


def test_bits_per_byte(tmp_path):
    result = Trainer(config(), tmp_path / "run").fit()
    trainer = Trainer(config(), tmp_path / "run")
    ratio = trainer.corpus.bytes_per_token
    assert result["val/bpb"] == pytest.approx(result["val/loss"] / 0.6931471805599453 / ratio)
    assert result["tokens"] == 20 * 4 * 16


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = Trainer(config(), tmp_path / "run").fit()
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert Trainer(config(), tmp_path / "run").fit() == first
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_damaged_checkpoint_costs_its_steps_only(tmp_path, capsys):
    first = Trainer(config(), tmp_path / "run").fit()
    newest = load_newest(tmp_path / "run" / "checkpoints").folder
    path = newest / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert Trainer(config(), tmp_path / "run").fit() == first
    said = capsys.readouterr().err
    assert "set aside as bad-step-00000020" in said and "at step 15" in said


def test_the_folder_of_another_config_is_refused(tmp_path):
    Trainer(config(), tmp_path / "run").fit()
    with pytest.raises(ConfigError, match=r"belongs to another config: steps is 20 there and 21"):
        Trainer(config(steps=21), tmp_path / "run").fit()
    Trainer(config(tracking={"log_every": 7}), tmp_path / "run").fit()


def test_a_checkpoint_of_another_table_is_refused(tmp_path):
    Trainer(config(), tmp_path / "run").fit()
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"another table: wte.weight: lr 0.006.* there|here"):
        Trainer(config(hparams={"lr": 0.007}), tmp_path / "run").fit()


def test_changed_text_is_refused(tmp_path):
    Trainer(config(), tmp_path / "run").fit()
    (tmp_path / "text.txt").write_text("another text " * 500)
    trainer_module.load_corpus.cache_clear()
    with pytest.raises(ConfigError, match="trained on another corpus"):
        Trainer(config(), tmp_path / "run").fit()


def test_a_folder_in_use_names_its_holder(tmp_path):
    with (
        locked(tmp_path / "run"),
        pytest.raises(ConfigError, match=rf"in use by process {os.getpid()}; .*--run"),
    ):
        Trainer(config(), tmp_path / "run").fit()
    Trainer(config(), tmp_path / "run").fit()


def test_divergence_is_said_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    original = Trainer._train_one

    def poisoned(self):
        if self.step == 12:
            with torch.no_grad():
                self.model.ln_f.weight.fill_(torch.nan)
        return original(self)

    monkeypatch.setattr(Trainer, "_train_one", poisoned)
    with pytest.raises(Diverged, match=r"nan at step 12.*Lower hparams\.lr"):
        Trainer(config(), tmp_path / "run").fit()
    assert load_newest(tmp_path / "run" / "checkpoints").step == 10


def test_a_lost_learning_rate_is_noticed(tmp_path, monkeypatch):
    """What undoes µP in other code bases, a scheduler that sets one lr for all, stops the run."""
    monkeypatch.setattr(
        "mupgpt.training.step.set_lr",
        lambda optimizer, factor: [g.update(lr=0.006 * factor) for g in optimizer.param_groups],
    )
    with pytest.raises(AssertionError, match=r"lr of blocks\.0\.attn\.q\.weight .* the table says"):
        Trainer(config(), tmp_path / "run").fit()


def test_a_signal_saves_and_stops(tmp_path, monkeypatch):
    original = Trainer._train_one

    def signalled(self):
        if self.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_one", signalled)
        with pytest.raises(Interrupted, match="stopped at step 9 of 20"):
            Trainer(config(), tmp_path / "run").fit()
    assert load_newest(tmp_path / "run" / "checkpoints").step == 9
    assert Trainer(config(), tmp_path / "run").fit() == Trainer(config(), tmp_path / "w").fit()


def test_13b_is_refused_here_before_it_is_built():
    data = {"source": "text.txt", "tokenizer": "bytes"}
    big = train_config({"model": {"preset": "cerebras-gpt-13b", "seq_len": 64}, "data": data})
    message = r"parameters need 191 GiB .* has \d+ GiB; take a smaller"
    with pytest.raises(ConfigError, match=message):
        Trainer(big, "run")


def test_a_disk_too_small_for_a_checkpoint_is_said_first(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=80_000))
    with pytest.raises(ConfigError, match=r"takes 0\.0 GiB and 0\.0 GiB are free; .* --run"):
        Trainer(config(), tmp_path / "run").fit()
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_bf16_is_refused_on_a_cpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="bf16 is many times slower than fp32"):
        Trainer(config(precision="bf16"), tmp_path / "run").fit()


def test_a_run_that_never_started_claims_no_folder(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        with pytest.raises(StopAt):
            Trainer(config(steps=30), tmp_path / "run").fit()
    assert Trainer(config(), tmp_path / "run").fit()["step"] == 20


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "usage: python -m mupgpt.trainer CONFIG"),
        (["missing.toml"], "error: cannot read missing.toml"),
        (["bad.toml"], "error: unknown key 'stepz'"),
    ],
)
def test_the_light_door_makes_no_tracebacks(tmp_path, monkeypatch, capsys, argv, said):
    (tmp_path / "bad.toml").write_text('model = "proxy-32"\nstepz = 3\n')
    monkeypatch.setattr(sys, "argv", ["trainer", *argv])
    with pytest.raises(SystemExit) as stop:
        trainer_module.main()
    assert said in capsys.readouterr().err
    assert stop.value.code == 2


@pytest.mark.parametrize("argv", [["--", "x"], ["--hparams.lr", "3e-3", "proxy-32"]])
def test_the_config_comes_before_the_flags(argv, capsys):
    assert run(["train", *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: config = {argv[0]!r}: must be a preset's name or a config file")
    assert said.count("\n") == 1 and "mupgpt train CONFIG" in said


@pytest.mark.parametrize(
    ("config", "folder"),
    [("cerebras-gpt-1.3b", "cerebras-gpt-1.3b"), ("below/big-1.3b.toml", "big-1.3b")],
)
def test_a_dot_belongs_to_the_name(config, folder, tmp_path, monkeypatch):
    """By every door: `Path.stem` would train 1.3b and 1.7b in one folder."""
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "big-1.3b.toml").write_text('model = "proxy-32"')
    seen = []
    monkeypatch.setattr(trainer_module, "Trainer", lambda _, where: seen.append(str(where)) or STUB)
    assert run(["train", config]) == 0
    if config.endswith(".toml"):
        monkeypatch.setattr("mupgpt.runs.launch.supervise", lambda _, f, *__: seen.append(str(f)))
        assert run(["launch", config]) == 0
        monkeypatch.setattr(sys, "argv", ["trainer", config])
        trainer_module.main()
    assert set(seen) == {f"runs/{folder}"} and len(seen) in (1, 3)


class STUB:
    """In the place of a Trainer that has nothing to do."""

    fit = staticmethod(dict)


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError, 2), (OSError, 2), (CheckpointError, 1), (Crashed, 1), (Diverged, 1)],
)
def test_a_known_failure_is_one_line_and_a_code(error, code, capsys):
    class Finer(error):
        """A failure is told by its class, whatever a subclass is called."""

    def command():
        raise Finer("what went wrong")

    assert guarded(command) == code
    assert capsys.readouterr().err == "error: what went wrong\n"


def test_an_unknown_failure_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="of our own"):
        guarded(lambda: (_ for _ in ()).throw(RuntimeError("of our own")))


def test_metrics_survive_a_torn_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
    log = MetricsLog(path, step=2)
    log.log({"step": 3, "again": True})
    log.close()
    assert [json.loads(x) for x in path.read_text().splitlines()][-1] == {"step": 3, "again": True}


def test_wandb_mirrors_and_may_fail(tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")

    class Run:
        logged = []  # noqa: RUF012

        def define_metric(self, *args, **kwargs):
            pass

        def log(self, record):
            if record["step"] > 8:
                raise OSError("disk full")
            self.logged.append(record)

        def finish(self):
            pass

    started = {}
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "init", lambda **options: started.update(options) or Run())
    Trainer(config(tracking={"wandb": "offline"}), tmp_path / "run").fit()
    assert (started["mode"], started["project"]) == ("offline", "mupgpt")
    assert started["config"]["hparams"]["lr"] == 0.006
    assert [r["step"] for r in Run.logged] == [4, 8]
    assert capsys.readouterr().err.count("wandb is off for this run: disk full") == 1
    assert [r["step"] for r in metrics(tmp_path / "run")] == [4, 8, 12, 16, 20]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert Wandb(config().tracking, tmp_path, "x", {})._run is None


def test_sampling_is_the_training_forward(tmp_path):
    Trainer(config(steps=5), tmp_path / "run").fit()
    model, tokenizer = load_run(tmp_path / "run")
    prompt = encode_prompt("line 3", tokenizer)
    greedy = list(sample(model, prompt, 9, temperature=0))
    history = prompt.tolist()
    for token in greedy:
        assert token == int(model(torch.tensor([history]))[0, -1].argmax())
        history.append(token)
    assert len(list(sample(model, prompt, 60, seed=1))) == 60  # beyond the context of 16
    assert list(sample(model, prompt, 20, seed=3)) == list(sample(model, prompt, 20, seed=3))
    likeliest = list(sample(model, prompt, 20, temperature=0))
    assert list(sample(model, prompt, 20, top_k=1)) == likeliest
    assert decode([104, 105, 256], "bytes") == "hi"


def test_top_k_and_temperature_are_the_distribution():
    """4000 draws from three logits: frequencies within four standard errors."""
    from mupgpt.runs.generate import _pick

    logits = torch.tensor([0.0, 1.0, 2.0, -5.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([_pick(logits, 2.0, 2, generator) for _ in range(4000)])
    p = torch.softmax(logits[1:3] / 2.0, 0)
    for token, share in ((1, p[0]), (2, p[1])):
        found = (draws == token).double().mean()
        assert abs(found - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_an_untrained_folder_cannot_generate(tmp_path):
    with pytest.raises(ConfigError, match="has no checkpoint; train there first"):
        load_run(tmp_path)


@pytest.mark.slow
def test_killed_again_and_again_a_run_continues_to_the_same_end(tmp_path):
    """kill −9 three times, then to the end, in real processes: the unbroken run's result."""
    import tomli_w

    (tmp_path / "c.toml").write_text(tomli_w.dumps({**RAW, "steps": 2000}))
    command = [sys.executable, "-m", "mupgpt.trainer", "c.toml"]
    whole = json.loads(subprocess.run([*command, "whole"], capture_output=True, check=True).stdout)
    reached = 0
    for _ in range(3):
        with subprocess.Popen([*command, "broken"], stderr=subprocess.DEVNULL) as child:
            while newest(tmp_path / "broken") <= reached:
                assert child.poll() is None
                time.sleep(0.02)
            child.kill()
        reached = newest(tmp_path / "broken")
    last = subprocess.run([*command, "broken"], capture_output=True, check=True, text=True)
    assert json.loads(last.stdout.splitlines()[-1]) == whole


def newest(folder):
    """Step of the newest checkpoint folder, verified or not."""
    found = sorted(folder.glob("checkpoints/step-*"))
    return int(found[-1].name.removeprefix("step-")) if found else 0
