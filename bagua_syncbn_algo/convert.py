"""The converter between BatchNorm and SyncBatchNorm layers, and the tags that identify layers across ranks."""

from __future__ import annotations

import warnings
from typing import Any, Dict, Iterator, List, Optional, Tuple, Type, TypeVar, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from .comm.groups import group_of
from .comm.wire import Roster
from .compat import inside_compiled
from .config import SyncBatchNormConfig
from .graph.coalesce import coalesce as coalesce_rounds
from .graph.coalesce import plan_of, uncoalesce
from .graph.plan import text_table
from .graph.remarks import Remarks, State
from .graph.replaced import shortened, warn_replaced
from .layer import PROCESS_LOCAL, SyncBatchNorm, SyncTag
from .trial import is_act_style
from .variants import SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d

__all__ = [
    "BatchNormNd",
    "SyncBatchNormAct",
    "convert_sync_batchnorm",
    "register_conversion",
    "revert_sync_batchnorm",
    "sync_batchnorm_layers",
    "tag_sync_batchnorm",
    "tag_table",
    "unconverted_layers",
    "warn_unconverted",
]

_M = TypeVar("_M", bound=nn.Module)


class SyncBatchNormAct(SyncBatchNorm):
    """Synchronized batch normalization, followed by dropout and an activation, as in timm's ``BatchNormAct2d``.

    It is not a ``torch.nn.BatchNorm2d``: code that replaces such layers would remove the activation.

    Attributes:
        drop: the dropout module; ``torch.nn.Identity`` for none.
        act: the activation module.
    """

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output


class BatchNormNd(_BatchNorm):
    """Batch normalization over inputs ``(N, C, ...)`` with at least 2 dimensions.

    :func:`revert_sync_batchnorm` creates this class in place of a :class:`SyncBatchNorm` that no conversion created.

    Shape:
        - Input: :math:`(N, C, *)`, where :math:`*` is any number of dimensions
        - Output: the same shape

    Raises:
        ValueError: in forward, if the input has fewer than 2 dimensions.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(
                f"expected at least 2D input (N, C, ...) (got {input.dim()}D input); add the missing dimensions"
            )


_SYNCHRONIZED: Tuple[Type[SyncBatchNorm], ...] = (SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d)
_conversions: Dict[type, Type[SyncBatchNorm]] = {}  # registered by the user


def register_conversion(source: Type[_BatchNorm], target: Type[SyncBatchNorm]) -> None:
    """Registers how :func:`convert_sync_batchnorm` converts a BatchNorm subclass that overrides ``forward``.

    Args:
        source: the class to convert. The registration does not apply to its subclasses.
        target: the subclass of :class:`SyncBatchNorm` that replaces ``source``. Its ``forward`` normalizes with
            ``super().forward`` and repeats everything else that the ``forward`` of ``source`` computes. A converted
            layer keeps the whole state of the original layer, including custom attributes.

    Raises:
        TypeError: if ``target`` is not a subclass of :class:`SyncBatchNorm`.

    Example::

        class MySyncBN(SyncBatchNorm):
            def forward(self, input):
                return super().forward(input) * self.gate

        register_conversion(MyBN, MySyncBN)
    """
    if not (isinstance(target, type) and issubclass(target, SyncBatchNorm)):
        raise TypeError(
            f"expected a subclass of SyncBatchNorm to convert {source.__name__} to (got {target!r}); define one "
            f"whose forward repeats what {source.__name__} computes in addition to the normalization"
        )
    _conversions[source] = target


def convert_sync_batchnorm(
    module: _M,
    process_group: Optional[Any] = None,
    *,
    coalesce: Optional[bool] = None,
    overlap: Optional[bool] = None,
    example_inputs: Optional[Tuple[Any, ...]] = None,
) -> _M:
    """Replaces the BatchNorm layers of ``module`` with :class:`SyncBatchNorm` layers.

    A ``torch.nn.BatchNorm2d`` becomes a :class:`SyncBatchNorm2d`, which is an instance of both classes and accepts the
    same inputs; ``BatchNorm1d`` and ``BatchNorm3d`` likewise. Other layers become a :class:`SyncBatchNorm`.
    Parameters and buffers keep their identity, so an optimizer created before the conversion stays valid. The training
    flag, hooks, custom attributes and ``state_dict`` keys are also kept. A layer that is used in several places is
    converted once. ``torch.nn.SyncBatchNorm`` layers are converted too and keep their process group. InstanceNorm, and
    frozen BatchNorm classes that are not subclasses of BatchNorm, are not converted. The new layers are tagged, see
    :func:`tag_sync_batchnorm`.

    Call this function before ``with_bagua``. If it raises one of the errors below, ``module`` is unchanged.

    Args:
        module: the model, or a single BatchNorm layer.
        process_group: the process group to normalize over, or a ``DeviceMesh`` of one dimension, whose group is used;
            ``None`` for all ranks.
        coalesce: whether layers that do not depend on each other share a round of statistics, where the forward can be
            traced. Default: ``BAGUA_SYNCBN_COALESCE``, or ``True`` if it is not set. A log message and
            :func:`plan_of` show the rounds. Plain attributes that the forward reads (numbers, strings, functions and
            containers of these) may change later. Convert again after you change another object that it reads.
        overlap: whether backward rounds overlap with the weight gradients of convolutions and linear layers, where the
            forward was traced. Default: ``BAGUA_SYNCBN_OVERLAP``, or ``True`` if it is not set. Gradients stay bitwise
            the same, except for a weight that autocast casts once for several forwards. A backward with
            ``create_graph=True`` raises an error.
        example_inputs: the positional arguments of a training forward. If given, the regrouped forward is compared with
            the original forward during the conversion. Otherwise it is compared on the first training batch.

    Returns:
        ``module`` with its layers replaced, or a new layer if ``module`` is itself a BatchNorm layer.

    Raises:
        RuntimeError: if ``with_bagua`` was called on ``module`` or on a submodule.
        ValueError: if a lazy layer is not initialized; if ``process_group`` is a ``DeviceMesh`` of several dimensions,
            such as ``mesh`` in place of ``mesh["dp"]``; if ``overlap=True`` and ``coalesce=False``; if a
            ``BAGUA_SYNCBN_*`` environment variable is invalid.
        TypeError: if a BatchNorm subclass overrides ``forward`` and is not registered (:func:`register_conversion`);
            if ``process_group`` is no process group, such as a list of ranks.

    Collectives:
        None.

    Example::

        model = convert_sync_batchnorm(model)
        model = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    """
    inner = inside_compiled(module)
    if inner is not module:
        convert_sync_batchnorm(inner, process_group, coalesce=coalesce, overlap=overlap, example_inputs=example_inputs)
        return module  # the replaced layers are guards of its graphs, which are traced again
    _check_not_wrapped(module)
    process_group = group_of(process_group)
    config = SyncBatchNormConfig.from_env()
    coalesce = config.coalesce if coalesce is None else coalesce
    if overlap and not coalesce:
        raise ValueError(
            "expected coalescing with overlap=True (got coalesce=False, as an argument or by BAGUA_SYNCBN_COALESCE=0); "
            "omit overlap=True or enable coalescing: overlap needs the regrouped forward"
        )
    targets: Dict[int, Tuple[_BatchNorm, Type[SyncBatchNorm]]] = {}
    for name, layer in _batch_norms(module):
        if not isinstance(layer, SyncBatchNorm):
            targets[id(layer)] = (layer, _target_of(name or type(layer).__name__, layer))
    replacements: Dict[int, nn.Module] = {
        key: _transform(layer, target, process_group) for key, (layer, target) in targets.items()
    }
    module = _replace(module, replacements)
    overlap = config.overlap if overlap is None else overlap
    if coalesce:
        coalesce_rounds(module, example_inputs, overlap)
    else:
        uncoalesce(module)
    for layer in tag_sync_batchnorm(module):
        layer._overlap = overlap  # for torch.compile
    return module


def revert_sync_batchnorm(module: _M) -> _M:
    """Replaces the SyncBatchNorm layers of ``module`` with BatchNorm layers of the classes they were converted from.

    This function keeps everything that :func:`convert_sync_batchnorm` keeps. Of the layers that were not converted, a
    :class:`SyncBatchNorm2d` becomes a ``torch.nn.BatchNorm2d`` and a :class:`SyncBatchNorm` a :class:`BatchNormNd`.

    Args:
        module: the model, or a single SyncBatchNorm layer.

    Returns:
        ``module`` with its layers replaced, or a new layer if ``module`` is itself a SyncBatchNorm layer.

    Raises:
        RuntimeError: if ``with_bagua`` was called on ``module`` or on a submodule.

    Collectives:
        None.
    """
    _check_not_wrapped(module)
    uncoalesce(module)
    replacements: Dict[int, nn.Module] = {}
    for _, layer in _batch_norms(module):
        if isinstance(layer, SyncBatchNorm):
            plain = BatchNormNd if layer._plain is _BatchNorm else layer._plain
            original = layer.__dict__.get("_converted_from", plain)
            reverted = original.__new__(original)
            reverted.__dict__.update(layer.__dict__)
            removed = [*PROCESS_LOCAL, "_converted_from", "_dimensions", "_overlap", "tag"]
            for attribute in removed if issubclass(original, nn.SyncBatchNorm) else [*removed, "process_group"]:
                reverted.__dict__.pop(attribute, None)
            replacements[id(layer)] = reverted
    return _replace(module, replacements)


def tag_sync_batchnorm(module: nn.Module) -> List[SyncBatchNorm]:
    """Assigns a :class:`SyncTag` to every SyncBatchNorm layer of ``module``.

    Other ranks identify a layer by the qualified name in its tag. :func:`convert_sync_batchnorm` and
    :class:`SyncBatchNormAlgorithm` call this function. Call it for a model that uses neither of them.

    Args:
        module: the model.

    Returns:
        The layers, without duplicates, in the order of ``module.named_modules()``.

    Collectives:
        None.
    """
    module = inside_compiled(module)
    named = [(name, layer) for name, layer in _batch_norms(module) if isinstance(layer, SyncBatchNorm)]
    prefix = type(module).__name__
    # The class name distinguishes the layers of several models in one job, such as a generator and a discriminator.
    names = [f"{prefix}.{name}" if name else prefix for name, _ in named]
    plan = plan_of(module)
    roster = Roster(
        tuple((name, layer.num_features) for name, (_, layer) in zip(names, named)),
        plan.agreement(),
        max((layer.itemsize for _, layer in named), default=4),
        tuple(f", eps={layer.eps}, momentum={layer.momentum}" for _, layer in named),
        remarks=Remarks(module),
        state=State([layer for _, layer in named]),
    )
    roster.observer.planned = plan if any(planned.level for planned in plan.rounds) else None
    for order, (name, (_, layer)) in enumerate(zip(names, named)):
        layer._unbind()
        layer.tag = SyncTag(name, order, _global_ranks(layer.process_group), roster)
    return [layer for _, layer in named]


def sync_batchnorm_layers(module: nn.Module) -> List[SyncBatchNorm]:
    """Returns the SyncBatchNorm layers of ``module``, without duplicates, in the order of ``module.named_modules()``.

    Args:
        module: the model.
    """
    return [layer for _, layer in _batch_norms(module) if isinstance(layer, SyncBatchNorm)]


def unconverted_layers(module: nn.Module) -> List[str]:
    """Returns the qualified names of the BatchNorm layers of ``module`` that are not :class:`SyncBatchNorm` layers."""
    return [
        name or type(layer).__name__ for name, layer in _batch_norms(module) if not isinstance(layer, SyncBatchNorm)
    ]


def warn_unconverted(module: nn.Module, layers: List[SyncBatchNorm]) -> None:
    """Warns if ``module`` has BatchNorm layers other than its SyncBatchNorm ``layers``, or no layers of either kind."""
    of_torch = [name for name, layer in _batch_norms(module) if isinstance(layer, nn.SyncBatchNorm)]
    plain = [name for name in unconverted_layers(module) if name not in of_torch]
    if of_torch:
        warn_replaced(type(module).__name__, of_torch, stacklevel=3)
    if plain:
        warnings.warn(
            f"expected every BatchNorm of {type(module).__name__} to be converted (got {shortened(plain)}, which "
            "normalize over one rank); call convert_sync_batchnorm(model) before with_bagua",
            stacklevel=3,
        )
    elif not (layers or of_torch):
        warnings.warn(
            f"expected SyncBatchNorm layers in {type(module).__name__} (got none); build the model with BatchNorm "
            "layers and call convert_sync_batchnorm(model) before with_bagua, or use the inner algorithm directly",
            stacklevel=3,
        )


def tag_table(module: nn.Module) -> str:
    """Returns a text table of the tagged layers of ``module``: position, qualified name, number of features, ranks.

    Args:
        module: the model.
    """
    rows = [("order", "layer", "features", "normalizes over")]
    for layer in sync_batchnorm_layers(module):
        if layer.tag is not None:
            ranks = "all ranks" if layer.tag.group is None else "ranks " + ", ".join(map(str, layer.tag.group))
            rows.append((str(layer.tag.order), layer.tag.name, str(layer.num_features), ranks))
    return "\n".join(text_table(rows, left_aligned=(1, 3)))


def _batch_norms(module: nn.Module) -> Iterator[Tuple[str, _BatchNorm]]:
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm):
            yield name, layer


def _check_not_wrapped(module: nn.Module) -> None:
    for name, part in module.named_modules():
        wrapped = part.__dict__.get("bagua_ddp")
        # A copy of a wrapped module shares `bagua_ddp`, but is not its module and can be converted.
        if wrapped is not None and getattr(wrapped, "module", part) is part:
            raise RuntimeError(
                f"expected a model without with_bagua (got with_bagua at {name or type(part).__name__}); "
                "call convert_sync_batchnorm or revert_sync_batchnorm before with_bagua"
            )


def _target_of(name: str, layer: _BatchNorm) -> Type[SyncBatchNorm]:
    kind = type(layer)
    tensors = [tensor for tensor in (*layer._parameters.values(), *layer._buffers.values()) if tensor is not None]
    if any(is_lazy(tensor) for tensor in tensors):
        raise ValueError(
            f"expected layers with initialized parameters and buffers (got {name}, an uninitialized {kind.__name__}); "
            "run one batch through the model before the conversion"
        )
    if kind in _conversions:
        return _conversions[kind]
    if kind.forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return next((each for each in _SYNCHRONIZED if issubclass(kind, each._plain)), SyncBatchNorm)
    if is_act_style(layer):
        return SyncBatchNormAct
    raise TypeError(
        f"expected BatchNorm layers whose forward can be converted (got {name}, a "
        f"{kind.__module__}.{kind.__qualname__} that overrides forward); call register_conversion(class, a subclass of "
        "SyncBatchNorm) first"
    )


def _transform(layer: _BatchNorm, target: Type[SyncBatchNorm], process_group: Optional[Any]) -> SyncBatchNorm:
    converted = target.__new__(target)
    # The dictionaries of parameters, buffers and hooks are shared, not copied: handles of registered hooks reference
    # them, and the original layer is no longer used.
    converted.__dict__.update(layer.__dict__)
    own_group = layer.__dict__.get("process_group")
    converted._init_sync(process_group if own_group is None else own_group)
    converted._converted_from = type(layer)  # type: ignore[assignment]
    if target._dimensions is not None and type(layer)._check_input_dim is not target._plain._check_input_dim:
        converted._dimensions = None  # the class may accept more inputs than the one it derives from
    return converted


def _replace(module: _M, replacements: Dict[int, nn.Module]) -> _M:
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in replacements:
                parent._modules[name] = replacements[id(child)]
    return cast(_M, replacements.get(id(module), module))


def _global_ranks(process_group: Optional[Any]) -> Optional[Tuple[int, ...]]:
    if process_group is None:
        return None
    try:
        return tuple(dist.get_process_group_ranks(process_group))
    except (AttributeError, RuntimeError, ValueError, KeyError):
        return tuple(range(process_group.size()))  # a bare backend does not know its global ranks
