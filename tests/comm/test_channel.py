"""Tests of the statistics channel: exchange, headers, errors, frames, agreement, late and dead ranks."""

from __future__ import annotations

import os
import time
import weakref
from types import SimpleNamespace
from typing import Any, List, Optional

import pytest
import torch
import torch.distributed as dist
from ranks import run_processes, run_threads
from torch import Tensor

from bagua_syncbn_algo import SyncBatchNorm, SyncBatchNormError
from bagua_syncbn_algo import layer as layer_module
from bagua_syncbn_algo.comm import pending as pending_module
from bagua_syncbn_algo.comm import transport
from bagua_syncbn_algo.comm.channel import Channel
from bagua_syncbn_algo.comm.local import SINGLE_PROCESS
from bagua_syncbn_algo.comm.report import error_text
from bagua_syncbn_algo.comm.transport import TorchChannel, channel_of
from bagua_syncbn_algo.comm.wire import BACKWARD, FORWARD, HEADER_BYTES, Roster, SyncPoint, sync_point
from bagua_syncbn_algo.compat import ALLGATHER_ON_CURRENT_STREAM

A, B = sync_point("model.layer2.0.bn1"), sync_point("model.layer2.0.bn2")


def channel_for(group: Any, features: int = 4, store: Optional[Any] = None) -> TorchChannel:
    channel = TorchChannel(group, store)
    channel.join(Roster(((A.name, features), (B.name, features))))
    return channel


class LateChannel(TorchChannel):
    """A channel that checks headers a step later, as on CUDA."""

    checks_late = True


def channel_after_failure(rank: int, group: Any) -> LateChannel:
    """Returns a channel in whose first round rank 1 has sent an error instead of its statistics."""
    channel = LateChannel(group)
    channel.join(Roster(((A.name, 4),)))
    if rank == 1:
        channel.fail(A, FORWARD, ValueError("made up"))
    else:
        channel.exchange(A, FORWARD, [torch.zeros(4)])
    return channel


def messages(failures: List[Optional[BaseException]]) -> List[str]:
    assert all(isinstance(failure, SyncBatchNormError) for failure in failures), failures
    return [str(failure) for failure in failures]


@pytest.mark.multirank
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", [4, 5, 4000])
def test_exchange_returns_every_rank_in_order(dtype: torch.dtype, features: int) -> None:
    """Catches misaligned views, ranks out of order, a count that is converted to float32, and lost frames.

    4000 features need many frames in a channel with capacity for 4 features. 2²⁴ + 1 has no float32 representation.
    """

    def body(rank: int, group: Any) -> Any:
        channel = channel_for(group)
        parts = [torch.tensor([2**24 + 1 + rank]), torch.arange(features, dtype=dtype) + 1000 * rank]
        return channel.exchange(A, FORWARD, parts), channel.rounds, channel.capacity

    for (counts, values), rounds, capacity in run_threads(3, body):
        assert counts.tolist() == [[2**24 + 1], [2**24 + 2], [2**24 + 3]]
        assert torch.equal(values, torch.stack([torch.arange(features, dtype=dtype) + 1000 * r for r in range(3)]))
        payload = 8 + features * torch.empty(0, dtype=dtype).element_size()
        assert rounds == -(-payload // (capacity - HEADER_BYTES))


@pytest.mark.multirank
@pytest.mark.parametrize("features", [4, 40])
def test_a_round_in_flight_keeps_its_result(features: int) -> None:
    """Catches a second round that overwrites the memory of the first one, whose result is read later."""

    def body(rank: int, group: Any) -> Any:
        channel = channel_for(group)
        first = channel.launch(A, BACKWARD, [torch.full((features,), 1.0 + rank)])
        second = channel.launch(B, BACKWARD, [torch.full((features,), 10.0 + rank)])
        third = channel.launch(A, FORWARD, [torch.full((features,), 100.0 + rank)])
        return [wait()[0][:, 0].tolist() for wait in (third, first, second, first)]

    for found in run_threads(2, body):
        assert found == [[100.0, 101.0], [1.0, 2.0], [10.0, 11.0], [1.0, 2.0]]


@pytest.mark.multirank
def test_ranks_that_differ_hear_of_it_when_they_wait() -> None:
    """Catches a mismatch that is lost because the launch of the next round has waited for the mismatched one."""

    def body(rank: int, group: Any) -> None:
        channel = channel_for(group)
        wait = channel.launch((A, B)[rank], BACKWARD, [torch.zeros(4)])
        for call in (lambda: channel.launch(A, FORWARD, [torch.zeros(4)]), wait, wait):
            with pytest.raises(SyncBatchNormError, match="expected every rank to be at the same layer"):
                call()
        channel.exchange(A, FORWARD, [torch.zeros(4)])

    run_threads(2, body)


@pytest.mark.multirank
def test_every_message_has_one_length() -> None:
    """Catches messages as long as their payload: gloo ends the process if the lengths differ between ranks."""
    lengths = []

    class Recording(TorchChannel):
        def _all_gather(self, message: Tensor) -> Tensor:
            lengths.append(message.numel())
            return super()._all_gather(message)

    def body(rank: int, group: Any) -> None:
        channel = Recording(group)
        channel.join(Roster(((A.name, 16), (B.name, 4))))
        lengths.clear()
        for point, features in ((A, 16), (B, 4)):
            channel.exchange(point, FORWARD, [torch.tensor([1]), torch.zeros(2 * features)])
            channel.exchange(point, BACKWARD, [torch.zeros(2 * features)])

    run_threads(1, body)
    assert len(lengths) == 4 and set(lengths) == {Roster(((A.name, 16),)).capacity(4)}


@pytest.mark.multirank
def test_ranks_at_different_layers_name_both() -> None:
    """Catches a rank that skips a layer and silently merges the statistics of another layer."""

    def body(rank: int, group: Any) -> None:
        channel_for(group).exchange(A if rank == 0 else B, FORWARD, [torch.zeros(4)])

    for text in messages(run_threads(2, body, errors=True)):
        assert "rank 0 at model.layer2.0.bn1 (forward)" in text
        assert "rank 1 at model.layer2.0.bn2 (forward)" in text


@pytest.mark.multirank
def test_ranks_in_different_phases_are_told() -> None:
    """Catches a backward round that is paired with another rank's forward round of the same layer."""

    def body(rank: int, group: Any) -> None:
        channel_for(group).exchange(A, FORWARD if rank == 0 else BACKWARD, [torch.zeros(4)])

    for text in messages(run_threads(2, body, errors=True)):
        assert "rank 0 at model.layer2.0.bn1 (forward), rank 1 at model.layer2.0.bn1 (backward)" in text


@pytest.mark.multirank
def test_unknown_layer_of_another_rank() -> None:
    """Catches a KeyError instead of the error message if another rank is at a layer unknown to this rank."""

    def body(rank: int, group: Any) -> None:
        channel = channel_for(group)
        channel.exchange(A if rank == 0 else SyncPoint(123, "elsewhere"), FORWARD, [torch.zeros(4)])

    assert "rank 1 at a layer unknown on this rank" in messages(run_threads(2, body, errors=True))[0]


@pytest.mark.multirank
def test_payloads_of_different_lengths_are_told() -> None:
    """Catches float64 statistics of one rank that are merged with float32 statistics of another rank."""

    def body(rank: int, group: Any) -> None:
        dtype = torch.float32 if rank == 0 else torch.float64
        channel_for(group).exchange(A, FORWARD, [torch.zeros(2, dtype=dtype)])

    for text in messages(run_threads(2, body, errors=True)):
        assert "got 8 bytes on rank 0, 16 bytes on rank 1" in text and "same num_features and input dtype" in text


@pytest.mark.multirank
def test_frames_of_different_number_do_not_hang() -> None:
    """Catches a rank that waits for a second frame that the other rank never sends: the first header has the length."""

    def body(rank: int, group: Any) -> None:
        channel_for(group).exchange(A, FORWARD, [torch.zeros(4 if rank == 0 else 4000)])

    for text in messages(run_threads(2, body, errors=True)):
        assert "got 16 bytes on rank 0, 16000 bytes on rank 1" in text


@pytest.mark.multirank
def test_a_fault_on_one_rank_reaches_all() -> None:
    """Catches ranks that wait for the timeout because another rank has refused its input."""
    layers = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)]

    def body(rank: int, group: Any) -> None:
        SyncBatchNorm(3, process_group=group)(layers[rank])

    good, bad = run_threads(2, body, errors=True)
    assert isinstance(bad, ValueError) and "expected 3 channels in dimension 1" in str(bad)
    assert isinstance(good, SyncBatchNormError)
    assert "expected rank 1 to send statistics at SyncBatchNorm(3) number 1 (forward)" in str(good)
    assert "expected 3 channels" in str(good)


@pytest.mark.multirank
def test_a_fault_in_backward_reaches_all(mocker: Any) -> None:
    """Catches ranks that wait for a rank whose backward has failed."""
    import bagua_syncbn_algo.ops.exact as exact

    x = torch.randn(2, 2, 3, 4, 4)
    original = exact.gradient_sums

    def faulty(grad_output: Tensor, input: Tensor, *rest: Any) -> Any:
        if torch.equal(input, x[1]):
            raise MemoryError("no memory left")
        return original(grad_output, input, *rest)

    mocker.patch.object(exact, "gradient_sums", faulty)

    def body(rank: int, group: Any) -> None:
        SyncBatchNorm(3, process_group=group)(x[rank].requires_grad_()).sum().backward()

    x = x.clone()
    good, bad = run_threads(2, body, errors=True)
    assert isinstance(bad, MemoryError)
    assert isinstance(good, SyncBatchNormError) and "(backward) (got its error: MemoryError: no memory left)" in str(
        good
    )


@pytest.mark.multirank
def test_a_fault_after_the_exchange_reaches_all(mocker: Any) -> None:
    """Catches ranks that wait at the next layer for a rank that ran out of memory after the exchange."""
    import bagua_syncbn_algo.ops.functional as functional

    x = torch.randn(2, 2, 3, 4, 4)
    original = functional.normalize

    def faulty(input: Tensor, *rest: Any) -> Any:
        if torch.equal(input, x[1]):
            raise MemoryError("no memory left")
        return original(input, *rest)

    mocker.patch.object(functional, "normalize", faulty)

    def body(rank: int, group: Any) -> None:
        SyncBatchNorm(3, process_group=group)(x[rank].clone().requires_grad_()).sum().backward()

    good, bad = run_threads(2, body, errors=True)
    assert isinstance(bad, MemoryError)
    assert isinstance(good, SyncBatchNormError) and "(got its error: MemoryError: no memory left)" in str(good)


def test_a_long_error_ends_with_an_ellipsis() -> None:
    """Catches the text of another rank's error that ends in the middle of a word, as if it were complete."""
    error = ValueError("x" * 100)
    assert error_text(error, 20) == b"ValueError: xxxxx..."
    assert error_text(error, 112) == b"ValueError: " + b"x" * 100


@pytest.mark.multirank
def test_different_layers_are_refused_at_the_start() -> None:
    """Catches ranks with different models that hang in the middle of a step."""

    def body(rank: int, group: Any) -> None:
        names = [("net.bn1", 4), ("net.bn2", 8)] + ([] if rank == 0 else [("net.bn3", 8)])
        TorchChannel(group).join(Roster(tuple(names)))

    for text in messages(run_threads(2, body, errors=True)):
        assert "got 2 on rank 0, 3 on rank 1" in text
        assert "number 2: nothing on rank 0, net.bn3 with 8 features on rank 1" in text


@pytest.mark.multirank
def test_the_longest_message_of_any_rank_is_taken() -> None:
    """Catches ranks with different message lengths because only one of them has float64 layers."""

    def body(rank: int, group: Any) -> int:
        channel = TorchChannel(group)
        channel.join(Roster((("net.bn", 100),)), itemsize=4 if rank == 0 else 8)
        return channel.capacity

    assert run_threads(2, body) == [Roster((("net.bn", 100),)).capacity(8)] * 2


@pytest.mark.multirank
def test_a_rank_that_never_arrives_is_named() -> None:
    """Catches a timeout error that does not name the layer and the missing rank."""
    store = dist.HashStore()

    def body(rank: int, group: Any) -> None:
        channel = channel_for(group, store=store)
        channel.exchange(A, FORWARD, [torch.zeros(4)])
        if rank == 2:
            time.sleep(3)
            return
        channel.exchange(B, BACKWARD, [torch.zeros(4)])

    first, second, third = run_threads(3, body, errors=True, timeout=2.0)
    assert third is None
    for text in messages([first, second]):
        assert "rank 0 at model.layer2.0.bn2 (backward), rank 1 at model.layer2.0.bn2 (backward)" in text
        assert "rank 2 did not arrive" in text


def _die_in_the_middle(rank: int) -> str:
    dist.init_process_group("gloo")
    layer = SyncBatchNorm(3)
    layer(torch.randn(2, 3, 4, 4))
    if rank == 1:
        os._exit(3)
    try:
        layer(torch.randn(2, 3, 4, 4))
    except SyncBatchNormError as error:
        return str(error)
    return "no error"


@pytest.mark.multirank
def test_a_dead_rank_ends_the_others() -> None:
    """Catches a hang after a rank has died; uses processes, because a rank cannot die in a thread."""
    first, second = run_processes(2, _die_in_the_middle, errors=True)
    assert first is None
    assert second == "rank 1 returned no result: it hung or died"


def test_without_a_process_group_there_is_one_rank() -> None:
    """Catches a collective in a program without a process group."""
    assert channel_of(None) is SINGLE_PROCESS
    parts = SINGLE_PROCESS.exchange(A, FORWARD, [torch.tensor([3]), torch.ones(2)])
    assert [part.tolist() for part in parts] == [[[3]], [[1.0, 1.0]]]


def test_a_group_that_this_rank_is_not_in_is_refused() -> None:
    """Catches an AttributeError in forward for the result of `new_group` on a rank that is not a member."""
    with pytest.raises(ValueError, match="expected a process group that this rank belongs to"):
        channel_of(object())


def test_sync_points_do_not_depend_on_order() -> None:
    """Catches keys from `hash`, which differs between processes, or from the order of registration."""
    assert sync_point("model.layer1.bn").key == 6231833962137924943
    assert sync_point("a").key != sync_point("b").key


@pytest.mark.multirank
def test_two_models_of_one_architecture_are_told_apart() -> None:
    """Catches layers identified by name only: ranks in different models would merge their statistics."""

    def body(rank: int, group: Any) -> None:
        channel = TorchChannel(group)
        models = [Roster((("Net.bn", 4),)), Roster((("Net.bn", 4),))]
        points = [sync_point("Net.bn", channel.join(roster)) for roster in models]
        channel.exchange(points[rank], FORWARD, [torch.zeros(4)])

    for text in messages(run_threads(2, body, errors=True)):
        assert "expected every rank to be at the same layer" in text


@pytest.mark.multirank
def test_a_rank_that_begins_another_model_is_told() -> None:
    """Catches a message of another length at the first use of a model: gloo would end the process."""

    def body(rank: int, group: Any) -> None:
        channel = channel_for(group)
        if rank == 0:
            channel.join(Roster((("Other.bn", 4000),)))
        channel.exchange(A, FORWARD, [torch.zeros(4)])

    for text in messages(run_threads(2, body, errors=True)):
        assert "rank 0 at the first use of a model's layers (first use), rank 1 at model.layer2.0.bn1 (forward)" in text


@pytest.mark.multirank
def test_a_first_forward_in_inference_mode() -> None:
    """Catches buffers created in inference mode, which later training steps cannot write to."""
    x = torch.randn(2, 4, 3)

    def body(rank: int, group: Any) -> Any:
        layer = SyncBatchNorm(3, process_group=group)
        with torch.inference_mode():
            layer(x[rank])
        leaf = x[rank].clone().requires_grad_()
        layer(leaf).sum().backward()
        return leaf.grad is not None

    assert run_threads(2, body) == [True, True]


def _waits(rank: int) -> Any:
    from bagua_syncbn_algo import SyncBatchNormAlgorithm, bagua, convert_sync_batchnorm

    bagua.init_process_group()
    model = convert_sync_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
    model.with_bagua([], SyncBatchNormAlgorithm(timeout=1.0))
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        store.wait(["rank 0 has timed out"])  # alive, but never at the layer
        return None
    with pytest.raises(SyncBatchNormError) as caught:
        model(torch.randn(4, 3))
    store.set("rank 0 has timed out", "")
    return str(caught.value)


@pytest.mark.multirank
def test_the_timeout_ends_a_wait_for_a_rank_that_lives() -> None:
    """Catches a timeout that is not passed to the communicator: the wait would last as long as the other rank runs."""
    assert "rank 1 did not arrive" in run_processes(2, _waits)[0]


# -- CUDA, with stand-ins ----------------------------------------------------------------------------------------------


def test_control_messages_lie_where_the_layers_do(mocker: Any) -> None:
    """Catches control tensors that are not on the device of the model: NCCL reports a duplicate GPU."""
    mocker.patch.object(transport, "is_nccl", lambda group: True)
    mocker.patch.object(torch.cuda, "current_device", lambda: 0)
    group = mocker.Mock(**{"rank.return_value": 0, "size.return_value": 2})
    channel = TorchChannel(group)
    assert channel.device == torch.device("cuda", 0)
    channel.use_device(torch.device("cpu"))
    channel.use_device(torch.device("cuda", 1))
    channel.use_device(torch.device("cuda", 2))  # ignored: a communicator has one device
    assert channel.device == torch.device("cuda", 1)


@pytest.mark.skipif(ALLGATHER_ON_CURRENT_STREAM is None, reason="needs torch 2.8")
def test_a_round_that_is_awaited_at_once_runs_on_the_current_stream(mocker: Any) -> None:
    """Catches a forward round that pays for the change of streams, and a backward round that blocks the stream."""
    mocker.patch.object(transport, "is_nccl", lambda group: True)
    event, stream = mocker.Mock(**{"query.return_value": False}), mocker.Mock()
    mocker.patch.object(pending_module, "event_on", lambda device: event)
    mocker.patch.object(torch.cuda, "current_stream", lambda device=None: stream)
    work = mocker.Mock()
    # NCCL's all-gather on the current stream returns no Work: PyTorch 2.8, ProcessGroupNCCL.cpp, `collective`.
    group = mocker.Mock(**{"rank.return_value": 0, "size.return_value": 2})

    def all_gather(out: Tensor, message: Tensor, options: Optional[Any] = None) -> Any:
        out.view(2, -1).copy_(message)
        return work if options is None else None

    group._allgather_base.side_effect = all_gather
    channel = TorchChannel(group)
    channel.capacity = 128
    channel.watch = mocker.Mock()
    backward = channel.launch(A, BACKWARD, [torch.ones(4)])
    assert group._allgather_base.call_args.args[2:] == ()
    assert channel._in_flight is not None and channel._in_flight._work is work
    backward()
    channel.launch(A, FORWARD, [torch.ones(4)])
    options = group._allgather_base.call_args.args[2]
    assert options.asyncOp is False
    in_flight = channel._in_flight
    assert in_flight is not None and not in_flight._work.is_completed()  # as the monitor asks
    in_flight._work.wait()
    stream.wait_event.assert_called_once_with(event)


def test_the_layer_tells_its_device(mocker: Any) -> None:
    """Catches a layer that binds to a channel without setting the device of its statistics."""
    channel = mocker.Mock(spec=Channel, local=False)
    channel.anonymous_name.return_value = "norm"
    mocker.patch.object(layer_module, "channel_of", lambda group, device: channel)
    mocker.patch.object(layer_module, "source_group", lambda group: channel)
    SyncBatchNorm(3)._bound_channel(torch.device("cuda", 1))
    channel.use_device.assert_called_once_with(torch.device("cuda", 1))
    channel.reset_mock()
    mocker.patch.object(SyncBatchNorm, "device", torch.device("cuda", 2))  # of the parameters
    SyncBatchNorm(3)._bound_channel()
    channel.use_device.assert_called_once_with(torch.device("cuda", 2))


@pytest.mark.multirank
def test_a_failing_rank_leaves_no_check_behind() -> None:
    """Catches a header check of a rank's own error message, which on CUDA would raise in a later round."""

    def body(rank: int, group: Any) -> Any:
        channel = channel_after_failure(rank, group)
        channel.flush()
        found = channel.exchange(A, FORWARD, [torch.full((4,), float(rank))])  # the next step
        if rank == 1:
            channel.flush()
        else:
            with pytest.raises(SyncBatchNormError, match="made up"):
                channel.flush()
        return found[0][:, 0].tolist()

    assert run_threads(2, body) == [[0.0, 1.0]] * 2


@pytest.mark.multirank
def test_late_checks_name_the_layers_of_an_earlier_step() -> None:
    """Catches headers that are never compared on CUDA, and an error that names the layers of the current step."""
    other = sync_point("model.head")

    def body(rank: int, group: Any) -> str:
        channel = LateChannel(group)
        channel.join(Roster(((A.name, 4), (B.name, 4), (other.name, 4))))
        with pytest.raises(SyncBatchNormError) as caught:
            for step in range(3):
                for point in (A, other if (rank, step) == (1, 1) else B):
                    channel.exchange(point, FORWARD, [torch.zeros(4)])
                channel.flush()
        assert step == 2
        return str(caught.value)

    for message in run_threads(2, body):
        assert f"rank 0 at {B.name} (forward), rank 1 at {other.name} (forward)" in message


@pytest.mark.multirank
@pytest.mark.parametrize("features", [4, 4000, 12000])
def test_late_checked_messages_of_several_frames(features: int) -> None:
    """Catches frames of one message that share a slot: the third one overwrites the first one without an error."""

    def body(rank: int, group: Any) -> Any:
        channel = LateChannel(group)
        channel.join(Roster(((A.name, 4),)))
        channel.capacity = 8192
        part = torch.arange(features, dtype=torch.float32) + rank / 4
        waits = [channel.launch(A, phase, [part * (1 + phase)]) for phase in (FORWARD, BACKWARD)]
        return [wait()[0] for wait in waits]

    expected = torch.stack([torch.arange(features) + rank / 4 for rank in range(2)])
    for forward, backward in run_threads(2, body):
        torch.testing.assert_close(forward, expected)
        torch.testing.assert_close(backward, expected * 2)


@pytest.mark.multirank
def test_a_late_error_counts_no_message_that_was_not_sent() -> None:
    """Catches ranks that recover to different numbers of messages: one finds the error before it sends the next one."""

    def body(rank: int, group: Any) -> Any:
        channel = channel_after_failure(rank, group)
        channel.exchange(A, FORWARD, [torch.zeros(4)])
        if rank == 0:
            with pytest.raises(SyncBatchNormError, match="made up"):
                channel.exchange(A, FORWARD, [torch.zeros(4)])
        frames = channel.frames
        channel.recover(frames)
        return frames, channel.exchange(A, FORWARD, [torch.full((4,), float(rank))])[0][:, 0].tolist()

    assert run_threads(2, body) == [(3, [0.0, 1.0])] * 2


def test_a_channel_with_late_checks_is_freed() -> None:
    """Catches a reference cycle that keeps the slots, pinned memory and the communicator until a garbage collection."""
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 1, name=lambda: "gloo")
    group.allgather = lambda outputs, inputs: outputs[0][0].copy_(inputs[0]) is None or SimpleNamespace(wait=bool)
    holder = WeakReferenced(group)
    channel = LateChannel(holder)
    channel.capacity = 64
    channel.exchange(A, FORWARD, [torch.zeros(4)])
    reference = weakref.ref(channel)
    del channel
    assert reference() is None


class WeakReferenced:
    """A process group of one rank that a channel can reference weakly."""

    def __init__(self, group: Any) -> None:
        self.__dict__.update(vars(group))


@pytest.mark.multirank
def test_results_of_late_checked_rounds_stay_valid() -> None:
    """Catches a slot that the next round overwrites while its result is still in use."""

    def body(rank: int, group: Any) -> List[float]:
        channel = LateChannel(group)
        channel.join(Roster(((A.name, 4),)))
        waits = [channel.launch(A, BACKWARD, [torch.full((4,), 10.0 * i + rank)]) for i in range(2)]
        return [float(value) for wait in waits for value in wait()[0][:, 0]]

    assert run_threads(2, body) == [[0.0, 1.0, 10.0, 11.0]] * 2


@pytest.mark.multirank
def test_ranks_recover_from_messages_that_others_did_not_send() -> None:
    """Catches a channel that remains one message short after an error: later statistics would be paired wrongly."""

    def body(rank: int, group: Any) -> Any:
        channel = channel_for(group)
        if rank == 1:
            channel.fail(A, FORWARD, ValueError("made up"), wait=False)
            assert channel.failed
        channel.recover(2)
        assert (channel.frames, channel.failed) == (2, False)
        return channel.exchange(B, FORWARD, [torch.full((4,), float(rank))])[0][:, 0].tolist()

    assert run_threads(2, body) == [[0.0, 1.0]] * 2
