"""Tests of the examples, run as scripts in their own processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "examples" / "train_digits.py"


def run(*arguments: Any, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the example as a script, without RANK and WORLD_SIZE of a launcher, and with ``variables``."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    path = os.pathsep.join(filter(None, [str(REPOSITORY), environment.get("PYTHONPATH")]))
    # COLUMNS fits the table. The ranks use CPUs, because the machine may have fewer GPUs than ranks.
    environment.update(PYTHONPATH=path, OMP_NUM_THREADS="1", COLUMNS="120", CUDA_VISIBLE_DEVICES="", **variables)
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


@pytest.mark.multirank
@pytest.mark.timeout(120)
def test_the_environment_alone_switches_on() -> None:
    """Catches a flag's default that overrides BAGUA_SYNCBN=1, and layers that stay local despite the printed "on"."""
    done = run("--steps", 3, BAGUA_SYNCBN="1")
    assert done.returncode == 0, done.stderr
    assert "synchronized batch normalization: on, over the world (2 ranks" in done.stdout
    assert "14 statistics rounds" in done.stdout  # 9 layers in 7 levels, forward and backward


@pytest.mark.multirank
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("span", "rounds"), [("node", 14), ("rank", 1)])
def test_the_environment_alone_says_over_which_ranks(span: str, rounds: int) -> None:
    """Catches a variable that is read but not passed to the algorithm."""
    done = run("--steps", 3, BAGUA_SYNCBN="1", BAGUA_SYNCBN_NORMALIZE_OVER=span)
    assert done.returncode == 0, done.stderr
    assert f"synchronized batch normalization: on, over the {span} (2 ranks" in done.stdout
    assert f"; {rounds} statistics rounds" in done.stdout


@pytest.mark.multirank
@pytest.mark.timeout(120)
def test_off_unless_asked_for() -> None:
    """Catches a model that is synchronized without a flag or variable."""
    done = run("--steps", 3)
    assert done.returncode == 0, done.stderr
    assert "synchronized batch normalization: off (2 ranks" in done.stdout
    assert "; 0 statistics rounds" in done.stdout


@pytest.mark.multirank
@pytest.mark.timeout(120)
def test_joins_the_launcher_that_started_it() -> None:
    """Catches an example that starts further ranks under torchrun: nested ranks, or a rendezvous that hangs."""
    done = run("--steps", 3, "--sync-bn", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", **_rendezvous())
    assert done.returncode == 0, done.stderr
    assert "synchronized batch normalization: on, over the world (1 ranks" in done.stdout
    assert done.stdout.count("test accuracy") == 1


def test_an_unknown_algorithm_is_answered_with_the_known_ones() -> None:
    """Catches a wrong name that is reported by a traceback or by a list of failed ranks."""
    done = run("--algorithm", "nonsense")
    assert done.returncode != 0
    assert "got 'nonsense'" in done.stderr
    assert "gradient_allreduce" in done.stderr and "sync_batchnorm" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("--nproc", 0), ("--compare", "--nproc", 1)])
def test_too_few_ranks_are_refused(arguments: Any) -> None:
    """Catches a run of zero ranks that succeeds, and a comparison of one rank with itself."""
    done = run(*arguments)
    assert done.returncode != 0
    assert "expected" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.multirank
@pytest.mark.timeout(120)
def test_compare_prints_the_table_and_draws_the_picture(tmp_path: Path) -> None:
    """Catches a missing column, round count or picture, and synchronized training unlike a single process."""
    done = run("--compare", "--seeds", 0, "--steps", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    for column in ("local", "local, world statistics", "synchronized", "single process"):
        assert column in _row(done.stdout, "local")
    assert [cell.strip() for cell in _row(done.stdout, "statistics rounds").split("│")[2:6]] == ["0", "1", "14", "0"]
    *_, synchronized, single, _ = _row(done.stdout, "test accuracy").split("│")
    assert synchronized.strip() == single.strip()
    ours, worlds = (cell.split(",") for cell in _row(done.stdout, "each rank").split("│")[2:4])
    assert len(ours) == 2 and len(worlds) == 2 and worlds[0].strip() == worlds[1].strip()
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def _row(output: str, start: str) -> str:
    return next(line for line in output.splitlines() if line.lstrip("│┃ ").startswith(start) and line[0] in "│┃")


def _rendezvous() -> Any:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}


@pytest.mark.multirank
@pytest.mark.parametrize("name", ["ddp_minimal", "bagua_minimal"])
def test_minimal_examples(name: str) -> None:
    """Catches a minimal example that does not run, or whose ranks have different statistics."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(REPOSITORY / "examples" / f"{name}.py")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    means = {line.rsplit(" ", 1)[1] for line in done.stdout.splitlines() if "running mean" in line}
    assert len(means) == 1 and done.stdout.count("running mean") == 2
