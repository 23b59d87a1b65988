"""Tests of the layer: a single rank, invalid input, modes, recomputation under checkpointing, copies."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any, List

import pytest
import torch
from ranks import run_processes, run_threads
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bagua_syncbn_algo import (
    SyncBatchNorm,
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    SyncBatchNorm3d,
    SyncBatchNormAlgorithm,
    SyncBatchNormError,
    bagua,
    convert_sync_batchnorm,
    revert_sync_batchnorm,
)
from bagua_syncbn_algo.comm.channel import Channel


def rounds(layer: SyncBatchNorm) -> int:
    channel = layer._channel
    assert isinstance(channel, Channel)
    return channel.rounds


# -- one rank ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("training", [True, False])
def test_one_rank_is_plain_batch_norm(options: Any, training: bool) -> None:
    """Catches any bitwise difference from nn.BatchNorm2d in a program with one rank."""
    x = torch.randn(4, 3, 5, 5)
    layers = [nn.BatchNorm2d(3, **options), SyncBatchNorm(3, **options)]
    results = []
    for layer in layers:
        leaf = x.clone().requires_grad_()
        layer.train()
        layer(leaf)
        layer.train(training)
        y = layer(leaf)
        y.pow(2).sum().backward()
        results.append((y, leaf.grad, *layer.buffers(), *(p.grad for p in layer.parameters())))
    for plain, synchronized in zip(*results):
        assert torch.equal(plain, synchronized)


def test_batches_tracked_is_updated_in_place() -> None:
    """Catches `self.num_batches_tracked = … + 1`, which breaks other references to it (averaged model, DDP)."""
    layer = SyncBatchNorm(3)
    held = layer.num_batches_tracked
    layer(torch.randn(2, 3, 4))
    assert held is not None and held.item() == 1


def test_evaluation_of_an_empty_batch_without_running_statistics() -> None:
    """Catches an error where nn.BatchNorm returns an empty output, as for a detector without regions."""
    x = torch.randn(0, 3, 4, 4)
    for layer in (SyncBatchNorm(3, track_running_stats=False), nn.BatchNorm2d(3, track_running_stats=False)):
        assert layer.eval()(x).shape == x.shape
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        SyncBatchNorm(3, track_running_stats=False)(x)


def test_evaluation_of_an_empty_batch() -> None:
    """Catches an error for an empty evaluation batch, such as the last one."""
    assert SyncBatchNorm(3).eval()(torch.randn(0, 3, 4, 4)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("input", "message"),
    [
        (
            torch.randn(3),
            r"expected at least 2D input \(N, C, \.\.\.\) at SyncBatchNorm \(got 1D input of shape \(3,\)",
        ),
        (torch.randn(2, 4, 5), r"expected 3 channels in dimension 1 at SyncBatchNorm \(got input of shape \(2, 4, 5\)"),
        (torch.ones(2, 3, dtype=torch.int64), r"expected a floating point input at SyncBatchNorm \(got torch.int64\)"),
        (torch.randn(1, 3), r"expected more than 1 value per channel at SyncBatchNorm \(got input of shape \(1, 3\)"),
        (torch.randn(0, 3, 2, 2), r"expected more than 1 value per channel at SyncBatchNorm"),
    ],
)
def test_bad_input_on_one_rank(input: Tensor, message: str) -> None:
    """Catches invalid input that reaches a native kernel, and buffers that are updated before the error."""
    layer = SyncBatchNorm(3)
    with pytest.raises(ValueError, match=message):
        layer(input)
    assert layer.num_batches_tracked is not None and layer.num_batches_tracked.item() == 0


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("input", "message"),
    [
        (torch.randn(3), "expected at least 2D input"),
        (torch.randn(2, 4, 5), "expected 3 channels in dimension 1"),
        (torch.ones(2, 3, dtype=torch.int64), "expected a floating point input"),
    ],
)
def test_bad_input_on_all_ranks(input: Tensor, message: str) -> None:
    """Catches ranks that report another rank's error instead of their own."""
    failures = run_threads(2, lambda rank, group: SyncBatchNorm(3, process_group=group)(input), errors=True)
    for failure in failures:
        assert isinstance(failure, ValueError) and message in str(failure)


@pytest.mark.multirank
def test_one_value_per_channel_in_the_whole_world() -> None:
    """Catches a variance with zero degrees of freedom, hence NaN in running_var, for one sample over all ranks."""
    shards = [torch.randn(1, 3), torch.randn(0, 3)]

    def body(rank: int, group: Any) -> None:
        SyncBatchNorm(3, process_group=group)(shards[rank])

    for failure in run_threads(2, body, errors=True):
        assert isinstance(failure, ValueError)
        assert "expected more than 1 value per channel in the whole group" in str(failure)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "dimensions", "expected"),
    [(SyncBatchNorm1d, (2, 3), "2D or 3D"), (SyncBatchNorm2d, (4,), "4D"), (SyncBatchNorm3d, (5,), "5D")],
)
def test_a_layer_accepts_the_dimensions_of_its_class(kind: Any, dimensions: Any, expected: str, training: bool) -> None:
    """Catches a converted layer that accepts a batch without its batch dimension, which the original class refuses."""
    layer = kind(3).train(training)
    for dims in range(2, 7):
        x = torch.randn(2, 3, *[2] * (dims - 2))
        if dims in dimensions:
            assert layer(x).shape == x.shape
        else:
            message = rf"expected {expected} input at {kind.__name__} \(got {dims}D input of shape .*\); change"
            with pytest.raises(ValueError, match=message):
                layer(x)


# -- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.multirank
@pytest.mark.parametrize("track", [True, False])
def test_evaluation_never_communicates(track: bool) -> None:
    """Catches a collective in evaluation: evaluation on rank 0 only, which is common, would hang."""
    x = torch.randn(2, 4, 3, 2, 2)

    def body(rank: int, group: Any) -> Any:
        layer = SyncBatchNorm(3, track_running_stats=track, process_group=group)
        layer(x[rank])
        before = rounds(layer)
        layer.eval()
        y = layer(x[rank]) if rank == 0 else None
        return before, rounds(layer), y, layer

    (before, after, y, layer), _ = run_threads(2, body)
    assert before == after == 1
    plain = nn.BatchNorm2d(3, track_running_stats=track).eval()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(y, plain(x[0]))


@pytest.mark.multirank
def test_frozen_layers() -> None:
    """Catches rounds or updates of a layer in eval(), and gradients of parameters that require none."""
    x = torch.randn(2, 4, 3, 2, 2)

    def body(rank: int, group: Any) -> Any:
        model = nn.Sequential(SyncBatchNorm(3, process_group=group), SyncBatchNorm(3, process_group=group))
        model[0].eval()
        for parameter in model[1].parameters():
            parameter.requires_grad_(False)
        leaf = x[rank].clone().requires_grad_()
        model(leaf).pow(3).sum().backward()
        return model, leaf.grad

    for model, gradient in run_threads(2, body):
        assert model[0]._channel is None
        assert model[0].num_batches_tracked.item() == 0 and model[1].num_batches_tracked.item() == 1
        assert model[0].weight.grad is not None and model[1].weight.grad is None
        assert rounds(model[1]) == 2 and gradient.abs().sum() > 0


# -- recomputation ----------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """A block that applies one normalization layer twice, to inputs with different statistics."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(3, 3), nn.Linear(3, 3), norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.second(torch.relu(self.norm(self.first(x)))) * 3 + 1)
        return y


class Nested(nn.Module):
    """A block with an inner checkpoint: in an outer checkpoint, the forward of its layer runs three times."""

    def __init__(self, norm: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.linear, self.norm, self.reentrant = nn.Linear(3, 3), norm, reentrant

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(lambda h: self.norm(self.linear(h)).tanh(), x * 2, use_reentrant=self.reentrant)
        return y


@pytest.mark.multirank
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["once", "twice", "nested", "two_regions", "stale"])
def test_checkpointing_neither_communicates_nor_updates_again(kind: str, reentrant: bool) -> None:
    """Catches a second round (a deadlock if another rank has none), and a second update of the running statistics.

    ``stale``: earlier forwards without a backward must not be taken for the recomputed forward.
    """
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    noise = torch.randn(3, 2, 5, 3, dtype=torch.float64) * 4 + 2

    def body(rank: int, group: Any, checkpointed: bool) -> Any:
        norm = SyncBatchNorm(3, process_group=group)
        block: Any
        if kind == "twice":
            block = Twice(norm)
        elif kind == "nested":
            block = Nested(norm, reentrant)
        else:
            block = nn.Sequential(nn.Linear(3, 3), norm, nn.Tanh())
        block = block.double()
        linears = [part for part in block.modules() if isinstance(part, nn.Linear)]
        with torch.no_grad():
            for number, linear in enumerate(linears):  # not random: the threads share one generator
                linear.weight.copy_(torch.arange(9.0).add(number).cos().view(3, 3))
                linear.bias.zero_()
        if kind == "stale":
            with torch.no_grad():
                for shard in noise[:, rank]:
                    block(shard)
            block(noise[0, rank])  # its graph is freed without a backward
        leaf = x[rank].clone().requires_grad_()

        def run(h: Tensor) -> Tensor:
            y: Tensor = checkpoint(block, h, use_reentrant=reentrant) if checkpointed else block(h)
            return y

        y = run(leaf)
        if kind == "two_regions":
            y = run(y * 2 + 1)
        y.pow(3).sum().backward()
        values = [y.detach(), leaf.grad, norm.running_mean, norm.running_var, norm.weight.grad]
        values += [linear.weight.grad for linear in linears]
        return rounds(norm), norm.num_batches_tracked.item(), values

    for plain, again in zip(run_threads(2, body, False), run_threads(2, body, True)):
        assert again[:2] == plain[:2]
        for expected, value in zip(plain[2], again[2]):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not hasattr(torch._C, "_current_graph_task_id"), reason="needs the graph task id of torch 2.0")
def test_one_rank_checkpointing_updates_once() -> None:
    """Catches running statistics that are updated twice per step, as those of nn.BatchNorm under checkpointing."""
    norm = SyncBatchNorm(3)
    x = torch.randn(4, 3, requires_grad=True)
    checkpoint(norm, x, use_reentrant=False).pow(2).sum().backward()
    assert norm.num_batches_tracked is not None and norm.num_batches_tracked.item() == 1


# -- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.multirank
def test_deepcopy_of_a_bound_layer_trains_on_its_own() -> None:
    """Catches a copy (for an averaged model) that shares runtime state, and a bound layer that cannot be copied."""
    x = torch.randn(2, 4, 3)

    def body(rank: int, group: Any) -> Any:
        layer = SyncBatchNorm(3, process_group=group)
        layer(x[rank])
        replica = copy.deepcopy(layer)
        assert (
            replica.process_group is group
            and replica._channel is None
            and replica._recompute_cache is not layer._recompute_cache
        )
        layer(x[rank])
        replica(x[rank])
        return layer.running_mean, replica.running_mean

    for mine, copied in run_threads(2, body):
        assert torch.equal(mine, copied)


def test_pickle_and_state_dict() -> None:
    """Catches runtime objects in a saved model, and state_dict keys that other BatchNorm layers do not have."""
    model = convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    model(torch.randn(2, 3, 4, 4))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    # torch 1.12 has no `weights_only`; recent releases refuse classes by default.
    loaded = torch.load(buffer, **({"weights_only": False} if torch.__version__ >= "2" else {}))
    assert loaded[1].tag[:3] == model[1].tag[:3] and loaded[1].tag.roster.layers == model[1].tag.roster.layers
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert list(SyncBatchNorm(4).state_dict()) == list(nn.BatchNorm2d(4).state_dict())
    nn.SyncBatchNorm(4).load_state_dict(model[1].state_dict())


@pytest.mark.multirank
def test_a_layer_with_a_process_group_is_not_pickled_in_silence() -> None:
    """Catches a process group that is lost in pickling: the loaded layer would normalize over other ranks."""

    def body(rank: int, group: Any) -> None:
        pickle.dumps(SyncBatchNorm(3, process_group=group))

    for failure in run_threads(2, body, errors=True):
        assert isinstance(failure, TypeError) and "expected a layer without a process group in pickle" in str(failure)


@pytest.mark.multirank
def test_a_skipped_layer_is_an_error_on_all_ranks() -> None:
    """Catches layer drop on one rank only: the ranks would merge statistics of two layers."""
    x = torch.randn(2, 4, 3)

    def body(rank: int, group: Any) -> None:
        first, second = SyncBatchNorm(3, process_group=group), SyncBatchNorm(3, process_group=group)
        for layer in (first, second):
            layer._bound_channel()
        y = first(x[rank]) if rank == 0 else x[rank]
        second(y)

    for failure in run_threads(2, body, errors=True):
        assert isinstance(failure, SyncBatchNormError)
        assert "rank 0 at SyncBatchNorm(3) number 1 (forward)" in str(failure)
        assert "rank 1 at SyncBatchNorm(3) number 2 (forward)" in str(failure)


# -- other tools ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_scripting_names_the_remedy(training: bool) -> None:
    """Catches TorchScript's own error about a type annotation, which does not tell what to do."""
    model = convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).train(training)
    with pytest.raises(RuntimeError, match=r"torch.jit.script \(got Sequential\.1, .*revert_sync_batchnorm"):
        torch.jit.script(model)
    x = torch.randn(2, 3, 4, 4)
    model.eval()
    expected = model(x)
    assert torch.equal(torch.jit.trace(model, x)(x), expected)
    assert torch.equal(torch.jit.script(revert_sync_batchnorm(copy.deepcopy(model)))(x), expected)


class TwoLayers(nn.Module):
    """Two layers in one round, if coalesced."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x) + self.b(x)
        return y


@pytest.mark.multirank
@pytest.mark.parametrize("coalesce", [True, False])
@pytest.mark.skipif(not hasattr(torch, "func"), reason="needs torch.func of torch 2.0")
def test_function_transforms_name_the_remedy(coalesce: bool) -> None:
    """Catches an error about tensors of the exchange, which the user has not written, and a refusal in evaluation."""
    x = torch.randn(2, 4, 3)

    def body(rank: int, group: Any) -> Any:
        model = convert_sync_batchnorm(TwoLayers(), group, coalesce=coalesce)
        messages = []
        for transformed in (torch.func.grad(lambda x: model(x).pow(3).sum()), torch.func.vmap(model)):
            argument = x[rank] if not messages else x[rank].unsqueeze(0)
            with pytest.raises(RuntimeError) as caught:
                transformed(argument)
            messages.append(str(caught.value))
        model(x[rank])  # the ranks are still in step
        model.eval()
        leaf = x[rank].clone().requires_grad_()
        model(leaf).pow(3).sum().backward()
        return messages, torch.func.grad(lambda x: model(x).pow(3).sum())(x[rank]), leaf.grad

    for messages, gradient, expected in run_threads(2, body):
        for message in messages:
            assert "torch.func transform around a training forward of TwoLayers.a over 2 ranks" in message
            assert "call eval(), or compute gradients with torch.autograd" in message
        torch.testing.assert_close(gradient, expected)


def test_repr_shows_the_options() -> None:
    """Catches a repr without the configuration of the layer."""
    assert repr(SyncBatchNorm(3, eps=0.5)) == repr(nn.BatchNorm2d(3, eps=0.5)).replace("BatchNorm2d", "SyncBatchNorm")


def _with_another_default_device(rank: int, default: bool) -> List[Tensor]:
    """Trains with all tensors on the CPU; the default device is one whose tensors have no values."""
    bagua.init_process_group()
    torch.manual_seed(0)
    results = []
    for over in ("world", "rank"):
        base = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3))
        model = convert_sync_batchnorm(base)
        model.with_bagua([torch.optim.SGD(model.parameters(), lr=0.1)], SyncBatchNormAlgorithm(normalize_over=over))
        results.append((model, [torch.randn(2 + rank, 2, 8, 8) for _ in range(2)]))
    torch.set_default_device("meta" if default else "cpu")
    try:
        for model, batches in results:
            for batch in batches:
                model(batch).pow(3).sum().backward()
        model, batches = results[0]
        model(batches[0][:0] if rank else batches[0]).sum().backward()
    finally:
        torch.set_default_device("cpu")
    return [value.detach() for model, _ in results for value in (*model.state_dict().values(), model[0].weight.grad)]


@pytest.mark.multirank
@pytest.mark.skipif(not hasattr(torch, "set_default_device"), reason="torch 2.0 has a default device")
def test_the_default_device_has_no_effect() -> None:
    """Catches tensors that are created without a device: messages, counts and caches would be on the default one."""
    expected = run_processes(2, _with_another_default_device, False)
    for found, wanted in zip(run_processes(2, _with_another_default_device, True), expected):
        for ours, theirs in zip(found, wanted):
            assert torch.equal(ours, theirs)
