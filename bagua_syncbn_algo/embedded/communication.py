"""Process groups and collectives under Bagua's names."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import pickle
import weakref
from datetime import timedelta
from enum import IntEnum
from typing import Any, Iterator, Optional, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm.groups import is_nccl, member_group
from .core import BaguaCommBackendPy, BaguaSingleCommunicatorPy
from .env import get_local_rank, get_rank, get_world_size
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
    """Reductions, with Bagua's numbers."""

    SUM = 0
    PRODUCT = 1
    MIN = 2
    MAX = 3
    BOR = 7
    BAND = 8
    BXOR = 9
    AVG = 10


class _NonMember:
    """The communicator of a rank that is not in its group: every collective does nothing there, as upstream."""

    cuda_stream = None
    streams = CpuStreams()

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
        ranks: global ranks, ascending.
        stream: the stream that its collectives run on; ``None`` on the CPU.
        group_name: unique name.
    """

    def __init__(self, ranks: Sequence[int], stream: Any, group_name: str, torch_group: Any) -> None:
        self.ranks, self.stream, self.group_name = list(ranks), stream, group_name
        self._communicator: Any = NON_COMM_MEMBER
        self._host_group: Optional[weakref.ref[Any]] = None
        if torch_group is not None:
            self._communicator = BaguaSingleCommunicatorPy(torch_group, stream, streams())

    def get_global_communicator(self) -> BaguaSingleCommunicatorPy:
        """Returns the communicator over all ranks of the group."""
        communicator: BaguaSingleCommunicatorPy = self._communicator
        return communicator

    def host_group(self) -> Any:
        """Returns a communicator of the same ranks for small CPU tensors; not in upstream.

        Collectives:
            The first call creates it. Every rank of the group must call.
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
    """Returns how communication is ordered against computation here: on CUDA by streams, on the CPU by the program."""
    cuda = torch.cuda.is_available() and dist.is_initialized() and is_nccl(dist.group.WORLD)
    return CudaStreams() if cuda else CpuStreams()


def init_process_group(store: Optional[Any] = None) -> None:
    """Initialises ``torch.distributed`` (NCCL where CUDA is available, else gloo) and Bagua's default group.

    A process group that is initialised already is used as it is.

    Args:
        store: key-value store that all ranks reach; ``None`` to meet by the launcher's environment variables.

    Raises:
        RuntimeError: if called twice.

    Collectives:
        Every rank must call.
    """
    global _default_group, _default_torch_group
    if is_initialized():
        raise RuntimeError(
            "expected init_process_group to be called once (got a second call); "
            "call torch.distributed.destroy_process_group first to start anew"
        )
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if store is None:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=store, rank=get_rank(), world_size=get_world_size())
    _default_torch_group = weakref.ref(dist.group.WORLD)
    # Buckets travel on a group of Bagua's own: the default one is the user's.
    _default_group = new_group()


def is_initialized() -> bool:
    """Whether Bagua's default group exists and its ``torch.distributed`` group has not been destroyed."""
    if _default_torch_group is None or not dist.is_initialized():
        return False
    return dist.group.WORLD is _default_torch_group()


def _get_default_group() -> BaguaProcessGroup:
    if not is_initialized():
        raise RuntimeError(
            "expected an initialised process group (got none); call bagua.init_process_group() first, in a process "
            "started by torchrun or another launcher"
        )
    assert _default_group is not None
    return _default_group


def new_group(
    ranks: Optional[Sequence[int]] = None, stream: Optional[Any] = None, timeout: Optional[timedelta] = None
) -> BaguaProcessGroup:
    """Creates a process group.

    Args:
        ranks: global ranks; ``None`` for all.
        stream: the CUDA stream for its collectives; ``None`` for one of its own. Ignored on the CPU.
        timeout: of its collectives; ``None`` for that of the default group. Not in upstream.

    Raises:
        ValueError: for a rank outside the world.

    Collectives:
        Every rank of ``ranks`` must call; others may.
    """
    world = get_world_size()
    ranks = list(range(world)) if ranks is None else sorted(ranks)
    for rank in ranks:
        if not 0 <= rank < world:
            raise ValueError(f"expected ranks of the world, 0 … {world - 1} (got {rank}); leave the others out")
    group = member_group(ranks, timeout) if get_rank() in ranks else None
    return _named_group(ranks, stream, group)


def from_torch_group(group: Any, stream: Optional[Any] = None) -> BaguaProcessGroup:
    """Returns the Bagua process group with the communicator of a ``torch.distributed`` group."""
    if group not in _from_torch:
        _from_torch[group] = _named_group(dist.get_process_group_ranks(group), stream, group)
    return _from_torch[group]


def _named_group(ranks: Sequence[int], stream: Optional[Any], torch_group: Any) -> BaguaProcessGroup:
    stream = streams().new_stream() if stream is None else stream
    return BaguaProcessGroup(ranks, stream, str(next(_group_count)), torch_group)


# A backend lives as long as its model, whose registered tensors hold it.
_backends: weakref.WeakValueDictionary[str, BaguaCommBackendPy] = weakref.WeakValueDictionary()


def get_backend(model_name: str) -> BaguaCommBackendPy:
    """Returns the backend that schedules the buckets of a model; always the same for one name."""
    backend = _backends.get(model_name)
    if backend is None:
        backend = _backends[model_name] = BaguaCommBackendPy(100, device_id=get_local_rank())
        backend.model_name = model_name
    return backend


def _communicator(comm: Optional[BaguaSingleCommunicatorPy]) -> BaguaSingleCommunicatorPy:
    return _get_default_group().get_global_communicator() if comm is None else comm


@contextlib.contextmanager
def _ordered(comm: Optional[BaguaSingleCommunicatorPy]) -> Iterator[BaguaSingleCommunicatorPy]:
    """Gives the communicator that is meant, with the block ordered behind and before the current stream's work."""
    communicator = _communicator(comm)
    with communicator.streams.ordered(communicator.cuda_stream):
        yield communicator


def _registered(tensor: Any) -> Any:
    return tensor.to_bagua_tensor().bagua_backend_tensor()


def broadcast(tensor: Tensor, src: int = 0, comm: Optional[BaguaSingleCommunicatorPy] = None) -> None:
    """Overwrites ``tensor`` on every rank by that of rank ``src`` of the communicator.

    Collectives:
        One broadcast. Every rank of ``comm`` must call.
    """
    with _ordered(comm) as communicator:
        communicator.broadcast(_registered(tensor), src)


def broadcast_object(obj: object, src: int = 0, comm: Optional[BaguaSingleCommunicatorPy] = None) -> Any:
    """Returns rank ``src``'s ``obj`` on every rank, sent by pickle.

    Collectives:
        Two broadcasts (length and bytes). Every rank of ``comm`` must call.
    """
    comm = _communicator(comm)
    if comm.rank() == -1:
        return obj
    here = comm.rank() == src
    payload = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8) if here else torch.empty(0)
    device = "cuda" if isinstance(comm.streams, CudaStreams) else "cpu"
    size = torch.tensor([payload.numel()], device=device)
    broadcast(size, src, comm)
    content = payload.to(device) if here else torch.empty(int(size), dtype=torch.uint8, device=device)
    broadcast(content, src, comm)
    if here:
        return obj
    content = content.cpu()
    return pickle.loads(ctypes.string_at(content.data_ptr(), content.numel()))


def allreduce(
    send_tensor: Tensor,
    recv_tensor: Tensor,
    op: ReduceOp = ReduceOp.SUM,
    comm: Optional[BaguaSingleCommunicatorPy] = None,
) -> None:
    """Writes the reduction of all ranks' ``send_tensor`` into ``recv_tensor`` of the same shape.

    Collectives:
        One all-reduce. Every rank of ``comm`` must call.
    """
    with _ordered(comm) as communicator:
        communicator.allreduce(_registered(send_tensor), _registered(recv_tensor), int(op))


def allreduce_inplace(
    tensor: Tensor, op: ReduceOp = ReduceOp.SUM, comm: Optional[BaguaSingleCommunicatorPy] = None
) -> None:
    """Replaces ``tensor`` by its reduction over all ranks.

    Collectives:
        One all-reduce. Every rank of ``comm`` must call.
    """
    with _ordered(comm) as communicator:
        communicator.allreduce_inplace(_registered(tensor), int(op))


def allgather(send_tensor: Tensor, recv_tensor: Tensor, comm: Optional[BaguaSingleCommunicatorPy] = None) -> None:
    """Writes all ranks' ``send_tensor`` into ``recv_tensor``, of ``nranks`` times its elements, in rank order.

    Collectives:
        One all-gather. Every rank of ``comm`` must call.
    """
    with _ordered(comm) as communicator:
        communicator.allgather(_registered(send_tensor), _registered(recv_tensor))


def allgather_inplace(tensor: Tensor, comm: Optional[BaguaSingleCommunicatorPy] = None) -> None:
    """Fills ``tensor``, of which each rank has written its own part, with every rank's part, in rank order.

    Collectives:
        One all-gather. Every rank of ``comm`` must call.
    """
    with _ordered(comm) as communicator:
        communicator.allgather_inplace(_registered(tensor))


def reduce(
    send_tensor: Tensor,
    recv_tensor: Tensor,
    dst: int,
    op: ReduceOp = ReduceOp.SUM,
    comm: Optional[BaguaSingleCommunicatorPy] = None,
) -> None:
    """Writes the reduction of all ranks' ``send_tensor`` into ``recv_tensor`` on rank ``dst`` of the communicator.

    Collectives:
        One all-reduce. Every rank of ``comm`` must call.
    """
    with _ordered(comm) as communicator:
        communicator.reduce(_registered(send_tensor), _registered(recv_tensor), dst, int(op))


def reduce_inplace(
    tensor: Tensor, dst: int, op: ReduceOp = ReduceOp.SUM, comm: Optional[BaguaSingleCommunicatorPy] = None
) -> None:
    """Replaces ``tensor`` on rank ``dst`` of the communicator by its reduction over all ranks.

    Collectives:
        One all-reduce. Every rank of ``comm`` must call.
    """
    with _ordered(comm) as communicator:
        communicator.reduce_inplace(_registered(tensor), dst, int(op))


def barrier(comm: Optional[BaguaSingleCommunicatorPy] = None) -> None:
    """Waits until every rank is here.

    Collectives:
        One barrier. Every rank of ``comm`` must call.
    """
    _communicator(comm).barrier()
