"""Tests of the command line's measurements, with real ranks and files; no test sets an upper limit on a duration."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List, Sequence

import pytest
import torch
from ranks import run_threads
from torch import Tensor, nn

from bagua_syncbn_algo import record_rounds
from bagua_syncbn_algo.__main__ import main
from bagua_syncbn_algo.bench import steps, timeline
from bagua_syncbn_algo.bench.latency import add_latency
from bagua_syncbn_algo.bench.measure import Spread, run_ranks
from bagua_syncbn_algo.bench.schemes import EAGER_VARIANTS
from bagua_syncbn_algo.comm.channel import Channel
from bagua_syncbn_algo.comm.transport import TorchChannel
from bagua_syncbn_algo.comm.wire import BACKWARD, FORWARD, Roster, SyncPoint, sync_point


class Convolutions(nn.Sequential):
    """A model of two levels whose second convolution is large enough to overlap with a round."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True)),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)),
        )


A = sync_point("model.norm")
MODEL = "test_bench:Convolutions"
INPUT = "4,3,16,16"


@pytest.mark.multirank
def test_bench_measures_every_variant(tmp_path: Path, capsys: Any) -> None:
    """Catches a variant with a wrong number of rounds or missing in table or file, and a missing picture."""
    files = ["--json", str(tmp_path / "found.json"), "-o", str(tmp_path / "found.png")]
    main(["bench", MODEL, "--input", INPUT, "--steps", "2", "--latency", "0.5", *files])
    printed = capsys.readouterr().out
    assert "0.5 ms added to every round" in printed and "2 gloo ranks" in printed
    assert "layers 2, rounds forward 2, backward 2, overlapped 1" in printed
    found = json.loads((tmp_path / "found.json").read_text())["rows"]
    rounds = {name: each["rounds"] for name, each in found["variants"].items()}
    assert rounds == {"local": 0, "upstream": 10, "torch": 4, "per layer": 4, "coalesced": 4, "overlapped": 4}
    assert list(rounds) == list(EAGER_VARIANTS)
    for name, each in found["variants"].items():
        assert name in printed and each["low"] <= each["median"] <= each["high"]
        # The added latency is part of every round: each phase has at least two rounds of 0.5 ms.
        assert all(phase["duration"] >= 2 * 0.0005 for phase in each["phases"].values())
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    assert steps.overhead_of(found, "upstream") == 1 and steps.overhead_of(found, "local") == 0


@pytest.mark.multirank
def test_timeline_shows_overlapped_rounds_and_waits(tmp_path: Path, capsys: Any) -> None:
    """Catches missing lanes of a rank, missing rounds, and times of other steps."""
    picture = tmp_path / "step.png"
    main(["timeline", MODEL, "--input", INPUT, "--latency", "3", "-o", str(picture)])
    assert str(picture.with_suffix(".json")) in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    events = json.loads(picture.with_suffix(".json").read_text())["traceEvents"]
    names = {(e["pid"], e["args"]["name"]) for e in events if e["ph"] == "M"}
    assert names == {(rank, name) for rank in range(2) for name in (f"rank {rank}", *timeline.LANES)}
    spans = [e for e in events if e["ph"] == "X"]
    for rank in range(2):
        mine = [e for e in spans if e["pid"] == rank]
        assert {e["cat"] for e in mine} == {"forward", "backward", "wait", "overlapped", "exposed", "bucket"}
        rounds = {e["name"] for e in mine if e["tid"] == timeline.LANES.index("statistics")}
        expected = {f"Convolutions.{layer} ({phase}" for layer in (1, 4) for phase in ("forward", "backward")}
        assert {name.rsplit(",", 1)[0] for name in rounds} == expected
        backward = next(e for e in mine if e["cat"] == "backward")
        # The part of the round that overlaps with the second convolution's weight gradient is within backward.
        overlapped = next(
            e for e in mine if e["cat"] == "overlapped" and e["name"].startswith("Convolutions.1 (backward")
        )
        assert backward["ts"] <= overlapped["ts"] and overlapped["dur"] > 0
        assert min(e["ts"] for e in mine) >= 0


class SlowChannel(Channel):
    """A channel whose rounds take 5 ms."""

    def exchange(self, point: SyncPoint, phase: int, parts: Sequence[Tensor]) -> List[Tensor]:
        assert "_all_gather" not in self.__dict__
        time.sleep(5e-3)
        return list(parts)


def test_latency_is_added_to_what_a_round_takes() -> None:
    """Catches a latency that excludes the round's own duration, and a second call that adds to the first."""
    channel = SlowChannel()
    for _ in range(2):
        add_latency(channel, 1.0)
        assert channel._all_gather.latency >= 1.0 + 5e-3  # type: ignore[attr-defined]
    add_latency(channel, 0.0)
    assert "_all_gather" not in channel.__dict__
    bare = Channel()
    add_latency(bare, 1.0)
    assert "_all_gather" not in bare.__dict__


@pytest.mark.multirank
def test_an_added_latency_is_part_of_the_round() -> None:
    """Catches a delay that the record omits, and a round that ends before its delay is over."""

    def body(rank: int, group: Any) -> float:
        channel = TorchChannel(group)
        channel.join(Roster(((A.name, 4),)))
        add_latency(channel, 0.05)
        start = time.perf_counter()
        if rank == 0:  # one record per process, which includes the other thread's rounds
            with record_rounds() as rounds:
                channel.exchange(A, FORWARD, [torch.zeros(4)])
            assert all(entry.finish is None or entry.duration >= 0.05 for entry in rounds)
            assert any(entry.finish is not None for entry in rounds)
        else:
            channel.exchange(A, FORWARD, [torch.zeros(4)])
        return time.perf_counter() - start

    assert all(seconds >= 0.05 for seconds in run_threads(2, body))


class DelayedPeerChannel(Channel):
    """A channel whose second rank sends the same message as the first, ``later`` nanoseconds later."""

    world_size, later = 2, 0

    def _message(self, point: SyncPoint, device: torch.device) -> Tensor:
        return torch.zeros(self.capacity, dtype=torch.uint8)

    def _all_gather(self, message: Tensor) -> Any:
        both = torch.stack([message, message])
        both[1, -8:].view(torch.int64).add_(self.later)
        return both, SimpleNamespace(wait=lambda: None)  # completes only in `wait`, as if no core was free before


@pytest.mark.parametrize("later", [0, 10**10])
def test_an_added_latency_is_a_wires(later: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a latency counted from when this rank receives, or from its own message instead of the last rank's.

    A thread of the transport receives late while a weight gradient occupies its only core.
    """
    channel = DelayedPeerChannel()
    channel.capacity, channel.later = 64, later
    add_latency(channel, 1e-3)
    slept: List[float] = []
    wait = channel.launch(A, BACKWARD, [torch.ones(4)])
    time.sleep(2e-3)
    clock = SimpleNamespace(perf_counter=time.perf_counter, sleep=slept.append)  # only for that module
    monkeypatch.setattr("bagua_syncbn_algo.bench.latency.time", clock)
    assert wait()[0].tolist() == [[1.0] * 4] * 2
    assert len(slept) == 1 and (slept[0] > 1 if later else slept[0] == 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", MODEL, "--variants", "local", "fast"], "expected variants among local, upstream, torch"),
        (["bench", MODEL, "--nproc", "1"], "expected at least 2 ranks"),
        (["timeline", MODEL, "--latency", "-1"], "a latency of at least 0"),
        (["timeline", "test_bench:Nothing"], "expected a function or class at test_bench:Nothing"),
        (["timeline", MODEL, "--variant", "quick"], r"(got quick)"),
    ],
)
def test_mistakes_are_said_before_ranks_start(arguments: Any, message: str) -> None:
    """Catches a wrong argument that is reported by tracebacks of two ranks."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert message in str(caught.value)


def test_an_input_that_is_no_shape(capsys: Any) -> None:
    """Catches the error message of `int()`, which does not name the expected format."""
    with pytest.raises(SystemExit):
        main(["bench", MODEL, "--input", "large"])
    assert "expected numbers separated by commas (got large)" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an ImportError that is raised after minutes of measurements."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install bagua_syncbn_algo\[bench\]"):
        main(["timeline", MODEL])


def test_whatever_a_model_returns_is_differentiated() -> None:
    """Catches a kind of model output, such as a dict, that the loss does not accept."""
    one, two = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    loss = steps.loss_of({"a": [one * 2, torch.arange(3)], "b": two * 3})
    assert float(loss) == pytest.approx(4 + 9)
    with pytest.raises(ValueError, match=r"expected the model to return floating-point tensors \(got list"):
        steps.loss_of([torch.arange(3)])


def _large(rank: int) -> Tensor:
    torch.distributed.init_process_group("gloo")
    return torch.full((100_000,), float(rank)).tolist()  # type: ignore[no-any-return]


def _fails(rank: int) -> None:
    torch.distributed.init_process_group("gloo")
    if rank == 1:
        raise RuntimeError("this rank has a fault")
    torch.distributed.barrier()


@pytest.mark.multirank
def test_ranks_return_what_they_measured() -> None:
    """Catches a deadlock between a rank and its parent for a result that is larger than the pipe's buffer."""
    assert run_ranks(_large) == [0.0] * 100_000


@pytest.mark.multirank
def test_a_rank_that_fails_ends_all() -> None:
    """Catches a launcher that waits for a rank which waits for the failed rank."""
    with pytest.raises(Exception, match="this rank has a fault"):
        run_ranks(_fails)


def test_spreads_by_hand() -> None:
    """Catches quartiles in the wrong order."""
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == (3.0, 1.5, 4.5)
