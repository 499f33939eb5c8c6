"""The launcher goes on after failures, stops in a loop of crashes, and passes interrupts on."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tomli_w

from mupgpt.cli import run
from mupgpt.errors import Crashed
from mupgpt.runs.launch import command_for, supervise

EXAMPLES = Path(__file__).parent.parent / "examples" / "slurm"
TINY = {
    "model": {"n_layer": 1, "d_model": 8, "d_head": 8, "vocab_size": 257, "seq_len": 8},
    "base": {"d_model": 8, "d_ffn": 32, "n_head": 1, "d_head": 8, "n_kv_head": 1, "n_layer": 1},
    "batch_size": 2, "steps": 40, "data": {"source": "text.txt", "eval_tokens": 64},
    "tracking": {"checkpoint_every": 5, "wandb": "off"},
}  # fmt: skip


def script(tmp_path, body):
    """A stand-in for the trainer: ``body`` runs with ``n``, how often it was started."""
    path = tmp_path / "stand_in.py"
    path.write_text(
        "import pathlib, sys\n"
        "count = pathlib.Path('count')\n"
        "n = int(count.read_text()) + 1 if count.exists() else 1\n"
        "count.write_text(str(n))\n"
        "def checkpoint(step):\n"
        "    folder = pathlib.Path(f'run/checkpoints/step-{step:08d}')\n"
        "    folder.mkdir(parents=True)\n"
        "    (folder / 'manifest.json').write_text('{}')\n" + body
    )
    return [sys.executable, str(path)]


def starts():
    return int(Path("count").read_text())


def test_a_run_that_gets_on_is_started_again_each_time(tmp_path):
    """Five failures, each after a new checkpoint: none counts against two retries."""
    body = "if n < 6:\n    checkpoint(n)\n    sys.exit(1)\n"
    supervise(script(tmp_path, body), Path("run"), retries=2, pause=0.0)
    assert starts() == 6


def test_a_loop_of_crashes_ends(tmp_path):
    """The first failure comes after a checkpoint, then three have none: 1 + 2 retries."""
    body = "if n == 1:\n    checkpoint(7)\nsys.exit(9)\n"
    with pytest.raises(Crashed, match=r"exit code 9, 3 times in a row .* after step 7"):
        supervise(script(tmp_path, body), Path("run"), retries=2, pause=0.0)
    assert starts() == 3


def test_a_mistake_in_the_config_is_not_tried_twice(tmp_path, capsys):
    with pytest.raises(Crashed, match="refuses this config"):
        supervise(script(tmp_path, "sys.exit(2)\n"), Path("run"), retries=5, pause=0.0)
    assert starts() == 1
    Path("wrong.toml").write_text('model = "proxy-33"')
    assert run(["launch", "wrong.toml"]) == 2
    assert "unknown preset 'proxy-33'" in capsys.readouterr().err


def test_the_pause_doubles(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr("mupgpt.runs.launch.time.sleep", waited.append)
    with pytest.raises(Crashed):
        supervise(script(tmp_path, "sys.exit(1)\n"), Path("run"), retries=3, pause=2.0)
    assert waited == [2.0, 4.0, 8.0]


def test_processes_have_one_thread_and_time_for_a_last_checkpoint(tmp_path, monkeypatch):
    body = "import json, os\njson.dump(dict(os.environ), open('seen.json', 'w'))\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    supervise(script(tmp_path, body), Path("run"))
    seen = json.loads(Path("seen.json").read_text())
    assert (seen["OMP_NUM_THREADS"], seen["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) == ("3", "540")


def test_an_interrupt_is_passed_on_and_is_no_failure(tmp_path):
    body = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(130))\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(60)\n"
    )

    def interrupt():
        while not Path("ready").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt, match="stopped at step 0"):
        supervise(script(tmp_path, body), Path("run"), retries=5, pause=0.0)
    thread.join()
    assert starts() == 1


@pytest.mark.slow
def test_a_trainer_that_is_killed_ends_as_if_nothing_had_happened(tmp_path):
    """kill −9 of the trainer below the launcher; losses equal those of an undisturbed run."""
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(300)))
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(TINY))
    whole = subprocess.run(
        command_for(Path("tiny.toml"), Path("whole"), 1), capture_output=True, check=True
    )
    command = [sys.executable, "-m", "mupgpt", "launch", "tiny.toml", "--pause", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as launcher:
        while not list(Path("runs/tiny/checkpoints").glob("step-*/manifest.json")):
            assert launcher.poll() is None
            time.sleep(0.02)
        below = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
        os.kill(int(below), signal.SIGKILL)
        said, _ = launcher.communicate()
    assert launcher.returncode == 0
    assert said == whole.stdout


@pytest.fixture
def cluster(tmp_path):
    """An environment with a SLURM whose job 17 has two nodes, both this machine."""
    tools = tmp_path / "tools"
    tools.mkdir()
    scontrol = 'if [ "$1" = show ]; then printf "localhost\\nnode2\\n"; else echo "$@" >> asked; fi'
    # Each node starts what follows srun's own flags; the job fails if one of them does.
    srun = 'shift\n"$@" &\n"$@" > node2.log && wait $!'
    for name, body in (("scontrol", scontrol), ("srun", srun)):
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    return {
        **os.environ, "PATH": f"{tools}:{Path(sys.executable).parent}:/usr/bin:/bin",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "17",
        "SLURM_GPUS_PER_NODE": "h200:1", "SLURM_CPUS_PER_TASK": "8",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["train", "sweep"])
def test_the_cluster_scripts_are_bash_and_say_what_they_would_run(name, cluster):
    path = EXAMPLES / f"{name}.sbatch"
    lint = ["shellcheck", str(path)] if shutil.which("shellcheck") else ["bash", "-n", str(path)]
    subprocess.run(lint, check=True)
    arguments = ["target.toml"] if name == "train" else ["joint", "postgresql+psycopg://u@h/s"]
    said = sbatch(cluster, name, *arguments, DRY_RUN="1").stdout
    expected = {
        "train": "--nnodes=2 --nproc-per-node=1 --rdzv-id=17.0 --rdzv-backend=c10d "
        "--rdzv-endpoint=localhost:29500 -m mupgpt.trainer target.toml runs/target",
        "sweep": "sweep run joint --storage postgresql+psycopg://u@h/s --workers 8",
    }
    assert expected[name] in said


def sbatch(cluster, name, *arguments, **more):
    """Run a script as SLURM would."""
    return subprocess.run(
        ["bash", str(EXAMPLES / f"{name}.sbatch"), *arguments], env={**cluster, **more},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("writes", "asked"), [(True, "requeue 17\n"), (False, None)])
def test_a_job_is_queued_again_if_it_got_on(cluster, writes, asked, tmp_path):
    folder = "mkdir -p runs/target/checkpoints/step-00000007\n" if writes else ""
    (tmp_path / "tools" / "srun").write_text(f"#!/bin/sh\n{folder}exit 3\n")
    Path("runs/target/checkpoints/step-00000005").mkdir(parents=True)
    assert sbatch(cluster, "train", "target.toml").returncode == 3
    found = Path("asked")
    assert (found.read_text() if found.exists() else None) == asked


@pytest.mark.slow
def test_two_nodes_meet_and_train_one_model(cluster, tmp_path):
    """The cluster's script with torchrun on each of two nodes: the loss of one process."""
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(300)))
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(TINY))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    done = sbatch(cluster, "train", "tiny.toml", "nodes", MASTER_PORT=port)
    assert done.returncode == 0, done.stderr
    one = command_for(Path("tiny.toml"), Path("one"), 1)
    alone = subprocess.run(one, capture_output=True, check=True, text=True).stdout
    (said,) = [line for line in (done.stdout + Path("node2.log").read_text()).splitlines() if line]
    assert json.loads(said) == pytest.approx(json.loads(alone), rel=1e-4)
    assert len(list(Path("nodes/checkpoints").glob("step-00000040/model-*"))) == 2
