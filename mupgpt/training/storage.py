"""How a run is stored on the devices at hand."""

import os

import torch

from mupgpt.config.schema import TrainConfig
from mupgpt.distributed.processes import gather, world_size
from mupgpt.errors import ConfigError
from mupgpt.parametrization.layout import count_params
from mupgpt.planning.plan import GIB, Machine, decide_storage, state_bytes
from mupgpt.util.host import memory

__all__ = ["stored_here"]


def stored_here(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The config with storage and recomputation decided; a run that cannot fit is refused."""
    world = world_size()
    if device.type == "cuda":
        free = min(gather(torch.cuda.mem_get_info(device)[0]))
        return decide_storage(config, Machine(gpus=world, hbm=free / GIB))
    stored = decide_storage(config)
    need = sum(state_bytes(stored).values())
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world > 1 else 1
    free = memory() * world // beside
    where = f"this {device.type}" if world == 1 else f"that of {world} processes"
    if need > free:
        raise ConfigError(
            f"model: {count_params(config.model):,} parameters need {need / GIB:.0f} GiB for "
            f"weights, gradients and moments, and {where} has {free / GIB:.0f} GiB; "
            "take a smaller preset (`mupgpt presets`) or a larger machine"
        )
    return stored
