"""13B on one GPU: real optimizer steps, memory against the plan, coordinate check, kill and resume.

    python benchmarks/gpu_13b.py                          # all of it, ten minutes at most
    python benchmarks/gpu_13b.py speed --data 'x/*.bin'   # one stage, on token shards
    python benchmarks/gpu_13b.py --toy --out toy.json     # every line of it, on any machine

Stages (``rate speed coord resume hf save eager``) write into sweeps/results/gpu_13b.json as they
end; what would begin after ``--minutes`` is left to a call that names it, and the record says so.
Text is read by GPT-2's tokenizer where tiktoken has its vocabulary, else as bytes (the record says
which); shards for a machine without a network are made elsewhere by ``mupgpt data prepare stdlib
x/text``.
MFU is FLOPs of the convention ``palm``, recomputation not counted, over the dense bf16 matrix
product that was measured in the same run.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import machine, spread

from mupgpt.checkpoint.state import state_groups
from mupgpt.checkpoint.verify import verify
from mupgpt.checkpoint.writer import Writer
from mupgpt.data.batches import Batches
from mupgpt.data.corpus import load_corpus, write_corpus
from mupgpt.distributed.parallel import materialize, parallelize
from mupgpt.distributed.processes import Grid
from mupgpt.errors import ConfigError
from mupgpt.evidence.coordinates import coord_check
from mupgpt.model.gpt import GPT
from mupgpt.model.init import init_weights
from mupgpt.optim.make import make_optimizer
from mupgpt.parametrization.layout import count_params
from mupgpt.parametrization.table import parametrize
from mupgpt.planning.flops import flops_per_token
from mupgpt.planning.memory import moments
from mupgpt.planning.plan import GIB, Machine, decide_storage
from mupgpt.resolve import train_config
from mupgpt.training.device import compute, param_dtype, pick_device
from mupgpt.training.health import activations, measure
from mupgpt.training.metrics import TRAIN_LOSS, VAL_LOSS, read_metrics
from mupgpt.training.step import train_step

RESULT = Path(__file__).parent.parent / "sweeps" / "results" / "gpu_13b.json"
WARM, TIMED = 3, 20
INSIDE = 130.0  # GiB, of an H200's 139
RUNS = (  # preset, storage, sequences a step
    ("cerebras-gpt-13b", "lean", 4),
    ("cerebras-gpt-13b", "split", 4),
    ("cerebras-gpt-1.3b", "lean", 8),
    ("cerebras-gpt-1.3b", "exact", 8),
)
WIDTHS, SEEDS = (256, 1024, 2048, 5120), range(3)
TOY = {"n_layer": 2, "d_model": 64, "n_head": 2, "vocab_size": 257, "seq_len": 64}
TOY_RUNS = tuple(("toy", memory, 4) for memory in ("exact", "split", "lean"))
TOY_WIDTHS = (32, 64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=" ".join(STAGES))
    parser.add_argument("--toy", action="store_true", help="toy sizes, on a CPU too")
    parser.add_argument("--data", default="stdlib", help="text, or a glob of token shards")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--minutes", type=float, default=10.0, help="begin nothing after these")
    args = parser.parse_args()
    args.end = time.perf_counter() + 60 * args.minutes
    for odd in set(args.stages) - set(STAGES):
        parser.error(f"unknown stage {odd!r}; known: {', '.join(STAGES)}")
    device = pick_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
        if not args.toy:
            sys.exit("error: no GPU is here; --toy runs every line at toy size")
    record = json.loads(args.out.read_text()) if args.out.is_file() else {}
    record |= {"command": " ".join(["python", "benchmarks/gpu_13b.py", *sys.argv[1:]]),
               "machine": machine() | gpu(device), "toy": args.toy}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        args.scratch = Path(folder)
        args.tokens, record["data"] = shards(args)
        for stage in args.stages or STAGES:
            start, left = time.perf_counter(), late(args)
            found = {"left": True} if left else STAGES[stage](args, device, record)
            record[stage] = {"seconds": round(time.perf_counter() - start, 1), **found}
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            said = (
                f"left out after {args.minutes:g} minutes"
                if left
                else f"{record[stage]['seconds']} s"
            )
            print(f"{stage}: {said}", flush=True)


def late(args: argparse.Namespace) -> bool:
    """Whether the time is over in which something new may begin."""
    return time.perf_counter() > args.end


def gpu(device: torch.device) -> dict:
    """Name, memory and libraries of the GPU; nothing on a CPU."""
    if device.type == "cpu":
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda,
            "memory_gib": total / GIB, "free_gib": free / GIB}  # fmt: skip


def wait(device: torch.device) -> float:
    """Seconds on a clock that has waited for all kernels."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def shards(args: argparse.Namespace) -> tuple[dict, dict]:
    """Where the runs find their tokens, and the fingerprint of what these are.

    Text is tokenized once, into shards that all runs read.
    """
    for tokenizer in ("bytes",) if args.toy else ("gpt2", "bytes"):
        asked = train_config({"model": TOY, "data": {"source": args.data, "tokenizer": tokenizer}})
        try:
            corpus = load_corpus(asked.data)
            break
        except ConfigError as error:
            print(f"not as {tokenizer}: {error}", file=sys.stderr)
    if args.data.endswith(".bin"):
        return {"source": args.data}, corpus.fingerprint
    write_corpus(corpus, args.scratch / "text")
    return {"source": str(args.scratch / "*.bin")}, corpus.fingerprint


# rate: the dense matrix product that MFU is a share of


def stage_rate(args: argparse.Namespace, device: torch.device, record: dict) -> dict:
    n, dtype, repeats = (256, torch.float32, 5) if args.toy else (8192, torch.bfloat16, 30)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(3 + repeats):
        start = wait(device)
        a @ b
        seconds.append(wait(device) - start)
    middle = sorted(seconds[3:])[repeats // 2]
    return {"n": n, "dtype": str(dtype), "repeats": repeats, "flops_per_s": 2 * n**3 / middle}


# speed: whole optimizer steps


def stage_speed(args: argparse.Namespace, device: torch.device, record: dict) -> dict:
    return speed(args, device, record, compiled=not args.toy)


def stage_eager(args: argparse.Namespace, device: torch.device, record: dict) -> dict:
    """The same runs without torch.compile, for what it is worth."""
    return speed(args, device, record, compiled=False)


def speed(args: argparse.Namespace, device: torch.device, record: dict, compiled: bool) -> dict:
    """All runs; one that fails says so, since the others still count."""
    if "rate" not in record:
        record["rate"] = stage_rate(args, device, record)
    rows = []
    for preset, memory, batch in TOY_RUNS if args.toy else RUNS:
        raw = {"model": TOY if args.toy else preset, "memory": memory, "batch_size": batch,
               "steps": WARM + TIMED, "data": args.tokens,
               "parallel": {"compile": compiled}}  # fmt: skip
        row = {"model": preset, "memory": memory, "batch_size": batch, "compiled": compiled}
        try:
            if late(args):
                raise TimeoutError(f"not begun after {args.minutes:g} minutes")
            row |= one_run(train_config(raw), device, record["rate"]["flops_per_s"])
        except Exception as error:
            if args.toy:
                raise
            row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
        clear(device)
        rows.append(row)
        print({k: v for k, v in row.items() if k not in LONG}, flush=True)
    return {"runs": rows}


def clear(device: torch.device) -> None:
    """Give back what the last run held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


LONG = ("losses", "grad_norms", "health", "profile")


def one_run(config, device: torch.device, rate: float) -> dict:
    """Speed, memory and health of ``WARM + TIMED`` steps, and a profile of one more."""
    config = fitted(config, device)
    start = wait(device)
    model, optimizer, table = build(config, device)
    built = wait(device) - start
    batches = Batches(load_corpus(config.data), config.course, config.seed)
    losses, norms = [], []

    def step(i: int) -> None:
        batch = tuple(t.to(device) for t in batches(i))
        with compute(config.precision, device, config.memory):
            loss, norm = train_step(
                model, optimizer, batch, lr_factor=min(1.0, (i + 1) / config.steps),
                grad_clip=config.grad_clip, accumulate=config.accumulate,
            )  # fmt: skip
        losses.append(float(loss))
        norms.append(float(norm))

    seconds, peak = clocked(step, device)
    per_token = flops_per_token(config.model, "palm")
    need = max(moments(config, config.memory, config.parallel.checkpointing), key=lambda n: n.total)
    with (
        activations(model) as carried,
        torch.no_grad(),
        compute(config.precision, device, config.memory),
    ):
        model(*(t[:1].to(device) for t in batches(config.steps)))
    return {
        "n_params": count_params(config.model), "tokens_per_step": config.tokens_per_step,
        "checkpointing": config.parallel.checkpointing, "build_seconds": built,
        "step_seconds": spread(seconds[WARM:]) | {"first": seconds[0], "timed": TIMED},
        "tokens_per_s": config.tokens_per_step / statistics.median(seconds[WARM:]),
        "mfu": per_token * config.tokens_per_step / statistics.median(seconds[WARM:]) / rate,
        "peak_gib": peak, "planned_gib": need.total / GIB, "planned_moment": need.moment,
        "losses": losses, "grad_norms": norms, "grad_clip": config.grad_clip,
        "health": measure(optimizer, table) | carried,
        "profile": profile(lambda: step(config.steps), device),
    }  # fmt: skip


def clocked(step, device: torch.device) -> tuple[list[float], float | None]:
    """Seconds of each of ``WARM + TIMED`` steps, and the device's peak of memory, GiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for i in range(WARM + TIMED):
        start = wait(device)
        step(i)
        seconds.append(wait(device) - start)
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
    return seconds, peak


def fitted(config, device: torch.device):
    """The config as it is stored and recomputed inside `INSIDE` of what is free."""
    if device.type == "cpu":
        return decide_storage(config)
    free = torch.cuda.mem_get_info()[0] / GIB
    return decide_storage(config, Machine(hbm=min(0.95 * free, INSIDE), reserve=0.0))


def build(config, device: torch.device):
    """Model, optimizer and table of a run on one device, as the trainer builds them."""
    with torch.device("meta"):
        model = GPT(config.model).to(param_dtype(config.precision, config.memory))
    parallelize(model, config.parallel, Grid(), config.memory != "exact")
    materialize(model, device)
    table = parametrize(config.model, config.base, config.hparams, config.rule)
    init_weights(model, table, config.seed)
    backend = "inductor" if config.parallel.compile else None
    return model, make_optimizer(model, table, config.memory, config.seed, backend), table


def profile(work, device: torch.device, count: int = 15) -> list[dict]:
    """The operations that take most of the device's time in ``work``, with their share of it."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile as profiler

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profiler(activities=kinds) as seen:
        work()
        wait(device)
    cuda = device.type == "cuda"
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = [  # on a GPU kernels alone: what launched them counts the same time
        (getattr(event, own), event.key, event.count) for event in seen.key_averages()
        if not cuda or (event.device_type == DeviceType.CUDA and not event.is_user_annotation)
    ]  # fmt: skip
    total = sum(time for time, _, _ in rows)
    return [
        {"operation": name[:120], "share": time / total, "calls": calls}
        for time, name, calls in sorted(rows, reverse=True)[:count]
    ]


# coord: does the rule hold from 256 to 5120?


def stage_coord(args: argparse.Namespace, device: torch.device, record: dict) -> dict:
    with device:
        check = coord_check("mup", sizes=TOY_WIDTHS if args.toy else WIDTHS, seeds=tuple(SEEDS))
    print(check)
    return check.to_dict()


# resume: a run that is killed and continued is the run that was not


def stage_resume(args: argparse.Namespace, device: torch.device, record: dict) -> dict:
    """Two runs of 1.3B through the trainer: one is killed −9 after its first checkpoint."""
    steps, every = (40, 10) if args.toy else (8, 4)
    raw = {
        "model": TOY if args.toy else "cerebras-gpt-1.3b", "memory": "split", "batch_size": 4,
        "steps": steps, "data": {**args.tokens, "eval_tokens": 4096},
        "schedule": {"warmup": 0.5, "warmup_tokens": 0},
        "tracking": {"log_every": 1, "checkpoint_every": every, "keep": 1, "wandb": "off"},
    }  # fmt: skip
    config, whole, broken = (args.scratch / name for name in ("config.json", "whole", "broken"))
    config.write_text(json.dumps(raw), encoding="utf-8")
    seconds = {"whole": trainer(config, whole), "killed": killed(config, broken)}
    seconds["continued"] = trainer(config, broken)
    losses = {key: [[r[key] for r in read_metrics(folder / "metrics.jsonl") if key in r]
                    for folder in (whole, broken)] for key in (TRAIN_LOSS, VAL_LOSS)}  # fmt: skip
    return {
        "memory": "split", "steps": steps, "seconds": seconds, "losses": losses[TRAIN_LOSS][0],
        "largest_difference": {
            key: max(abs(a - b) for a, b in zip(*columns, strict=True))
            for key, columns in losses.items()
        },
    }  # fmt: skip


def command(config: Path, folder: Path) -> list[str]:
    return [sys.executable, "-m", "mupgpt.trainer", str(config), str(folder)]


def trainer(config: Path, folder: Path) -> float:
    """Seconds of a run to its end."""
    start = time.perf_counter()
    subprocess.run(command(config, folder), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def killed(config: Path, folder: Path) -> float:
    """Seconds until the run had a whole checkpoint and was killed."""
    start = time.perf_counter()
    process = subprocess.Popen(command(config, folder), stdout=subprocess.DEVNULL)
    while not list((folder / "checkpoints").glob("step-*/manifest.json")):
        if process.poll() is not None:
            sys.exit("error: the run ended before it could be killed")
        time.sleep(0.05)
    process.kill()
    process.wait()
    return time.perf_counter() - start


# hf: the same shape by transformers, on the same device


def stage_hf(args: argparse.Namespace, device: torch.device, record: dict) -> dict:
    """Tokens per second and peak memory of 1.3B beside Hugging Face's GPT-2, both as shipped."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return {"error": "transformers is not installed here"}
    config = train_config({
        "model": TOY if args.toy else "cerebras-gpt-1.3b", "memory": "exact", "batch_size": 4,
        "steps": WARM + TIMED, "data": args.tokens, "parallel": {"checkpointing": "none"},
    })  # fmt: skip
    m, rate = config.model, record.get("rate", {}).get("flops_per_s", float("nan"))
    ours = one_run(config, device, rate)
    clear(device)
    shape = GPT2Config(
        vocab_size=m.vocab_size, n_positions=m.seq_len, n_embd=m.d_model, n_layer=m.n_layer,
        n_head=m.n_head, n_inner=m.d_ffn, activation_function="gelu", use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with device:
        model = GPT2LMHeadModel(shape).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batches = Batches(load_corpus(config.data), config.course, config.seed)

    def step(i: int) -> None:
        tokens = batches(i)[0].to(device)
        with compute(config.precision, device, config.memory):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds, peak = clocked(step, device)
    theirs = config.tokens_per_step / statistics.median(seconds[WARM:])
    return {
        "tokens_per_s": {"ours": ours["tokens_per_s"], "hf": theirs},
        "times_faster": ours["tokens_per_s"] / theirs,
        "peak_gib": {"ours": ours["peak_gib"], "hf": peak},
        "tokens_per_step": config.tokens_per_step,
    }


# save: what a verified checkpoint costs the run that writes it


def stage_save(args: argparse.Namespace, device: torch.device, record: dict) -> dict:
    """Seconds that one checkpoint of 1.3B takes from the steps beside it, and its way to the disk.

    Pairs of as many steps each, one with a checkpoint that begins before the first of them.
    """
    steps, pairs = (5, 3) if args.toy else (30, 3)
    config = train_config({
        "model": TOY if args.toy else "cerebras-gpt-1.3b", "memory": "split", "batch_size": 4,
        "steps": 2, "data": args.tokens,
    })  # fmt: skip
    config = fitted(config, device)
    model, optimizer, _ = build(config, device)
    tokens = tuple(t.to(device) for t in Batches(load_corpus(config.data), config.course, 0)(0))

    def run() -> float:
        start = wait(device)
        for _ in range(steps):
            train_step(model, optimizer, tokens, lr_factor=0.1, grad_clip=config.grad_clip)
        return wait(device) - start

    run()
    lost, blocked, written, verified = [], [], [], []
    for number in range(pairs):
        without = run()
        with Writer(args.scratch / "save", keep=1) as writer:
            start = wait(device)
            writer.save(number, state_groups(model, optimizer), {})
            blocked.append(time.perf_counter() - start)
            lost.append(blocked[-1] + run() - without)
            writer.wait()
            written.append(time.perf_counter() - start)
        start = time.perf_counter()
        folder = verify(args.scratch / "save" / f"step-{number:08d}").folder
        verified.append(time.perf_counter() - start)
    size = sum(path.stat().st_size for path in folder.iterdir()) / GIB
    each = statistics.median(lost)
    return {
        "gib": size, "steps_beside": steps, "lost_seconds": spread(lost),
        "blocked_seconds": spread(blocked), "until_on_disk_seconds": spread(written),
        "verify_seconds": spread(verified),
        "share_of_a_run_that_saves_every_half_hour": each / (1800 + each),
    }  # fmt: skip


STAGES = {"rate": stage_rate, "speed": stage_speed, "coord": stage_coord, "resume": stage_resume,
          "hf": stage_hf, "save": stage_save, "eager": stage_eager}  # fmt: skip

if __name__ == "__main__":
    main()
