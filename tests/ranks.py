"""N processes of one job for a test: forked from a server that has imported torch once."""

import multiprocessing
import os
import signal
import socket
import time
import traceback
import warnings
from queue import Empty

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch.distributed.fsdp", "torch._dynamo", "mupgpt.trainer"])
PATIENCE_S = 240


def launch(world, action, *args):
    """What ``action(*args)`` returns in each of ``world`` processes that torchrun might have made.

    An error in one of them is raised here with its traceback; one that kills itself returns None.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = SERVER.Queue()
    children = [
        SERVER.Process(target=_child, args=(rank, world, port, answers, action, args))
        for rank in range(world)
    ]
    for child in children:
        child.start()
    try:
        return _collect(children, answers)
    finally:
        for child in children:
            child.kill()
            child.join()


def _collect(children, answers):
    results = [None] * len(children)
    waiting, deadline = set(range(len(children))), time.monotonic() + PATIENCE_S
    while waiting:
        assert time.monotonic() < deadline, f"ranks {waiting} hang"
        try:
            rank, results[rank], failure = answers.get(timeout=0.2)
            assert failure is None, f"rank {rank}: {failure}"
            waiting.discard(rank)
        except Empty:
            waiting -= {r for r in waiting if children[r].exitcode == -signal.SIGKILL}
    return results


def _child(rank, world, port, answers, action, args):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    import torch

    from mupgpt.distributed.processes import join_group, leave_group

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    try:
        join_group()
        result = action(*args)
        leave_group()
        answers.put((rank, result, None))
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
