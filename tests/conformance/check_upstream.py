"""Checks of the plugin on upstream Bagua's Python layer (0.9.2, unmodified), against the embedded host and no plugin.

Run by ``make conformance`` in an environment with upstream's wheel. The native core is the embedded host's. So the
checks cover the calls between the plugin and upstream's Python code, and neither streams, NCCL nor compression.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch

HERE = Path(__file__).parent
LIMIT = 120  # seconds for all ranks of a run


def run(
    folder: Path, host: str, algorithm: str, mode: str, world: int = 2, steps: int = 6, **env: str
) -> tuple[List[Dict[str, Any]], str]:
    """Trains on ``world`` ranks; returns the final state of each rank, and the output of all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = folder / f"{host}-{algorithm}-{mode}-{world}"
    processes, log = [], out.with_suffix(".log").open("w+")
    for rank in range(world):
        environment = {
            **os.environ,
            **env,
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(HERE / "train.py"), host, algorithm, mode, str(steps), str(out)]
        # In a new session, to kill as one: upstream's autotune server outlives its rank and would keep the log open.
        processes.append(
            subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        )
    try:
        for process in processes:
            process.wait(LIMIT)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    log.seek(0)
    results = [Path(f"{out}.{rank}") for rank in range(world)]
    return [torch.load(path, weights_only=False) for path in results if path.exists()], log.read()


def trained(*arguments: Any, **options: Any) -> List[Dict[str, Any]]:
    ranks, log = run(*arguments, **options)
    assert len(ranks) == options.get("world", 2), log[-3000:]
    return ranks


def same(left: List[Dict[str, Any]], right: List[Dict[str, Any]]) -> None:
    for mine, theirs in zip(left, right):
        for name, value in mine["state"].items():
            difference = (value.double() - theirs["state"][name].double()).abs().max()
            assert difference <= 1e-6 + 1e-5 * value.double().abs().max(), (name, difference)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("mode", ["world", "rank", "2"])
@pytest.mark.parametrize("algorithm", ["gradient_allreduce", "bytegrad"])
def check_equals_the_embedded_host(tmp_path: Path, algorithm: str, mode: str, world: int) -> None:
    """Catches a call with another meaning upstream. Bytegrad is exact here: its emulation does not compress."""
    upstream = trained(tmp_path, "upstream", algorithm, mode, world=world)
    embedded = trained(tmp_path, "embedded", "gradient_allreduce", mode, world=world)
    same(upstream, embedded)
    for rank in upstream:
        assert not any("syncbn" in name for bucket in rank["buckets"] for name in bucket)
        if mode == "world":
            assert rank["rounds"] == 6 * 2 * 2 and rank["sent"] == [True, True]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("algorithm", ["qadam", "decentralized"])
def check_leaves_the_inner_algorithm_alone(tmp_path: Path, algorithm: str, world: int) -> None:
    """Catches a plugin that changes its inner algorithm. Without it the layers exchange over torch.distributed."""
    wrapped = trained(tmp_path, "upstream", algorithm, "world", world=world)
    same(wrapped, trained(tmp_path, "upstream", algorithm, "bare", world=world))
    running = [name for name in wrapped[0]["state"] if "running" in name]
    for rank in wrapped[1:]:
        for name in running:
            assert torch.equal(rank["state"][name], wrapped[0]["state"][name])


@pytest.mark.parametrize("algorithm", ["qadam", "decentralized"])
def check_world_statistics_where_ranks_normalize_alone(tmp_path: Path, algorithm: str) -> None:
    """Catches running statistics that differ between ranks under an algorithm that marks no tensor in backward."""
    first, second = trained(tmp_path, "upstream", algorithm, "rank")
    for name, value in first["state"].items():
        if "running" in name:
            assert torch.equal(value, second["state"][name])
            assert value.isfinite().all() and not torch.equal(value, torch.zeros_like(value))


def check_asynchronous_averaging_is_refused(tmp_path: Path) -> None:
    """Catches ranks that run different numbers of steps and exchange statistics of different steps."""
    ranks, log = run(tmp_path, "upstream", "async", "world")
    assert not ranks
    assert "expected a synchronous inner algorithm (got AsyncModelAverageAlgorithm" in log


@pytest.mark.parametrize("mode", ["world", "rank"])
def check_autotune_rebuckets_without_harm(tmp_path: Path, mode: str) -> None:
    """Catches statistics among the tensors that the autotuner moves between buckets; it is asked every 100 steps."""
    settings = {
        "BAGUA_AUTOTUNE": "1",
        "BAGUA_AUTOTUNE_WARMUP_TIME_S": "0",
        "BAGUA_AUTOTUNE_SAMPLING_CONFIDENCE_TIME_S": "0",
    }
    tuned = trained(tmp_path, "upstream", "gradient_allreduce", mode, steps=210, **settings)
    same(tuned, trained(tmp_path, "embedded", "gradient_allreduce", mode, steps=210))
