"""Modules that are not ours under our table: the same training as our GPT's, whatever is done to
them, and one clear error for what cannot be known."""

import copy
import dataclasses
import re
import subprocess
import sys

import mup
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mupgpt as mg
from mupgpt.config.schema import Base, GPTConfig, HParams
from mupgpt.errors import ConfigError
from mupgpt.optim.make import make_optimizer
from mupgpt.optim.rates import effective_lrs, set_lr
from mupgpt.parametrization.layout import layout
from mupgpt.parametrization.rules import RULES
from mupgpt.parametrization.table import parametrize


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.d_head = c.d_head
        self.q, self.k, self.v = (nn.Linear(c.d_model, c.d_attn) for _ in range(3))
        self.o = nn.Linear(c.d_attn, c.d_model)

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.d_head)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(c.d_model), nn.LayerNorm(c.d_model)
        self.attn = Attention(c)
        up, down = nn.Linear(c.d_model, c.d_ffn), nn.Linear(c.d_ffn, c.d_model)
        self.mlp = nn.ModuleDict({"up": up, "down": down})

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.mlp["down"](F.gelu(self.mlp["up"](self.ln2(x))))


class TheirGPT(nn.Module):
    """Someone's GPT of torch's layers: our names, and no multiplier anywhere."""

    def __init__(self, c):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(c.vocab_size, c.d_model), nn.Embedding(12, c.d_model)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.d_model)
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        if c.tied:
            self.head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))


def config(d_model, n_head, d_ffn, n_layer=2, tied=True, vocab_size=19):
    return GPTConfig(
        n_layer=n_layer, d_model=d_model, n_head=n_head, d_ffn=d_ffn, vocab_size=vocab_size,
        seq_len=12, tied=tied,
    )  # fmt: skip


HP = HParams(
    lr=3e-3, init_std=0.2, emb_mult=1.5, attn_mult=2.0, residual_mult=0.7, output_mult=2.5,
    weight_decay=0.3, eps=1e-6, lr_mult_norm=0.5,
)  # fmt: skip
WRITERS = {"blocks.*.attn.o": "residual_out", "blocks.*.mlp.down": "residual_out"}
ROLES = {**WRITERS, "*.attn.q.weight": "query", "ln_f.weight": "final_norm"}  # biases go along


def adopted(tied=True, rule="mup", **kwargs):
    kwargs = {"hparams": HP, "roles": ROLES, "d_head": lambda m: m.blocks[0].attn.d_head, **kwargs}
    base, delta = config(16, 2, 48, tied=tied), config(24, 2, 64, tied=tied)
    return mg.adopt(TheirGPT, base=base, delta=delta, rule=rule, **kwargs)


def batches(steps):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(19, (2, 4, 12), generator=generator) for _ in range(steps)]


def train(model, optimizer, steps=3):
    """Losses of some steps, from a module's logits."""
    losses = []
    for x, y in batches(steps):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# --- what it is ---


@pytest.mark.parametrize(
    "fields",
    [
        {"d_head": 8},
        {"n_head": 2, "tied": False},
        {"d_head": 8, "activation": "swiglu", "norm": "rmsnorm", "bias": False},
        {"n_head": 2, "qk_norm": True, "positions": "rope"},
        {"d_head": 8, "group": 2, "positions": "none"},
    ],
)
def test_our_gpt_is_described_as_its_layout(fields):
    fields = dict(fields)
    group = fields.pop("group", 0)
    base, delta, target = (
        GPTConfig(
            n_layer=n, d_model=d, vocab_size=19, seq_len=12,
            n_kv_head=d // 8 // group if group else 0, **fields,
        )
        for d, n in ((16, 2), (32, 2), (96, 3))
    )  # fmt: skip
    with torch.device("meta"):
        found = mg.describe(mg.GPT(target), base=mg.GPT(base), delta=mg.GPT(delta), roles=WRITERS)
    assert found == layout(target)


@pytest.mark.parametrize(("rule", "tied"), [*((rule, True) for rule in RULES), ("mup", False)])
def test_their_gpt_trains_as_ours(rule, tied):
    """Wider by 3, 5 in the MLP and 2 in the heads, and twice as deep, in float64."""
    shape = config(48, 3, 240, n_layer=4, tied=tied)
    ours, theirs = mg.GPT(shape).double(), TheirGPT(shape).double()
    table = parametrize(shape, Base.of(config(16, 2, 48, tied=tied)), HP, rule)
    mg.init_weights(ours, table, seeds=0)
    adopted(tied, rule).init_weights(theirs)
    optimizer, reference = adopted(tied, rule).optimizer(theirs), make_optimizer(ours, table)
    expected = []
    for x, y in batches(10):
        loss = ours(x, y).mean()
        reference.zero_grad()
        loss.backward()
        reference.step()
        expected.append(loss.item())
    bfloat16 = 1e-3  # in which Muon orthogonalizes
    assert train(theirs, optimizer, 10) == pytest.approx(
        expected, abs=bfloat16 if rule == "mup-muon" else 1e-12
    )


def mlp(width, hidden, readout=nn.Linear):
    return nn.Sequential(
        nn.Linear(7, width), nn.ReLU(), nn.Linear(width, hidden), nn.ReLU(), readout(hidden, 3)
    )


def test_an_mlp_trains_as_mups_own():
    """mup's readout, base shapes and AdamW on one side; a plain MLP on the other."""
    hp = HParams(lr=0.01, weight_decay=0.2, emb_mult=1.0)
    ours = mg.adopt(
        lambda size: mlp(*size), base=(16, 32), delta=(24, 40), rule="mup-package", hparams=hp
    )
    model = ours.build((64, 160)).double()
    peer = mlp(64, 160, mup.MuReadout).double()
    base, delta = mlp(16, 32, mup.MuReadout), mlp(24, 40, mup.MuReadout)
    mup.set_base_shapes(peer, base, delta=delta, rescale_params=False)
    with torch.no_grad():
        for name, p in peer.named_parameters():
            p.copy_(model.get_parameter(name) * (5 if name == "4.weight" else 1))
    optimizer = ours.optimizer(model)
    reference = mup.MuAdamW(
        peer.parameters(), lr=0.01, betas=(hp.beta1, hp.beta2), eps=hp.eps, weight_decay=0.2
    )
    torch.manual_seed(0)
    for _ in range(20):
        x, y = torch.randn(16, 7, dtype=torch.float64), torch.randint(3, (16,))
        losses = F.cross_entropy(model(x), y), F.cross_entropy(peer(x), y)
        assert abs(losses[0].item() - losses[1].item()) < 1e-9
        for loss, stepped in zip(losses, (optimizer, reference), strict=True):
            stepped.zero_grad()
            loss.backward()
            stepped.step()


def test_the_table_says_what_was_carried_where():
    table = adopted().table(TheirGPT(config(48, 3, 240)))
    assert {m.value for m in table.multipliers.values()} == {1.0}
    row = table.rows["ln_f.weight"]  # 2.5 / 3 over 1.5
    assert float(row.init) == pytest.approx(2.5 / 3 / 1.5)
    assert "readout, emb" in row.why


# --- what must not break it ---


SHAPE = config(48, 3, 240, tied=False)


def untied():
    return adopted(tied=False)


def initialized(model):
    untied().init_weights(model)
    return model


def reference_run():
    model = initialized(TheirGPT(SHAPE).double())
    optimizer = untied().optimizer(model)
    rows = effective_lrs(optimizer)
    return rows, train(model, optimizer)


def deep_copied(model):
    return copy.deepcopy(model)


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_by_block(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")
    return model


def loaded(model):
    fresh = TheirGPT(SHAPE).double()
    fresh.load_state_dict(model.state_dict())
    return fresh


def assigned(model):
    with torch.device("meta"):
        fresh = TheirGPT(SHAPE)
    fresh.load_state_dict(model.state_dict(), assign=True)
    return fresh


def made_empty(model):
    with torch.device("meta"):
        fresh = TheirGPT(SHAPE).double()
    return initialized(fresh.to_empty(device="cpu"))


def checkpointed(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    return model


@pytest.mark.parametrize(
    "change",
    [deep_copied, compiled, compiled_by_block, loaded, assigned, made_empty, checkpointed],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own
def test_training_survives(change):
    model = change(initialized(TheirGPT(SHAPE).double()))
    optimizer = untied().optimizer(model)
    rates, losses = reference_run()
    wrapped = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.")
    assert {wrapped.sub("", n): lr for n, lr in effective_lrs(optimizer).items()} == rates
    assert train(model, optimizer) == pytest.approx(losses, abs=1e-12)


def test_nothing_is_attached_to_the_module():
    model, plain = untied().build(SHAPE), TheirGPT(SHAPE)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert type(ours) is type(theirs) and vars(ours).keys() == vars(theirs).keys()
        assert not ours._forward_hooks and not ours._forward_pre_hooks
    for p in model.parameters():
        assert type(p) is nn.Parameter and not vars(p)


def test_weights_that_came_untied_are_noticed():
    model = adopted().build(config(48, 3, 240))
    with torch.device("meta"):
        fresh = TheirGPT(config(48, 3, 240))
    fresh.load_state_dict(model.state_dict(), assign=True)
    with pytest.raises(ConfigError, match=r"head\.weight is only in this module.*tie them again"):
        adopted().optimizer(fresh)
    fresh.head.weight = fresh.wte.weight
    assert effective_lrs(adopted().optimizer(fresh)) == effective_lrs(adopted().optimizer(model))


SHARDED = """
import sys
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, {tests!r})
from test_adopt import SHAPE, TheirGPT, initialized, reference_run, train, untied
from mupgpt.distributed.processes import leave_group
from mupgpt.optim.rates import effective_lrs

torch.set_num_threads(1)
rank, world = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
with torch.device("meta"):
    model = TheirGPT(SHAPE).double()
for block in model.blocks:
    fully_shard(block)
fully_shard(model)
model.to_empty(device="cpu")
initialized(model)
optimizer = untied().optimizer(model)
rates, losses = reference_run()
assert effective_lrs(optimizer) == rates
whole = initialized(TheirGPT(SHAPE).double())
for name, p in model.named_parameters():
    assert torch.equal(p.full_tensor(), whole.get_parameter(name)), name
replica = DistributedDataParallel(whole)
wrapped = {{f"module.{{name}}": lr for name, lr in rates.items()}}
assert effective_lrs(untied().optimizer(replica)) == wrapped
found = train(model, optimizer)  # every rank has the whole batch
assert max(abs(a - b) for a, b in zip(found, losses)) < 1e-12, (found, losses)
print("same")
leave_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_training_survives_sharding(world, tmp_path, request):
    code = SHARDED.format(tests=str(request.path.parent), store=tmp_path / "store")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(world)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    said = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert all(text.strip().endswith("same") for text in said), said


# --- what cannot be known ---


class Raw(nn.Module):
    """x @ w between an input and a readout."""

    def __init__(self, width, extra=None):
        super().__init__()
        self.first = nn.Linear(7, width)
        self.w = nn.Parameter(torch.empty(width, 2 * width if extra is None else extra))
        self.last = nn.Linear(2 * width if extra is None else extra, 3)


class Experts(nn.Module):
    """A layer with a router, in a list."""

    def __init__(self, width, routed=4):
        super().__init__()
        self.first = nn.Linear(7, width)
        layer = nn.ModuleDict({"router": nn.Linear(width, routed), "up": nn.Linear(width, width)})
        self.layers = nn.ModuleList([layer])
        self.last = nn.Linear(width, 3)


class Vocabulary(nn.Module):
    """An untied language model whose vocabulary is padded more at larger widths."""

    def __init__(self, width, rows):
        super().__init__()
        self.wte = nn.Embedding(rows, width)
        self.head = nn.Linear(width, rows, bias=False)


class OffsetNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape) * (1 + self.weight)


def normed(width):
    return nn.Sequential(nn.Linear(7, width), OffsetNorm(width), nn.Linear(width, 3))


def their(**kwargs):
    return lambda: adopted(**kwargs)


REFUSED = {
    "a raw matrix": (
        lambda: mg.adopt(Raw, base=8, delta=16),
        r'w is 8×16 in base and 16×32 in delta: its class.*roles=\{"w": "hidden"\}',
    ),
    "two ratios of a raw matrix": (
        lambda: mg.adopt(
            lambda size: Raw(*size), base=(8, 8), delta=(16, 32), roles={"w": "hidden"}
        ),
        r"w is 8×8 in the base and 16×32 in this module: its widths grow by different ratios",
    ),
    "a router": (
        lambda: mg.adopt(Experts, base=8, delta=16),
        r"layers\.\*\.router\.weight is 4×8 in base and 4×16 in delta: only its fan-in is width.*"
        r'"hidden"} or roles={"layers\.\*\.router\.weight": "output"}',
    ),
    "a vocabulary that grows": (
        lambda: mg.adopt(lambda size: Vocabulary(*size), base=(8, 19), delta=(16, 24)),
        r"head\.weight is 19×8 in base and 24×16 in delta: it has as many rows as an embedding.*"
        r'give base and delta one vocabulary, or declare roles=\{"head\.weight": "output"\}',
    ),
    "a width that delta hides": (
        lambda: mg.adopt(TheirGPT, base=config(16, 2, 48), delta=config(32, 4, 48), roles=ROLES),
        r"mlp\.up\.weight is 48×16 in base and 48×32 in delta: only its fan-in is width",
    ),
    "a width that delta hides, outside a layer": (
        lambda: mg.adopt(lambda size: mlp(*size), base=(8, 32), delta=(16, 32)).build((16, 64)),
        r"4\.weight is 3×32 in the base and 3×64 in this module: dimension 1 grows here, but not",
    ),
    "no difference": (
        lambda: mg.adopt(Raw, base=8, delta=8, roles={"w": "hidden"}),
        "delta: every shape is as in base",
    ),
    "another structure": (
        lambda: mg.adopt(lambda n: nn.Sequential(*[nn.Linear(n, n)] * 1), base=8, delta=16),
        "readouts must sum over one width: none is known",
    ),
    "a typo in roles": (
        their(roles={"blocks.*.atn.o": "residual_out"}),
        r"unknown parameter or module in roles 'blocks\.\*\.atn\.o'; did you mean",
    ),
    "no such role": (
        their(roles={"head": "outptu"}), "unknown role 'outptu'; did you mean 'output'",
    ),
    "heads that grow unseen": (
        lambda: mg.adopt(TheirGPT, base=config(16, 2, 48), delta=config(32, 2, 64), roles=ROLES),
        r"d_head: blocks\.0\.attn\.d_head is 8 in base and 16 in delta; declare it",
    ),
    "heads of an absolute rule": (their(rule="cerebras", d_head=None), "d_head: rule 'cerebras'"),
    "queries unknown": (
        their(roles={k: v for k, v in ROLES.items() if v != "query"}),
        r'attn = .*no parameter is known to carry it.*roles=\{"\*\.q_proj": "query"\}',
    ),
    "a tied head without its norm": (
        their(roles={k: v for k, v in ROLES.items() if v != "final_norm"}),
        r'readout = .*of a tied one.*roles=\{"ln_f": "final_norm"\}',
    ),
    "branches unknown": (
        their(roles={k: v for k, v in ROLES.items() if v != "residual_out"}),
        r'residual\.attn = 0\.7.*"residual_out"',
    ),
    "a final norm that is none": (
        their(roles={**ROLES, "wpe": "final_norm"}),
        r"wpe\.weight .*a input is no final_norm",
    ),
    "an attention of no use": (their(hparams=dataclasses.replace(HP, attn_mult=0.0)), "attn = 0"),
    "branches of two kinds": (
        their(rule=dataclasses.replace(RULES["mup"], forward={"residual.mlp": {"m_d": -1}})),
        r"residual\.mlp = .*must be residual\.attn's 0\.7",
    ),
    "two roles": (their(roles={**ROLES, "wpe": "input", "wp?": "output"}), "input and output"),
    "a norm of another kind": (
        lambda: mg.adopt(normed, base=8, delta=16).build(32),
        r'1\.weight starts at 0 in its constructor, not at 1.*roles=\{"1\.weight": "bias"\}',
    ),
    "branches in no list": (
        lambda: mg.adopt(Raw, base=8, delta=16, roles={"w": "residual_out"}),
        "w is residual_out, but in no list of like layers",
    ),
    "depth without branches": (
        lambda: adopted(roles={"*.attn.q": "query", "ln_f": "final_norm"},
                        hparams=dataclasses.replace(HP, residual_mult=1.0))
        .table(TheirGPT(config(24, 2, 64, n_layer=3))),
        r"the base's layers are \{'blocks': 2\}, this module's \{'blocks': 3\}: declare",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_known_is_asked_for(case):
    make, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        make()


def test_what_was_declared_is_followed():
    adopted_raw = mg.adopt(Raw, base=8, delta=16, roles={"w": "hidden"})
    assert adopted_raw.table(Raw(64)).rows["w"].lr == pytest.approx(HParams().lr / 8)
    router = {"layers.*.router": "output"}
    table = mg.adopt(Experts, base=8, delta=16, roles=router).table(Experts(64))
    rows = table.rows
    assert rows["layers.0.router.weight"].role == "output"
    assert rows["layers.0.router.bias"].role == "bias"
    assert rows["layers.0.router.weight"].lr == pytest.approx(HParams().lr / 8)
    offset = mg.adopt(normed, base=8, delta=16, roles={"1.weight": "bias"}).build(32)
    assert not offset[1].weight.any()


def test_a_padded_vocabulary_is_not_width():
    """Rows of embeddings and readouts may differ: in the target, and declared, in delta too."""
    for delta, roles in ((19, {}), (24, {"head.weight": "output"})):
        ours = mg.adopt(
            lambda size: Vocabulary(*size), base=(8, 19), delta=(16, delta), roles=roles
        )
        rows = ours.table(Vocabulary(32, 64)).rows
        assert (rows["wte.weight"].role, rows["head.weight"].role) == ("input", "output")
        assert rows["wte.weight"].lr == pytest.approx(HParams().lr * HParams().emb_mult)
        assert rows["head.weight"].lr == pytest.approx(HParams().lr / 4)
    base, delta = Vocabulary(8, 19), Vocabulary(16, 24)
    roles = {"head.weight": "output", "wte": "hidden"}
    found = mg.describe(Vocabulary(32, 64), base=base, delta=delta, roles=roles)
    assert [(p.fan_in, p.fan_out) for p in found] == [(1, 32), (32, 1)]


class Vision(nn.Module):
    """A convolution, a class token, torch's own encoder layers, a scale for each channel."""

    def __init__(self, width):
        super().__init__()
        rates = [rate.item() for rate in torch.linspace(0, 0.1, 2)]  # not on the meta device
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, width // 16, 2 * width, rates[0], batch_first=True),
            num_layers=2, enable_nested_tensor=False,
        )  # fmt: skip
        self.scale = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, 5)

    def forward(self, images):
        x = self.patches(images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return self.head(self.encoder(x)[:, 0] * self.scale)


def test_convolutions_and_torchs_own_layers():
    roles = {
        "cls_token": "input", "scale": "norm",
        "encoder.layers.*.self_attn.out_proj": "residual_out",
        "encoder.layers.*.linear2": "residual_out",
    }  # fmt: skip
    ours = mg.adopt(Vision, base=32, delta=64, roles=roles)
    model = ours.build(128)
    rows = ours.table(model).rows
    assert rows["patches.weight"].role == rows["cls_token"].role == "input"
    assert rows["encoder.layers.1.self_attn.in_proj_weight"].lr == HParams().lr / 4
    assert rows["encoder.layers.1.linear2.weight"].residual_out
    std = model.patches.weight.std().item() / (HParams().init_std * HParams().emb_mult)
    assert std == pytest.approx(1, abs=4 / (2 * model.patches.weight.numel()) ** 0.5)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)


# --- does it scale ---


CHECK_HP = HParams(lr=6e-3, init_std=0.08, emb_mult=10.0, attn_mult=2.0, weight_decay=0.0)


def their_loss(model, seed):
    tokens = torch.randint(19, (2, 9), generator=torch.Generator().manual_seed(seed))
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def check(rule, d_head, tied=True):
    sizes = {d: config(d, 2, 4 * d, tied=tied) for d in (64, 128, 256)}
    ours = mg.adopt(
        TheirGPT, base=sizes[64], delta=sizes[128], rule=rule, hparams=CHECK_HP, roles=ROLES,
        d_head=d_head,
    )  # fmt: skip
    return mg.coord_check_module(ours, their_loss, sizes)


def width_of_heads(model):
    return model.blocks[0].attn.d_head


def off(result):
    return {(slope.measure, slope.probe) for slope in result.slopes if not slope.ok}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_their_gpt_passes_its_coordinate_check(tied):
    result = check("mup", width_of_heads, tied)
    assert result.passed, result
    assert str(result).endswith("mup: PASSED")
    assert {"wte", "attention scores", "blocks.*.mlp.down", "head"} <= {
        slope.probe for slope in result.slopes
    }


@pytest.mark.slow
def test_standard_parametrization_fails_it():
    """Hidden layers and logits move more at larger widths; the final norm cannot."""
    result = check("sp", width_of_heads)
    found = off(result)
    assert {("change", f"blocks.*.{name}") for name in ("attn.q", "attn.v", "mlp.up")} <= found
    assert ("change", "head") in found and ("change", "ln_f") not in found
    assert result.to_dict()["passed"] is False


@pytest.mark.slow
def test_heads_that_were_not_declared_fail_it():
    """Scores under 1/√d_head are √d_head too large."""
    found = off(check("mup", lambda model: 32.0))
    assert ("init", "attention scores × √d_head") in found
    assert all(probe.startswith("attention scores") for _, probe in found)


def test_a_check_needs_enough():
    for widths, kwargs in (((8, 16), {}), ((8, 16, 32), {"seeds": (0, 1)})):
        with pytest.raises(ConfigError, match="be at least three"):
            mg.coord_check_module(adopted(), their_loss, widths, **kwargs)
    with pytest.raises(ConfigError, match="at least 10"):
        mg.coord_check_module(adopted(), their_loss, (8, 16, 32), steps=3)


# --- inside transformers ---


def llama(width, **kwargs):
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2,
        num_attention_heads=width // 16, num_key_value_heads=width // 16, vocab_size=64,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=0, **kwargs,
    )  # fmt: skip


LLAMA_ROLES = {
    "*.o_proj": "residual_out",
    "*.down_proj": "residual_out",
    "model.norm": "final_norm",
}


def adopted_llama(rule="mup", **kwargs):
    from transformers import LlamaForCausalLM

    hp = dataclasses.replace(CHECK_HP, attn_mult=1.0, lr=1e-2)
    base, delta = llama(32, **kwargs), llama(64, **kwargs)
    return mg.adopt(
        LlamaForCausalLM, base=base, delta=delta, rule=rule, hparams=hp, roles=LLAMA_ROLES
    )


def ids(seed, n=2):
    return torch.randint(64, (n, 8), generator=torch.Generator().manual_seed(seed))


def llama_loss(model, seed):
    return model(input_ids=ids(seed), labels=ids(seed)).loss


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_trainer_steps_by_the_table(tied, tmp_path):
    """Its Trainer's rates are table × schedule, its weights ours, and a saved model is ordinary."""
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    steps, ours = 5, adopted_llama(tie_word_embeddings=tied)
    model, mine = (ours.build(llama(128, tie_word_embeddings=tied), seed=1) for _ in range(2))
    rates = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            rates.append(effective_lrs(optimizer))

    example = {"input_ids": ids(0, 1)[0], "labels": ids(0, 1)[0]}
    args = TrainingArguments(
        str(tmp_path), max_steps=steps, per_device_train_batch_size=2, lr_scheduler_type="linear",
        max_grad_norm=0.0, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=[example] * 2 * steps, callbacks=[Watch()],
        optimizers=(ours.optimizer(model), None),
    )  # fmt: skip
    trainer.train()

    rows, optimizer = ours.table(mine).rows, ours.optimizer(mine)
    for step in range(steps):
        factor = 1 - step / steps
        assert rates[step] == pytest.approx({n: row.lr * factor for n, row in rows.items()})
        set_lr(optimizer, factor)
        optimizer.zero_grad()
        mine(input_ids=ids(0, 1), labels=ids(0, 1)).loss.backward()
        optimizer.step()
    for name, p in mine.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path / "saved")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(ids(3)).logits, model(ids(3)).logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rule", ["mup", "mup-sgd", "mup-lion", "mup-muon"])
@pytest.mark.parametrize(
    ("name", "asked"),
    [("cosine_with_min_lr", {"min_lr": 6e-4}), ("polynomial", {"lr_end": 6e-4})],
)
def test_transformers_schedules_end_where_they_say(rule, name, asked):
    """Those that read ``optimizer.defaults["lr"]``: from the base's 6e-3 to a tenth of it, and so
    every parameter to a tenth of its own."""
    from transformers import get_scheduler

    ours = mg.adopt(
        lambda width: mlp(width, width), base=64, delta=128, rule=rule, hparams=HParams(lr=6e-3)
    )
    model = ours.build(256)
    optimizer, rows = ours.optimizer(model), ours.table(model).rows
    schedule = get_scheduler(name, optimizer, 0, 8, scheduler_specific_kwargs=asked)
    assert effective_lrs(optimizer) == {n: row.lr for n, row in rows.items()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(8):
        optimizer.step()
        schedule.step()
    assert effective_lrs(optimizer) == pytest.approx({n: row.lr / 10 for n, row in rows.items()})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_gpt2s_transposed_weights_have_their_fans():
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2(width, inner):
        return GPT2Config(
            n_embd=width, n_inner=inner, n_head=width // 16, n_layer=2, vocab_size=64,
            n_positions=16, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip

    roles = {"*.c_proj": "residual_out", "transformer.ln_f": "final_norm"}
    ours = mg.adopt(GPT2LMHeadModel, base=gpt2(32, 96), delta=gpt2(64, 160), roles=roles)
    rows = ours.table(ours.build(gpt2(128, 768))).rows
    rates = {name: rows[f"transformer.h.1.{name}.weight"].lr for name in
             ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}  # fmt: skip
    ratios = (HParams().lr / rate for rate in rates.values())
    assert list(ratios) == pytest.approx([4, 4, 4, 8])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rule", ["mup", "sp"])
def test_a_llama_passes_its_coordinate_check_under_mup_alone(rule):
    widths = {width: llama(width) for width in (64, 128, 256)}
    result = mg.coord_check_module(adopted_llama(rule), llama_loss, widths)
    assert result.passed == (rule == "mup"), result
