"""Synchronized batch normalization as a Bagua algorithm that wraps any other algorithm."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import nn

from .buffers import broadcast_buffers, message_bucket, running_error
from .comm.channel import Channel
from .comm.local import SINGLE_PROCESS
from .comm.recorder import RoundRecord, active
from .comm.transport import BaguaChannel, bagua_channel
from .comm.wire import BACKWARD, FORWARD, Roster, sync_point
from .config import SyncBatchNormConfig
from .convert import convert_sync_batchnorm, tag_sync_batchnorm, warn_unconverted
from .graph.coalesce import plan_of
from .host import agree_on_groups, bagua, statistics_group, streams
from .layer import SyncBatchNorm
from .ops.running_stats import RunningPool

__all__ = ["SyncBatchNormAlgorithm", "SyncBatchNormAlgorithmImpl", "enable_sync_batchnorm"]

logger = logging.getLogger(__name__)

Algorithm = bagua.algorithms.Algorithm
AlgorithmImpl = bagua.algorithms.AlgorithmImpl
GlobalAlgorithmRegistry = bagua.algorithms.GlobalAlgorithmRegistry
BaguaBucket = bagua.bucket.BaguaBucket


class SyncBatchNormAlgorithm(Algorithm):  # type: ignore[misc, valid-type]
    """A Bagua algorithm that adds synchronized batch normalization to another algorithm.

    The inner algorithm trains the parameters. The statistics of the :class:`SyncBatchNorm` layers use separate process
    groups and Bagua buckets. Running statistics are those of the whole world's batch for every ``normalize_over``.

    Args:
        inner: the algorithm that trains the parameters: an instance or a registered name. Default: gradient all-reduce.
        normalize_over: the ranks that normalize together: ``"world"`` (all ranks: exact synchronized BatchNorm),
            ``"node"`` (``LOCAL_WORLD_SIZE`` ranks), a number of consecutive ranks, or ``"rank"`` (each rank separately,
            with PyTorch's own kernels). Default: ``BAGUA_SYNCBN_NORMALIZE_OVER``, else ``"world"``.
        timeout: the number of seconds that a rank waits for the statistics of the other ranks. Default:
            ``BAGUA_SYNCBN_TIMEOUT``, else the timeout of the default group. It has no effect under upstream Bagua.
        check: ``"nonfinite"`` to raise an error that names the first layer and rank whose statistics or gradient sums
            are not finite; ``"none"`` for no check. Default: ``BAGUA_SYNCBN_CHECK``.
        **inner_arguments: arguments of the inner algorithm's constructor, if ``inner`` is not an instance.

    Raises:
        TypeError: if ``inner`` is not an algorithm, is wrapped already, or is an instance with ``inner_arguments``.
        KeyError: if ``inner`` is a name that is not registered.
        ValueError: if ``normalize_over``, ``timeout``, ``check`` or a ``BAGUA_SYNCBN_*`` environment variable is
            invalid, or ``inner`` is asynchronous model averaging.

    Example::

        model = convert_sync_batchnorm(model)
        model.with_bagua([optimizer], SyncBatchNormAlgorithm(GradientAllReduceAlgorithm()))
    """

    def __init__(
        self,
        inner: Union[str, Any, None] = None,
        *,
        normalize_over: Union[str, int, None] = None,
        timeout: Optional[float] = None,
        check: Optional[str] = None,
        **inner_arguments: Any,
    ) -> None:
        algorithm: Any = "gradient_allreduce" if inner is None else inner
        if isinstance(algorithm, str):
            algorithm = Algorithm.init(algorithm, **inner_arguments)
        elif inner_arguments:
            raise TypeError(
                f"expected no further arguments with an algorithm instance (got {', '.join(sorted(inner_arguments))}); "
                "pass them to the constructor of that algorithm, or pass its registered name"
            )
        if not hasattr(algorithm, "reify"):
            raise TypeError(
                f"expected inner to be a Bagua algorithm or a registered name (got {algorithm!r}); pass an "
                "instance such as GradientAllReduceAlgorithm()"
            )
        if isinstance(algorithm, SyncBatchNormAlgorithm):
            raise TypeError("expected an unwrapped algorithm (got a SyncBatchNormAlgorithm); pass its inner algorithm")
        if _is_asynchronous(algorithm):
            raise ValueError(
                f"expected a synchronous inner algorithm (got {type(algorithm).__name__}, whose ranks run different "
                "numbers of steps and would exchange statistics of different steps); use another algorithm, or "
                "BatchNorm without synchronization"
            )
        given: Dict[str, Any] = {"normalize_over": normalize_over, "timeout": timeout, "check": check}
        given = {name: value for name, value in given.items() if value is not None}
        config = replace(SyncBatchNormConfig.from_env(), **given)
        self.inner, self.normalize_over = algorithm, config.normalize_over
        self.timeout, self.check = config.timeout, config.check

    def reify(self, process_group: Any) -> SyncBatchNormAlgorithmImpl:
        """Returns the live algorithm. It creates its process groups when ``with_bagua`` binds the model.

        Args:
            process_group: the Bagua process group of the training.

        Raises:
            ValueError: if ``normalize_over`` does not divide the number of ranks.

        Collectives:
            None.
        """
        size = _ranks_per_group(self.normalize_over, len(process_group.ranks))
        inner = self.inner.reify(process_group)
        return SyncBatchNormAlgorithmImpl(process_group, inner, size, self.timeout, self.check)


class SyncBatchNormAlgorithmImpl(AlgorithmImpl):  # type: ignore[misc, valid-type]
    """The live form of :class:`SyncBatchNormAlgorithm`. Other attributes are those of the inner algorithm.

    Attributes:
        inner: the live inner algorithm.
        channel: the statistics channel; ``None`` before the model is bound, if no layer is bound, and where each rank
            normalizes separately.
        running: the pool of moments for the running statistics; ``None`` if layers normalize over the world.
    """

    def __init__(
        self, process_group: Any, inner: Any, ranks_per_group: int, timeout: Optional[float] = None, check: str = "none"
    ) -> None:
        super().__init__(process_group)
        self._timeout, self._check = timeout, check
        self.inner = inner
        self.channel: Optional[Channel] = None
        self.running: Optional[RunningPool] = None
        self._ranks_per_group = ranks_per_group
        # The channels of the world and of this rank's group, with their ranks. Every rank has the same number.
        self._channels: List[Tuple[Channel, Sequence[int]]] = []
        self._bound_modules: Dict[int, Any] = {}
        self._running_record: Optional[RoundRecord] = None
        self._ranks = list(process_group.ranks)
        self._message_buckets: List[Any] = []
        self._world_group: Any = None
        self._group: Any = None
        self._running_group: Any = None

    def _create_groups(self) -> None:
        # Not in the constructor: reify must work on a machine without CUDA. Separate groups: on the gradients'
        # communicator, each layer would wait for all queued buckets. Every rank must call for every group.
        ranks, size = self._ranks, self._ranks_per_group
        self._world_group = self._group = statistics_group("world", ranks, self._timeout)
        if 1 < size < len(ranks):
            blocks = [ranks[i : i + size] for i in range(0, len(ranks), size)]
            groups = [statistics_group("part", block, self._timeout) for block in blocks]
            self._group = next(g for g in groups if bagua.get_rank() in g.ranks)
        if size < len(ranks):
            # Separate, because another thread sends the running statistics: two threads on one communicator would race.
            self._running_group = statistics_group("running", ranks, self._timeout)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not set yet: the next line would recurse
            raise AttributeError(name)
        return getattr(self.inner, name)

    # -- the inner algorithm's hooks ------------------------------------------------------------------------------

    def need_reset(self) -> bool:
        return bool(self.inner.need_reset())

    def init_tensors(self, bagua_ddp: Any) -> List[Any]:
        # `with_bagua` calls this hook, and so does every reset.
        if id(bagua_ddp) not in self._bound_modules:
            self._bound_modules[id(bagua_ddp)] = bagua_ddp
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
            self._finish_running()  # of an interrupted backward
            record = active()
            if record is not None:
                record.next_step()
            inner(input)

        return hook

    def init_backward_hook(self, bagua_ddp: Any) -> Callable[[str, nn.Parameter], None]:
        inner = self.inner.init_backward_hook(bagua_ddp)

        def hook(parameter_name: str, parameter: nn.Parameter) -> None:
            self._launch_running()  # at the first gradient, to overlap the all-reduces with the rest of backward
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

    # -- interrupted steps: called by the embedded host only ------------------------------------------------------

    @property
    def step_failed(self) -> bool:
        return any(channel.failed for channel, _ in self._channels)

    def message_counts(self) -> List[int]:
        return [channel.frames for channel, _ in self._channels]

    def abort_step(self, in_forward: bool) -> bool:
        phase, name = (FORWARD, "forward") if in_forward else (BACKWARD, "backward")
        error = RuntimeError(f"an exception interrupted its {name}")
        # Backward rounds use the layers' channel only. If no rank waits for the message, `recover` balances the counts.
        channels = [channel for channel, _ in self._channels if in_forward or channel is self.channel]
        for channel in channels:
            if not channel.failed:
                channel.fail(sync_point(name), phase, error, wait=False)
        return bool(channels)

    def recover(self, counts: List[Tuple[int, ...]]) -> None:
        for index, (channel, ranks) in enumerate(self._channels):
            channel.recover(max(sent[index] for rank, sent in zip(self._ranks, counts) if rank in ranks))

    # -- statistics -----------------------------------------------------------------------------------------------

    def _bind(self, bagua_ddp: Any) -> None:
        """Binds the model's layers to a statistics channel, whose messages are registered Bagua tensors."""
        module = bagua_ddp.module
        layers = tag_sync_batchnorm(module)
        warn_unconverted(module, layers)
        device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
        if self._world_group is None:
            agree_on_groups(self.process_group, device, self._ranks_per_group)
            self._create_groups()
        roster = layers[0].tag.roster if layers and layers[0].tag is not None else Roster()
        itemsize = max((layer.itemsize for layer in layers), default=4)
        world = bagua_channel(self._world_group, streams(), device, self._timeout, self._check)
        # Also without layers: if another rank has layers, all ranks must raise the error.
        ordinal = world.join(roster, itemsize)
        broadcast_buffers(layers, self._world_group)
        # A layer with a process group uses the channel of that group.
        layers = [layer for layer in layers if layer.process_group is None]
        if not layers or len(self._ranks) == 1:
            return
        self._channels = [(world, self._ranks)]
        channel: Channel = world
        if self._ranks_per_group == 1:
            channel = SINGLE_PROCESS
        elif self._group is not self._world_group:
            channel = bagua_channel(self._group, streams(), device, self._timeout, self._check)
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
            layers_by_name = {layer.sync_name: layer for layer in layers}
            for planned in plan_of(module).rounds:
                # One bucket for each round, also for rounds of a single layer.
                if planned.layers[0] in layers_by_name:
                    device_of_round = layers_by_name[planned.layers[0]].device or device
                    message = torch.zeros(channel.capacity, dtype=torch.uint8, device=device_of_round)
                    bucket = message_bucket(message, planned.name, bagua_ddp)
                    self._message_buckets.append(channel.add_bucket(sync_point(planned.name, ordinal), bucket))
        values = len(layers), type(module).__name__, self._ranks_per_group, len(self._ranks)
        logger.info("synchronizing %d layers of %s over %d ranks, running statistics over %d ranks", *values)

    def _bind_running(self, layers: List[SyncBatchNorm], world: Channel, bagua_ddp: Any) -> None:
        """Registers the moments of all layers as one tensor in one bucket, on a separate backend.

        A backend runs its buckets in order: an unmarked bucket among the gradients' buckets would block all later ones.
        Some algorithms also fail on buckets that they did not create.
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
        bucket.append_python_op(self._record_finish, group=self._running_group)
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
            self._running_record = record.launch(tuple(self.running.names), "running", size)
        payload.bagua_mark_communication_ready()

    def _record_finish(self, name: str) -> None:
        if self._running_record is not None:
            self._running_record.finish = time.perf_counter()

    def _finish_running(self) -> None:
        if self.running is None or not self.running.in_flight:
            return
        if self._running_record is not None:
            self._running_record.wait = time.perf_counter()
        try:
            self._running_backend.wait_pending_comm_ops()
        except RuntimeError as error:
            raise running_error(self.running.names, error) from error
        self._running_record = None
        self.running.apply()


def enable_sync_batchnorm(
    model: nn.Module, algorithm: Any, config: Optional[SyncBatchNormConfig] = None
) -> Tuple[nn.Module, Any]:
    """Converts the model and wraps the algorithm if ``config`` enables synchronized batch normalization.

    Args:
        model: the model; converted in place. Call this function before ``with_bagua``.
        algorithm: the algorithm that trains the parameters. A :class:`SyncBatchNormAlgorithm` is not wrapped again.
        config: the configuration. Default: :meth:`SyncBatchNormConfig.from_env`, enabled by ``BAGUA_SYNCBN=1``.

    Returns:
        The converted model and the wrapped algorithm. Both are unchanged if ``config`` does not enable it.

    Raises:
        ValueError: if an environment variable is invalid; :func:`convert_sync_batchnorm` lists further errors.

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
    chosen: Dict[str, Any] = {"normalize_over": config.normalize_over, "timeout": config.timeout, "check": config.check}
    return model, SyncBatchNormAlgorithm(algorithm, **chosen)


def _ranks_per_group(normalize_over: Union[str, int], world: int) -> int:
    """Returns the number of consecutive ranks that normalize together.

    Raises:
        ValueError: if it does not divide ``world``, the number of ranks.
    """
    named = {"world": world, "node": bagua.get_local_size(), "rank": 1}
    ranks = named[normalize_over] if isinstance(normalize_over, str) else normalize_over
    if world % ranks:
        meant = f"{ranks} (the ranks of a node, LOCAL_WORLD_SIZE)" if normalize_over == "node" else str(ranks)
        raise ValueError(
            f"expected normalize_over to divide the {world} ranks (got {meant}); pass a divisor, world, node or rank"
        )
    return ranks


def _is_asynchronous(algorithm: Any) -> bool:
    """Returns whether ranks run different numbers of steps under ``algorithm``."""
    asynchronous = GlobalAlgorithmRegistry.get("async") if "async" in GlobalAlgorithmRegistry else None
    return isinstance(asynchronous, type) and isinstance(algorithm, asynchronous)


GlobalAlgorithmRegistry.register(
    "sync_batchnorm", SyncBatchNormAlgorithm, description="Synchronized batch normalization, added to another algorithm"
)
