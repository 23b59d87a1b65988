"""Split backward of convolutions and linear layers, so that their weight gradients overlap with a backward round.

A normalization needs the input gradient of the following convolution, but not the weight gradient. The backward of the
convolution therefore computes the input gradient at once, and the weight gradient while the all-gather is in flight.
"""

from __future__ import annotations

import math
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from ..compat import any_autocast, autocast_dtype
from ..ops.deferred import DeferredGrad, OverlapCandidates, refuse_second_derivative
from ..ops.moments import cast
from .module_state import has_own_forward, hooks_of

__all__ = ["DeferrableLayer", "DeferrableLayers", "apply_split", "is_weighted", "why_unsplittable"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_SPLIT = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)

# Smallest number of multiplications of a weight gradient for which a layer is split. A split costs 0.1 ms of Python, in
# which one core of a server does about 5 million multiplications (benchmarks/overlap.py).
WORTHWHILE = 5e6
# On CUDA a launch takes longer than a small gradient: an estimate (10 µs at 100 TFLOP/s), not measured on a GPU yet.
WORTHWHILE_ON_CUDA = 1e9


def is_weighted(module: nn.Module) -> bool:
    """Returns whether a module is a convolution or linear layer, also one of a subclass."""
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))


def why_unsplittable(module: nn.Module) -> Optional[str]:
    """Returns the reason why the backward of a convolution or linear layer cannot be split, or ``None``."""
    if type(module) not in _SPLIT:
        return f"is a {type(module).__name__}, a subclass of a torch.nn layer"
    if has_own_forward(module):
        return "has a forward set on the instance"
    if any(hooks_of(module)):
        return "has hooks"
    if isinstance(module, _CONVOLUTIONS) and module.padding_mode == "zeros" and _padding(module) is None:
        return "has different padding on the two sides"
    return None


class DeferrableLayer:
    """A position in a graph where a convolution or linear layer follows a round of statistics.

    Args:
        name: qualified name of the layer, for errors.
        shared: whether the weight of the layer is used in several places of the graph.
    """

    def __init__(self, name: str, shared: bool = False) -> None:
        self.name, self._shared = name, shared
        self._work = math.inf  # multiplications of the weight gradient; unknown until the first forward, which is split
        self._on_cuda = False

    @property
    def is_measured(self) -> bool:
        """Whether the size of the weight gradient is known."""
        return self._work < math.inf

    @property
    def is_large(self) -> bool:
        """Whether the weight gradient takes long enough to overlap it with a round."""
        return self._work >= (WORTHWHILE_ON_CUDA if self._on_cuda else WORTHWHILE)

    @property
    def is_worthwhile(self) -> bool:
        """Whether to split the next forward of the layer."""
        # Autocast casts a shared weight once and sums the gradients of its uses in half precision.
        return self.is_large and not (self._shared and any_autocast())

    def record_work(self, module: Any, input: Tensor, output: Tensor) -> None:
        """Records the size of the first forward, which decides whether later forwards are split.

        Later sizes are ignored: a forward and its recomputation by activation checkpointing must be split alike.
        """
        if self._work == math.inf:
            weight: Tensor = module.weight
            self._on_cuda = input.is_cuda
            uses = input if isinstance(module, _TRANSPOSED) else output  # each element is one use of a filter
            self._work = uses.numel() * weight.numel() / weight.shape[0]


class DeferrableLayers(OverlapCandidates):
    """The candidates of one round, in one forward.

    Args:
        candidates: the positions of the candidates in the graph.
        modules: the current layer at each of these positions.
    """

    def __init__(self, candidates: Sequence[DeferrableLayer], modules: Sequence[Any]) -> None:
        super().__init__()
        self.candidates, self._modules = candidates, modules

    def deferrable_tensors(self, device: torch.device) -> List[Optional[Tuple[Optional[Tensor], ...]]]:
        return [
            (module.weight, module.bias) if candidate.is_worthwhile and _can_split(module, device) else None
            for candidate, module in zip(self.candidates, self._modules)
        ]


def _can_split(module: Any, device: torch.device) -> bool:
    weight: Tensor = module.weight
    return (
        weight.requires_grad
        and weight.is_floating_point()
        and weight.device == device
        and why_unsplittable(module) is None
    )


def apply_split(module: Any, input: Tensor, candidates: Optional[DeferrableLayers], index: int) -> Tensor:
    """Runs a convolution or linear layer, and defers its weight gradient if the round has a deferred gradient for it.

    Output and gradients are bitwise those of ``module(input)``.

    Args:
        module: the layer.
        input: the input of the layer.
        candidates: the candidates of a round that has run; ``None`` in a graph of ``torch.compile``.
        index: index of the layer in ``candidates``.

    Returns:
        The output of the layer.
    """
    if candidates is None:
        return module(input)  # type: ignore[no-any-return]
    candidate, deferred_grads = candidates.candidates[index], candidates.deferred_grads
    deferred_grad = deferred_grads[index] if deferred_grads else None
    if isinstance(module, nn.Linear) and input.dim() > 2 and not input.is_contiguous():
        deferred_grad = None  # F.linear uses other kernels for such inputs
    if deferred_grad is None or not (torch.is_grad_enabled() and input.requires_grad):
        output: Tensor = module(input)
    else:
        weight, bias = module.weight, module.bias
        if getattr(module, "padding_mode", "zeros") != "zeros":  # before any cast: autocast pads in float32
            input = F.pad(input, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        fixed = _autocast(input, weight, bias)
        info = _ParameterInfo(candidate.name, weight.dtype, None if bias is None else bias.dtype)
        output = (_linear if isinstance(module, nn.Linear) else _convolve)(module, deferred_grad, info, *fixed)
    candidate.record_work(module, input, output)
    return output


class _ParameterInfo(NamedTuple):
    """Name and dtypes that the deferred computation of the gradients needs.

    A separate object: a computation that holds its :class:`DeferredGrad` would be a reference cycle.
    """

    name: str
    weight_dtype: torch.dtype
    bias_dtype: Optional[torch.dtype]


def _linear(
    module: Any,
    deferred_grad: DeferredGrad,
    info: _ParameterInfo,
    input: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
) -> Tensor:
    rows = input.reshape(-1, input.shape[-1])
    arguments = rows, deferred_grad.token, (weight, bias), deferred_grad, info, _Linear
    output: Tensor = _Split.apply(*arguments)  # type: ignore[no-untyped-call]
    return output.view(*input.shape[:-1], output.shape[-1])


def _convolve(
    module: Any,
    deferred_grad: DeferredGrad,
    info: _ParameterInfo,
    input: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
) -> Tensor:
    convolution = _Convolution(
        module.stride,
        _padding(module) if module.padding_mode == "zeros" else (0,) * len(module.stride),
        module.dilation,
        isinstance(module, _TRANSPOSED),
        module.output_padding,
        module.groups,
    )
    batched = input if input.dim() == weight.dim() else input.unsqueeze(0)
    arguments = batched, deferred_grad.token, (weight, bias), deferred_grad, info, convolution
    output: Tensor = _Split.apply(*arguments)  # type: ignore[no-untyped-call]
    return output if batched is input else output.squeeze(0)


def _padding(module: nn.modules.conv._ConvNd) -> Optional[Sequence[int]]:
    """Returns the padding on each side of each dimension; ``None`` if the two sides differ."""
    if not isinstance(module.padding, str):
        return module.padding
    if module.padding == "valid":
        return [0] * len(module.stride)
    both_sides = [dilation * (size - 1) for dilation, size in zip(module.dilation, module.kernel_size)]
    return None if any(zeros % 2 for zeros in both_sides) else [zeros // 2 for zeros in both_sides]


def _autocast(input: Tensor, *parameters: Optional[Tensor]) -> Tuple[Any, ...]:
    """Returns the tensors in the dtype of autocast, which does not cast the tensors that an autograd Function saves.

    Under autocast, the parameters are detached: :func:`_cast` casts their gradients back.
    """
    dtype = autocast_dtype(input.device.type) if any_autocast() else None
    if dtype is None:
        return (input, *parameters)
    return tuple(
        tensor.to(dtype) if tensor is not None and tensor.dtype not in (dtype, torch.float64) else tensor
        for tensor in (input, *(parameter if parameter is None else parameter.detach() for parameter in parameters))
    )


def _cast(
    weight: Optional[Tensor], bias: Optional[Tensor], info: _ParameterInfo
) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """Returns gradients in the dtypes of the weight and the bias, which :func:`_autocast` may have cast."""
    return (
        None if weight is None else cast(weight, info.weight_dtype),
        None if bias is None or info.bias_dtype is None else cast(bias, info.bias_dtype),
    )


# The overload itself: overload resolution takes longer than a small gradient.
_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default


class _Convolution(NamedTuple):
    """The arguments of ``aten::convolution`` after the tensors, and the operation with its backward."""

    stride: Sequence[int]
    padding: Optional[Sequence[int]]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int

    def forward(self, input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        output: Tensor = torch.convolution(input, weight, bias, *self)  # type: ignore[arg-type]
        return output

    def backward(
        self, grad: Tensor, input: Tensor, weight: Tensor, bias_sizes: Optional[torch.Size], mask: Sequence[bool]
    ) -> Sequence[Optional[Tensor]]:
        """Returns the gradients of input, weight and bias; ``None`` where ``mask`` is false."""
        gradients: Sequence[Optional[Tensor]] = _CONVOLUTION_BACKWARD(grad, input, weight, bias_sizes, *self, mask)
        return gradients


class _Linear:
    """The operation of a linear layer on a two-dimensional input, with its backward."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(
        grad: Tensor, input: Tensor, weight: Tensor, bias_sizes: Optional[torch.Size], mask: Sequence[bool]
    ) -> Sequence[Optional[Tensor]]:
        """Returns the same gradients as :meth:`_Convolution.backward`."""
        needs_input, needs_weight, needs_bias = mask
        return (
            grad.mm(weight) if needs_input else None,
            grad.t().mm(input) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


class _Split(Function):
    """A convolution or linear layer whose backward computes the input gradient and defers those of the parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        token: Tensor,
        parameters: Tuple[Tensor, Optional[Tensor]],
        deferred_grad: DeferredGrad,
        info: _ParameterInfo,
        operation: Any,
    ) -> Tensor:
        # In a tuple, so that autograd does not record the parameters as inputs of this node.
        weight, bias = parameters
        ctx.save_for_backward(input, weight)
        ctx.deferred_grad, ctx.info, ctx.operation = deferred_grad, info, operation
        ctx.bias_sizes = None if bias is None else bias.shape
        ctx.set_materialize_grads(False)
        output: Tensor = operation.forward(input, weight, bias)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        info: _ParameterInfo = ctx.info
        refuse_second_derivative(info.name)
        if grad is None:  # the loss does not use the output: its gradients are None, not zeros
            return (None,) * len(ctx.needs_input_grad)
        operation, arguments = ctx.operation, (grad, *ctx.saved_tensors, ctx.bias_sizes)
        gradient = operation.backward(*arguments, (True, False, False))[0]

        def weight_and_bias(needs: Sequence[bool]) -> Sequence[Optional[Tensor]]:
            _, weight, bias = operation.backward(*arguments, (False, *needs))
            return _cast(weight, bias, info)

        ctx.deferred_grad.provide(weight_and_bias)
        return gradient, None, None, None, None, None
