"""Tests of the objects that the embedded host broadcasts: no pickle, and a restricted unpickler where one is needed."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from typing import Any, List, Tuple

import pytest
import torch
from ranks import run_processes
from torch import nn

from bagua_syncbn_algo import bagua
from bagua_syncbn_algo.embedded.objects import pack, unpack


class Custom:
    """An object that no rank accepts."""


class Harmful:
    """An object whose pickle runs code of the sender."""

    def __reduce__(self) -> Any:
        return os.putenv, ("SYNCBN_HARMED", "1")


VALUES: List[Any] = [
    None,
    True,
    0.1,
    float("inf"),
    "ü\0",
    [1, (2, {3: "x", "y": [None]}), {4}, frozenset([5])],
    {1: torch.Size([2, 3]), (1, 2): b"\xff\0"},
    OrderedDict([("b", 1), ("a", 2)]),
    {"kind": "tensor", "value": 3},
    torch.bfloat16,
    10**5000,
    -(2**60),
]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_values_are_the_same_after_the_wire(value: Any) -> None:
    """Catches tuples that become lists, integer keys that become texts, and a dictionary that is taken for a tensor."""
    found = unpack(pack(value))
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensors_keep_every_bit(dtype: torch.dtype, shape: Tuple[int, ...]) -> None:
    """Catches a conversion on the way, a lost shape, and two tensors that share an offset."""
    first = torch.randn(shape).mul(3).to(dtype)
    second = torch.arange(6).reshape(2, 3).t()
    found = unpack(pack([first, second]))
    assert found[0].dtype == dtype and found[0].shape == first.shape and torch.equal(found[0], first)
    assert torch.equal(found[1], second)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam"])
def test_states_of_optimizers_need_no_pickle(name: str, mocker: Any) -> None:
    """Catches pickle on the wire for the optimizers of PyTorch."""
    refused = mocker.patch.object(torch, "save", side_effect=AssertionError)
    parameters = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 2))]
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)(parameters, lr=0.1, **options)
    sum(p.square().sum() for p in parameters).backward()
    optimizer.step()
    state = optimizer.state_dict()
    found = unpack(pack(state))
    assert not refused.called
    other = getattr(torch.optim, name)([nn.Parameter(p.detach().clone()) for p in parameters], lr=0.2, **options)
    other.load_state_dict(found)
    assert str(other.state_dict()) == str(state)


def test_tensors_of_other_kinds_pass_the_restricted_unpickler() -> None:
    """Catches a state that could be sent before: a parameter, a sparse tensor, a tensor that requires a gradient."""
    for value in (nn.Parameter(torch.ones(2)), torch.eye(2).to_sparse(), torch.ones(2, requires_grad=True)):
        found = unpack(pack({"state": value}))["state"]
        assert type(found) is type(value) and found.requires_grad == value.requires_grad
        assert torch.equal(found.detach().to_dense(), value.detach().to_dense())


@pytest.mark.parametrize("value", [Custom(), Harmful(), {"state": [Harmful()]}, Custom, lambda: None])
def test_other_objects_are_refused(value: Any) -> None:
    """Catches an unpickler that imports names or calls functions which the sender chooses."""
    with pytest.raises(ValueError, match=r"expected an object (of tensors|that can be sent)") as caught:
        unpack(pack(value))
    assert "SYNCBN_HARMED" not in os.environ
    if isinstance(value, Custom):
        assert "Custom" in str(caught.value) and "add_safe_globals" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 40, pickle.dumps([1]), pack([1])[:-1], json.dumps({"a": 1}).encode(), pack([torch.ones(2)])[:-4]],
)
def test_bytes_of_another_version_are_refused(content: bytes) -> None:
    """Catches a traceback of the JSON parser, or a tensor with fewer elements, for bytes in another format."""
    with pytest.raises(ValueError, match="expected an object as broadcast_object sends it"):
        unpack(content)


def _refused_on_all_ranks(rank: int) -> str:
    bagua.init_process_group()
    assert bagua.communication.broadcast_object({"a": (1, torch.ones(2))}, src=1)["a"][0] == 1
    with pytest.raises(ValueError) as caught:
        bagua.communication.broadcast_object(Custom() if rank == 0 else None)
    return str(caught.value)


@pytest.mark.multirank
def test_an_object_that_is_refused_is_an_error_on_all_ranks() -> None:
    """Catches a source that continues alone, or that raises before its broadcast while the other ranks wait."""
    first, second = run_processes(2, _refused_on_all_ranks)
    assert first == second and "Custom" in first
