"""What torch's classes say of a module's parameters, and where its layers are.

A parameter is known by its name alone, also once its module has been compiled, wrapped or sharded.
"""

from collections.abc import Collection, Iterable

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mupgpt.model.layers import Embedding, LayerNorm, Linear, RMSNorm

__all__ = ["axes", "is_norm", "is_table", "locate", "named", "owners", "stacks", "unwrapped"]

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Linear)
TABLES = (nn.Embedding, nn.EmbeddingBag, Embedding)
NORMS = (LayerNorm, RMSNorm)
TRANSPOSED = "transformers.pytorch_utils.Conv1D"  # GPT-2's: (in, out)
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}
"""Parts that `torch.compile` and checkpointing put into parameter names."""


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names that they have in the module as its constructor makes it.

    >>> list(named(nn.Sequential(nn.Linear(2, 3, bias=False))))
    ['0.weight']
    """
    return {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): p
        for name, p in unwrapped(model).named_parameters()
    }


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside a `DistributedDataParallel`, else the module."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def owners(model: nn.Module) -> dict[str, list[str]]:
    """Name of each parameter → all names that it has: more than one where modules share it."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(first.setdefault(id(p), name), []).append(name)
    return names


def is_table(module: nn.Module) -> bool:
    """Whether it is an embedding, whose rows are never width."""
    return isinstance(module, TABLES)


def is_norm(module: nn.Module) -> bool:
    """Whether it is a norm: its class is called so, as torch's and transformers' are."""
    name = type(module).__name__
    return isinstance(module, NORMS) or "Norm" in name


def axes(module: nn.Module, key: str) -> tuple[int, int] | None:
    """Axes of fan-out and fan-in of the parameter ``key``; None where the class does not say.

    >>> axes(nn.Linear(2, 3), "weight"), axes(nn.Embedding(2, 3), "weight")
    ((0, 1), (1, 0))
    >>> axes(nn.Bilinear(2, 3, 4), "weight") is None
    True
    """
    if isinstance(module, nn.MultiheadAttention):
        return (0, 1) if key.endswith("proj_weight") else None
    if key != "weight":
        return None
    if isinstance(module, MATRICES):
        return 0, 1
    transposed = f"{type(module).__module__}.{type(module).__qualname__}" == TRANSPOSED
    return (1, 0) if transposed or is_table(module) else None


def stacks(model: nn.Module) -> set[str]:
    """Sites of the containers whose children are layers: alike in names and shapes.

    >>> block = lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    >>> sorted(stacks(nn.Sequential(nn.Linear(4, 8), nn.ModuleList([block(), block()]))))
    ['1']
    """
    found: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and _alike(module.children()):
            found.add(locate(name, found)[0])
    return found


def _alike(layers: Iterable[nn.Module]) -> bool:
    """Whether these have submodules, and agree in the shape of every parameter they share."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        own = {name: tuple(p.shape) for name, p in layer.named_parameters()}
        shared = own.keys() & shapes.keys()
        if not any(layer.children()) or (shapes and not shared):
            return False
        if any(own[name] != shapes[name] for name in shared):
            return False
        shapes |= own
    return bool(shapes)


def locate(name: str, stacks: Collection[str]) -> tuple[str, tuple[str, int] | None]:
    """The site of ``name`` (layers' indices as ``*``), and the outermost stack and layer it is in.

    >>> locate("layers.3.mlp.0.weight", {"layers"})
    ('layers.*.mlp.0.weight', ('layers', 3))
    >>> locate("layers.3.experts.5.up.weight", {"layers", "layers.*.experts"})
    ('layers.*.experts.*.up.weight', ('layers', 3))
    """
    site: list[str] = []
    layer = None
    for part in name.split("."):
        container = ".".join(site)
        if part.isdigit() and container in stacks:
            layer = layer or (container, int(part))
            part = "*"
        site.append(part)
    return ".".join(site), layer
