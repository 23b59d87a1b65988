"""SyncBatchNorm as a Bagua algorithm: wraps any algorithm and makes the statistics Bagua communication."""

from __future__ import annotations

import logging
import warnings
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import torch
import torch.distributed as dist
from torch import nn

from .channel import BaguaChannel, Channel, Roster, sync_point
from .config import SyncBatchNormConfig
from .convert import convert_sync_batchnorm, tag_sync_batchnorm, unconverted_layers
from .host import bagua, streams
from .layer import SyncBatchNorm

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
        **inner_arguments: for ``inner`` given by name.

    Raises:
        TypeError: if ``inner`` is no algorithm, or an instance comes with arguments.
        KeyError: for an unknown name.

    Example::

        model = convert_sync_batchnorm(model)
        model.with_bagua([optimizer], SyncBatchNormAlgorithm(GradientAllReduceAlgorithm()))
    """

    def __init__(self, inner: Union[str, Any, None] = None, **inner_arguments: Any) -> None:
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
        self.inner = algorithm

    def reify(self, process_group: Any) -> SyncBatchNormAlgorithmImpl:
        """Returns the live algorithm on ``process_group``.

        Collectives:
            Creates the statistics group. Every rank of the world must call.
        """
        return SyncBatchNormAlgorithmImpl(process_group, self.inner.reify(process_group))


class SyncBatchNormAlgorithmImpl(AlgorithmImpl):  # type: ignore[misc, valid-type]
    """The live :class:`SyncBatchNormAlgorithm`. What it does not define itself is the inner algorithm's.

    Attributes:
        inner: the live inner algorithm.
        channel: the statistics channel; ``None`` until the model is known, and for a model without SyncBatchNorm.
    """

    def __init__(self, process_group: Any, inner: Any) -> None:
        super().__init__(process_group)
        self.inner = inner
        self.channel: Optional[Channel] = None
        # A group of its own: behind queued gradient buckets every layer would wait for all of them. Members only may
        # hold a live one, but all ranks must take part in making it.
        self._group = bagua.communication.new_group(list(process_group.ranks), stream=streams().new_stream())
        self._bound: Dict[int, Any] = {}

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
        return tensors

    def tensors_to_buckets(self, tensors: List[List[Any]], do_flatten: bool) -> List[Any]:
        buckets: List[Any] = self.inner.tensors_to_buckets(tensors, do_flatten)
        return buckets

    def init_forward_pre_hook(self, bagua_ddp: Any) -> Callable[[Any], None]:
        hook: Callable[[Any], None] = self.inner.init_forward_pre_hook(bagua_ddp)
        return hook

    def init_backward_hook(self, bagua_ddp: Any) -> Callable[[str, nn.Parameter], None]:
        hook: Callable[[str, nn.Parameter], None] = self.inner.init_backward_hook(bagua_ddp)
        return hook

    def init_post_backward_hook(self, bagua_ddp: Any) -> Callable[[], None]:
        inner = self.inner.init_post_backward_hook(bagua_ddp)

        def hook() -> None:
            inner()
            if self.channel is not None:
                self.channel.flush()

        return hook

    def init_post_optimizer_step_hook(self, bagua_ddp: Any) -> Callable[[torch.optim.Optimizer], None]:
        hook: Callable[[torch.optim.Optimizer], None] = self.inner.init_post_optimizer_step_hook(bagua_ddp)
        return hook

    def init_operations(self, bagua_ddp: Any, bucket: Any) -> None:
        self.inner.init_operations(bagua_ddp, bucket)

    # -- statistics -----------------------------------------------------------------------------------------------

    def _bind(self, bagua_ddp: Any) -> None:
        """Binds the model's layers to a statistics channel whose messages are registered Bagua tensors."""
        module = bagua_ddp.module
        layers = tag_sync_batchnorm(module)
        _warn_about(module, layers)
        communicator = self._group.get_global_communicator()
        device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
        channel = BaguaChannel(communicator, streams(), device, _default_store())
        # Also where this rank has no layers: another rank may, and both must learn of it.
        channel.join(layers[0].roster if layers else Roster())
        _broadcast_buffers(layers, communicator)
        if not layers or communicator.nranks() == 1:
            return
        # A backend of its own as well: one queue of buckets, and a statistics bucket that waits at its front (a frozen
        # layer's, say) would hold back every gradient behind it.
        backend_name = f"{bagua_ddp.bagua_module_name}/syncbn"
        for layer in layers:
            if layer.process_group is not None:
                continue  # normalizes over ranks of its own choice: its channel is that group's
            point = sync_point(layer.sync_name)
            message: Any = torch.zeros(channel.capacity, dtype=torch.uint8, device=_device_of(layer, device))
            tensor = message.ensure_bagua_tensor(f"syncbn.{layer.sync_name}", backend_name)
            channel.add_bucket(point, BaguaBucket([tensor], f"syncbn.{layer.sync_name}", flatten=False))
            layer.bind(channel, point)
        bagua.communication.get_backend(backend_name).register_ordered_buckets(
            [bucket.backend_bucket for bucket in channel.buckets]
        )
        self.channel = channel
        logger.info(
            "synchronizing %d layers over %d ranks, %d bytes a message",
            len(channel.buckets),
            channel.world_size,
            channel.capacity,
        )


def enable_sync_batchnorm(
    model: nn.Module, algorithm: Any, config: Optional[SyncBatchNormConfig] = None
) -> Tuple[nn.Module, Any]:
    """Switches synchronized batch normalization on where ``config`` says so.

    Args:
        model: converted in place; call before ``with_bagua``.
        algorithm: the Bagua algorithm that trains the parameters.
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
    return convert_sync_batchnorm(model), SyncBatchNormAlgorithm(algorithm)


def _warn_about(module: nn.Module, layers: List[SyncBatchNorm]) -> None:
    left = unconverted_layers(module)
    if left:
        shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        warnings.warn(
            f"expected every BatchNorm of {type(module).__name__} to be converted (got {shown}, which normalize over "
            "one rank); call convert_sync_batchnorm(model) before with_bagua",
            stacklevel=3,
        )
    elif not layers:
        warnings.warn(
            f"expected SyncBatchNorm layers in {type(module).__name__} (got none); SyncBatchNormAlgorithm changes "
            "nothing here: build the model with BatchNorm and call convert_sync_batchnorm(model) before with_bagua",
            stacklevel=3,
        )


def _broadcast_buffers(layers: List[SyncBatchNorm], communicator: Any) -> None:
    """Gives every rank rank 0's running statistics: Bagua broadcasts parameters, never buffers."""
    for layer in layers:
        for buffer in layer._buffers.values():
            if buffer is not None:
                bagua.communication.broadcast(buffer, src=0, comm=communicator)


def _device_of(layer: SyncBatchNorm, default: torch.device) -> torch.device:
    for tensor in (layer.weight, layer.running_mean):
        if tensor is not None:
            return tensor.device
    return default


def _default_store() -> Optional[Any]:
    return dist.distributed_c10d._get_default_store() if dist.is_initialized() else None


GlobalAlgorithmRegistry.register(
    "sync_batchnorm",
    SyncBatchNormAlgorithm,
    description="Synchronized batch normalization around another algorithm",
)
