"""Commands that train, sample, and do the whole job."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg

from mupgpt.cli.shared import one_thread, print_json, read_config
from mupgpt.config.plain import load_toml, to_dict
from mupgpt.config.schema import GPTConfig, TrainConfig
from mupgpt.errors import ConfigError
from mupgpt.resolve import overlay, train_config
from mupgpt.util.text import label

__all__ = ["COMMANDS", "ShapeFlags", "run_train"]


def train(config: Positional[str]) -> None:
    """Execute a config; any field can be changed by a flag, e.g. --hparams.lr 3e-3.

    Args:
        config: A preset's name or a config file; `mupgpt train NAME --help` shows its flags.
    """
    raise AssertionError("`parse` calls `run_train`, whose flags are the config's fields")


@dataclass(frozen=True, kw_only=True)
class ShapeFlags(GPTConfig):
    """Shape of the model; what is not given follows from what is."""

    def __post_init__(self) -> None:
        """Check nothing yet: a flag is checked together with the file's values that it leaves."""


@dataclass(frozen=True, kw_only=True)
class TrainFlags(TrainConfig):
    """A run as flags."""

    model: ShapeFlags
    """Shape of the model."""

    def __post_init__(self) -> None:
        """Check nothing yet, as above."""


def run_train(name: str, flags: list[str]) -> None:
    """``mupgpt train``: the file gives the defaults, then the flags are read over them."""
    if name.startswith("-"):
        raise ConfigError(
            f"config = {name!r}: must be a preset's name or a config file, before any flag: "
            "mupgpt train CONFIG --hparams.lr 3e-3"
        )
    raw = read_config(name)
    resolved = train_config(raw)
    shape: dict[str, Any] = vars(resolved.model)
    fields: dict[str, Any] = {**vars(resolved), "model": ShapeFlags(**shape)}
    default, folder = TrainFlags(**fields), Path("runs") / label(name)

    def train(
        config: Annotated[TrainFlags, arg(name="")] = default,
        run: Path = folder,
    ) -> None:
        """Execute a config in one folder; the same command continues it.

        Args:
            config: The run.
            run: Folder for checkpoints and metrics.
        """
        from mupgpt.distributed.processes import is_main, leave_group
        from mupgpt.trainer import Trainer

        one_thread()
        given = _given(to_dict(default), to_dict(config), _named(flags))
        under = {k: v for k, v in raw_fields(raw).items() if k != "tokens" or "steps" not in given}
        result = Trainer(train_config(overlay(under, given)), run).fit()
        if is_main():
            print_json(result)
        leave_group()

    tyro.cli(train, args=flags, prog=f"mupgpt train {name}", use_underscores=True)


def raw_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """``raw`` with a model given by name as a table, so that fields can be laid over it."""
    model = raw["model"]
    return {**raw, "model": {"preset": model} if isinstance(model, str) else model}


def _named(flags: list[str]) -> set[str]:
    """The dotted fields that flags name."""
    names = (flag[2:].partition("=")[0] for flag in flags if flag.startswith("--"))
    return {name.replace("-", "_").replace(".no_", ".") for name in names}


def _given(
    old: dict[str, Any], new: dict[str, Any], named: Collection[str], path: str = ""
) -> dict[str, Any]:
    """The nested values of ``new`` that were given: named by a flag, or not those of ``old``."""
    given: dict[str, Any] = {}
    for key, value in new.items():
        if isinstance(value, dict):
            if below := _given(old[key], value, named, f"{path}{key}."):
                given[key] = below
        elif value != old[key] or f"{path}{key}" in named:
            given[key] = value
    return given


def launch(
    config: Positional[Path],
    run: Path | None = None,
    processes: int = 1,
    retries: int = 3,
    pause: float = 10.0,
) -> None:
    """Execute a config file under torchrun, again from the last good checkpoint when it fails.

    Args:
        config: The run.
        run: Folder for checkpoints and metrics (default: runs/NAME).
        processes: Processes on this machine, one a GPU.
        retries: Failures in a row without a new checkpoint that are forgiven.
        pause: Seconds before the first of them is tried again; doubled with each.
    """
    from mupgpt.runs.launch import command_for, supervise

    train_config(load_toml(config))  # a mistake is said before anything is started
    folder = run or Path("runs") / label(config)
    supervise(command_for(config, folder, processes), folder, retries, pause)


def generate(
    run: Positional[Path],
    prompt: str = "",
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
    context: int = 0,
    alibi_scaling: float | None = None,
) -> None:
    """Sample text from a run's newest checkpoint.

    Args:
        run: The run's folder.
        prompt: What to continue.
        max_tokens: Tokens to sample.
        temperature: 0 takes the most likely token.
        top_k: Sample among that many; 0 is all.
        seed: Seed of the sampling.
        context: Tokens that it may look back on (default: as trained; learned positions end there).
        alibi_scaling: Divide ALiBi's distances by this; 0 is by context over the trained one.
    """
    from mupgpt.data.tokenizers import EOT
    from mupgpt.runs.generate import decode, encode_prompt, load_run, sample

    model, tokenizer = load_run(run, context, alibi_scaling)
    start = encode_prompt(prompt, tokenizer)
    tokens = sample(model, start, max_tokens, temperature, top_k, seed, EOT[tokenizer])
    print(prompt + decode(list(tokens), tokenizer))


def demo(out: Path = Path("runs/demo"), workers: int | None = None) -> None:
    """Run the main job on the text of the Python standard library, in a few minutes.

    Args:
        out: Folder for the results.
        workers: One-thread processes (default: one a core).
    """
    from mupgpt.cli.demo import run_demo

    one_thread()
    run_demo(out, workers)


COMMANDS = (train, launch, generate, demo)
