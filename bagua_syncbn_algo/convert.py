"""The converter: BatchNorm layers to SyncBatchNorm and back, and the tags by which the algorithm knows them."""

from __future__ import annotations

import math
import warnings
from typing import Any, Dict, Iterator, List, Optional, Tuple, Type

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from .comm.wire import Roster
from .config import SyncBatchNormConfig
from .graph.coalesce import coalesce as coalesce_rounds
from .graph.coalesce import plan_of, uncoalesce
from .graph.plan import text_table
from .layer import SyncBatchNorm, SyncTag

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


class SyncBatchNormAct(SyncBatchNorm):
    """SyncBatchNorm with a fused dropout and activation after it, as in timm's ``BatchNormAct2d``."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output


class BatchNormNd(_BatchNorm):
    """BatchNorm over an input ``(N, C, ...)`` of any dimension: what a hand-made SyncBatchNorm reverts to."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(
                f"expected at least 2D input (N, C, ...) (got {input.dim()}D input); add the missing dimensions"
            )


_conversions: Dict[type, Type[SyncBatchNorm]] = {
    nn.BatchNorm1d: SyncBatchNorm,
    nn.BatchNorm2d: SyncBatchNorm,
    nn.BatchNorm3d: SyncBatchNorm,
    nn.SyncBatchNorm: SyncBatchNorm,
    BatchNormNd: SyncBatchNorm,
}


def register_conversion(source: Type[_BatchNorm], target: Type[SyncBatchNorm]) -> None:
    """Teaches the converter a BatchNorm subclass with a ``forward`` of its own.

    Args:
        source: the class to convert (exactly this class, not its subclasses).
        target: what to convert it to: a subclass of :class:`SyncBatchNorm` whose ``forward`` does what ``source``'s
            does beyond normalizing. It receives the whole state of the converted layer, custom attributes included.

    Raises:
        TypeError: if ``target`` is no subclass of SyncBatchNorm.

    Example::

        class MySyncBN(SyncBatchNorm):
            def forward(self, input):
                return super().forward(input) * self.gate

        register_conversion(MyBN, MySyncBN)
    """
    if not (isinstance(target, type) and issubclass(target, SyncBatchNorm)):
        raise TypeError(
            f"expected a subclass of SyncBatchNorm to convert {source.__name__} to (got {target!r}); derive one and "
            f"do in its forward what {source.__name__} does beyond normalizing"
        )
    _conversions[source] = target


def convert_sync_batchnorm(
    module: nn.Module,
    process_group: Optional[Any] = None,
    *,
    coalesce: Optional[bool] = None,
    overlap: Optional[bool] = None,
    example_inputs: Optional[Tuple[Any, ...]] = None,
) -> nn.Module:
    """Replaces the BatchNorm layers of ``module`` by :class:`SyncBatchNorm` and tags them for the algorithm.

    Parameters and buffers are kept by identity (an optimizer built before stays valid), and so are the training flag,
    hooks, custom attributes and ``state_dict`` keys. A layer that stands in several places is converted once.
    ``torch.nn.SyncBatchNorm`` is converted too and keeps its process group. InstanceNorm, and classes that freeze
    BatchNorm without deriving from it, stay. Convert before ``with_bagua``.

    Args:
        module: a model, or a BatchNorm layer itself.
        process_group: the ranks to normalize over; ``None`` for all.
        coalesce: whether layers that do not depend on each other share a round of statistics, where the forward can be
            traced; ``None`` for what ``BAGUA_SYNCBN_COALESCE`` says (default: yes). What was done is logged, and
            :func:`plan_of` returns it. A plain attribute that decides what the forward does is read once: after
            changing one, convert again.
        overlap: whether backward computes the weight gradients of convolutions and linear layers while the statistics
            of the normalization before them travel, where the forward was traced; ``None`` for what
            ``BAGUA_SYNCBN_OVERLAP`` says (default: yes). Gradients stay bitwise the same; ``create_graph=True`` is
            refused.
        example_inputs: arguments of a training forward, to compare the regrouped forward with the original now; else
            the first training batch does, once.

    Returns:
        ``module`` with its layers replaced, or a new layer if ``module`` is itself a BatchNorm.

    Raises:
        RuntimeError: if ``module`` is already in ``with_bagua``.
        ValueError: for a lazy layer without a shape yet; for ``overlap=True`` without coalescing, which wires it.
        TypeError: for a BatchNorm subclass whose own ``forward`` is unknown. On any of these nothing is converted.
    """
    _refuse_wrapped(module)
    config = SyncBatchNormConfig.from_env()
    if overlap and coalesce is False:
        raise ValueError(
            "expected coalesce=True or None with overlap=True (got coalesce=False), because coalescing finds the "
            "layers to overlap with; leave one of the two arguments away"
        )
    targets: Dict[int, Tuple[_BatchNorm, Type[SyncBatchNorm]]] = {}
    for name, layer in _batch_norms(module):
        if not isinstance(layer, SyncBatchNorm):
            targets[id(layer)] = (layer, _target_of(name or type(layer).__name__, layer))
    replacements: Dict[int, nn.Module] = {
        key: _transform(layer, target, process_group) for key, (layer, target) in targets.items()
    }
    module = _replace(module, replacements)
    if config.coalesce if coalesce is None else coalesce:
        coalesce_rounds(module, example_inputs, overlap=config.overlap if overlap is None else overlap)
    else:
        uncoalesce(module)
    tag_sync_batchnorm(module)
    return module


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replaces the SyncBatchNorm layers of ``module`` by the BatchNorm layers that they came from.

    Everything that :func:`convert_sync_batchnorm` keeps is kept again. A layer made by hand becomes a
    :class:`BatchNormNd`.

    Args:
        module: a model, or a SyncBatchNorm layer itself.

    Returns:
        ``module`` with its layers replaced, or a new layer if ``module`` is itself a SyncBatchNorm.

    Raises:
        RuntimeError: if ``module`` is in ``with_bagua``.
    """
    _refuse_wrapped(module)
    uncoalesce(module)
    replacements: Dict[int, nn.Module] = {}
    for _, layer in _batch_norms(module):
        if isinstance(layer, SyncBatchNorm):
            original = layer.__dict__.get("_converted_from", BatchNormNd)
            reverted = original.__new__(original)
            reverted.__dict__.update(layer.__dict__)
            live = ["_channel", "_channel_source", "_point", "_recompute_cache", "_running", "_empty_shards"]
            live += ["_converted_from", "tag"]
            for attribute in live if issubclass(original, nn.SyncBatchNorm) else [*live, "process_group"]:
                reverted.__dict__.pop(attribute, None)
            replacements[id(layer)] = reverted
    return _replace(module, replacements)


def tag_sync_batchnorm(module: nn.Module) -> List[SyncBatchNorm]:
    """Gives every SyncBatchNorm of ``module`` its tag: qualified name, order and group.

    Returns:
        The layers, in the model's order.
    """
    named = [(name, layer) for name, layer in _batch_norms(module) if isinstance(layer, SyncBatchNorm)]
    prefix = type(module).__name__
    # The class name tells apart the layers of several models in one job, a generator's and a discriminator's, say.
    names = [f"{prefix}.{name}" if name else prefix for name, _ in named]
    roster = Roster(
        tuple((name, layer.num_features) for name, (_, layer) in zip(names, named)),
        plan_of(module).agreement(),
        max((layer.itemsize for _, layer in named), default=4),
    )
    for order, (name, (_, layer)) in enumerate(zip(names, named)):
        layer._go_unbound()
        layer.tag = SyncTag(name, order, _global_ranks(layer.process_group), roster)
    return [layer for _, layer in named]


def sync_batchnorm_layers(module: nn.Module) -> List[SyncBatchNorm]:
    """Returns the SyncBatchNorm layers of ``module``, each once, in the model's order."""
    return [layer for _, layer in _batch_norms(module) if isinstance(layer, SyncBatchNorm)]


def unconverted_layers(module: nn.Module) -> List[str]:
    """Returns the qualified names of BatchNorm layers that are not synchronized by this package."""
    return [
        name or type(layer).__name__ for name, layer in _batch_norms(module) if not isinstance(layer, SyncBatchNorm)
    ]


def warn_unconverted(module: nn.Module, layers: List[SyncBatchNorm]) -> None:
    """Warns where ``module`` has BatchNorm layers that are not converted, or none that are."""
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


def tag_table(module: nn.Module) -> str:
    """Returns a table of the tagged layers of ``module``, a line each: order, name, features, ranks."""
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


def _refuse_wrapped(module: nn.Module) -> None:
    for name, part in module.named_modules():
        wrapped = part.__dict__.get("bagua_ddp")
        if wrapped is not None and getattr(wrapped, "module", part) is part:  # a copy of one is free again
            raise RuntimeError(
                f"expected a model that is not in with_bagua yet (got {name or type(part).__name__}, which is); "
                "call convert_sync_batchnorm or revert_sync_batchnorm before with_bagua"
            )


def _target_of(name: str, layer: _BatchNorm) -> Type[SyncBatchNorm]:
    kind = type(layer)
    tensors = [tensor for tensor in (*layer._parameters.values(), *layer._buffers.values()) if tensor is not None]
    if any(is_lazy(tensor) for tensor in tensors):
        raise ValueError(
            f"expected layers whose shapes are known (got {name}, an unmaterialised {kind.__name__}); "
            "run one batch through the model before converting"
        )
    if kind in _conversions:
        return _conversions[kind]
    if kind.forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return SyncBatchNorm
    if _is_act_style(layer):
        return SyncBatchNormAct
    raise TypeError(
        f"expected BatchNorm layers whose forward is known (got {name}, a {kind.__module__}.{kind.__qualname__} with "
        "a forward of its own); teach the converter with register_conversion(class, a subclass of SyncBatchNorm)"
    )


@torch.no_grad()
def _is_act_style(layer: _BatchNorm) -> bool:
    """Whether the layer's own forward is normalization, then ``drop``, then ``act``: by trying, not by its name."""
    drop, act = layer._modules.get("drop"), layer._modules.get("act")
    if drop is None or act is None:
        return False
    modes = {part: part.training for part in layer.modules()}
    parameters, buffers = dict(layer._parameters), dict(layer._buffers)
    features = layer.num_features
    like = next((tensor for tensor in (layer.weight, layer.running_mean) if tensor is not None), torch.empty(0))
    if like.is_meta:
        return True  # nothing can be tried without values

    def line(low: float, high: float, *shape: int) -> Tensor:
        return torch.linspace(low, high, math.prod(shape), dtype=like.dtype, device=like.device).view(shape)

    try:
        layer.eval()  # no random dropout, no update of the running statistics
        # For the trial it gets a state that is far from the identity, or a new layer could not be told from one that
        # activates before it normalizes.
        for name, low, high in (("weight", 0.5, 2.0), ("bias", -1.0, 1.0)):
            if parameters.get(name) is not None:
                layer._parameters[name] = nn.Parameter(line(low, high, features))
        for name, low, high in (("running_mean", -0.5, 1.0), ("running_var", 0.5, 3.0)):
            if buffers.get(name) is not None:
                layer._buffers[name] = line(low, high, features)
        inner = 1 if isinstance(layer, nn.BatchNorm1d) else 3 if isinstance(layer, nn.BatchNorm3d) else 2
        probe = line(-2, 2, 4, features, *[1] * inner)
        plain = nn.functional.batch_norm(
            probe,
            layer.running_mean,
            layer.running_var,
            layer.weight,
            layer.bias,
            layer.running_mean is None,
            0.0,
            layer.eps,
        )
        own: Tensor = type(layer).forward(layer, probe)
        return torch.allclose(own.float(), act(drop(plain)).float(), rtol=1e-2, atol=1e-2)
    except Exception:
        return False  # a forward that wants something else than an input of the usual kind
    finally:
        layer._parameters.update(parameters)
        layer._buffers.update(buffers)
        for part, training in modes.items():
            part.training = training


def _transform(layer: _BatchNorm, target: Type[SyncBatchNorm], process_group: Optional[Any]) -> SyncBatchNorm:
    converted = target.__new__(target)
    # The dictionaries inside (parameters, buffers, hooks) are shared, not copied: handles of registered hooks refer
    # to them, and the old layer is given up.
    converted.__dict__.update(layer.__dict__)
    own = layer.__dict__.get("process_group")
    converted._adopt(process_group if own is None else own)
    converted._converted_from = type(layer)  # type: ignore[assignment]
    return converted


def _replace(module: nn.Module, replacements: Dict[int, nn.Module]) -> nn.Module:
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in replacements:
                parent._modules[name] = replacements[id(child)]
    return replacements.get(id(module), module)


def _global_ranks(process_group: Optional[Any]) -> Optional[Tuple[int, ...]]:
    if process_group is None:
        return None
    try:
        return tuple(dist.get_process_group_ranks(process_group))
    except (AttributeError, RuntimeError, ValueError, KeyError):
        return tuple(range(process_group.size()))  # a bare backend knows only its own numbering
