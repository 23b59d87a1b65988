"""Tests of the overlapped backward round: the order, bitwise equal gradients, and what users do with autograd."""

from __future__ import annotations

import copy
import threading
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Tuple

import models
import pytest
import torch
from pytest_mock import MockerFixture
from ranks import run_processes, run_threads
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bagua_syncbn_algo import (
    SyncBatchNormAlgorithm,
    SyncBatchNormError,
    bagua,
    convert_sync_batchnorm,
    plan_of,
    record_rounds,
    sync_batchnorm_layers,
)
from bagua_syncbn_algo.comm.local import TWO_RANK_STUB
from bagua_syncbn_algo.comm.wire import BACKWARD, sync_point
from bagua_syncbn_algo.graph import split_backward as overlap_module
from bagua_syncbn_algo.graph.split_backward import DeferrableLayer, DeferrableLayers, apply_split, why_unsplittable
from bagua_syncbn_algo.ops import deferred as deferred_module
from bagua_syncbn_algo.ops import functional as functional_module
from bagua_syncbn_algo.ops.deferred import DeferredGrad


@pytest.fixture(autouse=True)
def _split_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits every layer: the models here are so small that their layers would not be split otherwise."""
    monkeypatch.setattr(overlap_module, "WORTHWHILE", 0.0)


class Alone(type(TWO_RANK_STUB)):  # type: ignore[misc]
    """A channel of one rank that acts as two and records its events."""

    trial = False

    def __init__(self) -> None:
        super().__init__()
        self.events: List[str] = []

    def launch(self, point: Any, phase: int, parts: Any) -> Callable[[], Any]:
        arrived = super().launch(point, phase, parts)

        def note(what: str) -> None:
            self.events.append(f"{what} {point.name.split('.', 1)[1]}{'' if phase == BACKWARD else ' forward'}")

        def wait() -> Any:
            note("wait")
            return arrived()

        note("launch")
        return wait

    def agree(self, occasion: str, text: str, value: int, *unused: Any, **options: Any) -> List[int]:
        return [value]


def alone(model: nn.Module, **options: Any) -> Tuple[Any, Alone]:
    """Converts a model and lets its layers use a channel of one rank."""
    model, channel = convert_sync_batchnorm(model, **options), Alone()
    for layer in sync_batchnorm_layers(model):
        layer._bound_channel = lambda *unused: channel  # type: ignore[method-assign]
        layer._point = sync_point(layer.sync_name)
    return model, channel


def gradients(model: nn.Module) -> List[Any]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(first: List[Any], second: List[Any]) -> None:
    assert len(first) == len(second)
    for ours, theirs in zip(first, second):
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))


def total(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return (output * torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)).sum()
    return torch.stack([total(part) for part in output]).sum()


class Net(nn.Module):
    """Two layers, an in-place activation, pooling, an addition and a concatenation between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(12, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head, self.relu = nn.Linear(6, 2), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.avg_pool2d(self.relu(self.bn1(self.conv1(x))), 2)
        z = self.bn2(self.conv2(torch.cat([y, -y], 1)))
        z += y
        output: Tensor = self.head(self.relu(z).mean((2, 3)))
        return output


# -- one layer ---------------------------------------------------------------------------------------------------------

LAYERS: Dict[str, Tuple[Callable[[], nn.Module], Tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, 2, 1), (2, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3), (2, 4, 5, 6, 7)),
    "no bias": (lambda: nn.Conv2d(32, 32, 3, padding=1, bias=False), (2, 32, 8, 8)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 9, 9)),
    "dilation": (lambda: nn.Conv2d(4, 6, 3, dilation=2), (2, 4, 9, 9)),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 9, 9)),
    "valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 9, 9)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 9)),
    "circular, uneven": (lambda: nn.Conv2d(4, 6, 4, padding="same", padding_mode="circular"), (2, 4, 9, 9)),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 9, 9)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1), (2, 4, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=2), (2, 4, 5, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 3, 2, 1, 1), (2, 4, 3, 4, 5)),
    "linear": (lambda: nn.Linear(8, 6), (4, 8)),
    "linear without bias": (lambda: nn.Linear(8, 6, bias=False), (4, 8)),
    "linear of a sequence": (lambda: nn.Linear(8, 6), (4, 5, 8)),
    "linear of a vector": (lambda: nn.Linear(8, 6), (8,)),
    "linear of channels last": (lambda: nn.Linear(6, 5), (4, 3, 7, 6)),
}


def split_and_whole(layer: nn.Module, x: Tensor, context: Callable[[], Any], splits: bool = True) -> List[List[Any]]:
    found = []
    for split in (True, False):
        replica, leaf = copy.deepcopy(layer), x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        with context():
            scaled = leaf * 1.0
            if split:
                deferrable = DeferrableLayers([DeferrableLayer("layer")], [replica])
                assert (deferrable.defer([leaf], x.device, "round") is not None) == splits
                output = apply_split(replica, scaled, deferrable, 0)
            else:
                output = replica(scaled)
        output.backward(torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype))
        found.append([output, leaf.grad, *gradients(replica)])
    return found


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("variant", ["float32", "float64", "bfloat16", "channels_last", "autocast", "frozen bias"])
def test_a_split_layer_is_bitwise_the_same(kind: str, variant: str) -> None:
    """Catches a lost geometry argument, a lost bias, and a cast where autocast has none."""
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    if variant in ("float64", "bfloat16"):
        layer, x = layer.to(getattr(torch, variant)), x.to(getattr(torch, variant))
    if variant == "channels_last" and x.dim() == 4:
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    if variant == "frozen bias" and layer.bias is not None:
        layer.bias.requires_grad_(False)
    enabled = variant == "autocast"
    first, second = split_and_whole(layer, x, lambda: torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled))
    same(first, second)


def test_a_sequence_that_is_not_contiguous_keeps_its_kernel() -> None:
    """Catches a copy to two dimensions where F.linear adds the bias in a second step: the last bits would differ."""
    layer, x = nn.Linear(64, 48).double(), torch.randn(4, 64, 49).double().transpose(1, 2)
    same(*split_and_whole(layer, x, torch.enable_grad))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(*split_and_whole(layer.float(), x.float(), torch.enable_grad))


def test_a_frozen_weight_needs_no_split() -> None:
    """Catches a deferred gradient without tensors that require one, which autograd would refuse."""
    layer = nn.Conv2d(3, 3, 1).requires_grad_(False)
    same(*split_and_whole(layer, torch.randn(1, 3, 2, 2), torch.enable_grad, splits=False))


class _Subclass(nn.Conv2d):
    pass


def _hooked(kind: str) -> nn.Module:
    layer = nn.Conv2d(3, 3, 3, padding=1)
    if kind == "forward":
        layer.register_forward_hook(lambda module, args, output: output * 2)
    elif kind == "pre":
        layer.register_forward_pre_hook(lambda module, args: None)
    else:
        layer.register_full_backward_hook(lambda module, grads, outputs: None)
    return layer


def _patched() -> nn.Module:
    layer = nn.Conv2d(3, 3, 3, padding=1)
    layer.forward = lambda x: nn.Conv2d.forward(layer, x) + 1  # type: ignore[method-assign]
    return layer


# By kind: the constructor, why the layer is not split, and the reason in the plan.
WHOLE: Dict[str, Tuple[Callable[[], nn.Module], str, str]] = {
    "subclass": (lambda: _Subclass(3, 3, 3, padding=1), "is a _Subclass", "calls conv2d as a function"),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3, padding=1)),
        "is a ParametrizedConv2d",
        "is a ParametrizedConv2d",
    ),
    "old weight norm": (lambda: nn.utils.weight_norm(nn.Conv2d(3, 3, 3, padding=1)), "has hooks", "cannot be copied"),
    "forward hook": (lambda: _hooked("forward"), "has hooks", "has hooks"),
    "pre-hook": (lambda: _hooked("pre"), "has hooks", "has hooks"),
    "backward hook": (lambda: _hooked("backward"), "has hooks", "has hooks"),
    "patched": (_patched, "has a forward set on the instance", ""),
    "uneven": (lambda: nn.Conv2d(3, 3, 4, padding="same"), "has different padding", "has different padding"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", list(WHOLE))
def test_what_does_more_than_a_plain_layer_runs_whole_and_is_named(kind: str) -> None:
    """Catches a split that skips hooks, a parametrization (which only the type shows) or a subclass's own forward."""
    make, reason, said = WHOLE[kind]
    found = []
    x = torch.randn(2, 3, 5, 5)
    for options in ({}, {"overlap": False}):
        torch.manual_seed(1)
        model, _ = alone(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), make()), **options)
        assert str(why_unsplittable(model[2])).startswith(reason)
        if not options:
            plan = plan_of(model)
            named = {**dict(plan.skipped), **dict(plan.unsplit)}
            assert any(name.startswith("Sequential") and why.startswith(said) for name, why in named.items())
            assert plan.rounds_overlapped == 0
        total(model(x)).backward()
        found.append(gradients(model))
    same(*found)


def test_a_hook_registered_after_conversion_fires() -> None:
    """Catches a split that is decided at conversion only."""
    model, _ = alone(Net())
    calls = []
    model.conv2.register_forward_hook(lambda *_: calls.append("forward"))
    model.conv2.register_full_backward_hook(lambda *_: calls.append("backward"))
    total(model(torch.randn(2, 3, 6, 6))).backward()
    assert calls[-2:] == ["forward", "backward"]


# -- the order ---------------------------------------------------------------------------------------------------------


def test_the_engine_overlaps_every_round(mocker: MockerFixture) -> None:
    """Catches nodes created in another order: backward would wait for a round before the weight gradient."""
    model, channel = alone(Net())
    x = torch.randn(2, 3, 6, 6)
    total(model(x)).backward()
    channel.events.clear()
    usual, usual_cast = overlap_module._CONVOLUTION_BACKWARD, overlap_module._cast

    def convolution_backward(*arguments: Any) -> Any:
        if arguments[-1][0]:
            channel.events.append("input of conv2")
        return usual(*arguments)

    def cast(weight: Any, bias: Any, late: Any) -> Any:
        channel.events.append(f"weights of {late.name.split('.')[1]}")
        return usual_cast(weight, bias, late)

    mocker.patch.object(overlap_module, "_CONVOLUTION_BACKWARD", convolution_backward)
    mocker.patch.object(overlap_module, "_cast", cast)
    output = total(model(x))
    channel.events.clear()
    output.backward()
    second, first = ["launch bn2", "weights of head", "wait bn2"], ["launch bn1", "weights of conv2", "wait bn1"]
    assert channel.events == [*second, "input of conv2", *first]


def test_a_round_in_flight_gets_the_core_before_what_it_overlaps_with(mocker: MockerFixture) -> None:
    """Catches a message that the group's yielding threads send only after the weight gradient."""
    model, channel = alone(Net())
    total(model(torch.randn(2, 3, 6, 6))).backward()
    mocker.patch.object(functional_module, "yield_core", lambda: channel.events.append("yield"))
    mocker.patch.object(overlap_module, "_cast", lambda *each: channel.events.append("weights") or each[:2])
    output = total(model(torch.randn(2, 3, 6, 6)))
    channel.events.clear()
    output.backward()
    assert channel.events == [
        *("launch bn2", "yield", "weights", "wait bn2"),
        *("launch bn1", "yield", "weights", "wait bn1"),
    ]


def test_forward_makes_its_nodes_while_the_statistics_travel(mocker: MockerFixture) -> None:
    """Catches Python code that runs after a wait instead of during it, or before the core is yielded to the message."""
    model, channel = alone(Net())
    total(model(torch.randn(2, 3, 6, 6))).backward()
    channel.events.clear()
    mocker.patch.object(functional_module, "yield_core", lambda: channel.events.append("yield"))

    def made(*arguments: Any) -> DeferredGrad:
        channel.events.append("node")
        return DeferredGrad(*arguments)

    mocker.patch.object(deferred_module, "DeferredGrad", made)
    model(torch.randn(2, 3, 6, 6))
    rounds = [[f"launch {name} forward", "yield", "node", "node", f"wait {name} forward"] for name in ("bn1", "bn2")]
    assert channel.events == [*rounds[0], *rounds[1]]


def test_a_recomputed_forward_keeps_the_core(mocker: MockerFixture) -> None:
    """Catches a core yielded in the middle of backward for statistics that are not sent a second time."""
    model, channel = alone(Net())
    total(model(torch.randn(2, 3, 6, 6))).backward()
    channel.events.clear()
    mocker.patch.object(functional_module, "yield_core", lambda: channel.events.append("yield"))
    output = checkpoint(model, torch.randn(2, 3, 6, 6, requires_grad=True), use_reentrant=False)
    assert channel.events.count("yield") == 2
    channel.events.clear()
    total(output).backward()
    launches = [event for event in channel.events if event.startswith("launch")]
    assert (launches, channel.events.count("yield")) == (["launch bn2", "launch bn1"], 2)


def test_plans_name_what_a_round_overlaps_with() -> None:
    """Catches a plan that does not name the split layers."""
    plan = plan_of(convert_sync_batchnorm(Net()))
    assert [planned.overlapped_with for planned in plan.rounds] == [("Net.conv2",), ("Net.head",)]
    assert plan.rounds_overlapped == plan.rounds_backward == 2
    assert type(plan).from_json(plan.to_json()) == plan
    assert plan_of(convert_sync_batchnorm(Net(), overlap=False)).rounds_overlapped == 0


def test_small_layers_are_not_split_twice(monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture) -> None:
    """Catches 0.1 ms spent to overlap a gradient of 0.01 ms, and a decision that differs in a recomputation.

    The first forward decides by its sizes. A later batch of another size, here checkpointed, does not change that.
    """
    monkeypatch.setattr(overlap_module, "WORTHWHILE", 5e6)
    model, _ = alone(Net())
    spy = mocker.spy(overlap_module, "_ParameterInfo")
    x = torch.randn(2, 3, 6, 6)
    total(model(x)).backward()
    before = spy.call_count
    assert before > 0
    total(model(x)).backward()
    assert spy.call_count == before
    output = checkpoint(model, torch.randn(16, 3, 64, 64, requires_grad=True), use_reentrant=False)
    total(output).backward()
    assert spy.call_count == before


# -- what users do -----------------------------------------------------------------------------------------------------


def test_parameter_hooks_fire_once_and_in_backward() -> None:
    """Catches a gradient that is written outside of autograd, or accumulated in two parts."""
    model, _ = alone(Net())
    x = torch.randn(2, 3, 6, 6)
    total(model(x)).backward()
    calls: List[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: calls.append(name))
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: calls.append(f"{name} accumulated"))
    loss = total(model(x))
    assert not calls
    loss.backward()
    names = [name for name, _ in model.named_parameters()]
    assert sorted(calls) == sorted([*names, *(f"{name} accumulated" for name in names)])


class Twice(nn.Module):
    """One convolution applied at two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2, self.conv = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.conv(self.bn2(self.conv(self.bn1(x)).relu()))
        return output


def _retained(model: nn.Module, x: Tensor) -> None:
    loss = total(model(x))
    loss.backward(retain_graph=True)
    loss.backward()


def _accumulated(model: nn.Module, x: Tensor) -> None:
    for part in (x, x.flip(0) + 1):
        total(model(part)).backward()


def _two_forwards(model: nn.Module, x: Tensor) -> None:
    (total(model(x)) + total(model(x.flip(0) + 1))).backward()


def _autocast(model: nn.Module, x: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
    total(output.float()).backward()


def _channels_last(model: nn.Module, x: Tensor) -> None:
    total(model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))).backward()  # type: ignore[call-overload]


def _anomaly(model: nn.Module, x: Tensor) -> None:
    with torch.autograd.detect_anomaly(check_nan=True):
        total(model(x)).backward()


def _only_some(model: nn.Module, x: Tensor) -> None:
    parameters = list(model.parameters())
    grads = torch.autograd.grad(total(model(x)), parameters[::2])
    for parameter, grad in zip(parameters[::2], grads):
        parameter.grad = grad


def _checkpointed(reentrant: bool) -> Callable[[nn.Module, Tensor], None]:
    def use(model: nn.Module, x: Tensor) -> None:
        total(checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)).backward()

    return use


def _evaluated_between(model: nn.Module, x: Tensor) -> None:
    loss = total(model(x))
    with torch.no_grad():
        model(x)
    model.eval()
    model(x)
    model.train()
    loss.backward()


USES: Dict[str, Callable[[nn.Module, Tensor], None]] = {
    "plain": lambda model, x: total(model(x)).backward(),
    "retain_graph": _retained,
    "accumulation": _accumulated,
    "two forwards, one backward": _two_forwards,
    "autocast": _autocast,
    "channels_last": _channels_last,
    "anomaly": _anomaly,
    "autograd.grad": _only_some,
    "checkpoint": _checkpointed(False),
    "reentrant checkpoint": _checkpointed(True),
    "evaluation between": _evaluated_between,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("use", list(USES))
@pytest.mark.parametrize("build", [Net, Twice])
def test_the_same_gradients_whatever_the_use(build: Callable[[], nn.Module], use: str) -> None:
    """Catches a gradient lost, doubled or taken from another pass, bitwise over three steps against overlap=False."""
    start = build()
    ours, theirs = alone(copy.deepcopy(start))[0], alone(copy.deepcopy(start), overlap=False)[0]
    for _ in range(3):
        x = torch.randn(4, 3, 6, 6)
        for model in (ours, theirs):
            model.zero_grad()
            USES[use](model, x.clone())
        same(gradients(ours), gradients(theirs))
    assert plan_of(ours).rounds_overlapped == plan_of(ours).rounds_backward > 0
    for ours_, theirs_ in zip(ours.buffers(), theirs.buffers()):
        assert torch.equal(ours_, theirs_)


def test_a_layers_own_gradients_do_not_wait_for_the_round() -> None:
    """Catches hooks and gradient buckets that run after the wait instead of while the round is in flight."""
    model, channel = alone(Net())
    x = torch.randn(2, 3, 6, 6)
    total(model(x)).backward()
    for parameter in model.bn2.parameters():
        parameter.register_hook(lambda grad: channel.events.append("own gradient of bn2"))
    output = total(model(x))
    channel.events.clear()
    output.backward()
    assert channel.events[:4] == ["launch bn2", "own gradient of bn2", "own gradient of bn2", "wait bn2"]


def test_gradients_of_a_layers_own_parameters_alone() -> None:
    """Catches a launched round that is never waited for, because the input's gradient is not requested."""
    start, x = Net(), torch.randn(2, 3, 6, 6)
    found = []
    for overlap in (True, False):
        model, channel = alone(copy.deepcopy(start), overlap=overlap)
        total(model(x)).backward()
        output = total(model(x))
        channel.events.clear()
        found.append((torch.autograd.grad(output, list(model.bn2.parameters())), list(channel.events)))
    (ours, events), (theirs, as_plain) = found
    same(list(ours), list(theirs))
    assert events == as_plain == ["launch bn2", "wait bn2"]


@pytest.mark.parametrize("frozen", ["conv1", "bn1", "conv2", "bn2", "head"])
def test_frozen_layers(frozen: str) -> None:
    """Catches a deferred gradient that waits for a gradient that is not computed."""
    start = Net()
    start.get_submodule(frozen).requires_grad_(False)
    ours, theirs = alone(copy.deepcopy(start))[0], alone(copy.deepcopy(start), overlap=False)[0]
    x = torch.randn(4, 3, 6, 6)
    for model in (ours, theirs):
        total(model(x)).backward()
    same(gradients(ours), gradients(theirs))


def test_gradients_of_inputs_only_hold_nothing(mocker: MockerFixture) -> None:
    """Catches activations held as long as the loss exists, for weight gradients that are not requested."""
    model, _ = alone(Net())
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    total(model(x)).backward()
    made: List[Any] = []
    usual = deferred_module.DeferredGrad.__init__

    def note(self: Any, *arguments: Any) -> None:
        made.append(self)
        usual(self, *arguments)

    mocker.patch.object(deferred_module.DeferredGrad, "__init__", note)
    loss = total(model(x))
    torch.autograd.grad(loss, x)
    assert len(made) == 4
    assert all(deferred_grad._node.compute is None for deferred_grad in made)


class Heads(nn.Module):
    """Two heads after one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.one, self.two = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        y = self.bn(self.conv(x)).relu().mean((2, 3))
        return self.one(y), self.two(y)


class _FirstOnly(torch.autograd.Function):
    """Takes both heads and gives the second one no gradient, as DDP does when it looks for unused parameters."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, two: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return one.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


def test_a_head_that_no_loss_uses_is_left_alone() -> None:
    """Catches hooks called without a gradient, and zeros instead of None, by which momentum would move the weight."""
    model, _ = alone(Heads())
    x = torch.randn(2, 3, 6, 6)
    total(model(x)).backward()
    model.zero_grad()
    handle = model.two.weight.register_hook(lambda grad: grad * 2)
    total(model(x)[0]).backward()
    assert model.two.weight.grad is None and model.one.weight.grad is not None
    handle.remove()
    total(_FirstOnly.apply(*model(x))).backward()
    assert model.two.weight.grad is None


def test_gradients_of_a_follower_start_no_round() -> None:
    """Catches a deferred weight gradient that starts the round: a rank that requests it alone would hang."""
    model, channel = alone(Net())
    x = torch.randn(2, 3, 6, 6)
    total(model(x)).backward()
    channel.events.clear()
    (found,) = torch.autograd.grad(total(model(x)), model.head.weight)
    plain, _ = alone(copy.deepcopy(model), overlap=False)
    assert torch.equal(found, torch.autograd.grad(total(plain(x)), plain.head.weight)[0])
    assert not [event for event in channel.events if not event.endswith("forward")]


def test_a_gradient_penalty_is_told_how_to_go_on() -> None:
    """Catches second derivatives that silently omit the deferred gradients (seen in a prototype)."""
    model, _ = alone(Net())
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"without create_graph through .*overlap=False\) or BAGUA_SYNCBN_OVERLAP=0"):
        torch.autograd.grad(total(model(x)), x, create_graph=True)
    plain, _ = alone(Net(), overlap=False)
    torch.autograd.grad(total(plain(x)), x, create_graph=True)


def test_smaller_gradients_are_not_worth_a_launch_on_cuda() -> None:
    """Catches the CPU's limit on a GPU, where launching the two halves takes longer than the gradient."""
    layer, x = nn.Conv2d(8, 8, 1), torch.empty(4, 8, 64, 64)
    sizes = {}
    for on_cuda in (False, True):
        candidate = overlap_module.DeferrableLayer("layer")
        given = SimpleNamespace(is_cuda=on_cuda, numel=x.numel)
        candidate.record_work(layer, given, SimpleNamespace(numel=lambda: 10**6))  # type: ignore[arg-type]
        sizes[on_cuda] = candidate.is_large
    assert sizes == {False: True, True: False}


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an option that the environment does not set, and one accepted where overlap is impossible."""
    monkeypatch.setenv("BAGUA_SYNCBN_OVERLAP", "0")
    assert plan_of(convert_sync_batchnorm(Net())).rounds_overlapped == 0
    assert plan_of(convert_sync_batchnorm(Net(), overlap=True)).rounds_overlapped == 2
    with pytest.raises(ValueError, match=r"expected coalescing with overlap=True \(got coalesce=False"):
        convert_sync_batchnorm(Net(), coalesce=False, overlap=True)
    monkeypatch.setenv("BAGUA_SYNCBN_COALESCE", "0")
    with pytest.raises(ValueError, match=r"or by BAGUA_SYNCBN_COALESCE=0\); omit overlap=True"):
        convert_sync_batchnorm(Net(), overlap=True)
    monkeypatch.delenv("BAGUA_SYNCBN_COALESCE")
    model = copy.deepcopy(convert_sync_batchnorm(Net(), overlap=False))
    assert plan_of(model).rounds_overlapped == 0
    _, channel = alone(model, overlap=False)
    output = total(model(torch.randn(2, 3, 6, 6)))
    channel.events.clear()
    output.backward()
    assert channel.events[:2] == ["launch bn2", "wait bn2"]


# -- several ranks -----------------------------------------------------------------------------------------------------


@pytest.mark.multirank
@pytest.mark.parametrize("name", ["ResNet", "Inception", "HighResolution", "Pyramid", "Dense"])
def test_models_have_bitwise_the_same_gradients(name: str) -> None:
    """Catches a weight gradient computed from the input of another call, and rounds in another order on a rank."""
    start = getattr(models, name)(4)
    batches = [torch.randn(2 + rank, 3, 32, 32) for rank in range(2)]

    def body(rank: int, group: Any) -> Any:
        ours = convert_sync_batchnorm(copy.deepcopy(start), group)
        theirs = convert_sync_batchnorm(copy.deepcopy(start), group, overlap=False)
        for step in range(2):
            for model in (ours, theirs):
                model.zero_grad()
                total(model(batches[rank] + step)).backward()
            same(gradients(ours), gradients(theirs))
        return plan_of(ours)

    for plan in run_threads(2, body):
        # The pyramid's shared head is applied three times: the order in which its gradients are summed must not change.
        assert plan.rounds_overlapped == (4 if name == "Pyramid" else plan.rounds_backward) > 0


@pytest.fixture
def faults(mocker: MockerFixture) -> Dict[int, str]:
    """Maps the rank of a thread to the layer whose weight gradient fails, as when memory runs out."""
    layers: Dict[int, str] = {}
    usual = overlap_module._cast

    def cast(weight: Any, bias: Any, late: Any) -> Any:
        mine = layers.get(_rank_of_thread.rank, "")
        return 1 / 0 if mine and late.name.endswith(mine) else usual(weight, bias, late)

    mocker.patch.object(overlap_module, "_cast", cast)
    return layers


_rank_of_thread = threading.local()


@pytest.mark.multirank
def test_an_error_in_the_middle_of_backward_on_all_ranks(faults: Dict[int, str]) -> None:
    """Catches a message that stays in flight: the next step would get the statistics of this one."""
    start = Net()
    batches = [torch.randn(2, 3, 6, 6) for _ in range(2)]

    def body(rank: int, group: Any) -> None:
        _rank_of_thread.rank = rank
        ours = convert_sync_batchnorm(copy.deepcopy(start), group)
        theirs = convert_sync_batchnorm(copy.deepcopy(start), group, overlap=False)
        total(ours(batches[rank])).backward()
        total(theirs(batches[rank])).backward()
        for failing in ("head", "conv2"):  # while the round of bn2, then of bn1, is in flight
            faults[rank] = failing
            with pytest.raises(ZeroDivisionError):
                total(ours(batches[rank])).backward()
            faults[rank] = ""
            total(theirs(batches[rank])).backward()
            for model in (ours, theirs):
                model.zero_grad()
                total(model(batches[rank])).backward()
            same(gradients(ours), gradients(theirs))

    run_threads(2, body)


@pytest.mark.multirank
def test_an_error_in_the_middle_of_backward_on_one_rank(faults: Dict[int, str]) -> None:
    """Catches a rank that continues alone, and one that hangs: every rank must fail and name where the others were."""
    start = Net()
    batches = [torch.randn(2, 3, 6, 6) for _ in range(2)]

    def body(rank: int, group: Any) -> None:
        _rank_of_thread.rank = rank
        model = convert_sync_batchnorm(copy.deepcopy(start), group)
        total(model(batches[rank])).backward()
        if rank == 1:
            faults[rank] = "head"
            with pytest.raises(ZeroDivisionError):
                total(model(batches[rank])).backward()
            total(model(batches[rank])).backward()
        else:
            total(model(batches[rank])).backward()

    for error in run_threads(2, body, errors=True):
        assert isinstance(error, SyncBatchNormError)
        assert "rank 0 at Net.bn1 (backward), rank 1 at Net.bn1 (forward)" in str(error)


@pytest.mark.multirank
def test_an_error_while_forward_makes_its_nodes(mocker: MockerFixture) -> None:
    """Catches a rank that fails with its message in flight, and leaves the others to a timeout in the next round."""
    start = Net()
    batches = [torch.randn(2, 3, 6, 6) for _ in range(2)]
    fails = [False, False]

    def made(*arguments: Any) -> DeferredGrad:
        if fails[_rank_of_thread.rank]:
            raise MemoryError("no room for a node")
        return DeferredGrad(*arguments)

    mocker.patch.object(deferred_module, "DeferredGrad", made)

    def body(rank: int, group: Any) -> None:
        _rank_of_thread.rank = rank
        model = convert_sync_batchnorm(copy.deepcopy(start), group)
        total(model(batches[rank])).backward()
        fails[rank] = rank == 1
        total(model(batches[rank])).backward()

    other, own = run_threads(2, body, errors=True)
    assert isinstance(own, MemoryError)
    assert isinstance(other, SyncBatchNormError) and "MemoryError: no room for a node" in str(other)


def _ddp(rank: int, unused: bool) -> Any:
    torch.distributed.init_process_group("gloo")
    overlap_module.WORTHWHILE = 0.0
    found = []
    for overlap in (True, False):
        torch.manual_seed(0)
        model = convert_sync_batchnorm(Net(), overlap=overlap)
        ddp = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=unused)
        for step in range(3):
            torch.manual_seed(10 * step + rank)
            ddp.zero_grad()
            total(ddp(torch.randn(2, 3, 6, 6))).backward()
        found.append(gradients(model))
    same(*found)
    return found[0]


@pytest.mark.multirank
@pytest.mark.parametrize("unused", [False, True])
def test_distributed_data_parallel(unused: bool) -> None:
    """Catches a reducer that misses a deferred gradient, or that marks its weight as unused."""
    same(*run_processes(2, _ddp, unused))


def _bagua(rank: int) -> Any:
    overlap_module.WORTHWHILE = 0.0
    bagua.init_process_group()
    found = []
    for overlap in (True, False):
        torch.manual_seed(0)
        model: Any = convert_sync_batchnorm(Net(), overlap=overlap)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        inner = bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithm()
        model.with_bagua([optimizer], SyncBatchNormAlgorithm(inner))
        with record_rounds() as rounds:
            for step in range(3):
                torch.manual_seed(10 * step + rank)
                optimizer.zero_grad()
                total(model(torch.randn(2, 3, 6, 6))).backward()
                optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
        assert all(r.wait is not None and r.finish is not None and r.finish >= r.launch for r in rounds)
        assert len(rounds) == 3 * 4
    same(*found)
    return found[0]


@pytest.mark.multirank
def test_with_bagua() -> None:
    """Catches Bagua hooks that miss a deferred gradient, and rounds whose end is not recorded."""
    same(*run_processes(2, _bagua))


def _behind_gradients(rank: int) -> Any:
    bagua.init_process_group()
    released = threading.Event()

    class Slow(bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithm):  # type: ignore[misc]
        def reify(self, process_group: Any) -> Any:
            live = super().reify(process_group)
            usual = live.init_operations

            def init_operations(ddp: Any, bucket: Any) -> None:
                usual(ddp, bucket)
                # The first bucket of a step blocks the communication thread until all statistics are exchanged.
                bucket.append_python_op(lambda name: None if released.wait(30) else 1 / 0, group=process_group)

            live.init_operations = init_operations
            return live

    torch.manual_seed(rank)
    model: Any = convert_sync_batchnorm(Net())
    model.with_bagua([], SyncBatchNormAlgorithm(Slow()))
    model.conv1.weight.register_hook(lambda grad: released.set())  # the last gradient: all rounds have ended
    with record_rounds() as rounds:
        total(model(torch.randn(2, 3, 6, 6))).backward()
    return [(r.layers, r.phase, r.finish is not None) for r in rounds], released.is_set()


@pytest.mark.multirank
def test_statistics_pass_gradients_in_flight() -> None:
    """Catches statistics on the gradients' group or queue: a round would wait for a bucket that waits for the round."""
    for rounds, released in run_processes(2, _behind_gradients):
        assert released
        backward = [(layers, done) for layers, phase, done in rounds if phase == "backward"]
        assert backward == [(("Net.bn2",), True), (("Net.bn1",), True)]
