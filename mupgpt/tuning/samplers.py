"""The samplers of a spec: Optuna's own, and CARBS; or one of the user's own."""

import importlib
import zlib
from collections.abc import Callable

from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler

from mupgpt.errors import ConfigError
from mupgpt.tuning.spec import StudyConfig
from mupgpt.tuning.storage import quiet

__all__ = ["SamplerFactory", "find_sampler", "importable_name", "make_sampler", "sampler_name"]

SamplerFactory = Callable[[int], BaseSampler]
"""From a seed to a sampler."""


def make_sampler(
    config: StudyConfig, salt: str = "", own: SamplerFactory | None = None
) -> BaseSampler:
    """The spec's sampler (or what ``own`` gives), seeded by ``study.sampler_seed`` and ``salt``.

    After an earlier sweep it draws other points than that one did.
    """
    seed = zlib.crc32(f"{config.sampler_seed}/{config.warm_start}{salt}".encode())
    if own is not None:
        return _own(own, seed)
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


def _own(factory: SamplerFactory, seed: int) -> BaseSampler:
    sampler = factory(seed)
    if not isinstance(sampler, BaseSampler):
        raise ConfigError(
            f"sampler = {sampler_name(factory)}: gave {sampler!r} for a seed; "
            "it must return an optuna.samplers.BaseSampler"
        )
    return sampler


def sampler_name(factory: SamplerFactory) -> str:
    """``module:function`` of a factory, which need not be importable.

    >>> sampler_name(RandomSampler)
    'optuna.samplers._random:RandomSampler'
    """
    name = getattr(factory, "__qualname__", type(factory).__qualname__)
    return f"{factory.__module__}:{name}"


def importable_name(factory: SamplerFactory) -> str:
    """The name by which other processes import the factory; ConfigError where they cannot."""
    name = sampler_name(factory)
    module, _, attribute = name.partition(":")
    if module == "__main__" or "." in attribute:  # a script is another __main__ in its workers
        found = None
    else:
        found = getattr(importlib.import_module(module), attribute, None)
    if found is not factory:
        raise ConfigError(
            f"sampler = {name}: several workers import it by name; "
            "define the function in a module of its own, or set workers = 1"
        )
    return name


def find_sampler(name: str) -> SamplerFactory:
    """The factory called ``module:function``.

    >>> find_sampler("optuna.samplers:RandomSampler") is RandomSampler
    True
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"sampler = {name!r}: {error}; name an importable function as 'module:function'"
        ) from error
