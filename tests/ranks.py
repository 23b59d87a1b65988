"""Runs a test function on several ranks: as threads (0.1 s, no default process group) or as processes (seconds).

All functions return within a time limit. `run_threads` and `run_processes` raise the error of the lowest rank that
failed. `observe_processes` returns how each process ended, for processes that are killed or stopped on purpose.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import signal
import socket
import threading
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait as wait_for_any
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

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


def _set_environment(rank: int, world: int, port: int) -> None:
    """Sets the variables that a launcher sets."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
    )


def _process_main(
    rank: int, world: int, port: int, env: Dict[str, str], results: Any, body: Callable[..., Any], args: Any
) -> None:
    _set_environment(rank, world, port)
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


class Outcome(NamedTuple):
    """How one process ended. Times are those of ``time.monotonic``, which all processes share."""

    value: Any  # the result of the body; None without one
    failure: str  # type and text of the exception; empty without one
    notes: List[Tuple[str, Any, float]]  # what the body has noted, with the times
    exit_code: Optional[int]  # None if it did not end by itself
    ended: float


def observe_processes(
    world: int, body: Callable[..., Any], *args: Any, preload: Sequence[str] = (), limit: float = 60.0
) -> List[Outcome]:
    """Runs ``body(rank, note, *args)`` in ``world`` processes, which may end in any way.

    ``note(name, value)`` sends a picklable value to this process at once. The name ``"stop"`` stops the process by
    SIGSTOP, and this function continues it after ``value`` seconds. It kills a process with the value ``None`` when all
    others have ended. An exception ends a process as it ends a script: without `destroy_process_group`.

    Args:
        world: the number of ranks.
        body: the function that each rank runs, defined at module level.
        *args: further arguments of ``body``.
        preload: modules that the server of the processes imports.
        limit: the seconds after which all ranks are killed.

    Returns:
        The outcomes of all ranks, in rank order.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "torch.utils.checkpoint", "pytest", *preload])
    port, processes, pipes = free_port(), [], []
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_observed_main, args=(rank, world, port, sender, body, args), daemon=True)
        process.start()
        sender.close()  # otherwise the end of the process would not end the pipe
        processes.append(process)
        pipes.append(receiver)
    notes: List[List[Tuple[str, Any, float]]] = [[] for _ in range(world)]
    ended: Dict[int, float] = {}
    continue_at: Dict[int, float] = {}  # by rank; infinity for a process that remains stopped
    deadline = time.monotonic() + limit
    while len(ended) < world and time.monotonic() < deadline:
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in ended]
        wait_for_any([*open_pipes, *(process.sentinel for process in processes if process.is_alive())], timeout=0.05)
        for rank, (process, pipe) in enumerate(zip(processes, pipes)):
            alive = rank not in ended and process.is_alive()  # before the pipe is read: nothing follows its end
            _drain(pipe, notes[rank])
            if rank not in ended and not alive:
                ended[rank] = time.monotonic()
            stops = [(value, at) for name, value, at in notes[rank] if name == "stop"]
            if stops and rank not in continue_at:
                seconds, at = stops[0]
                continue_at[rank] = float("inf") if seconds is None else at + seconds
            if alive and continue_at.get(rank, float("inf")) < time.monotonic():
                os.kill(process.pid, signal.SIGCONT)
                continue_at[rank] = float("inf")
        stopped = [rank for rank, at in continue_at.items() if at == float("inf") and rank not in ended]
        if stopped and len(ended) + len(stopped) == world and all(_is_stopped_for_good(notes[r]) for r in stopped):
            break
    outcomes = []
    for rank, process in enumerate(processes):
        by_itself = not process.is_alive()
        if not by_itself:
            process.kill()
        process.join(5)
        found = {name: value for name, value, _ in notes[rank] if name in ("value", "failure")}
        code = process.exitcode if by_itself else None
        end = ended.get(rank, time.monotonic())
        outcomes.append(Outcome(found.get("value"), found.get("failure", ""), notes[rank], code, end))
    return outcomes


def _drain(pipe: Any, notes: List[Tuple[str, Any, float]]) -> None:
    try:
        while pipe.poll():
            notes.append(pickle.loads(pipe.recv_bytes()))
    except (EOFError, OSError):  # the process has ended
        pass


def _is_stopped_for_good(notes: List[Tuple[str, Any, float]]) -> bool:
    return any(name == "stop" and value is None for name, value, _ in notes)


def _observed_main(rank: int, world: int, port: int, pipe: Any, body: Callable[..., Any], args: Any) -> None:
    _set_environment(rank, world, port)
    torch.set_num_threads(1)

    def note(name: str, value: Any = None) -> None:
        # Pickled to bytes: a pipe would pass tensors as shared memory of a process that is about to end.
        pipe.send_bytes(pickle.dumps((name, value, time.monotonic())))
        if name == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)

    try:
        note("value", body(rank, note, *args))
    except BaseException as error:
        note("failure", f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None
    if dist.is_initialized():
        dist.destroy_process_group()
