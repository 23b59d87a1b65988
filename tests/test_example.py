"""The example, run as a user runs it: as a script, in a process of its own."""

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
    """Runs the example with ``variables`` in its environment; it is not told that it runs in a test."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    path = os.pathsep.join(filter(None, [str(REPOSITORY), environment.get("PYTHONPATH")]))
    # Wide enough for the table, and CPUs even where the machine has fewer GPUs than ranks.
    environment.update(PYTHONPATH=path, OMP_NUM_THREADS="1", COLUMNS="120", CUDA_VISIBLE_DEVICES="", **variables)
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


@pytest.mark.multirank
@pytest.mark.timeout(120)
def test_the_environment_alone_switches_on() -> None:
    """A flag's default that overrides BAGUA_SYNCBN=1, or layers that stay local although it says "on"."""
    done = run("--steps", 3, BAGUA_SYNCBN="1")
    assert done.returncode == 0, done.stderr
    assert "synchronized batch normalization: on, over the world (2 ranks" in done.stdout
    assert "14 statistics rounds" in done.stdout  # 9 layers in 7 levels, forward and backward


@pytest.mark.multirank
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("span", "rounds"), [("node", 14), ("rank", 1)])
def test_the_environment_alone_says_over_which_ranks(span: str, rounds: int) -> None:
    """A variable that is read and then lost on its way to the algorithm."""
    done = run("--steps", 3, BAGUA_SYNCBN="1", BAGUA_SYNCBN_NORMALIZE_OVER=span)
    assert done.returncode == 0, done.stderr
    assert f"synchronized batch normalization: on, over the {span} (2 ranks" in done.stdout
    assert f"; {rounds} statistics rounds" in done.stdout


@pytest.mark.multirank
@pytest.mark.timeout(120)
def test_off_unless_asked_for() -> None:
    """Synchronizing a user's model without being asked to."""
    done = run("--steps", 3)
    assert done.returncode == 0, done.stderr
    assert "synchronized batch normalization: off (2 ranks" in done.stdout
    assert "; 0 statistics rounds" in done.stdout


@pytest.mark.multirank
@pytest.mark.timeout(120)
def test_joins_the_launcher_that_started_it() -> None:
    """Starting ranks of its own under torchrun: ranks of ranks, or a meeting that never happens."""
    done = run("--steps", 3, "--sync-bn", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", **_meeting_place())
    assert done.returncode == 0, done.stderr
    assert "synchronized batch normalization: on, over the world (1 ranks" in done.stdout
    assert done.stdout.count("test accuracy") == 1


def test_an_unknown_algorithm_is_answered_with_the_known_ones() -> None:
    """A traceback, or a list of ranks that died, where the name alone was wrong."""
    done = run("--algorithm", "nonsense")
    assert done.returncode != 0
    assert "got 'nonsense'" in done.stderr
    assert "gradient_allreduce" in done.stderr and "sync_batchnorm" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("--nproc", 0), ("--compare", "--nproc", 1)])
def test_too_few_ranks_are_refused(arguments: Any) -> None:
    """A run that starts nothing and succeeds, or a comparison of one rank with itself."""
    done = run(*arguments)
    assert done.returncode != 0
    assert "expected" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.multirank
@pytest.mark.timeout(120)
def test_compare_prints_the_table_and_draws_the_picture(tmp_path: Path) -> None:
    """A comparison that loses a column, measures no rounds, or draws nothing; synchronized that is not the batch's."""
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


def _meeting_place() -> Any:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}


@pytest.mark.multirank
@pytest.mark.parametrize("name", ["ddp_minimal", "bagua_minimal"])
def test_minimal_examples(name: str) -> None:
    """Catches an example that newcomers copy and that does not run, or whose ranks differ."""
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
