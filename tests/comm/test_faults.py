"""Tests of what each rank says after a fault: positions, global ranks, versions, threads, hooks, corrupt headers."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta
from typing import Any, List, Optional, Tuple

import pytest
import torch
import torch.distributed as dist
from ranks import run_processes, run_threads
from torch import Tensor, nn

from bagua_syncbn_algo import SyncBatchNorm, SyncBatchNormError, convert_sync_batchnorm
from bagua_syncbn_algo.comm import errors, version
from bagua_syncbn_algo.comm.errors import describe_failure, exchange_positions, explaining
from bagua_syncbn_algo.comm.report import header_error
from bagua_syncbn_algo.comm.transport import TorchChannel
from bagua_syncbn_algo.comm.version import VersionCheck
from bagua_syncbn_algo.comm.wire import BACKWARD, FORWARD, HEADER_BYTES, Roster, sync_point

A, B = sync_point("Net.bn1"), sync_point("Net.bn2")


def channel_over(group: Any, store: Optional[Any] = None, ranks: Tuple[int, ...] = (4, 6)) -> TorchChannel:
    channel = TorchChannel(group, store, ranks)
    channel.join(Roster(((A.name, 4), (B.name, 4))))
    return channel


def texts(failures: List[Optional[BaseException]]) -> List[str]:
    assert all(isinstance(failure, SyncBatchNormError) for failure in failures), failures
    return [str(failure) for failure in failures]


# -- positions ---------------------------------------------------------------------------------------------------------


def describe(store: Any, sequence: int, where: str = "Net.bn2 (forward)", rank: int = 4) -> str:
    return describe_failure(where, RuntimeError("timed out"), rank, (4, 6), "test", sequence, store)


def test_a_position_of_an_earlier_failure_is_not_the_current_one(mocker: Any) -> None:
    """Catches a position that a rank has published for an earlier failure and that stays in the store."""
    mocker.patch.multiple(errors, _DESCRIBE_SECONDS=0.2, _READ_SECONDS=0.1)
    store = dist.HashStore()
    exchange_positions("Net.bn1 (forward)", 6, (4, 6), "test", 3, store)
    text = describe(store, 9)
    assert "(got rank 4 at Net.bn2 (forward); rank 6 did not arrive" in text
    assert "rank 6 failed before at Net.bn1 (forward)" in text


def test_a_rank_that_failed_later_is_not_missing(mocker: Any) -> None:
    """Catches a rank that is reported as missing although it has failed in the next collective."""
    mocker.patch.multiple(errors, _DESCRIBE_SECONDS=0.2, _READ_SECONDS=0.1)
    store = dist.HashStore()
    exchange_positions("Net.bn3 (forward)", 6, (4, 6), "test", 10, store)
    text = describe(store, 9)
    assert "rank 6 at Net.bn3 (forward)" in text and "did not arrive" not in text


def test_an_unreachable_store_is_not_a_missing_rank() -> None:
    """Catches the statement that a rank did not arrive where only the store cannot be asked."""
    server = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=5), wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, None, False, timedelta(seconds=5), wait_for_workers=False)
    client.set("alive", "1")
    del server
    text = describe(client, 1)
    assert "the positions of the other ranks are unknown, because the key-value store cannot be reached" in text
    assert "did not arrive" not in text and "read the output of each rank first" in text


def test_a_store_that_never_answers_ends_the_wait(mocker: Any) -> None:
    """Catches a failing rank that waits forever for the process of the store, which is stopped."""
    mocker.patch.multiple(errors, _DESCRIBE_SECONDS=0.1, _STORE_SECONDS=0.2)
    store = mocker.Mock()
    store.set.side_effect = lambda *unused: time.sleep(3)
    text = describe(store, 1)
    assert "cannot be reached (no answer)" in text


def test_a_description_ends_within_the_documented_time() -> None:
    """Catches a rank that ends more than 3 seconds after its timeout: it waits for positions, then for readers."""
    assert errors._DESCRIBE_SECONDS + max(errors._READ_SECONDS, errors._STORE_SECONDS) < 3.0
    assert errors._READ_SECONDS < errors._STORE_SECONDS  # a store that answers is not given up while ranks read


@pytest.mark.multirank
def test_a_second_failure_does_not_quote_the_first() -> None:
    """Catches keys in the store without the number of the message, in a channel that fails twice."""
    store = dist.HashStore()

    def body(rank: int, group: Any) -> List[str]:
        channel = channel_over(group, store)
        found = []
        for point in (A, B) if rank == 0 else (A,):
            if rank == 1:
                time.sleep(2.5)  # arrives when rank 0 has closed the connection
            with pytest.raises(SyncBatchNormError) as caught:
                channel.exchange(point, FORWARD, [torch.zeros(4)])
            found.append(str(caught.value))
        return found

    first, second = run_threads(2, body, timeout=1.0)[0]
    assert "rank 4 at Net.bn1 (forward), rank 6 at Net.bn1 (forward)" in first
    assert "rank 6 did not arrive" in second and "rank 6 failed before at Net.bn1 (forward)" in second


# -- global ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.multirank
def test_errors_name_global_ranks() -> None:
    """Catches ranks of the group in errors of a channel over other ranks of the world."""

    def other_layers(rank: int, group: Any) -> None:
        channel_over(group).exchange(A if rank == 0 else B, FORWARD, [torch.zeros(4)])

    def an_error(rank: int, group: Any) -> None:
        channel = channel_over(group)
        if rank == 1:
            channel.fail(A, FORWARD, ValueError("made up"))
        channel.exchange(A, FORWARD, [torch.zeros(4)])

    def other_lengths(rank: int, group: Any) -> None:
        channel_over(group).exchange(A, FORWARD, [torch.zeros(4 + rank)])

    def other_models(rank: int, group: Any) -> None:
        TorchChannel(group, None, (4, 6)).join(Roster((("Net.bn1", 4 + rank),)))

    assert (
        "rank 4 at Net.bn1 (forward), rank 6 at Net.bn2 (forward)"
        in texts(run_threads(2, other_layers, errors=True))[0]
    )
    assert "expected rank 6 to send statistics" in str(run_threads(2, an_error, errors=True)[0])
    assert "16 bytes on rank 4, 20 bytes on rank 6" in texts(run_threads(2, other_lengths, errors=True))[0]
    assert (
        "Net.bn1 with 4 features on rank 4, Net.bn1 with 5 features on rank 6"
        in texts(run_threads(2, other_models, errors=True))[1]
    )


def _subgroup_of_the_world(rank: int) -> Optional[str]:
    dist.init_process_group("gloo")
    if rank == 0:
        return None
    layer = SyncBatchNorm(3, process_group=dist.new_group([1, 2], use_local_synchronization=True))
    with pytest.raises((SyncBatchNormError, ValueError)) as caught:
        layer(torch.randn(2, 3 if rank == 1 else 4, 5))
    return str(caught.value)


@pytest.mark.multirank
def test_a_subgroup_of_the_world_names_global_ranks() -> None:
    """Catches global ranks that are not passed to the channel of a process group."""
    _, first, _ = run_processes(3, _subgroup_of_the_world)
    assert first is not None and "expected rank 2 to send statistics" in first


# -- rounds of several frames ------------------------------------------------------------------------------------------


@pytest.mark.multirank
@pytest.mark.parametrize("fault", ["another width", "another layer"])
@pytest.mark.parametrize("features", [500, 3000])
def test_one_step_is_lost_after_a_caught_error(fault: str, features: int) -> None:
    """Catches an error of a round of several messages that leaves one more message on a rank: all later steps fail."""

    def body(rank: int, group: Any) -> List[str]:
        wide, small = (SyncBatchNorm(each, process_group=group) for each in (features, 3))
        outcomes = []
        for step in range(5):
            is_faulty = step == 2 and rank == 1
            layer = small if is_faulty and fault == "another layer" else wide
            x = torch.randn(3, layer.num_features - (is_faulty and layer is wide), requires_grad=True)
            try:
                layer(x).pow(3).sum().backward()
                outcomes.append("ok")
            except (SyncBatchNormError, ValueError) as error:
                outcomes.append(type(error).__name__)
        if features == 3000:
            assert wide._bound_channel().frames > 2 * 4  # several in each round
        return outcomes

    first, second = run_threads(2, body)
    own = "ValueError" if fault == "another width" else "SyncBatchNormError"
    assert first == ["ok", "ok", "SyncBatchNormError", "ok", "ok"]
    assert second == ["ok", "ok", own, "ok", "ok"]


# -- corrupt headers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[1, 7, 0, 16], [1, -3, 0, -5], [0, 2**62, 1, -(2**62)], [0, 0, 1, 2**62]])
def test_a_corrupt_header_is_reported(words: List[int]) -> None:
    """Catches an IndexError for a phase that does not exist, and a length that is not in the message."""
    own = [A.key, FORWARD, 0, 16]
    gathered = torch.zeros(2, HEADER_BYTES + 16, dtype=torch.uint8)
    error = header_error([own, words], own, A, FORWARD, gathered, 0, {A.key: A.name}, (4, 6))
    assert "rank 6" in str(error)
    if words[0] == 1:
        assert "rank 6 at a layer unknown on this rank (no known phase:" in str(error)


# -- versions ----------------------------------------------------------------------------------------------------------


def versioned(rank: int, group: Any, store: Any, seconds: float = 5.0) -> TorchChannel:
    channel = TorchChannel(group, store, (4, 6))
    channel.check_versions(seconds)
    channel.capacity = 64
    return channel


@pytest.mark.multirank
def test_another_message_version_is_refused_before_the_first_message() -> None:
    """Catches messages of another version: another length of the first message ends the process inside gloo."""
    store = dist.HashStore()

    def body(rank: int, group: Any) -> None:
        channel = TorchChannel(group, store, (4, 6))
        channel.check_versions(5.0)
        if rank == 1:
            store.set(f"{channel.label}/version/6", "2")  # as a later version of the package does
            channel._version_check._version = 2  # type: ignore[union-attr]
            store.set("ready", "")
        store.wait(["ready"])
        channel.join(Roster(((A.name, 4),)))

    for text in texts(run_threads(2, body, errors=True)):
        assert "expected one message version of bagua_syncbn_algo on all ranks (got 1 on rank 4, 2 on rank 6)" in text


@pytest.mark.multirank
def test_a_version_that_publishes_nothing_is_named_in_time() -> None:
    """Catches a rank that waits without a limit for a package that has no message versions."""
    store = dist.HashStore()

    def body(rank: int, group: Any) -> None:
        if rank == 0:
            versioned(rank, group, store, 0.3).exchange(A, FORWARD, [torch.zeros(4)])

    first, _ = run_threads(2, body, errors=True)
    assert "expected the message version 1 from all ranks (got none from rank 6 in 0 s)" in str(first)


def test_a_store_that_ended_is_named_by_the_version_check() -> None:
    """Catches the statement that another rank has another version where the store does not answer."""
    server = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=5), wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, None, False, timedelta(seconds=5), wait_for_workers=False)
    client.set("alive", "1")
    del server
    with pytest.raises(SyncBatchNormError, match=r"expected the message versions of all ranks in the key-value store"):
        VersionCheck(client, "test", 4, (4, 6), 0.5).compare()


def _versions_of_processes(rank: int) -> str:
    if rank == 1:
        version.MESSAGE_VERSION = 3  # type: ignore[misc]
    dist.init_process_group("gloo")
    with pytest.raises(SyncBatchNormError) as caught:
        SyncBatchNorm(3)(torch.randn(2, 3, 5))
    return str(caught.value)


@pytest.mark.multirank
def test_two_versions_in_one_job() -> None:
    """Catches a channel of `torch.distributed` that does not compare versions."""
    for text in run_processes(2, _versions_of_processes):
        assert "got 1 on rank 0, 3 on rank 1" in text


# -- threads -----------------------------------------------------------------------------------------------------------


def _forked(rank: int) -> Tuple[str, Tensor]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=10))
    layer = SyncBatchNorm(3)
    layer(torch.arange(12.0).view(4, 3) + rank)
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends this process if it waits
        text = "no error"
        try:
            layer(torch.ones(4, 3))
        except Exception as error:
            text = str(error)
        os.write(sender, text.encode())
        os._exit(0)
    os.waitpid(child, 0)
    layer(torch.arange(12.0).view(4, 3) * rank)  # the messages of this process are in order
    return os.read(receiver, 10000).decode(), layer.running_mean


@pytest.mark.multirank
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_is_refused() -> None:
    """Catches a training forward in a worker of a DataLoader: it waits for ever, as no thread receives messages."""
    (first, mean), (second, other) = run_processes(2, _forked)
    for text in (first, second):
        assert text.startswith(
            "expected statistics to be exchanged by the process of the rank (got one that was forked"
        )
    assert torch.equal(mean, other) and mean.any()


@pytest.mark.multirank
def test_two_threads_at_once_are_refused() -> None:
    """Catches two threads in one channel: an AttributeError at best, and statistics of other layers at worst."""

    def body(rank: int, group: Any) -> str:
        channel = channel_over(group)
        ready = threading.Event()
        found: List[Any] = []

        def wait() -> None:
            pending = channel.launch(A, FORWARD, [torch.full((4,), float(rank))])
            ready.set()
            found.append(pending()[0][:, 0].tolist())

        if rank == 1:
            time.sleep(1.0)
            wait()
            return ""
        thread = threading.Thread(target=wait, name="first thread")
        thread.start()
        ready.wait()
        time.sleep(0.2)
        with pytest.raises(SyncBatchNormError) as caught:
            channel.exchange(B, FORWARD, [torch.zeros(4)])
        thread.join()
        assert found == [[0.0, 1.0]]
        return str(caught.value)

    text = run_threads(2, body)[0]
    assert "expected one thread at a time to exchange statistics (got " in text and "while first thread waits" in text


@pytest.mark.multirank
def test_threads_may_take_turns() -> None:
    """Catches a lock that belongs to one thread: on CUDA, autograd runs backward in a thread of its own."""

    def body(rank: int, group: Any) -> Any:
        channel = channel_over(group)
        found: List[Any] = []

        def use(point: Any, phase: int) -> None:
            wait = channel.launch(point, phase, [torch.full((4,), float(rank))])
            found.append(wait)

        for point, phase in ((A, FORWARD), (B, FORWARD), (B, BACKWARD)):
            thread = threading.Thread(target=use, args=(point, phase))
            thread.start()
            thread.join()
        return [wait()[0][:, 0].tolist() for wait in found]

    assert run_threads(2, body) == [[[0.0, 1.0]] * 3] * 2


# -- hooks -------------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Two branches whose layers share a round."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
        self.right = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def log_shape(module: nn.Module, args: Any, output: Tensor) -> None:
    """A hook that only one rank has."""


def _hook_on_one_rank(rank: int, when: str) -> str:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model: Any = Branches()
    if when == "before" and rank == 1:
        model.left.register_forward_hook(log_shape)
    model = convert_sync_batchnorm(model)
    if when == "after" and rank == 1:
        model.left.register_forward_hook(log_shape)
    if when == "global" and rank == 1:
        nn.modules.module.register_module_forward_hook(log_shape)
    with pytest.raises(SyncBatchNormError) as caught:
        model(torch.randn(2, 2, 4, 4))
    return str(caught.value)


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("when", "hook"),
    [
        ("before", "Branches.left has the forward hook"),
        ("after", "Branches.left has the forward hook"),
        ("global", "all modules have the global forward hook"),
    ],
)
def test_a_hook_of_one_rank_is_named(when: str, hook: str) -> None:
    """Catches an error that names layers only, where a hook on one rank has changed the rounds."""
    for text in run_processes(2, _hook_on_one_rank, when):
        assert f"Not the same on all ranks: on rank 1, {hook} " in text.replace("on rank 0", "on rank 1"), text
        assert f"{hook} {__name__}.log_shape" in text, text
        if when != "before":
            assert "The check compares the regrouped forward of a module with its own forward" in text, text


# -- running statistics ------------------------------------------------------------------------------------------------


def _other_statistics(rank: int, options: Any, counts: Any) -> str:
    """Loads running statistics on rank 0 only; returns the error of the first training forward."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model: Any = convert_sync_batchnorm(Branches())
    if rank == 0:
        model.left[1].running_mean.fill_(3.0)
    ddp = nn.parallel.DistributedDataParallel(model, **options)
    try:
        ddp(torch.randn(2, 2, 4, 4)).sum().backward()
    except SyncBatchNormError as error:
        return str(error)
    dist.all_gather(counts, model.left[1].running_mean)
    assert torch.equal(*counts)
    return ""


@pytest.mark.multirank
def test_running_statistics_that_differ_are_an_error() -> None:
    """Catches a checkpoint that is loaded on rank 0 only: DDP broadcasts no buffers with `broadcast_buffers=False`."""
    counts = [torch.zeros(3), torch.zeros(3)]
    for text in run_processes(2, _other_statistics, {"broadcast_buffers": False}, counts):
        assert "expected the same running statistics on every rank at the first use of a model's layers" in text
        assert "(got different ones on rank 0 and rank 1 in Branches.left.1 and 1 more layers)" in text
    assert run_processes(2, _other_statistics, {}, counts) == ["", ""]


# -- bare errors of collectives ----------------------------------------------------------------------------------------


def test_errors_of_collectives_have_a_place(mocker: Any) -> None:
    """Catches a bare error of the backend, and a second description of an error that has one."""
    mocker.patch.multiple(errors, _DESCRIBE_SECONDS=0.1, _READ_SECONDS=0.1)
    with (
        pytest.raises(SyncBatchNormError) as caught,
        explaining("the gradients of Net.fc", "sum gradients", 4, (4, 6), "test", 7, dist.HashStore()),
    ):
        raise RuntimeError("Connection closed by peer")
    text = str(caught.value)
    assert "expected all 2 ranks to sum gradients at the gradients of Net.fc (got rank 4 at" in text
    assert "rank 6 did not arrive" in text and "on rank 4: Connection closed by peer" in text
    with pytest.raises(SyncBatchNormError, match=r"^known$"), explaining("x", "y", 4, (4, 6), "test", 8, None):
        raise SyncBatchNormError("known")


@pytest.mark.multirank
def test_an_error_in_the_second_half_of_backward_reaches_all(mocker: Any) -> None:
    """Catches ranks that wait for a rank whose backward has failed after its all-gather."""
    import bagua_syncbn_algo.ops.exact as exact

    x = torch.randn(2, 2, 3, 4, 4)
    original = exact.input_gradient

    def faulty(grad: Tensor, input: Tensor, *rest: Any) -> Any:
        if torch.equal(input, x[1]):
            raise MemoryError("no memory left")
        return original(grad, input, *rest)

    mocker.patch.object(exact, "input_gradient", faulty)

    def body(rank: int, group: Any) -> None:
        layer = SyncBatchNorm(3, process_group=group)
        leaf = x[rank].clone().requires_grad_()
        layer(leaf).sum().backward()
        layer(leaf)  # the next exchange

    good, bad = run_threads(2, body, errors=True)
    assert isinstance(bad, MemoryError)
    assert isinstance(good, SyncBatchNormError) and "(got its error: MemoryError: no memory left)" in str(good)
