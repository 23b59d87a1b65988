"""Tests of the check for statistics that are not finite."""

from __future__ import annotations

from typing import Any, List

import pytest
import torch
from ranks import run_processes, run_threads
from torch import Tensor, nn

from bagua_syncbn_algo import SyncBatchNorm, SyncBatchNormAlgorithm, SyncBatchNormError, bagua, convert_sync_batchnorm
from bagua_syncbn_algo.comm.transport import TorchChannel
from bagua_syncbn_algo.comm.wire import BACKWARD, FORWARD, Roster
from bagua_syncbn_algo.ops import nonfinite
from bagua_syncbn_algo.ops.nonfinite import require_finite


class Net(nn.Module):
    """Two branches that share a round, and a layer after them."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
        self.right = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
        self.last = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.left(x) + self.right(x))


def _train(rank: int, place: str, check: str, coalesce: bool) -> List[str]:
    bagua.init_process_group()
    torch.manual_seed(0)
    model: Any = convert_sync_batchnorm(Net(), coalesce=coalesce)
    model.with_bagua([], SyncBatchNormAlgorithm(check=check))
    errors = []
    for step in range(3):
        x = torch.randn(2, 2, 4, 4)
        broken = step == 1 and rank == 1
        if broken and place == "right":
            with torch.no_grad():
                model.right[0].bias[1] = float("nan")
        if step == 2:
            with torch.no_grad():
                model.right[0].bias.zero_()
        try:
            loss = model(x).pow(3).sum()
            (loss * float("inf") if broken and place == "backward" else loss).backward()
        except RuntimeError as error:
            errors.append(f"{step} {type(error).__name__}: {error}")
    return errors


@pytest.mark.multirank
@pytest.mark.parametrize("coalesce", [True, False])
@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("right", "expected finite statistics at Net.right.1 (forward) (got NaN or infinity on rank 1 in 1 of 3"),
        ("backward", "expected finite gradient sums at Net.last (backward) (got NaN or infinity on rank 1 in 3 of 3"),
    ],
)
def test_the_first_layer_and_rank_are_named_on_all_ranks(place: str, expected: str, coalesce: bool) -> None:
    """Catches an error on one rank only, one that names a later layer, and a step after it that is lost, too."""
    for errors in run_processes(2, _train, place, "nonfinite", coalesce):
        assert len(errors) == 1 and errors[0].startswith("1 SyncBatchNormError") and expected in errors[0], errors


@pytest.mark.multirank
def test_without_the_check_nothing_is_raised() -> None:
    """Catches a check that is on by default."""
    assert run_processes(2, _train, "right", "none", True) == [[], []]


def _plain(rank: int) -> str:
    torch.distributed.init_process_group("gloo")
    layer = SyncBatchNorm(3)
    x = torch.randn(2, 3, 4)
    if rank == 1:
        x[0, 2, 1] = float("inf")
    with pytest.raises(SyncBatchNormError) as caught:
        layer(x)
    return str(caught.value)


@pytest.mark.multirank
def test_the_variable_reaches_layers_without_an_algorithm() -> None:
    """Catches a variable that only the Bagua algorithm reads."""
    for text in run_processes(2, _plain, env={"BAGUA_SYNCBN_CHECK": "nonfinite"}):
        assert "on rank 1 in 1 of 3 channels, the first is 2)" in text


@pytest.mark.multirank
def test_ranks_with_and_without_the_check_are_told() -> None:
    """Catches a rank that leaves the step alone because only this rank has the variable."""

    def body(rank: int, group: Any) -> None:
        channel = TorchChannel(group)
        channel.checks_finite = rank == 1
        channel.join(Roster((("Net.bn", 3),)))

    for error in run_threads(2, body, errors=True):
        assert "the check for statistics that are not finite (BAGUA_SYNCBN_CHECK=nonfinite) on rank 1" in str(error)


@pytest.mark.parametrize("inverse", [False, True])
def test_every_value_that_is_not_finite(inverse: bool, mocker: Any) -> None:
    """Catches an infinite variance of the fused kernels, which send 1/√(variance + eps): 0."""
    channel = mocker.Mock(checks_finite=True, ranks=[4, 6])
    good = torch.ones(2, 10)
    require_finite(good, channel, FORWARD, ["a", "b"], [2, 3], inverse)
    for value in (float("nan"), float("inf"), float("-inf"), *([0.0] if inverse else [])):
        bad = good.clone()
        bad[1, 8] = value  # the second vector, layer b, channel 1
        with pytest.raises(SyncBatchNormError, match=r"at b \(forward\) .* rank 6 in 1 of 3 channels, the first is 1"):
            require_finite(bad, channel, FORWARD, ["a", "b"], [2, 3], inverse)
    channel.checks_finite = False
    require_finite(bad, channel, BACKWARD, ["a", "b"], [2, 3], inverse)


@pytest.mark.parametrize("has_triton", [False, True])
def test_fused_statistics_are_checked(has_triton: bool, mocker: Any) -> None:
    """Catches a fused round without the check, with stand-ins for the kernels."""
    from bagua_syncbn_algo.ops import fused
    from bagua_syncbn_algo.ops.moments import LocalMoments

    channel = mocker.Mock(checks_finite=True, ranks=[4, 6])
    nan = torch.full((2, 6), float("nan"))
    merge = mocker.Mock() if has_triton else None
    mocker.patch.object(fused, "load_merge_kernel", lambda device: merge)
    counts = torch.full((2, 1), 8)
    channel.launch.return_value = lambda: [counts, nan] if has_triton else [torch.cat([nan, counts], 1), counts]
    local: Any
    if has_triton:
        local = [LocalMoments(8, torch.zeros(3), torch.ones(3))]
    else:
        local = [fused.FusedLocal(8, torch.zeros(3), torch.ones(3), 1e-5)]
    wait = fused.launch_fused(local, channel, mocker.Mock(), ["Net.bn"], [1e-5], [None])
    with pytest.raises(SyncBatchNormError, match=r"expected finite statistics at Net.bn \(forward\) .* rank 4"):
        wait()


def test_a_captured_graph_is_not_checked(mocker: Any) -> None:
    """Catches a host that waits for the device during the capture of a CUDA graph, which is an error."""
    mocker.patch.object(nonfinite, "is_capturing", lambda tensor: True)
    channel = mocker.Mock(checks_finite=True, ranks=[4])
    require_finite(torch.full((1, 4), float("nan")), channel, FORWARD, ["a"], [2])
