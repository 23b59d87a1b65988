"""SyncBatchNorm as a Bagua algorithm: wraps any algorithm and makes the statistics Bagua communication."""

from __future__ import annotations

import logging
import time
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import nn

from .comm.channel import Channel
from .comm.groups import default_store
from .comm.local import SINGLE_PROCESS
from .comm.recorder import RoundRecord, active
from .comm.transport import BaguaChannel
from .comm.wire import BACKWARD, FORWARD, Roster, sync_point
from .config import SyncBatchNormConfig, check_normalize_over
from .convert import convert_sync_batchnorm, tag_sync_batchnorm, warn_unconverted
from .graph.coalesce import plan_of
from .host import bagua, statistics_group, streams
from .layer import SyncBatchNorm
from .ops.running_stats import RunningPool

__all__ = ["SyncBatchNormAlgorithm", "SyncBatchNormAlgorithmImpl", "enable_sync_batchnorm"]

logger = logging.getLogger(__name__)

Algorithm = bagua.algorithms.Algorithm
AlgorithmImpl = bagua.algorithms.AlgorithmImpl
GlobalAlgorithmRegistry = bagua.algorithms.GlobalAlgorithmRegistry
BaguaBucket = bagua.bucket.BaguaBucket


class SyncBatchNormAlgorithm(Algorithm):  # type: ignore[misc, valid-type]
    """Any Bagua algorithm, with the model's SyncBatchNorm statistics as communication of its own.

    Args:
        inner: the algorithm that trains the parameters: an instance or a registered name; gradient all-reduce by
            default.
        normalize_over: the ranks that normalize together: ``"world"`` (exact synchronized BatchNorm), ``"node"`` (the
            ranks of a node, by ``LOCAL_WORLD_SIZE``), a number of neighbouring ranks, or ``"rank"`` (each alone, by
            PyTorch's own kernels). Running statistics are those of the whole world's batch in every case.
        timeout: seconds that a rank waits for the others' statistics; by default ``BAGUA_SYNCBN_TIMEOUT`` or, without
            it, the process group's own. The embedded host only: upstream's communicators know no timeout.
        **inner_arguments: for ``inner`` given by name.

    Raises:
        TypeError: if ``inner`` is no algorithm, or an instance comes with arguments.
        KeyError: for an unknown name.
        ValueError: for an unknown ``normalize_over``, and for asynchronous model averaging.

    Example::

        model = convert_sync_batchnorm(model)
        model.with_bagua([optimizer], SyncBatchNormAlgorithm(GradientAllReduceAlgorithm()))
    """

    def __init__(
        self,
        inner: Union[str, Any, None] = None,
        *,
        normalize_over: Union[str, int] = "world",
        timeout: Optional[float] = None,
        **inner_arguments: Any,
    ) -> None:
        check_normalize_over(normalize_over, "normalize_over")
        algorithm: Any = "gradient_allreduce" if inner is None else inner
        if isinstance(algorithm, str):
            algorithm = Algorithm.init(algorithm, **inner_arguments)
        elif inner_arguments:
            raise TypeError(
                f"expected no further arguments with an algorithm instance (got {', '.join(sorted(inner_arguments))}); "
                "give them to the inner algorithm, or name it by its registered name"
            )
        if not hasattr(algorithm, "reify"):
            raise TypeError(
                f"expected inner to be a Bagua algorithm or a registered name (got {algorithm!r}); pass an "
                "instance such as GradientAllReduceAlgorithm()"
            )
        if isinstance(algorithm, SyncBatchNormAlgorithm):
            raise TypeError(
                "expected an inner algorithm that trains parameters (got a SyncBatchNormAlgorithm); pass its inner one"
            )
        if _loses_step(algorithm):
            raise ValueError(
                f"expected an inner algorithm that keeps ranks in step (got {type(algorithm).__name__}, whose ranks "
                "run different numbers of steps, so that statistics of different steps would meet); use another one, "
                "or plain BatchNorm"
            )
        self.inner, self.normalize_over = algorithm, normalize_over
        self.timeout = SyncBatchNormConfig.from_env().timeout if timeout is None else timeout

    def reify(self, process_group: Any) -> SyncBatchNormAlgorithmImpl:
        """Returns the live algorithm on ``process_group``; it makes its statistics groups once it sees the model.

        Collectives:
            None.
        """
        span = _ranks_per_group(self.normalize_over, len(process_group.ranks))
        return SyncBatchNormAlgorithmImpl(process_group, self.inner.reify(process_group), span, self.timeout)


class SyncBatchNormAlgorithmImpl(AlgorithmImpl):  # type: ignore[misc, valid-type]
    """The live :class:`SyncBatchNormAlgorithm`. What it does not define itself is the inner algorithm's.

    Attributes:
        inner: the live inner algorithm.
        channel: the statistics channel; ``None`` until the model is known, for a model without SyncBatchNorm, and where
            each rank normalizes alone.
        running: moments on their way into the running statistics; ``None`` where normalizing yields the world's.
    """

    def __init__(self, process_group: Any, inner: Any, ranks_per_group: int, timeout: Optional[float] = None) -> None:
        super().__init__(process_group)
        self._timeout = timeout
        self.inner = inner
        self.channel: Optional[Channel] = None
        self.running: Optional[RunningPool] = None
        self._ranks_per_group = ranks_per_group
        # The world's channel and that of this rank's group, each with its ranks; as many on every rank.
        self._channels: List[Tuple[Channel, Sequence[int]]] = []
        self._bound: Dict[int, Any] = {}
        self._round: Optional[RoundRecord] = None
        self._ranks = list(process_group.ranks)
        self._world_group: Any = None
        self._group: Any = None
        self._running_group: Any = None

    def _make_groups(self) -> None:
        # Not in the constructor: a described algorithm can then be inspected on a machine that has no stream to give.
        # Groups of their own: behind queued gradient buckets every layer would wait for all of them. Every rank takes
        # part in making every group, its own or not.
        ranks, span = self._ranks, self._ranks_per_group
        self._world_group = self._group = statistics_group(ranks, self._timeout)
        if 1 < span < len(ranks):
            blocks = [ranks[i : i + span] for i in range(0, len(ranks), span)]
            groups = [statistics_group(block, self._timeout) for block in blocks]
            self._group = next(g for g in groups if bagua.get_rank() in g.ranks)
        if span < len(ranks):
            # Two backends on one communicator would race: the running statistics are sent by another thread.
            self._running_group = statistics_group(ranks, self._timeout)

    def __getattr__(self, name: str) -> Any:
        # Only what is found nowhere else arrives here.
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    # -- the inner algorithm's hooks ------------------------------------------------------------------------------

    def need_reset(self) -> bool:
        return bool(self.inner.need_reset())

    def init_tensors(self, bagua_ddp: Any) -> List[Any]:
        # The first call with the model, and again at every reset.
        if id(bagua_ddp) not in self._bound:
            self._bound[id(bagua_ddp)] = bagua_ddp
            self._bind(bagua_ddp)
        tensors: List[Any] = self.inner.init_tensors(bagua_ddp)
        if self.running is not None:
            self.running.trains = bool(tensors)
        return tensors

    def tensors_to_buckets(self, tensors: List[List[Any]], do_flatten: bool) -> List[Any]:
        buckets: List[Any] = self.inner.tensors_to_buckets(tensors, do_flatten)
        return buckets

    def init_forward_pre_hook(self, bagua_ddp: Any) -> Callable[[Any], None]:
        inner = self.inner.init_forward_pre_hook(bagua_ddp)

        def hook(input: Any) -> None:
            self._finish_running()  # of a backward that was broken off
            record = active()
            if record is not None:
                record.next_step()
            inner(input)

        return hook

    def init_backward_hook(self, bagua_ddp: Any) -> Callable[[str, nn.Parameter], None]:
        inner = self.inner.init_backward_hook(bagua_ddp)

        def hook(parameter_name: str, parameter: nn.Parameter) -> None:
            self._launch_running()  # at the first gradient: the all-reduce overlaps with the rest of backward
            inner(parameter_name, parameter)

        return hook

    def init_post_backward_hook(self, bagua_ddp: Any) -> Callable[[], None]:
        inner = self.inner.init_post_backward_hook(bagua_ddp)

        def hook() -> None:
            inner()
            self._finish_running()
            if self.channel is not None:
                self.channel.flush()

        return hook

    def init_post_optimizer_step_hook(self, bagua_ddp: Any) -> Callable[[torch.optim.Optimizer], None]:
        hook: Callable[[torch.optim.Optimizer], None] = self.inner.init_post_optimizer_step_hook(bagua_ddp)
        return hook

    def init_operations(self, bagua_ddp: Any, bucket: Any) -> None:
        self.inner.init_operations(bagua_ddp, bucket)

    # -- after an exception in a step; the embedded host calls these ----------------------------------------------

    @property
    def step_failed(self) -> bool:
        return any(channel.failed for channel, _ in self._channels)

    def communication_counts(self) -> List[int]:
        return [channel.frames for channel, _ in self._channels]

    def leave_step(self, in_forward: bool) -> bool:
        phase, words = (FORWARD, "forward") if in_forward else (BACKWARD, "backward")
        error = RuntimeError(f"an exception broke off its {words}")
        # Backward has rounds on the layers' own channel only. A message that nobody waits for does no harm: `recover`
        # makes up for it.
        channels = [channel for channel, _ in self._channels if in_forward or channel is self.channel]
        for channel in channels:
            if not channel.failed:
                channel.fail(sync_point(words), phase, error, wait=False)
        return bool(channels)

    def recover(self, counts: List[Tuple[int, ...]]) -> None:
        for index, (channel, ranks) in enumerate(self._channels):
            channel.recover(max(sent[index] for rank, sent in zip(self._ranks, counts) if rank in ranks))

    # -- statistics -----------------------------------------------------------------------------------------------

    def _bind(self, bagua_ddp: Any) -> None:
        """Binds the model's layers to a statistics channel whose messages are registered Bagua tensors."""
        if self._world_group is None:
            self._make_groups()
        module = bagua_ddp.module
        layers = tag_sync_batchnorm(module)
        warn_unconverted(module, layers)
        device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
        roster = layers[0].tag.roster if layers and layers[0].tag is not None else Roster()
        itemsize = max((layer.itemsize for layer in layers), default=4)
        communicator = self._world_group.get_global_communicator()
        world = BaguaChannel(communicator, streams(), device, default_store())
        # Also where this rank has no layers: another rank may, and both must learn of it.
        ordinal = world.join(roster, itemsize)
        _broadcast_buffers(layers, communicator)
        # A layer with a process group normalizes over ranks of its own choice: its channel is that group's.
        layers = [layer for layer in layers if layer.process_group is None]
        if not layers or communicator.nranks() == 1:
            return
        self._channels = [(world, self._ranks)]
        channel: Channel = world
        if self._ranks_per_group == 1:
            channel = SINGLE_PROCESS
        elif self._group is not self._world_group:
            channel = BaguaChannel(self._group.get_global_communicator(), streams(), device, default_store())
            channel.label = f"bagua_syncbn/{','.join(map(str, self._group.ranks))}"
            channel.join(roster, itemsize)
            self._channels.append((channel, self._group.ranks))
        if self._running_group is not None:
            self._bind_running([layer for layer in layers if layer.running_mean is not None], world, bagua_ddp)
        for layer in layers:
            point = sync_point(layer.sync_name, ordinal)
            running = self.running if layer.running_mean is not None else None
            layer.bind(channel, point, running, empty_shards=channel.local)
        if isinstance(channel, BaguaChannel):
            self.channel = channel
            own = {layer.sync_name: layer for layer in layers}
            for planned in plan_of(module).rounds:
                # One bucket for every message that will be sent: a layer's own, or its round's.
                if planned.layers[0] in own:
                    where = own[planned.layers[0]].device or device
                    message = torch.zeros(channel.capacity, dtype=torch.uint8, device=where)
                    bucket = _message_bucket(message, planned.name, bagua_ddp)
                    channel.add_bucket(sync_point(planned.name, ordinal), bucket)
        logger.info(
            "synchronizing %d layers of %s over %d ranks, running statistics over %d",
            len(layers),
            type(module).__name__,
            self._ranks_per_group,
            communicator.nranks(),
        )

    def _bind_running(self, layers: List[SyncBatchNorm], world: Channel, bagua_ddp: Any) -> None:
        """Registers the layers' moments as one tensor of one bucket, on a backend of its own.

        A backend is one queue of buckets: among the gradients' a bucket that is not marked would hold back all behind
        it, and some algorithms break on buckets that are not theirs.
        """
        if not layers:
            return
        self.running = RunningPool(layers, world)
        name = f"{bagua_ddp.bagua_module_name}/syncbn.running"
        payload: Any = self.running.payload
        payload.ensure_bagua_tensor("syncbn.running_statistics", name)
        bucket = BaguaBucket([payload], "syncbn.running_statistics", flatten=False)
        bucket.append_centralized_synchronous_op(average=False, group=self._running_group)
        bucket.append_python_op(self.running.second_reduction, group=self._running_group)
        bucket.append_centralized_synchronous_op(average=False, group=self._running_group)
        bucket.append_python_op(self._note_finish, group=self._running_group)
        self._running_bucket = bucket  # upstream's backend does not keep it alive
        self._running_backend = bagua.communication.get_backend(name)
        self._running_backend.register_ordered_buckets([bucket.backend_bucket])

    def _launch_running(self) -> None:
        if self.running is None or self.running.in_flight:
            return
        self.running.load()
        payload: Any = self.running.payload
        record = active()
        if record is not None:
            size = 2 * payload.numel() * payload.element_size()
            self._round = record.launch(tuple(self.running.names), "running", size)
        payload.bagua_mark_communication_ready()

    def _note_finish(self, name: str) -> None:
        if self._round is not None:
            self._round.finish = time.perf_counter()

    def _finish_running(self) -> None:
        if self.running is None or not self.running.in_flight:
            return
        if self._round is not None:
            self._round.wait = time.perf_counter()
        self._running_backend.wait_pending_comm_ops()
        self._round = None
        self.running.apply()


def enable_sync_batchnorm(
    model: nn.Module, algorithm: Any, config: Optional[SyncBatchNormConfig] = None
) -> Tuple[nn.Module, Any]:
    """Switches synchronized batch normalization on where ``config`` says so.

    Args:
        model: converted in place; call before ``with_bagua``.
        algorithm: the Bagua algorithm that trains the parameters; one that is wrapped already stays as it is.
        config: ``None`` to read the environment: ``BAGUA_SYNCBN=1`` switches on.

    Returns:
        The converted model and the wrapped algorithm, or both as they were.

    Example::

        model, algorithm = enable_sync_batchnorm(model, GradientAllReduceAlgorithm())
        model.with_bagua([optimizer], algorithm)
    """
    config = SyncBatchNormConfig.from_env() if config is None else config
    if not config.enabled:
        return model, algorithm
    model = convert_sync_batchnorm(model, coalesce=config.coalesce, overlap=config.coalesce and config.overlap)
    if isinstance(algorithm, SyncBatchNormAlgorithm):
        return model, algorithm
    return model, SyncBatchNormAlgorithm(algorithm, normalize_over=config.normalize_over, timeout=config.timeout)


def _broadcast_buffers(layers: List[SyncBatchNorm], communicator: Any) -> None:
    """Gives every rank rank 0's running statistics: Bagua broadcasts parameters, never buffers."""
    for layer in layers:
        for buffer in layer._buffers.values():
            if buffer is not None:
                bagua.communication.broadcast(buffer, src=0, comm=communicator)


def _message_bucket(message: Any, round_name: str, bagua_ddp: Any) -> Any:
    """Returns the bucket of one registered tensor that carries a round's statistics."""
    name = f"syncbn.{round_name}"
    return BaguaBucket([message.ensure_bagua_tensor(name, f"{bagua_ddp.bagua_module_name}/syncbn")], name, False)


def _ranks_per_group(normalize_over: Union[str, int], world: int) -> int:
    """Returns how many neighbouring ranks normalize together.

    Raises:
        ValueError: if their number does not divide the world.
    """
    named = {"world": world, "node": bagua.get_local_size(), "rank": 1}
    ranks = named[normalize_over] if isinstance(normalize_over, str) else normalize_over
    if world % ranks:
        meant = f"{ranks} (the ranks of a node, LOCAL_WORLD_SIZE)" if normalize_over == "node" else str(ranks)
        raise ValueError(
            f"expected normalize_over to divide the {world} ranks (got {meant}); choose a divisor of {world}, or "
            "world, node, rank"
        )
    return ranks


def _loses_step(algorithm: Any) -> bool:
    """Whether ranks under this algorithm run different numbers of steps."""
    asynchronous = GlobalAlgorithmRegistry.get("async") if "async" in GlobalAlgorithmRegistry else None
    return isinstance(asynchronous, type) and isinstance(algorithm, asynchronous)


GlobalAlgorithmRegistry.register(
    "sync_batchnorm",
    SyncBatchNormAlgorithm,
    description="Synchronized batch normalization around another algorithm",
)
