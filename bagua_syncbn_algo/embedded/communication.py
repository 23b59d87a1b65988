"""Process groups and collectives with Bagua's names.

In every collective, ``comm`` is the communicator, or ``None`` for that of the default group. ``src`` and ``dst`` are
ranks in that communicator.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import weakref
from datetime import timedelta
from enum import IntEnum
from typing import Any, Iterator, Optional, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm.groups import default_group, is_nccl, member_group
from .core import BaguaCommBackendPy, BaguaSingleCommunicatorPy
from .env import get_local_rank, get_rank, get_world_size
from .objects import pack, unpack
from .streams import CpuStreams, CudaStreams

__all__ = [
    "BaguaProcessGroup",
    "ReduceOp",
    "allgather",
    "allgather_inplace",
    "allreduce",
    "allreduce_inplace",
    "barrier",
    "broadcast",
    "broadcast_object",
    "from_torch_group",
    "get_backend",
    "init_process_group",
    "is_initialized",
    "new_group",
    "reduce",
    "reduce_inplace",
]


class ReduceOp(IntEnum):
    """Reduction operations, with Bagua's numbers."""

    SUM = 0
    PRODUCT = 1
    MIN = 2
    MAX = 3
    BOR = 7
    BAND = 8
    BXOR = 9
    AVG = 10


class _NonMember:
    """The communicator of a rank outside of the group. Its collectives do nothing, as in upstream."""

    cuda_stream = None
    streams = CpuStreams()
    exists = True

    def rank(self) -> int:
        return -1

    def nranks(self) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


NON_COMM_MEMBER = _NonMember()


class BaguaProcessGroup:
    """A set of ranks and their communicator.

    Attributes:
        ranks: the global ranks, ascending.
        stream: the CUDA stream of the group's collectives; ``None`` on the CPU.
        group_name: unique name of the group.
    """

    def __init__(self, ranks: Sequence[int], stream: Any, group_name: str, torch_group: Any) -> None:
        self.ranks, self.stream, self.group_name = list(ranks), stream, group_name
        self._communicator: Any = NON_COMM_MEMBER
        self._host_group: Optional[weakref.ref[Any]] = None
        if torch_group is not None:
            self._communicator = BaguaSingleCommunicatorPy(torch_group, stream, streams(), self.ranks)

    def get_global_communicator(self) -> BaguaSingleCommunicatorPy:
        """Returns the communicator over all ranks of the group."""
        communicator: BaguaSingleCommunicatorPy = self._communicator
        return communicator

    def host_group(self) -> Any:
        """Returns a communicator over the same ranks for small CPU tensors. Not in upstream.

        Collectives:
            The first call creates the communicator. Every rank of the group must call.
        """
        group = None if self._host_group is None else self._host_group()
        if group is None:
            group = member_group(self.ranks, on_host=True)
            self._host_group = weakref.ref(group)
        return group


_default_group: Optional[BaguaProcessGroup] = None
_default_torch_group: Optional[weakref.ref[Any]] = None
_from_torch: weakref.WeakKeyDictionary[Any, BaguaProcessGroup] = weakref.WeakKeyDictionary()
_group_count = itertools.count()


def streams() -> CpuStreams:
    """Returns the stream operations: those of CUDA if the world communicates over NCCL, else those of the CPU."""
    cuda = torch.cuda.is_available() and dist.is_initialized() and is_nccl(dist.group.WORLD)
    return CudaStreams() if cuda else CpuStreams()


def init_process_group(store: Optional[Any] = None) -> None:
    """Initializes ``torch.distributed`` (NCCL where CUDA is available, else gloo) and Bagua's default group.

    A ``torch.distributed`` process group that is already initialized is kept.

    Args:
        store: a key-value store that all ranks can reach; ``None`` to use the launcher's environment variables.

    Raises:
        RuntimeError: if the default group is already initialized.

    Collectives:
        Creates one or two process groups. Every rank must call.
    """
    global _default_group, _default_torch_group
    if is_initialized():
        raise RuntimeError(
            "expected init_process_group to be called once (got a second call); "
            "call torch.distributed.destroy_process_group before another one"
        )
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if store is None:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=store, rank=get_rank(), world_size=get_world_size())
    _default_torch_group = weakref.ref(dist.group.WORLD)
    # Buckets use a separate process group: the default group belongs to the user.
    _default_group = new_group()


def is_initialized() -> bool:
    """Returns whether Bagua's default group exists and its ``torch.distributed`` group is not destroyed."""
    if _default_torch_group is None or not dist.is_initialized():
        return False
    return dist.group.WORLD is _default_torch_group()


def _get_default_group() -> BaguaProcessGroup:
    if not is_initialized():
        raise RuntimeError(
            "expected an initialized process group (got none); call bagua.init_process_group() first, in a process "
            "started by torchrun or another launcher"
        )
    assert _default_group is not None
    return _default_group


def new_group(
    ranks: Optional[Sequence[int]] = None, stream: Optional[Any] = None, timeout: Optional[timedelta] = None
) -> BaguaProcessGroup:
    """Creates a process group.

    Args:
        ranks: the global ranks; ``None`` for all.
        stream: the CUDA stream for the group's collectives; ``None`` for a new stream. Ignored on the CPU.
        timeout: the timeout of the group's collectives; ``None`` for that of the world's group. Not in upstream.

    Raises:
        ValueError: if a rank is outside of the world.

    Collectives:
        Creates a process group. Every rank of ``ranks`` must call; other ranks may.
    """
    world = get_world_size()
    ranks = list(range(world)) if ranks is None else sorted(ranks)
    for rank in ranks:
        if not 0 <= rank < world:
            raise ValueError(f"expected ranks from 0 to {world - 1} (got {rank}); pass only ranks of the world")
    group = member_group(ranks, timeout) if get_rank() in ranks else None
    return _named_group(ranks, stream, group)


def from_torch_group(group: Any, stream: Optional[Any] = None) -> BaguaProcessGroup:
    """Returns the Bagua process group over the communicator of a ``torch.distributed`` group.

    Args:
        group: the ``torch.distributed`` group.
        stream: the CUDA stream for its collectives; ``None`` for a new stream. Used by the first call for a group only.

    Collectives:
        None.
    """
    if group not in _from_torch:
        _from_torch[group] = _named_group(dist.get_process_group_ranks(group), stream, group)
    return _from_torch[group]


def _named_group(ranks: Sequence[int], stream: Optional[Any], torch_group: Any) -> BaguaProcessGroup:
    stream = streams().new_stream() if stream is None else stream
    return BaguaProcessGroup(ranks, stream, str(next(_group_count)), torch_group)


# Weak values: the registered tensors of a model reference its backend, which is freed with them.
_backends: weakref.WeakValueDictionary[str, BaguaCommBackendPy] = weakref.WeakValueDictionary()


def get_backend(model_name: str) -> BaguaCommBackendPy:
    """Returns the backend that schedules the buckets of the model ``model_name``; the same one at every call.

    After ``destroy_process_group`` and another ``init_process_group`` it is a new one: buckets of the former world may
    have failed, and the former backend would raise their errors.
    """
    backend, world = _backends.get(model_name), default_group()
    if backend is None or backend.world() is not world:
        backend = _backends[model_name] = BaguaCommBackendPy(100, device_id=get_local_rank())
        backend.model_name = model_name
        if world is not None:
            backend.world = weakref.ref(world)
    return backend


def _communicator(comm: Optional[BaguaSingleCommunicatorPy]) -> BaguaSingleCommunicatorPy:
    return _get_default_group().get_global_communicator() if comm is None else comm


@contextlib.contextmanager
def _ordered(comm: Optional[BaguaSingleCommunicatorPy]) -> Iterator[BaguaSingleCommunicatorPy]:
    """Yields the communicator. The block is ordered after earlier work of the current stream and before later work."""
    communicator = _communicator(comm)
    with communicator.streams.ordered(communicator.cuda_stream):
        yield communicator


def _backend_tensor(tensor: Any) -> Any:
    return tensor.to_bagua_tensor().bagua_backend_tensor()


def broadcast(tensor: Tensor, src: int = 0, comm: Optional[BaguaSingleCommunicatorPy] = None) -> None:
    """Overwrites ``tensor`` on every rank with the tensor of rank ``src``.

    Collectives:
        One broadcast. Every rank of ``comm`` must call.
    """
    with _ordered(comm) as communicator:
        communicator.broadcast(_backend_tensor(tensor), src)


def broadcast_object(obj: object, src: int = 0, comm: Optional[BaguaSingleCommunicatorPy] = None) -> Any:
    """Returns the ``obj`` of rank ``src`` on every rank.

    Numbers, strings, containers and tensors are sent as JSON and memory. Other objects are pickled, and read by a
    restricted unpickler; see :mod:`.objects`.

    Args:
        obj: the object; ignored on other ranks.
        src: the rank of the sender in ``comm``.
        comm: the communicator.

    Raises:
        ValueError: on all ranks, if the object cannot be sent or read. Ranks that have named other classes with
            ``torch.serialization.add_safe_globals`` may differ.

    Collectives:
        Two broadcasts (length and bytes). Every rank of ``comm`` must call.
    """
    comm = _communicator(comm)
    if comm.rank() == -1:
        return obj
    is_source = comm.rank() == src
    payload = torch.empty(0, device="cpu")
    if is_source:
        payload = torch.frombuffer(bytearray(pack(obj)), dtype=torch.uint8)
    on_cuda = isinstance(comm.streams, CudaStreams)
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    size = torch.tensor([payload.numel()], device=device)
    broadcast(size, src, comm)
    content = payload.to(device) if is_source else torch.empty(int(size), dtype=torch.uint8, device=device)
    broadcast(content, src, comm)
    content = content.cpu()
    # The source reads it, too: an object that other ranks refuse is an error on all ranks.
    found = unpack(ctypes.string_at(content.data_ptr(), content.numel()), device if on_cuda else None)
    return obj if is_source else found


def allreduce(
    send_tensor: Tensor,
    recv_tensor: Tensor,
    op: ReduceOp = ReduceOp.SUM,
    comm: Optional[BaguaSingleCommunicatorPy] = None,
) -> None:
    """Writes the reduction of ``send_tensor`` over all ranks into ``recv_tensor``, which has the same shape.

    Collectives:
        One all-reduce. Every rank of ``comm`` must call.
    """
    with _ordered(comm) as communicator:
        communicator.allreduce(_backend_tensor(send_tensor), _backend_tensor(recv_tensor), int(op))


def allreduce_inplace(
    tensor: Tensor, op: ReduceOp = ReduceOp.SUM, comm: Optional[BaguaSingleCommunicatorPy] = None
) -> None:
    """Replaces ``tensor`` with its reduction over all ranks.

    Collectives:
        One all-reduce. Every rank of ``comm`` must call.
    """
    with _ordered(comm) as communicator:
        communicator.allreduce_inplace(_backend_tensor(tensor), int(op))


def allgather(send_tensor: Tensor, recv_tensor: Tensor, comm: Optional[BaguaSingleCommunicatorPy] = None) -> None:
    """Writes the ``send_tensor`` of each rank into ``recv_tensor``, in rank order.

    ``recv_tensor`` has ``nranks`` times as many elements as ``send_tensor``.

    Collectives:
        One all-gather. Every rank of ``comm`` must call.
    """
    with _ordered(comm) as communicator:
        communicator.allgather(_backend_tensor(send_tensor), _backend_tensor(recv_tensor))


def allgather_inplace(tensor: Tensor, comm: Optional[BaguaSingleCommunicatorPy] = None) -> None:
    """Fills ``tensor`` with one part of each rank, in rank order. Each rank has written its own part before the call.

    Collectives:
        One all-gather. Every rank of ``comm`` must call.
    """
    with _ordered(comm) as communicator:
        communicator.allgather_inplace(_backend_tensor(tensor))


def reduce(
    send_tensor: Tensor,
    recv_tensor: Tensor,
    dst: int,
    op: ReduceOp = ReduceOp.SUM,
    comm: Optional[BaguaSingleCommunicatorPy] = None,
) -> None:
    """Writes the reduction of ``send_tensor`` over all ranks into ``recv_tensor`` on rank ``dst``.

    Collectives:
        One all-reduce. Every rank of ``comm`` must call.
    """
    with _ordered(comm) as communicator:
        communicator.reduce(_backend_tensor(send_tensor), _backend_tensor(recv_tensor), dst, int(op))


def reduce_inplace(
    tensor: Tensor, dst: int, op: ReduceOp = ReduceOp.SUM, comm: Optional[BaguaSingleCommunicatorPy] = None
) -> None:
    """Replaces ``tensor`` on rank ``dst`` with its reduction over all ranks.

    Collectives:
        One all-reduce. Every rank of ``comm`` must call.
    """
    with _ordered(comm) as communicator:
        communicator.reduce_inplace(_backend_tensor(tensor), dst, int(op))


def barrier(comm: Optional[BaguaSingleCommunicatorPy] = None) -> None:
    """Waits until every rank of the communicator has called ``barrier``.

    Collectives:
        One barrier. Every rank of ``comm`` must call.
    """
    _communicator(comm).barrier()
