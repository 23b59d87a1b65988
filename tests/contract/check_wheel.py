"""Checks of the plugin with upstream Bagua's published wheel and its native module, on a machine without CUDA.

Without CUDA the plugin imports, registers and reifies, but the first native backend or communicator ends the process.
So nothing trains here; ``tests/conformance`` trains over an emulated core. Run by ``make contract`` on Python 3.9 and
torch 1.12.
"""

from __future__ import annotations

import inspect
from typing import Any, List

import bagua.torch_api
import bagua_core
import pytest
import torch

import bagua_syncbn_algo
from bagua_syncbn_algo import SyncBatchNormAlgorithm, SyncBatchNormAlgorithmImpl, host

upstream = bagua.torch_api.algorithms


class ProcessGroup:
    """A stand-in: a real process group creates a CUDA stream."""

    ranks = (0, 1)


def hooks(kind: type) -> List[str]:
    return sorted(name for name, value in vars(kind).items() if inspect.isfunction(value) and name != "__init__")


def check_the_native_module_is_the_real_one() -> None:
    """Catches a check against an emulation, which would only repeat this project's assumptions."""
    assert bagua_core.bagua_core.__file__.endswith(".so")
    assert torch.__version__.startswith("1.12")


def check_the_host_is_upstream() -> None:
    """Catches a fallback to the embedded host, with which the other checks would show nothing."""
    assert host.is_upstream and bagua_syncbn_algo.bagua is bagua.torch_api
    assert issubclass(SyncBatchNormAlgorithm, upstream.Algorithm)
    assert issubclass(SyncBatchNormAlgorithmImpl, upstream.AlgorithmImpl)


@pytest.mark.parametrize("inner", ["gradient_allreduce", "bytegrad", "decentralized", "low_precision_decentralized"])
def check_by_name_and_reified(inner: str) -> None:
    """Catches a registry entry that upstream's registry cannot use, and a constructor that needs a device."""
    algorithm = upstream.Algorithm.init("sync_batchnorm", inner=inner, hierarchical=False)
    live = algorithm.reify(ProcessGroup())
    assert isinstance(live, SyncBatchNormAlgorithmImpl)
    assert type(live.inner) is type(upstream.Algorithm.init(inner, hierarchical=False).reify(ProcessGroup()))
    assert live.need_reset() is False and live.process_group.ranks == (0, 1)


def check_async_is_refused() -> None:
    """Catches upstream's asynchronous algorithm under a name other than the refused one."""
    with pytest.raises(ValueError, match="a synchronous inner algorithm"):
        SyncBatchNormAlgorithm("async")


@pytest.mark.parametrize("name", hooks(upstream.AlgorithmImpl))
def check_hook_signatures(name: str) -> None:
    """Catches a hook that upstream calls with other arguments, or that the plugin does not pass on."""
    assert name in vars(SyncBatchNormAlgorithmImpl), "every upstream hook is wrapped"
    theirs: Any = inspect.signature(getattr(upstream.AlgorithmImpl, name))
    ours: Any = inspect.signature(getattr(SyncBatchNormAlgorithmImpl, name))
    assert list(theirs.parameters) == list(ours.parameters)


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (bagua.torch_api.communication.new_group, ["ranks", "stream"]),
        (bagua.torch_api.communication.get_backend, ["model_name"]),
        (bagua.torch_api.communication.broadcast, ["tensor", "src", "comm"]),
        (bagua.torch_api.bucket.BaguaBucket.__init__, ["self", "tensors", "name", "flatten"]),
        (bagua.torch_api.bucket.BaguaBucket.append_python_op, ["self", "python_function", "group"]),
        (torch.Tensor.ensure_bagua_tensor, ["self", "name", "module_name"]),
        (torch.Tensor.bagua_mark_communication_ready, ["self"]),
        (torch.Tensor.to_bagua_tensor, ["self"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def check_what_the_plugin_calls(function: Any, parameters: List[str]) -> None:
    """Catches a call that only the embedded host accepts."""
    assert list(inspect.signature(function).parameters)[: len(parameters)] == parameters


def check_with_bagua_is_upstreams() -> None:
    """Catches an embedded with_bagua that replaces upstream's."""
    assert torch.nn.Module.with_bagua.__module__.startswith("bagua.")
