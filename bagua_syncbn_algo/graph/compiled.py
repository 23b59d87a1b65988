"""The regrouped forward of a module inside a graph of ``torch.compile``.

The graph is the one that runs eagerly, so that the rounds are the same, also on a rank that falls back to eager mode.
Dynamo follows the regrouped code. The choice of the graph and its check are constants of the trace: :func:`_choose`
runs once, while Dynamo traces. Dynamo then guards everything that the choice depends on, because
:func:`_is_unchanged` reads it in the trace.
"""

from __future__ import annotations

import threading
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..compat import inside_transform, trace_time, traced_as_constant
from ..layer import SyncBatchNorm
from .call_pattern import CallPattern
from .guards import has_global_hooks
from .module_state import CONSTANT_TYPES, MISSING
from .variant import Variant

__all__ = ["CHOICE", "train_captured"]


CHOICE = "_choice_"  # prefix of attributes of a coalesced forward, which copies do not get


class _Traced(threading.local):
    """The values of the call that Dynamo traces, as fake tensors."""

    values: Sequence[Any] = ()


_traced = _Traced()


def train_captured(forward: Any, module: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
    """Runs a training forward inside of a graph: regrouped, if possible.

    Args:
        forward: the coalesced forward of the module.
        module: the module.
        args: the positional arguments.
        kwargs: the keyword arguments.

    Collectives:
        While Dynamo traces: those of the check of a first training batch. In the graph: those of the rounds.
    """
    values: List[Any] = []
    template = _template((args, kwargs), values)
    trace_time(_keep_values, values)
    name = _choose(forward, template, torch.is_grad_enabled())
    choice = None if name is None else getattr(forward, name)
    if choice is None or not _is_unchanged(module, choice, values) or choice.function is None:
        return type(module).forward(module, *args, **kwargs)
    return pytree.tree_unflatten(list(choice.function(module, *values)), choice.outputs)


class _Choice:
    """A graph for the compiler.

    Attributes:
        function: the regrouped code, a function of the module and the values of a call; returns the leaves. ``None``
            if the module's own forward runs.
        outputs: the structure of the output.
        modes: the path and the mode of each submodule.
        attributes: path of a submodule, name and value of each attribute that the forward has read.
        absent: path of a submodule and name of each attribute that the forward has looked for and not found.
        parts: the names of the children of each submodule that has some.
        values: shape and strides of each tensor, and each number of the call; ``None`` if the choice does not depend
            on them.
    """

    def __init__(self, module: nn.Module, variant: Variant, examples: Sequence[Any]) -> None:
        run = variant.run
        self.function: Optional[Callable[..., Any]] = None if run is None else run.by_path()
        self.outputs: Any = None if run is None else run.outputs
        depends = variant.shapes is not None or variant.needed_shapes
        self.values = [_shape_or_number(value) for value in examples] if depends else None
        paths = [path for path, _ in module.named_modules(remove_duplicate=True)]
        self.modes = [(path, part.training) for path, part in zip(paths, module.modules())]
        read = [(paths[index], *rest) for index, *rest in variant.guard.expected_attributes]
        self.attributes = [each for each in read if each[2] is not MISSING]
        self.absent = [(path, name) for path, name, value in read if value is MISSING and _lacks(module, path, name)]
        self.parts = [(path, tuple(part._modules)) for path, part in zip(paths, module.modules()) if part._modules]


def _shape_or_number(value: Any) -> Any:
    return (tuple(value.shape), value.stride()) if isinstance(value, Tensor) else value


def _is_unchanged(module: nn.Module, choice: _Choice, values: Sequence[Any]) -> bool:
    """Returns ``True``, in a trace. What it reads becomes a guard of the graph."""
    if choice.values is not None:
        for value, expected in zip(values, choice.values):
            if _shape_or_number(value) != expected:
                return False
    for path, training in choice.modes:
        if module.get_submodule(path).training != training:
            return False
    for path, name, value in choice.attributes:
        if getattr(module.get_submodule(path), name) != value:
            return False
    for path, name in choice.absent:
        if hasattr(module.get_submodule(path), name):
            return False
    return all(tuple(module.get_submodule(path)._modules.keys()) == names for path, names in choice.parts)


def _lacks(module: nn.Module, path: str, name: str) -> bool:
    return not hasattr(module.get_submodule(path), name)


def _template(tree: Any, values: List[Any]) -> Any:
    """Returns the arguments of a call as constants, with a mark for each value; appends the values to ``values``."""
    if isinstance(tree, Tensor) or type(tree) in (int, float):
        for index, value in enumerate(values):
            if value is tree and isinstance(tree, Tensor):
                return ("value", index)
        values.append(tree)
        return ("value", len(values) - 1)
    if type(tree) is tuple:
        return ("tuple", *[_template(each, values) for each in tree])
    if type(tree) is list:
        return ("list", *[_template(each, values) for each in tree])
    if type(tree) is dict:
        return ("dict", tuple(tree.keys()), *[_template(each, values) for each in tree.values()])
    if isinstance(tree, CONSTANT_TYPES):
        return ("constant", tree)
    return ("other",)


def _filled(template: Any, values: Sequence[Any]) -> Any:
    """Returns the arguments that a template describes.

    Raises:
        LookupError: if they contain objects of other types.
    """
    kind, *rest = template
    if kind == "value":
        return values[rest[0]]
    if kind == "constant":
        return rest[0]
    if kind == "tuple":
        return tuple(_filled(each, values) for each in rest)
    if kind == "list":
        return [_filled(each, values) for each in rest]
    if kind == "dict":
        return {key: _filled(each, values) for key, each in zip(rest[0], rest[1:])}
    raise LookupError(kind)


def _keep_values(context: Any) -> None:
    """Keeps the fake tensors of the call for :func:`_choose`; runs while Dynamo traces :func:`train_captured`."""
    found = context.get_local("values")._i_will_not_complain_if_bc_breaks_VariableTracker()
    _traced.values = [
        each.as_python_constant() if each.is_python_constant() else each.as_proxy().node.meta["example_value"]
        for each in found.items
    ]


@traced_as_constant
def _choose(forward: Any, template: Any, grad_enabled: bool) -> Optional[str]:
    """Chooses the graph for a call and checks it; runs while Dynamo traces.

    Returns:
        The name of the attribute of ``forward`` with the :class:`_Choice`; ``None`` if the module's own forward runs.
    """
    values, _traced.values = _traced.values, ()
    module = forward.module
    layer = next((part for part in module.modules() if isinstance(part, SyncBatchNorm)), None)
    if layer is None or inside_transform() or has_global_hooks() or layer._bound_channel().local:
        return None
    forward.follow(layer._bound_channel())
    forward.count_call()
    try:
        args, kwargs = _filled(template, [_example(value) for value in values])
    except LookupError:
        return None
    pattern, examples = CallPattern.of(args, kwargs)
    if pattern is None:
        return None
    with torch.set_grad_enabled(grad_enabled):
        variant = forward.variant(pattern, examples)
        if variant is None or variant.run is None:
            if variant is not None and variant.needed_shapes:
                forward.check_failure(variant, layer)
                return _attribute(forward, variant, examples)
            return None
        if not variant.verified and not forward.agree(variant, layer, examples):
            return None
    return _attribute(forward, variant, examples)


def _attribute(forward: Any, variant: Variant, examples: Sequence[Any]) -> str:
    """Returns the name of the attribute with the choice of ``variant``.

    Each choice has its own: a graph is guarded by what it reads, but not by a list that grows.
    """
    name = f"{CHOICE}{variant.number}"
    if not hasattr(forward, name):
        setattr(forward, name, _Choice(forward.module, variant, examples))
    return name


def _example(value: Any) -> Any:
    """Returns a tensor like a fake one, with values for the check of the regrouped forward; numbers unchanged."""
    if not isinstance(value, Tensor):
        return _hint(value)
    shape = [int(_hint(size)) for size in value.shape]
    if value.dtype.is_floating_point or value.dtype.is_complex:
        example = torch.linspace(-2, 2, max(1, _product(shape)), device="cpu").sin_()[: _product(shape)].view(shape)
        return example.to(value.device, value.dtype).requires_grad_(value.requires_grad)
    return torch.zeros(shape, dtype=value.dtype, device=value.device)


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _hint(size: Any) -> Any:
    """Returns the size of the current call, without a guard on it."""
    node = getattr(size, "node", None)
    return size if node is None or node.hint is None else node.hint
