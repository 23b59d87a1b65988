"""Tests of the choice of host: upstream Bagua where it can run, else the embedded host; the switch and its errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

import pytest
import torch

from bagua_syncbn_algo import host

ROOT = Path(__file__).parent.parent


def run(code: str, env: Dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}
    )


def test_embedded_by_choice_and_by_default() -> None:
    """Catches an import that fails on a machine without upstream Bagua."""
    for choice in ("auto", "embedded"):
        done = run("from bagua_syncbn_algo import bagua; print(bagua.__name__)", {"BAGUA_SYNCBN_HOST": choice})
        assert done.stdout.strip() == "bagua_syncbn_algo.embedded.torch_api", done.stderr


def test_upstream_that_cannot_run_is_an_error() -> None:
    """Catches a silent fallback to the embedded host with BAGUA_SYNCBN_HOST=upstream."""
    done = run("from bagua_syncbn_algo import bagua", {"BAGUA_SYNCBN_HOST": "upstream"})
    assert done.returncode != 0
    assert (
        "ImportError: expected an installed Bagua that runs on this machine with BAGUA_SYNCBN_HOST=upstream"
        in done.stderr
    )


def test_wrong_choice_lists_the_right_ones() -> None:
    """Catches a misspelled choice that silently selects the default."""
    done = run("from bagua_syncbn_algo import bagua", {"BAGUA_SYNCBN_HOST": "embeded"})
    assert "to be one of auto, upstream, embedded (got 'embeded')" in done.stderr


@pytest.mark.parametrize(("cuda", "expected"), [(True, "upstream"), (False, "embedded")])
def test_auto_takes_upstream_only_with_cuda(mocker: Any, cuda: bool, expected: str) -> None:
    """Catches upstream chosen on a CPU machine, where its first native call ends the process."""
    modules = {"bagua.torch_api": "upstream", "bagua_syncbn_algo.embedded.torch_api": "embedded"}
    mocker.patch.object(torch.cuda, "is_available", lambda: cuda)
    mocker.patch.object(host.importlib, "import_module", lambda name: modules[name])
    assert host._choose("auto") == expected


def test_auto_survives_a_broken_upstream(mocker: Any) -> None:
    """Catches an OSError of a native library that ends the program although the embedded host can run."""

    def load(name: str) -> str:
        if name == "bagua.torch_api":
            raise OSError("libnccl.so.2: cannot open shared object file")
        return "embedded"

    mocker.patch.object(torch.cuda, "is_available", lambda: True)
    mocker.patch.object(host.importlib, "import_module", load)
    assert host._choose("auto") == "embedded"
    with pytest.raises(ImportError, match="libnccl"):
        host._choose("upstream")


def test_streams_follow_the_host(mocker: Any) -> None:
    """Catches CUDA streams on the embedded CPU host, and CPU streams on upstream."""
    assert type(host.streams()).__name__ == "CpuStreams"
    mocker.patch.object(host, "is_upstream", True)
    assert type(host.streams()).__name__ == "CudaStreams"
