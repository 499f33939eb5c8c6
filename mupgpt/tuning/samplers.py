"""The samplers of a spec: Optuna's own, and CARBS."""

import zlib

from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler

from mupgpt.tuning.spec import StudyConfig
from mupgpt.tuning.storage import quiet

__all__ = ["make_sampler"]


def make_sampler(config: StudyConfig, salt: str = "") -> BaseSampler:
    """The spec's sampler, seeded by ``study.sampler_seed`` and ``salt``.

    After an earlier sweep it draws other points than that one did.
    """
    seed = zlib.crc32(f"{config.sampler_seed}/{config.warm_start}{salt}".encode())
    if config.sampler == "tpe":
        return TPESampler(seed=seed)
    if config.sampler == "gp":
        return GPSampler(seed=seed)
    if config.sampler == "carbs":
        from mupgpt.tuning.carbs.sampler import (
            CarbsSampler,  # and scipy, which no other sampler waits for
        )

        # A study's trials have one shape and one length: their seconds differ by chance alone. They
        # share seeds and data: to repeat one would tell nothing.
        return CarbsSampler(seed=seed, cost_key=None, resample_every=0)
    if config.sampler == "qmc":
        # One scrambled sequence for all workers: they share its index through the storage.
        ours = zlib.crc32(config.warm_start.encode())  # 0 without one
        with quiet():
            return QMCSampler(seed=config.sampler_seed ^ ours, scramble=True)
    return RandomSampler(seed=seed)
