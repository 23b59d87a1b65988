"""Tests of forwards that can be traced only with the shapes of a real call."""

from __future__ import annotations

import copy
import math
from typing import Any, Callable, Dict, List

import pytest
import torch
from ranks import run_threads
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bagua_syncbn_algo import convert_sync_batchnorm, plan_of, report, sync_batchnorm_layers
from bagua_syncbn_algo.graph import forward as forward_module
from bagua_syncbn_algo.graph.shapes import shapes_of


class Pair(nn.Module):
    """Two independent layers: one round for both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.conv, self.drop = nn.Conv2d(3, 3, 3, bias=False), nn.Dropout(0.0)

    def both(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x) + self.b(self.conv(self.drop(x)).mean((2, 3), keepdim=True).expand(x.shape) * x)
        return y


class Padded(Pair):
    """As the padding of TensorFlow's models: from the size, in Python numbers."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = int(x.shape[-2]), x.size()[-1]
        pad = max((math.ceil(height / 2) - 1) * 2 + 3 - height, 0)
        return self.both(nn.functional.pad(x, [pad, pad, width % 2, 0]))


class Checked(Pair):
    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor) and torch.is_floating_point(x)
        if x.shape[1] != 3 or x.dim() != 4:
            raise ValueError(f"expected 3 channels (got {x.shape[1]})")
        return self.both(x)


class Windows(Pair):
    """Loops over chunks whose number depends on the size, and over a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([part * (index + 1) for index, part in enumerate(x.split(2, dim=2))], 2)
        x = torch.stack([row for row in x])
        x += 1
        return self.both(x) * len(x)


class Chosen(Pair):
    """Another operation for large inputs, with the same layers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x if x.shape[-1] < 7 else -x) if x.shape[0] > 1 else x


class Sequential(Pair):
    """Two dependent layers for large inputs, which cannot share a round."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.both(x) if x.shape[-1] < 7 else self.b(self.a(x) * x)
        return y


class Elements(Pair):
    """Branches on the elements, which no shape decides."""

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x) if float(x.sum()) < 1e9 else x


MODELS: Dict[str, Callable[[], nn.Module]] = {
    each.__name__: each
    for each in (Padded, Checked, Windows, Chosen)  # type: ignore[type-abstract]
}
SIZES = [6, 6, 8, 7, 6]


def rounds_of(model: nn.Module) -> int:
    return sync_batchnorm_layers(model)[0]._bound_channel().rounds


def trained(reference: nn.Module, sizes: List[List[int]]) -> List[Any]:
    """Trains on two ranks and in one process, compares outputs, and returns for each rank rounds and the model.

    Args:
        reference: the model.
        sizes: of the images, for each rank and step.
    """
    generator = torch.Generator().manual_seed(0)
    images = [[torch.randn(4, 3, size, size, generator=generator) for size in row] for row in sizes]

    def body(rank: int, group: Any) -> Any:
        model = convert_sync_batchnorm(copy.deepcopy(reference), group)
        rounds, outputs = [], []
        for x in images[rank]:
            before = rounds_of(model)
            y = model(x)
            rounds.append(rounds_of(model) - before)
            outputs.append(y.detach())
        return rounds, outputs, model

    results = run_threads(2, body)
    if sizes[0] == sizes[1]:
        whole = copy.deepcopy(reference)
        for step in range(len(sizes[0])):
            expected = whole(torch.cat([images[0][step], images[1][step]]))
            found = torch.cat([outputs[step] for _, outputs, _ in results])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    return results


@pytest.mark.multirank
@pytest.mark.parametrize("name", ["Padded", "Checked", "Chosen"])
def test_a_forward_that_asks_for_shapes_is_coalesced(name: str) -> None:
    """Catches a model that runs layer by layer because it computes with its size, and a graph for another size."""
    for rounds, _, model in trained(MODELS[name](), [SIZES, SIZES]):
        assert rounds == [1] * len(SIZES)
        assert report(model).as_planned or plan_of(model).rounds_forward == 1


@pytest.mark.multirank
def test_a_shape_without_rounds_to_share_runs_layer_by_layer() -> None:
    """Catches an error for a shape for which no layers are independent, although all ranks have it."""
    for rounds, _, _ in trained(Sequential(), [[6, 8, 6, 9], [6, 8, 6, 9]]):
        assert rounds == [1, 2, 1, 2]


@pytest.mark.multirank
def test_checkpointing_does_not_count_the_tensors_of_a_trace() -> None:
    """Catches a trace with shapes whose operations save tensors: the recomputation saves fewer, which is an error."""

    def body(rank: int, group: Any) -> List[Tensor]:
        torch.manual_seed(0)
        reference = Padded()
        found = []
        for checkpoints in (False, True):
            model = convert_sync_batchnorm(copy.deepcopy(reference), group)
            for x in images[rank]:
                leaf = x.clone().requires_grad_()
                y = checkpoint(model, leaf, use_reentrant=False) if checkpoints else model(leaf)
                y.square().sum().backward()
                found.append(leaf.grad)
        return found

    images = [[torch.randn(2, 3, size, size) for size in (6, 7, 6)] for _ in range(2)]
    for found in run_threads(2, body):
        assert all(map(torch.equal, found[:3], found[3:]))


@pytest.mark.multirank
def test_loops_over_a_tensor_and_its_parts() -> None:
    """Catches a number of iterations that is that of another size."""
    for rounds, outputs, model in trained(Windows(), [[6, 8, 6], [6, 8, 4]]):
        assert rounds == [1] * 3 and [y.shape[2] for y in outputs][:2] == [6, 8]
        assert len(model.__dict__["forward"]._variants) >= 2


@pytest.mark.multirank
def test_ranks_with_other_shapes_need_no_second_agreement() -> None:
    """Catches a rank that waits for the others in a check which they do not run."""
    for rounds, _, _ in trained(Padded(), [[6, 6, 8, 8, 6], [6, 9, 9, 6, 6]]):
        assert rounds == [1] * 5


@pytest.mark.multirank
def test_a_graph_for_another_shape_that_differs_is_given_up_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rank that falls back alone: the others would wait in other rounds."""
    original, calls = forward_module.check_equivalence, []

    def check(*arguments: Any) -> Any:
        calls.append(1)
        return original(*arguments) if len(calls) <= 2 else (forward_module.FAILED, "made up")

    monkeypatch.setattr(forward_module, "check_equivalence", check)
    with pytest.warns(UserWarning, match="its regrouped forward differs .made up"):
        assert [rounds for rounds, _, _ in trained(Padded(), [[6, 8, 8], [6, 8, 8]])] == [[1, 2, 2]] * 2


@pytest.mark.multirank
def test_elements_are_not_shapes() -> None:
    """Catches a branch on elements that a trace decides by the elements of fake tensors."""
    for rounds, _, model in trained(Elements(), [[6, 6, 6]] * 2):
        assert rounds == [2, 2, 2]
        assert dict(plan_of(model).skipped)["Elements"].startswith("cannot be traced (TypeError: float()")


def test_example_inputs_give_the_shapes_at_conversion() -> None:
    """Catches a plan without the rounds of a forward that needs shapes, although they are known."""
    model = convert_sync_batchnorm(Padded(), example_inputs=(torch.randn(4, 3, 6, 6),))
    assert plan_of(model).rounds_forward == 1
    assert plan_of(convert_sync_batchnorm(Padded())).rounds_forward == 2


def test_shapes_of_values() -> None:
    """Catches a graph for contiguous inputs that is used for channels-last ones: the forward may have asked."""
    x = torch.zeros(2, 3, 4, 4)
    module = nn.Linear(2, 2)
    keys = [shapes_of([y], module) for y in (x, x.contiguous(memory_format=torch.channels_last), x.double(), x[:1])]
    assert len(set(keys)) == 4 and shapes_of([x, 2], module) == (*keys[0], 2)
    assert len({shapes_of([x], each) for each in (module, nn.Linear(2, 3), nn.Linear(2, 2).double())}) == 3
