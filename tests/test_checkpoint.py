"""Checkpoints: what is loaded is what was saved, or it is refused by name."""

import json
import os
import random
import shutil
import signal
import threading
import time

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mupgpt.checkpoint.reader import Checkpoint
from mupgpt.checkpoint.verify import checkpoints, load_newest, verify
from mupgpt.checkpoint.writer import Writer, save
from mupgpt.errors import CheckpointError


def tensors(step):
    generator = torch.Generator().manual_seed(step)
    return {f"w{i}": torch.randn(40, 30, generator=generator) for i in range(3)}


def write(root, step, keep=2):
    groups = {"model": tensors(step), "optimizer": {"m": torch.full((5,), float(step))}}
    return save(root, step, groups, {"note": step}, keep)


def test_round_trip_and_pruning(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000003", "step-00000002"]
    newest = load_newest(tmp_path)
    assert newest.step == 3 and newest.manifest["note"] == 3
    for name, tensor in tensors(3).items():
        assert torch.equal(newest.tensors("model")[name], tensor)
    assert load_newest(tmp_path / "none") is None


def test_every_flipped_bit_is_seen(tmp_path):
    good = write(tmp_path, 1).folder
    files = sorted(good.iterdir())
    rng = random.Random(0)
    for _ in range(100):
        path = rng.choice(files)
        data = bytearray(path.read_bytes())
        place, bit = rng.randrange(len(data)), rng.randrange(8)
        data[place] ^= 1 << bit
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            verify(good)
        data[place] ^= 1 << bit
        path.write_bytes(data)
    verify(good)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_file_falls_back_to_the_older_checkpoint(tmp_path, capsys, name, share):
    for step in (1, 2):
        write(tmp_path, step)
    path = tmp_path / "step-00000002" / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert load_newest(tmp_path).step == 1
    said = capsys.readouterr().err
    assert name in said and "bad-step-00000002" in said


def test_missing_added_and_foreign_files_are_refused(tmp_path):
    write(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000007")
    with pytest.raises(CheckpointError, match="another format or step"):
        verify(tmp_path / "step-00000007")
    (tmp_path / "step-00000001" / "extra").touch()
    with pytest.raises(CheckpointError, match="extra is missing or was added"):
        verify(tmp_path / "step-00000001")
    (tmp_path / "step-00000001" / "extra").unlink()
    (tmp_path / "step-00000001" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        verify(tmp_path / "step-00000001")


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    folder = write(tmp_path, 1).folder
    (folder / "manifest.json").write_text(json.dumps({"step": 1}))
    with pytest.raises(CheckpointError, match="none of 1 checkpoints verifies"):
        load_newest(tmp_path)


def refuse(*_):
    raise SafetensorError("disk full")


def test_a_failed_write_leaves_the_old_one(tmp_path, monkeypatch):
    write(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(
            "mupgpt.checkpoint.writer._fsync", lambda path: (_ for _ in ()).throw(OSError("x"))
        )
        with pytest.raises(CheckpointError, match="cannot write"):
            write(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    with monkeypatch.context() as patch:
        patch.setattr("mupgpt.checkpoint.writer.save_file", refuse)
        with pytest.raises(CheckpointError, match=r"cannot write.*disk full"):
            write(tmp_path, 2)
    (tmp_path / ".tmp-step-00000009-1").mkdir()  # of a writer that was killed
    write(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(CheckpointError, match="and less is free"):
        write(tmp_path, 2)
    assert load_newest(tmp_path).step == 1


def test_killed_at_any_moment_a_whole_checkpoint_is_there(tmp_path):
    """kill −9 at twelve moments of a loop that saves: what loads is exactly what was saved."""
    rng = random.Random(1)
    for attempt in range(12):
        root = tmp_path / str(attempt)
        write(root, 1)
        child = os.fork()
        if child == 0:
            step = 2
            while True:
                write(root, step)
                step += 1
        time.sleep(rng.uniform(0.005, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = load_newest(root)
        assert torch.equal(found.tensors("model")["w0"], tensors(found.step)["w0"])
        assert not list(root.glob("bad-*"))


def test_the_background_writes_what_the_state_was(tmp_path, monkeypatch):
    """Weights change while a checkpoint is being written: it holds those of the call."""
    begin = threading.Event()
    original = save_file
    monkeypatch.setattr(
        "mupgpt.checkpoint.writer.save_file", lambda *args: begin.wait() and original(*args)
    )
    state = tensors(1)
    with Writer(tmp_path, keep=2) as writer:
        writer.save(1, {"model": state}, {})
        assert checkpoints(tmp_path) == []
        for tensor in state.values():
            tensor.zero_()
        begin.set()
        writer.wait()
        assert verify(tmp_path / "step-00000001")
    for name, tensor in tensors(1).items():
        assert torch.equal(load_newest(tmp_path).tensors("model")[name], tensor)


def test_without_room_for_a_copy_the_run_waits(tmp_path, monkeypatch):
    """13B's state beside 128 GB of host memory: written from where it is, file by file."""
    monkeypatch.setattr("mupgpt.checkpoint.writer.free_memory", lambda: 3 * 4800)
    monkeypatch.setattr("mupgpt.checkpoint.writer.PART", 2 * 4800)
    state = tensors(1)  # of 4800 bytes each
    with Writer(tmp_path, keep=2) as writer:
        writer.save(1, {"model": state}, {})
        found = load_newest(tmp_path)  # it stands when `save` returns
        assert sorted(found.manifest["files"]) == ["model-part1.safetensors", "model.safetensors"]
        assert max(f["size"] for f in found.manifest["files"].values()) < 2 * 4800 + 500
        for name, tensor in state.items():
            assert torch.equal(found.tensors("model")[name], tensor)
        monkeypatch.setattr("mupgpt.checkpoint.writer.save_file", refuse)
        writer.save(2, {"model": state}, {})  # as in the background: said by the next one
        with pytest.raises(CheckpointError, match="disk full"):
            writer.wait()
    assert load_newest(tmp_path).step == 1


def test_one_is_written_at_a_time_and_leaving_waits(tmp_path):
    with Writer(tmp_path, keep=3, keep_steps=(1,)) as writer:
        for step in range(1, 7):
            writer.save(step, {"model": tensors(step)}, {"note": step})
    assert [int(p.name[-1]) for p in checkpoints(tmp_path)] == [6, 5, 4, 1]
    assert load_newest(tmp_path).manifest["note"] == 6


def test_a_failed_write_surfaces_at_the_next_one_or_at_the_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mupgpt.checkpoint.writer.save_file", refuse)
    with Writer(tmp_path, keep=2) as writer:
        writer.save(1, {"model": tensors(1)}, {})
        with pytest.raises(CheckpointError, match=r"cannot write .*step-00000001: disk full"):
            writer.save(2, {"model": tensors(2)}, {})
    with pytest.raises(CheckpointError, match="disk full"), Writer(tmp_path, keep=2) as writer:
        writer.save(3, {"model": tensors(3)}, {})
    with pytest.raises(KeyError), Writer(tmp_path, keep=2) as writer:
        writer.save(4, {"model": tensors(4)}, {})
        raise KeyError  # what went wrong first is what is raised
    assert "the last checkpoint failed" in capsys.readouterr().err
    assert checkpoints(tmp_path) == []


def cut(folder, rows):
    """Make files of a whole checkpoint's ``w0`` as two processes write it: rows above and below."""
    whole = tensors(1)["w0"]
    slices = {}
    for rank, (start, stop) in enumerate(rows):
        file = f"model-{rank:05d}.safetensors"
        save_file({"w0": whole[start:stop].clone()}, folder / file)
        slices[file] = {"w0": [[start, 0], [40, 30]]}
    return Checkpoint(folder, {"step": 1, "files": list(slices), "slices": slices})


def test_slices_are_put_together(tmp_path):
    found = cut(tmp_path, [(0, 13), (13, 40)])
    assert torch.equal(found.tensors("model")["w0"], tensors(1)["w0"])
    assert found.dtypes("model") == {"w0": torch.float32}
    half = {"w0": torch.empty(40, 30, dtype=torch.float64)}
    found.load("model", half)
    assert torch.equal(half["w0"], tensors(1)["w0"].double())


def test_holes_names_and_shapes_are_noticed(tmp_path):
    found = cut(tmp_path, [(0, 13), (14, 40)])
    with pytest.raises(AssertionError, match="w0: the slices leave a hole"):
        found.tensors("model")
    with pytest.raises(CheckpointError, match=r"model 'w1' is not in it"):
        found.load("model", {"w0": torch.empty(40, 30), "w1": torch.empty(40, 30)})
    with pytest.raises(CheckpointError, match=r"'w0' is \(40, 30\), not \(40, 31\)"):
        found.load("model", {"w0": torch.empty(40, 31)})
