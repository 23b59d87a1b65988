"""Runs a test function on several ranks: as threads (0.1 s, no default process group) or as processes (seconds).

Both functions return within a time limit and raise the error of the lowest rank that failed.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import socket
import threading
import time
import traceback
from datetime import timedelta
from typing import Any, Callable, Dict, List, Optional

import torch
import torch.distributed as dist

TIMEOUT = 20.0


def run_threads(
    world: int, body: Callable[..., Any], *args: Any, errors: bool = False, timeout: float = TIMEOUT
) -> Any:
    """Runs ``body(rank, group, *args)`` on ``world`` threads, each with its own gloo backend.

    The threads share one random number generator: draw random numbers before the call.

    Args:
        world: the number of ranks.
        body: the function that each rank runs.
        *args: further arguments of ``body``.
        errors: whether to return each rank's exception (or ``None``) instead of raising it.
        timeout: the limit of each collective, in seconds.

    Returns:
        The results of all ranks, in rank order.

    Raises:
        AssertionError: if a rank hangs.
    """
    store = dist.HashStore()
    results: List[Any] = [None] * world
    failures: List[Optional[BaseException]] = [None] * world

    def rank_main(rank: int) -> None:
        try:
            group = dist.ProcessGroupGloo(dist.PrefixStore("test", store), rank, world, timedelta(seconds=timeout))
            results[rank] = body(rank, group, *args)
        except BaseException as error:
            failures[rank] = error

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout + 20)
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    if errors:
        return failures
    for failure in failures:
        if failure is not None:
            raise failure
    return results


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_processes(
    world: int,
    body: Callable[..., Any],
    *args: Any,
    env: Optional[Dict[str, str]] = None,
    errors: bool = False,
    limit: float = 90.0,
) -> Any:
    """Runs ``body(rank, *args)`` in ``world`` processes with a launcher's environment.

    Args:
        world: the number of ranks.
        body: the function that each rank runs, defined at module level.
        *args: further arguments of ``body``.
        env: additional environment variables.
        errors: whether to return each rank's error text (or ``None``) instead of raising it.
        limit: the seconds after which all ranks are killed.

    Returns:
        The results of all ranks, in rank order.

    Raises:
        AssertionError: if a rank failed, hung or died.
    """
    # Forked from a server process that has only imported torch: 2 s per rank less than spawning.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "torch.utils.checkpoint", "pytest"])
    results = context.SimpleQueue()
    port = free_port()
    processes = [
        context.Process(target=_process_main, args=(rank, world, port, env or {}, results, body, args), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    outcomes: Dict[int, Any] = {}
    deadline = time.monotonic() + limit
    try:
        while len(outcomes) < world and time.monotonic() < deadline:
            while not results.empty():
                rank, value, failure = results.get()
                outcomes[rank] = (pickle.loads(value), failure)
            if len(outcomes) < world and all(not process.is_alive() for process in processes) and results.empty():
                break
            time.sleep(0.02)
    finally:
        for process in processes:
            process.join(2 if len(outcomes) == world else 0.1)
            if process.is_alive():
                process.kill()
    for rank in range(world):
        outcomes.setdefault(rank, (None, f"rank {rank} returned no result: it hung or died"))
    if errors:
        return [outcomes[rank][1] for rank in range(world)]
    failures = [outcomes[rank][1] for rank in range(world) if outcomes[rank][1]]
    assert not failures, failures[0]
    return [outcomes[rank][0] for rank in range(world)]


def _process_main(
    rank: int, world: int, port: int, env: Dict[str, str], results: Any, body: Callable[..., Any], args: Any
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
    )
    os.environ.update(env)
    torch.set_num_threads(1)
    value, failure = None, None
    try:
        value = body(rank, *args)
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    # Pickled to bytes: a queue would pass tensors as shared memory of a process that is about to exit.
    results.put((rank, pickle.dumps(value), failure))
    if dist.is_initialized():
        dist.destroy_process_group()
