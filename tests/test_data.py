"""Data: a batch needs no history, every window is visited once, and bad input is named."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from mupgpt.config.phases import PhaseConfig
from mupgpt.config.schema import DataConfig
from mupgpt.data.batches import Batches, eval_batch, permute
from mupgpt.data.corpus import Corpus, is_held_out, load_corpus, write_corpus
from mupgpt.data.token_files import read_shard, write_shard
from mupgpt.data.tokenizers import EOT, encode_bytes
from mupgpt.errors import ConfigError
from mupgpt.runs.generate import decode


def corpus(n=1000, name="counting"):
    tokens = np.arange(n, dtype=np.uint16)
    return Corpus(name, tokens, tokens[:300], "bytes", "0" * 64, n, 1.0)


def course(batch_size, seq_len):
    return (PhaseConfig(steps=100, batch_size=batch_size, seq_len=seq_len),)


def test_a_batch_is_a_function_of_seed_and_step():
    a, b = (Batches(corpus(), course(4, 8), seed=3) for _ in range(2))
    for step in (5, 0, 31, 5):
        x, y = a(step)
        assert np.array_equal(x, b(step)[0])
        assert np.array_equal(x[:, 1:], y[:, :-1])
        assert np.array_equal(y - x, np.ones_like(x))  # the corpus counts
    assert not np.array_equal(a(0)[0], Batches(corpus(), course(4, 8), seed=4)(0)[0])


def test_an_epoch_visits_every_window_once():
    batches = Batches(corpus(1000), course(1, 8), seed=0)
    count = 999 // 8 - 1
    for epoch in range(3):
        samples = np.arange(epoch * count, (epoch + 1) * count)
        starts = batches.starts(samples)
        assert len(set(starts.tolist())) == count
        assert len({s % 8 for s in starts}) == 1  # one offset an epoch
    first, second = (batches.starts(np.arange(i * count, (i + 1) * count)) for i in (0, 1))
    assert not np.array_equal(first, second)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_permute_mixes():
    """Neighbours are spread: the mean distance is a third of the range, as for a random order."""
    order = permute(np.arange(3000), 3000, 11)
    assert np.abs(np.diff(order)).mean() == pytest.approx(1000, rel=0.06)


def test_the_standard_library():
    found = load_corpus(DataConfig())
    assert found.bytes > 5_000_000
    assert found.vocab_used == 257
    share = len(found.val) / (len(found.train) + len(found.val))
    assert 0.02 < share < 0.1
    assert found is load_corpus(DataConfig())
    text = bytes(int(t) for t in found.val[:2000] if t != EOT["bytes"]).decode()
    assert any(word in text for word in ("import", "def", "class"))


def test_files_split_by_name_not_by_place(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"file {i} ")
    before = load_corpus(DataConfig(source=str(tmp_path)))
    held = [i for i in range(60) if is_held_out(f"{i}.txt")]
    expected = "".join(f"file {i} " for i in sorted(held, key=str))
    assert bytes(int(t) for t in before.val if t < 256).decode() == expected
    eot = (before.val == 256).sum()
    assert eot == len(held) > 0


def test_a_single_file_holds_out_its_tail(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(100)) * 10)
    found = load_corpus(DataConfig(source=str(path)))
    assert (len(found.train), len(found.val)) == (951, 51)
    assert np.array_equal(found.val[:50], encode_bytes(path.read_bytes()[-50:]))


def test_a_source_alone_is_a_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 50)
    assert load_corpus("a.txt").fingerprint == load_corpus(DataConfig(source="a.txt")).fingerprint


def test_gzip_is_read_and_the_fingerprint_is_of_the_text(tmp_path):
    text = b"some text " * 50
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text))
    found = load_corpus(DataConfig(source=str(tmp_path / "a.txt.gz")))
    assert found.bytes == 500
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text + b"!"))
    load_corpus.cache_clear()
    again = load_corpus(DataConfig(source=str(tmp_path / "a.txt.gz")))
    assert again.fingerprint != found.fingerprint


def test_shards_round_trip(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("hello world, this is a corpus. " * 100)
    made = load_corpus(DataConfig(source=str(text)))
    write_corpus(made, tmp_path / "toy")
    read = load_corpus(DataConfig(source=str(tmp_path / "toy_*.bin")))
    assert np.array_equal(read.train, made.train)
    assert np.array_equal(read.val, made.val)
    assert read.bytes_per_token == made.bytes_per_token
    assert json.loads((tmp_path / "toy_val.json").read_text())["sha256"] == made.sha256


def test_headless_shards_are_nanogpts(tmp_path):
    tokens = np.arange(5000, dtype=np.uint16)
    tokens.tofile(tmp_path / "train.bin")
    tokens[:400].tofile(tmp_path / "val.bin")
    found = load_corpus(DataConfig(source=str(tmp_path / "*.bin"), tokenizer="gpt2"))
    assert np.array_equal(found.train, tokens) and len(found.val) == 400
    assert found.bytes_per_token is None


def test_damaged_shards_are_named(tmp_path):
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(100, dtype=np.uint16))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ConfigError, match=r"a\.bin: its header says 100 tokens, but it has 95"):
        read_shard(path)
    path.write_bytes(b"abc")
    with pytest.raises(ConfigError, match="3 bytes is no whole number"):
        read_shard(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/*.txt", "no such file, folder or glob"),
        ("package:no_such_package", "no installed package 'no_such_package'"),
    ],
)
def test_a_missing_source_is_named(source, message):
    with pytest.raises(ConfigError, match=message):
        load_corpus(DataConfig(source=source))


def test_empty_and_short_and_too_rich_corpora(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(ConfigError, match="all of them empty"):
        load_corpus(DataConfig(source=str(empty)))
    with pytest.raises(ConfigError, match=r"its val part has 300 tokens.*seq_len = 400"):
        corpus().check(vocab_size=2000, seq_len=400)
    with pytest.raises(ConfigError, match=r"model.vocab_size = 256.*has token 256.*at least 257"):
        load_corpus(DataConfig()).check(vocab_size=256, seq_len=8)


def test_broken_gzip_and_tiny_shards(tmp_path):
    broken = bytearray(gzip.compress(bytes(range(200)) * 9))
    broken[12:40] = b"\xff" * 28
    (tmp_path / "a.gz").write_bytes(broken)
    with pytest.raises(ConfigError, match=r"cannot read .*a\.gz"):
        load_corpus(DataConfig(source=str(tmp_path / "a.gz")))
    write_shard(tmp_path / "b.bin", np.arange(5, dtype=np.uint16))
    with pytest.raises(ConfigError, match="fewer than one sequence"):
        load_corpus(DataConfig(source=str(tmp_path / "b.bin"))).check(300, 8)
    for name in ("interval", "retrieval", "my_val_001", "val"):
        write_shard(tmp_path / f"{name}.bin", np.arange(100, dtype=np.uint16))
    found = load_corpus(DataConfig(source=str(tmp_path / "*.bin")))
    assert (len(found.train), len(found.val)) == (205, 200)


def test_the_evaluation_is_fixed_and_spread():
    x, y = eval_batch(corpus(), tokens=80, seq_len=8)
    assert x.shape == y.shape == (10, 8)
    assert x[0, 0] == 0 and y[-1, -1] == 299


def test_gpt2_tokens_are_gpt2s(tmp_path):
    """Ids that GPT-2's own vocabulary gives, and back to the text."""
    text = "Hello world, def f(x):\n    return x" * 40
    (tmp_path / "a.txt").write_text(text)
    found = load_corpus(DataConfig(source=str(tmp_path / "a.txt"), tokenizer="gpt2"))
    assert found.train[:5].tolist() == [15496, 995, 11, 825, 277]
    assert found.train[-1] == found.val[-1] == EOT["gpt2"]
    both = [int(t) for t in (*found.train, *found.val) if t != EOT["gpt2"]]
    assert decode(both, "gpt2") == text
    assert found.check(50257, 16) is found
