"""Communicators, buckets, and the backend that schedules buckets. In upstream Bagua these are native code.

The names are those of ``bagua_core`` 0.9.2. The collectives are those of ``torch.distributed``.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import weakref
from collections import Counter
from concurrent.futures import Future
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm.errors import explaining
from ..comm.groups import default_store, is_destroyed, is_nccl, label_of
from .streams import CpuStreams

__all__ = ["BaguaBucketPy", "BaguaCommBackendPy", "BaguaSingleCommunicatorPy", "BaguaTensorPy"]

logger = logging.getLogger(__name__)

# The numbers of reduction operations in Bagua's native library, and the same operations in torch.
_REDUCE_OPS = {
    0: dist.ReduceOp.SUM,
    1: dist.ReduceOp.PRODUCT,
    2: dist.ReduceOp.MIN,
    3: dist.ReduceOp.MAX,
    7: dist.ReduceOp.BOR,
    8: dist.ReduceOp.BAND,
    9: dist.ReduceOp.BXOR,
}
SUM, AVG = 0, 10


class BaguaTensorPy:
    """A registered tensor: a name, and the proxy that returns the effective tensor."""

    def __init__(self, name: str, torch_tensor: Tensor) -> None:
        self.name, self._proxy = name, torch_tensor
        #: Whether the proxy's gradient may move: the current backward creates it, so no user code references it.
        self.gradient_may_move = False

    def effective(self) -> Tensor:
        """Returns the tensor to communicate: the result of the getter closure for the proxy."""
        proxy: Any = self._proxy
        tensor: Tensor = proxy.bagua_getter_closure()
        return tensor

    def write_back(self, values: Tensor, effective: Tensor) -> None:
        """Copies ``values``, a part of a flat tensor, to the effective tensor. A new gradient moves there instead."""
        proxy: Any = self._proxy
        if self.gradient_may_move and effective is proxy.grad and effective.is_contiguous():
            proxy.bagua_set_storage(values.untyped_storage(), values.storage_offset())
        else:
            effective.detach().copy_(values.view(effective.shape))

    def data_ptr(self) -> int:
        """Returns the address of the effective tensor."""
        return self.effective().data_ptr()

    def num_elements(self) -> int:
        """Returns the number of elements of the effective tensor."""
        return self.effective().numel()

    def num_elements_allocated(self) -> int:
        """Returns the number of elements of the effective tensor, which has no padding."""
        return self.effective().numel()


class BaguaSingleCommunicatorPy:
    """The collectives of one process group.

    On the CPU each call returns when the result is available. On CUDA each call is enqueued on the current stream. A
    root is given by its rank in the communicator.

    Args:
        group: a ``torch.distributed`` group or a bare backend such as ``ProcessGroupGloo``. The communicator holds a
            weak reference, because a group that outlives ``destroy_process_group`` aborts the process at exit.
        stream: the stream on which callers run the collectives.
        streams: the operations that order ``stream`` against other streams.
        ranks: the global ranks of the group, for errors; ``None`` if they are those of the world.
    """

    def __init__(self, group: Any, stream: Any, streams: CpuStreams, ranks: Optional[Sequence[int]] = None) -> None:
        self._group_reference = weakref.ref(group)
        self.cuda_stream, self.streams = stream, streams
        self._ranks = tuple(range(group.size())) if ranks is None else tuple(ranks)
        self._label = label_of(group, self._ranks, "host")  # members create their communicators in one order
        self._explained: Counter[str] = Counter()  # by purpose: buckets are sent by a thread of their own

    def explaining(self, where: str, purpose: str) -> ContextManager[None]:
        """Adds the place, the ranks and their positions to the errors of collectives in a block. Not in upstream.

        Args:
            where: the place, such as the name of a parameter.
            purpose: what the ranks do in the block.
        """
        self._explained[purpose] += 1
        own, label = self._ranks[self.rank()], f"{self._label}/{purpose}"
        return explaining(where, purpose, own, self._ranks, label, self._explained[purpose], default_store())

    @property
    def exists(self) -> bool:
        """Whether the process group exists. It ends with the world that it belongs to. Not in upstream."""
        return not is_destroyed(self._group_reference())

    @property
    def torch_group(self) -> Any:
        """The process group, as a ``torch.distributed`` group or a bare backend. Not in upstream."""
        return self._group

    @property
    def _group(self) -> Any:
        group = self._group_reference()
        if is_destroyed(group):
            raise RuntimeError(
                "expected the communicator's process group to exist (got a destroyed one); call with_bagua again after "
                "init_process_group"
            )
        return group

    def rank(self) -> int:
        """Returns this process's rank in the communicator."""
        return int(self._group.rank())

    def nranks(self) -> int:
        """Returns the number of ranks of the communicator."""
        return int(self._group.size())

    def barrier(self) -> None:
        """Waits until every rank of the communicator has called this method."""
        self._group.barrier().wait()

    def broadcast(self, tensor: BaguaTensorPy, root: int) -> None:
        """Overwrites ``tensor`` on every rank with the tensor of rank ``root``."""
        options = dist.BroadcastOptions()
        options.rootRank = root
        with torch.no_grad():
            self._group.broadcast([tensor.effective().detach()], options).wait()

    def allreduce_inplace(self, tensor: BaguaTensorPy, op: int) -> None:
        """Replaces ``tensor`` with its reduction over all ranks."""
        self.reduce_over_all(tensor.effective(), op)

    def allreduce(self, send: BaguaTensorPy, recv: BaguaTensorPy, op: int) -> None:
        """Writes the reduction of ``send`` over all ranks into ``recv``."""
        with torch.no_grad():
            recv.effective().copy_(send.effective())
        self.reduce_over_all(recv.effective(), op)

    def allgather(self, send: BaguaTensorPy, recv: BaguaTensorPy) -> None:
        """Writes the ``send`` of each rank into ``recv``, in rank order."""
        self.begin_allgather(send, recv).wait()

    def begin_allgather(self, send: BaguaTensorPy, recv: BaguaTensorPy) -> Any:
        """Starts :meth:`allgather` and returns its ``Work``. Not in upstream, whose ``allgather`` does not wait."""
        source, result = send.effective().detach(), recv.effective().detach()
        if is_nccl(self._group):  # an all-gather into a list adds a copy for each rank
            return self._group._allgather_base(result.view(-1), source.view(-1))
        return self._group.allgather([list(result.view((self.nranks(), *source.shape)).unbind(0))], [source])

    def allgather_inplace(self, tensor: BaguaTensorPy) -> None:
        """Fills ``tensor`` with one part of each rank, in rank order. Each rank has written its own part before."""
        rows = list(tensor.effective().detach().view(self.nranks(), -1).unbind(0))
        self._group.allgather([rows], [rows[self.rank()].clone()]).wait()

    def reduce(self, send: BaguaTensorPy, recv: BaguaTensorPy, root: int, op: int) -> None:
        """Writes the reduction of ``send`` over all ranks into ``recv``, on rank ``root`` only."""
        result = send.effective().detach().clone()
        self.reduce_over_all(result, op)
        if self.rank() == root:
            recv.effective().detach().copy_(result)

    def reduce_inplace(self, tensor: BaguaTensorPy, root: int, op: int) -> None:
        """Replaces ``tensor`` with its reduction over all ranks, on rank ``root`` only."""
        self.reduce(tensor, tensor, root, op)

    def reduce_over_all(self, tensor: Tensor, op: int) -> None:
        """Replaces a plain tensor with its reduction over all ranks."""
        if op != AVG and op not in _REDUCE_OPS:
            raise ValueError(f"expected a ReduceOp (got {op!r}); use bagua.ReduceOp.SUM, AVG, MIN, MAX, ...")
        options = dist.AllreduceOptions()
        options.reduceOp = _REDUCE_OPS[SUM if op == AVG else op]  # type: ignore[assignment]
        with torch.no_grad():
            tensor = tensor.detach()
            if op == AVG:
                # Divide before the sum, as DistributedDataParallel does: half-precision gradients do not overflow.
                tensor.div_(self.nranks())
            self._group.allreduce([tensor], options).wait()


class BaguaBucketPy:
    """Tensors that are communicated together, and the operations that run once all tensors are ready."""

    def __init__(self, name: str, tensors: Sequence[BaguaTensorPy]) -> None:
        self.name, self.tensors = name, list(tensors)
        #: A flat tensor as large as the bucket, reused for copies; ``None`` if the bucket has none.
        self.memory: Optional[Tensor] = None
        self._operations: List[Callable[[Sequence[Any]], Tuple[CpuStreams, Any]]] = []

    @property
    def device(self) -> torch.device:
        """The device of the bucket's tensors."""
        return self.tensors[0].effective().device

    @property
    def place(self) -> str:
        """The bucket and its first and last tensor, for errors."""
        names = [tensor.name for tensor in self.tensors]
        return f"bucket {self.name} of {names[0]}{f' to {names[-1]}' if len(names) > 1 else ''}"

    def clear_ops(self) -> None:
        """Removes all operations."""
        self._operations.clear()

    def append_centralized_synchronous_op(
        self,
        communicator_internode: BaguaSingleCommunicatorPy,
        communicator_intranode: Optional[BaguaSingleCommunicatorPy] = None,
        hierarchical: bool = False,
        average: bool = True,
        scattergather: bool = False,
        compression: Optional[str] = None,
    ) -> None:
        """Appends a sum or an average of the bucket over all ranks.

        With two communicators, the operation reduces over ``communicator_intranode`` first. ``compression`` is ignored
        with a log message.
        """
        if compression is not None:
            logger.info("bucket %s: this host ignores compression=%s and sends exact values", self.name, compression)
        communicators = [c for c in (communicator_intranode, communicator_internode) if c is not None]

        def operation(events: Sequence[Any]) -> Tuple[CpuStreams, Any]:
            # Divide before the sum, as `reduce_over_all` does, but in the same pass over memory as the copy.
            divisor = math.prod(c.nranks() for c in communicators) if average else 1
            with communicators[0].streams.after(communicators[0].cuda_stream, events), self.flat(divisor) as values:
                for communicator in communicators:
                    with communicator.explaining(self.place, "sum gradients or statistics"):
                        communicator.reduce_over_all(values, SUM)
            return communicators[0].streams, communicators[0].cuda_stream

        self._operations.append(operation)

    def append_decentralized_synchronous_op(
        self,
        communicator_internode: BaguaSingleCommunicatorPy,
        communicator_intranode: Optional[BaguaSingleCommunicatorPy] = None,
        hierarchical: bool = True,
        peer_selection_mode: str = "all",
        peer_weight: Optional[BaguaTensorPy] = None,
    ) -> _PeerAverage:
        """Appends an average of the bucket over all ranks, which is written to ``peer_weight``.

        Returns:
            The operation, whose ``copy_back_peer_weight`` overwrites the bucket with the average.

        Raises:
            NotImplementedError: if ``peer_selection_mode`` is not ``"all"``, or ``peer_weight`` is ``None``.
        """
        if peer_selection_mode != "all" or peer_weight is None:
            raise NotImplementedError(
                f"expected peer_selection_mode to be all, with a peer_weight (got {peer_selection_mode!r}, "
                f"{peer_weight!r}); use upstream Bagua for other modes"
            )
        communicators = [c for c in (communicator_intranode, communicator_internode) if c is not None]
        peers = peer_weight

        def operation(events: Sequence[Any]) -> Tuple[CpuStreams, Any]:
            with communicators[0].streams.after(communicators[0].cuda_stream, events), self.flat() as values:
                average = peers.effective()
                average.copy_(values)
                for communicator in communicators:
                    with communicator.explaining(self.place, "average weights"):
                        communicator.reduce_over_all(average, AVG)
            return communicators[0].streams, communicators[0].cuda_stream

        self._operations.append(operation)
        return _PeerAverage(peers)

    def append_python_op(
        self, operation: Callable[[str], None], stream: Any = None, streams: Optional[CpuStreams] = None
    ) -> None:
        """Appends a Python function, which runs on ``stream`` and receives the bucket's name."""
        stream_operations = CpuStreams() if streams is None else streams

        def run(events: Sequence[Any]) -> Tuple[CpuStreams, Any]:
            with stream_operations.after(stream, events):
                operation(self.name)
            return stream_operations, stream

        self._operations.append(run)

    @contextlib.contextmanager
    def flat(self, divisor: int = 1) -> Iterator[Tensor]:
        """Yields all effective tensors as one flat tensor: their own memory if they are adjacent, else a copy.

        After the block, values of a copy are written back, or new gradients move into the copy.

        Args:
            divisor: the number by which all values are divided first, in the same pass over memory as the copy.
        """
        with torch.no_grad():
            tensors = [tensor.effective() for tensor in self.tensors]
            view = flat_view(tensors)
            flattened = self._flat_copy(tensors, divisor) if view is None else view
            if view is not None and divisor != 1:
                view.div_(divisor)
            yield flattened
            if view is None:
                pieces = flattened.split([tensor.numel() for tensor in tensors])
                for tensor, effective, values in zip(self.tensors, tensors, pieces):
                    tensor.write_back(values, effective)

    def _flat_copy(self, tensors: Sequence[Tensor], divisor: int) -> Tensor:
        sizes = [tensor.numel() for tensor in tensors]
        # Reuse memory: a new allocation would be freed after the step, and its page faults cost more than the copy.
        reused = self.memory if _is_unused(self.memory) else None
        copied = tensors[0].new_empty(sum(sizes)) if reused is None else reused
        for tensor, piece in zip(tensors, copied.split(sizes)):
            values = tensor.detach().reshape(-1)
            if divisor == 1:
                piece.copy_(values)
            else:
                torch.div(values, divisor, out=piece)
        return copied

    def run(self, events: Sequence[Any]) -> Tuple[CpuStreams, Any]:
        """Runs all operations, in order, after ``events``.

        Returns:
            The stream operations, and the event for which readers of the result must wait.
        """
        streams: CpuStreams = CpuStreams()
        event = None
        for operation in self._operations:
            streams, stream = operation(events)
            event = streams.record_event_on(stream)
        return streams, event


class _PeerAverage:
    """A decentralized operation, whose result is kept until it is copied back."""

    def __init__(self, peer_weight: BaguaTensorPy) -> None:
        self._peer_weight = peer_weight

    def copy_back_peer_weight(self, bucket: BaguaBucketPy) -> None:
        """Overwrites the bucket with the average."""
        with bucket.flat() as values:
            values.copy_(self._peer_weight.effective())


class BaguaCommBackendPy:
    """A scheduler that runs the operations of buckets on a separate thread.

    Buckets run in their registered order, each once all its tensors are ready. This order is the same on every rank,
    also where gradients become ready in different orders, so the collectives of all ranks match.
    """

    def __init__(self, schedule_channel_cap: int = 100, device_id: int = 0) -> None:
        self.model_name = ""
        self.world: Callable[[], Any] = lambda: None  # the world's process group of the buckets
        self._buckets: List[BaguaBucketPy] = []
        self._bucket_of: Dict[int, int] = {}  # index of the bucket, by the id of the tensor
        self._required: List[Set[int]] = []  # for each bucket, the ids of the tensors that must be ready
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._worker: Optional[threading.Thread] = None
        self._pending: List[Future[Any]] = []
        self.reset()

    def reset(self) -> None:
        """Marks all tensors as not ready, for the next backward. Launched buckets stay pending."""
        self._missing: List[Set[int]] = [set(tensors) for tensors in self._required]
        self._events: List[List[Any]] = [[] for _ in self._buckets]
        self._next = 0

    def register_ordered_buckets(self, buckets: Sequence[BaguaBucketPy]) -> None:
        """Registers buckets in the order in which they run, in place of those registered before."""
        self.wait_pending_comm_ops()
        self._buckets = list(buckets)
        self._bucket_of = {id(tensor): index for index, bucket in enumerate(buckets) for tensor in bucket.tensors}
        padding = "bagua_padding_tensor"  # always ready
        self._required = [{id(t) for t in bucket.tensors if not t.name.startswith(padding)} for bucket in buckets]
        self.reset()

    def mark_communication_ready(self, tensor: BaguaTensorPy, event: Any) -> None:
        """Marks a tensor ready, and launches the next buckets whose tensors are all ready.

        Args:
            tensor: a tensor of a registered bucket.
            event: the event after which the tensor's values are final; ``None`` if they are final now.

        Raises:
            RuntimeError: if the tensor is in no registered bucket, or its bucket was already sent in this backward.
        """
        index = self._bucket_of.get(id(tensor))
        if index is None:
            raise RuntimeError(
                f"expected a tensor of a registered bucket (got {tensor.name!r}); "
                "return it from init_tensors, or register its bucket"
            )
        if index < self._next:
            raise RuntimeError(
                f"expected one gradient per backward for {tensor.name} (got a second one after its bucket was sent); "
                "checkpoint shared parameters with use_reentrant=False"
            )
        self._missing[index].discard(id(tensor))
        self._events[index].append(event)
        while self._next < len(self._buckets) and not self._missing[self._next]:
            self._launch(self._buckets[self._next], self._events[self._next])
            self._next += 1
        if self._next == len(self._buckets):
            self.reset()

    def wait_pending_comm_ops(self) -> int:
        """Waits for all launched buckets, raises the first error among them, and returns their number."""
        pending, self._pending = self._pending, []
        for future in pending:
            streams, event = future.result()
            streams.wait(event)
        return len(pending)

    def _launch(self, bucket: BaguaBucketPy, events: Sequence[Any]) -> None:
        if self._worker is None:
            # A daemon thread: a rank that exits on an error must not wait for ranks that never send. An idle thread is
            # stopped before exit: the interpreter must not shut down while a thread holds native state.
            self._worker = threading.Thread(
                target=_run_jobs, args=(self._jobs,), name=f"bagua {self.model_name}", daemon=True
            )
            self._worker.start()
            weakref.finalize(self, _stop, self._jobs, self._worker)  # runs when the model is freed, or at exit
        future: Future[Any] = Future()
        self._pending.append(future)
        self._jobs.put((bucket, list(events), future))


def _run_jobs(jobs: queue.SimpleQueue[Any]) -> None:
    # Not a method: a thread with a reference to its backend would keep the model alive.
    for bucket, events, future in iter(jobs.get, None):
        try:
            # A thread starts on device 0. Use the tensors' device, not the local rank: a rank may see one GPU only.
            if bucket.device.type == "cuda":
                torch.cuda.set_device(bucket.device)
            future.set_result(bucket.run(events))
        except BaseException as error:
            future.set_exception(error)
        del bucket, events, future


def _stop(jobs: queue.SimpleQueue[Any], worker: threading.Thread) -> None:
    jobs.put(None)
    if worker is not threading.current_thread():
        worker.join(timeout=1.0)


def _is_unused(memory: Optional[Tensor]) -> bool:
    """Returns whether no other tensor uses the storage of ``memory``; ``False`` if PyTorch cannot count references."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    if memory is None or count is None:
        return False
    storage = memory.untyped_storage()
    return bool(count(storage._cdata) == 2)  # references: `memory` and `storage`


def flat_view(tensors: Sequence[Tensor]) -> Optional[Tensor]:
    """Returns one flat tensor over the memory of all ``tensors`` if they are adjacent, in order; else ``None``."""
    first, offset = tensors[0], tensors[0].storage_offset()
    start = first.untyped_storage().data_ptr()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == start
        if not same or tensor.storage_offset() != offset or not tensor.is_contiguous() or tensor.dtype != first.dtype:
            return None
        offset += tensor.numel()
    # Not a view, which would reference its base: `_is_unused` counts the references to the storage.
    flattened = torch.empty(0, dtype=first.dtype, device=first.device)
    with torch.no_grad():
        return flattened.set_(first.untyped_storage(), first.storage_offset(), (offset - first.storage_offset(),), (1,))
