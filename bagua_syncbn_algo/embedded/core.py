"""The part of Bagua that is native code upstream: communicators, buckets, and the backend that schedules them.

Names follow ``bagua_core`` 0.9.2; the collectives are those of ``torch.distributed``.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import weakref
from concurrent.futures import Future
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch
import torch.distributed as dist
from torch import Tensor

from .streams import CpuStreams

__all__ = ["BaguaBucketPy", "BaguaCommBackendPy", "BaguaSingleCommunicatorPy", "BaguaTensorPy"]

logger = logging.getLogger(__name__)

# Bagua's numbers for the operations (those of its native library), and torch's for the same.
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
    """A registered tensor: a name and the proxy through which the tensor worked on is found."""

    def __init__(self, name: str, torch_tensor: Tensor) -> None:
        self.name, self._proxy = name, torch_tensor
        #: Whether the proxy's gradient is of this backward, so that nobody holds it and another may take its place.
        self.gradient_is_new = False

    def effective(self) -> Tensor:
        """Returns the tensor that is communicated now: what the getter closure gives for the proxy."""
        proxy: Any = self._proxy
        tensor: Tensor = proxy.bagua_getter_closure()
        return tensor

    def receive(self, values: Tensor, effective: Tensor) -> None:
        """Gives the effective tensor ``values``, a piece of a flat tensor; a new gradient moves there."""
        proxy: Any = self._proxy
        if self.gradient_is_new and effective is proxy.grad and effective.is_contiguous():
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
        """Returns the same: nothing is padded here."""
        return self.effective().numel()


class BaguaSingleCommunicatorPy:
    """Collectives over one process group.

    On the CPU each call returns when the result is there. On CUDA it is enqueued on the current stream. Ranks of roots
    are ranks within the communicator.

    Args:
        group: a ``torch.distributed`` group, or a bare backend such as ``ProcessGroupGloo``; held weakly, because one
            that outlives ``destroy_process_group`` ends the process with an abort at exit.
        stream: what its users are to run the calls on.
        streams: how that stream is ordered against others.
    """

    def __init__(self, group: Any, stream: Any, streams: CpuStreams) -> None:
        self._held = weakref.ref(group)
        self.cuda_stream, self.streams = stream, streams

    @property
    def _group(self) -> Any:
        group = self._held()
        if group is None:
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
        """Waits until every rank of the communicator is here."""
        self._group.barrier().wait()

    def broadcast(self, tensor: BaguaTensorPy, root: int) -> None:
        """Overwrites ``tensor`` on every rank by that of ``root``."""
        options = dist.BroadcastOptions()
        options.rootRank = root
        with torch.no_grad():
            self._group.broadcast([tensor.effective().detach()], options).wait()

    def allreduce_inplace(self, tensor: BaguaTensorPy, op: int) -> None:
        """Replaces ``tensor`` by its reduction over all ranks."""
        self.reduce_over_all(tensor.effective(), op)

    def allreduce(self, send: BaguaTensorPy, recv: BaguaTensorPy, op: int) -> None:
        """Writes the reduction of ``send`` over all ranks into ``recv``."""
        with torch.no_grad():
            recv.effective().copy_(send.effective())
        self.reduce_over_all(recv.effective(), op)

    def allgather(self, send: BaguaTensorPy, recv: BaguaTensorPy) -> None:
        """Writes every rank's ``send`` into ``recv``, in rank order."""
        self.begin_allgather(send, recv).wait()

    def begin_allgather(self, send: BaguaTensorPy, recv: BaguaTensorPy) -> Any:
        """Sets :meth:`allgather` off; what it returns waits for it. (Upstream's own calls do not wait.)"""
        source = send.effective().detach()
        rows = list(recv.effective().detach().view((self.nranks(), *source.shape)).unbind(0))
        return self._group.allgather([rows], [source])

    def allgather_inplace(self, tensor: BaguaTensorPy) -> None:
        """Fills ``tensor``, of which each rank has written its own part, with every rank's part, in rank order."""
        rows = list(tensor.effective().detach().view(self.nranks(), -1).unbind(0))
        self._group.allgather([rows], [rows[self.rank()].clone()]).wait()

    def reduce(self, send: BaguaTensorPy, recv: BaguaTensorPy, root: int, op: int) -> None:
        """Writes the reduction of ``send`` over all ranks into ``recv`` on rank ``root``; leaves others' alone."""
        result = send.effective().detach().clone()
        self.reduce_over_all(result, op)
        if self.rank() == root:
            recv.effective().detach().copy_(result)

    def reduce_inplace(self, tensor: BaguaTensorPy, root: int, op: int) -> None:
        """Replaces ``tensor`` on rank ``root`` by its reduction over all ranks; leaves others' alone."""
        self.reduce(tensor, tensor, root, op)

    def reduce_over_all(self, tensor: Tensor, op: int) -> None:
        """Replaces a plain tensor by its reduction over all ranks."""
        if op != AVG and op not in _REDUCE_OPS:
            raise ValueError(f"expected a ReduceOp (got {op!r}); use bagua.ReduceOp.SUM, AVG, MIN, MAX, ...")
        options = dist.AllreduceOptions()
        options.reduceOp = _REDUCE_OPS[SUM if op == AVG else op]  # type: ignore[assignment]
        with torch.no_grad():
            tensor = tensor.detach()
            if op == AVG:
                # Divided before the sum, as torch's DDP does: half-precision gradients do not overflow.
                tensor.div_(self.nranks())
            self._group.allreduce([tensor], options).wait()


class BaguaBucketPy:
    """Tensors that are communicated together, and the operations to run once all of them are ready."""

    def __init__(self, name: str, tensors: Sequence[BaguaTensorPy]) -> None:
        self.name, self.tensors = name, list(tensors)
        #: One flat tensor in which the tensors may lie, where there is one.
        self.memory: Optional[Tensor] = None
        self._operations: List[Callable[[Sequence[Any]], Tuple[CpuStreams, Any]]] = []

    @property
    def device(self) -> torch.device:
        """Where its tensors lie."""
        return self.tensors[0].effective().device

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
        """Appends a sum or average of the bucket over all ranks.

        With two communicators it runs over the second, then the first. Compression runs exact, and says so.
        """
        if compression is not None:
            logger.info("bucket %s: compression %s runs exact on this host", self.name, compression)
        communicators = [c for c in (communicator_intranode, communicator_internode) if c is not None]

        def operation(events: Sequence[Any]) -> Tuple[CpuStreams, Any]:
            # As an average in `reduce_over_all`, but in the pass that copies.
            divisor = math.prod(c.nranks() for c in communicators) if average else 1
            with communicators[0].streams.after(communicators[0].cuda_stream, events), self.flat(divisor) as whole:
                for communicator in communicators:
                    communicator.reduce_over_all(whole, SUM)
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
        """Appends an average of the bucket over all ranks into ``peer_weight``; the bucket itself stays as it is.

        Raises:
            NotImplementedError: for a peer selection other than ``"all"``.
        """
        if peer_selection_mode != "all" or peer_weight is None:
            raise NotImplementedError(
                f"expected peer_selection_mode to be all, with a peer_weight (got {peer_selection_mode!r}, "
                f"{peer_weight!r}); others need upstream's own native code"
            )
        communicators = [c for c in (communicator_intranode, communicator_internode) if c is not None]
        peers = peer_weight

        def operation(events: Sequence[Any]) -> Tuple[CpuStreams, Any]:
            with communicators[0].streams.after(communicators[0].cuda_stream, events), self.flat() as whole:
                average = peers.effective()
                average.copy_(whole)
                for communicator in communicators:
                    communicator.reduce_over_all(average, AVG)
            return communicators[0].streams, communicators[0].cuda_stream

        self._operations.append(operation)
        return _PeerAverage(peers)

    def append_python_op(
        self, operation: Callable[[str], None], stream: Any = None, streams: Optional[CpuStreams] = None
    ) -> None:
        """Appends a Python function of the bucket's name, run on ``stream``."""
        order = CpuStreams() if streams is None else streams

        def run(events: Sequence[Any]) -> Tuple[CpuStreams, Any]:
            with order.after(stream, events):
                operation(self.name)
            return order, stream

        self._operations.append(run)

    @contextlib.contextmanager
    def flat(self, divisor: int = 1) -> Iterator[Tensor]:
        """Gives all effective tensors as one flat tensor: their own memory if they lie together, else a copy of it.

        What the block leaves in it is written back, or becomes theirs.

        Args:
            divisor: by which they are divided first; in the same pass over memory as the copy.
        """
        with torch.no_grad():
            tensors = [tensor.effective() for tensor in self.tensors]
            view = flat_view(tensors)
            whole = self._copied(tensors, divisor) if view is None else view
            if view is not None and divisor != 1:
                view.div_(divisor)
            yield whole
            if view is None:
                for tensor, effective, values in zip(self.tensors, tensors, whole.split([t.numel() for t in tensors])):
                    tensor.receive(values, effective)

    def _copied(self, tensors: Sequence[Tensor], divisor: int) -> Tensor:
        sizes = [tensor.numel() for tensor in tensors]
        # New memory would be given back after the step, and page faults take longer than the copy.
        own = self.memory if _is_free(self.memory) else None
        whole = tensors[0].new_empty(sum(sizes)) if own is None else own
        for tensor, piece in zip(tensors, whole.split(sizes)):
            values = tensor.detach().reshape(-1)
            if divisor == 1:
                piece.copy_(values)
            else:
                torch.div(values, divisor, out=piece)
        return whole

    def run(self, events: Sequence[Any]) -> Tuple[CpuStreams, Any]:
        """Runs all operations, in order, after ``events``.

        Returns:
            What the reader of the result has to wait for: an event, and how.
        """
        streams: CpuStreams = CpuStreams()
        event = None
        for operation in self._operations:
            streams, stream = operation(events)
            event = streams.event_behind(stream)
        return streams, event


class _PeerAverage:
    """A decentralized operation: its result waits until it is copied back."""

    def __init__(self, peer_weight: BaguaTensorPy) -> None:
        self._peer_weight = peer_weight

    def copy_back_peer_weight(self, bucket: BaguaBucketPy) -> None:
        """Overwrites the bucket by the average."""
        with bucket.flat() as whole:
            whole.copy_(self._peer_weight.effective())


class BaguaCommBackendPy:
    """Runs buckets in their registered order, each as soon as its tensors are ready, on a thread of its own.

    The order is the same on every rank whatever the order in which gradients appear; that is what keeps the ranks'
    collectives matched.
    """

    def __init__(self, schedule_channel_cap: int = 100, device_id: int = 0) -> None:
        self.model_name = ""
        self._buckets: List[BaguaBucketPy] = []
        self._owner: Dict[int, int] = {}
        self._awaited: List[Set[int]] = []  # of each bucket, the tensors that have to be ready
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._worker: Optional[threading.Thread] = None
        self._pending: List[Future[Any]] = []
        self.reset()

    def reset(self) -> None:
        """Forgets which tensors are ready, for a new round; what was launched is still awaited."""
        self._missing: List[Set[int]] = [set(tensors) for tensors in self._awaited]
        self._events: List[List[Any]] = [[] for _ in self._buckets]
        self._front = 0

    def register_ordered_buckets(self, buckets: Sequence[BaguaBucketPy]) -> None:
        """Sets the buckets and their order; replaces earlier ones."""
        self.wait_pending_comm_ops()
        self._buckets = list(buckets)
        self._owner = {id(tensor): index for index, bucket in enumerate(buckets) for tensor in bucket.tensors}
        padding = "bagua_padding_tensor"  # ready at all times
        self._awaited = [{id(t) for t in bucket.tensors if not t.name.startswith(padding)} for bucket in buckets]
        self.reset()

    def mark_communication_ready(self, tensor: BaguaTensorPy, event: Any) -> None:
        """Marks a tensor ready; launches the front buckets that this completes.

        Raises:
            RuntimeError: if the tensor's bucket was already sent in this round.
        """
        index = self._owner.get(id(tensor))
        if index is None:
            raise RuntimeError(
                f"expected a tensor of a registered bucket (got {tensor.name!r}); "
                "return it from init_tensors, or register its bucket"
            )
        if index < self._front:
            raise RuntimeError(
                f"expected one gradient a backward for {tensor.name} (got a second one after its bucket was sent); "
                "checkpoint shared parameters with use_reentrant=False"
            )
        self._missing[index].discard(id(tensor))
        self._events[index].append(event)
        while self._front < len(self._buckets) and not self._missing[self._front]:
            self._launch(self._buckets[self._front], self._events[self._front])
            self._front += 1
        if self._front == len(self._buckets):
            self.reset()

    def wait_pending_comm_ops(self) -> int:
        """Waits for all launched buckets and raises the first error of one; returns their number."""
        pending, self._pending = self._pending, []
        for future in pending:
            streams, event = future.result()
            streams.wait(event)
        return len(pending)

    def _launch(self, bucket: BaguaBucketPy, events: Sequence[Any]) -> None:
        if self._worker is None:
            # A daemon: a rank that ends on an error must not wait here for ranks that will never come. But an idle one
            # is ended in good order: the interpreter must not go down around a thread that holds native state.
            self._worker = threading.Thread(
                target=_work, args=(self._jobs,), name=f"bagua {self.model_name}", daemon=True
            )
            self._worker.start()
            weakref.finalize(self, _stop, self._jobs, self._worker)  # when the model is gone, or at exit
        future: Future[Any] = Future()
        self._pending.append(future)
        self._jobs.put((bucket, list(events), future))


def _work(jobs: queue.SimpleQueue[Any]) -> None:
    # Not a method: a thread that held its backend would keep the model alive.
    for bucket, events, future in iter(jobs.get, None):
        try:
            # A thread starts on device 0. The tensors', not the local rank's: a launcher may show each rank one GPU.
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


def _is_free(memory: Optional[Tensor]) -> bool:
    """Whether no other tensor lies in the memory; no, where PyTorch cannot tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    if memory is None or count is None:
        return False
    storage = memory.untyped_storage()
    return bool(count(storage._cdata) == 2)  # by the tensor, and by the line above


def flat_view(tensors: Sequence[Tensor]) -> Optional[Tensor]:
    """Returns one flat tensor over the memory of all ``tensors`` where they lie one behind the other, else ``None``."""
    first, offset = tensors[0], tensors[0].storage_offset()
    start = first.untyped_storage().data_ptr()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == start
        if not same or tensor.storage_offset() != offset or not tensor.is_contiguous() or tensor.dtype != first.dtype:
            return None
        offset += tensor.numel()
    # No view, which would hold its base: memory is free once nothing else lies in it.
    whole = torch.empty(0, dtype=first.dtype, device=first.device)
    with torch.no_grad():
        return whole.set_(first.untyped_storage(), first.storage_offset(), (offset - first.storage_offset(),), (1,))
