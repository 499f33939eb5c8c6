"""A table refuses a model that is not its own, in whichever way it comes."""

import dataclasses

import pytest
import torch
from torch import distributed as dist, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mupgpt as mg
from mupgpt.config.schema import Base, GPTConfig, HParams
from mupgpt.errors import ConfigError
from mupgpt.model.gpt import GPT
from mupgpt.model.init import init_weights
from mupgpt.model.shards import piece
from mupgpt.optim.groups import param_groups
from mupgpt.optim.make import make_optimizer
from mupgpt.parametrization.table import parametrize
from mupgpt.resolve import get_preset

SHAPE = GPTConfig(n_layer=2, d_model=16, n_head=2, vocab_size=11, seq_len=8)
OTHERS = {
    "wider": ({"d_model": 32, "d_ffn": 64}, "'wte.weight' is 11×16 in the model and 11×32"),
    "wider inside": ({"d_ffn": 96}, r"'blocks.0.mlp.up.weight' is 64×16 .* and 96×16 in the table"),
    "deeper": ({"n_layer": 3}, r"'blocks.2.ln1.weight' is only in the table"),
    "shallower": ({"n_layer": 1}, r"'blocks.1.ln1.weight' is only in the model"),
    "of more words": ({"vocab_size": 12}, "'wte.weight' is 11×16 in the model and 12×16"),
    "of a longer context": ({"seq_len": 9}, "'wpe.weight' is 8×16 in the model and 9×16"),
    "untied": ({"tied": False}, r"'head.weight' is only in the table"),
    "of shared keys": ({"n_kv_head": 1}, r"'blocks.0.attn.k.weight' is 16×16 .* and 8×16 in"),
}
DOORS = {
    "init_weights": init_weights,
    "param_groups": param_groups,
    "make_optimizer": make_optimizer,
    "apply_table": lambda model, tables: model.apply_table(tables),
}


def table(**fields):
    shape = dataclasses.replace(SHAPE, **fields)
    return parametrize(shape, Base.of(SHAPE), HParams(), "mup")


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("other", OTHERS)
def test_the_table_of_another_shape_is_refused(door, other):
    fields, message = OTHERS[other]
    with pytest.raises(ConfigError, match=f"the table is of another model: {message}"):
        DOORS[door](GPT(SHAPE), table(**fields))
    DOORS[door](GPT(SHAPE), table())


@pytest.mark.parametrize("door", DOORS)
def test_members_have_an_axis_more_and_each_a_table(door):
    DOORS[door](GPT(SHAPE, members=3), [table()] * 3)
    with pytest.raises(ConfigError, match=r"'wte.weight' is 11×16 in the model and 11×32"):
        DOORS[door](GPT(SHAPE, members=3), [table(), table(d_model=32, d_ffn=64), table()])


def test_a_refused_table_has_changed_nothing():
    model = GPT(SHAPE)
    init_weights(model, table(), 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    factors = model.factors()
    with pytest.raises(ConfigError):
        init_weights(model, table(n_layer=3), 1)
    assert model.factors() == factors
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_classic_mistake():
    """The proxy's table on its target: every name agrees."""
    small, large = (get_preset(name) for name in ("proxy-64", "proxy-128"))
    proxy = parametrize(small.shape, Base.of(small.shape), small.hparams, "mup")
    with torch.device("meta"):
        target = GPT(large.shape)
    assert set(proxy.rows) == {name for name, _ in target.named_parameters()}
    with pytest.raises(ConfigError, match="257×128 in the model and 257×64 in the table"):
        param_groups(target, proxy)


def mlp(d):
    return nn.Sequential(nn.Linear(7, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, 3))


def test_an_adopted_modules_table_is_of_its_own_width():
    adopted = mg.adopt(mlp, base=8, delta=16)
    narrow = adopted.table(mlp(32))
    assert param_groups(mlp(32), narrow)
    with pytest.raises(ConfigError, match=r"'0.weight' is 64×7 in the model and 32×7 in the table"):
        param_groups(mlp(64), narrow)
    module = mlp(32)
    module.members = "what a module may call its own"
    assert param_groups(module, narrow)


@pytest.fixture
def _two_processes():
    """As the first of two that never speak to each other: enough to divide parameters."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_two_processes")
def test_a_sharded_parameter_has_the_shape_of_the_whole():
    model = GPT(SHAPE)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    assert piece(model.wte.weight).data.shape == (6, 16)
    init_weights(model, table(), 0)
    assert param_groups(model, table())
    with pytest.raises(ConfigError, match=r"'wte.weight' is 11×16 in the model and 11×32"):
        model.apply_table(table(d_model=32, d_ffn=64))
