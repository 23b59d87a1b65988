"""Overlap of a backward round with the weight gradients of the layers that follow.

The weight gradient of a convolution does not depend on the statistics of the normalization before it. Its backward is
split in two: the input gradient at once, because the statistics wait for it, and the weight gradient while they travel.
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

# Multiplications of a weight gradient from which splitting pays: it costs 0.1 ms of Python, in which one core of a
# server does about 5 million (benchmarks/overlap.py). Smaller layers run as they are.
WORTHWHILE = 5e6


def is_weighted(module: nn.Module) -> bool:
    """Whether a module is of a kind whose weight gradient could be computed later."""
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))


def why_unsplittable(module: nn.Module) -> Optional[str]:
    """Returns why the backward of a convolution or linear layer cannot be split; ``None`` if it can."""
    if type(module) not in _SPLIT:
        return f"is a {type(module).__name__}, which may do more than a layer of torch.nn"
    if has_own_forward(module):
        return "has a forward of its own making"
    if any(hooks_of(module)):
        return "has hooks"
    if isinstance(module, _CONVOLUTIONS) and module.padding_mode == "zeros" and _padding(module) is None:
        return "pads one side more than the other"
    return None


class DeferrableLayer:
    """A place in a graph where a convolution or linear layer follows a round of statistics.

    Args:
        name: of the layer, for errors.
        shared: whether its weight is used in several places of the graph.
    """

    def __init__(self, name: str, shared: bool = False) -> None:
        self.name, self._shared = name, shared
        self._work = math.inf  # multiplications of its weight gradient; the first forward, which is split, shows it

    @property
    def is_worthwhile(self) -> bool:
        """Whether to split its next forward."""
        # Autocast casts a weight once for all its uses, and adds up their gradients in half precision.
        return self._work >= WORTHWHILE and not (self._shared and any_autocast())

    def note(self, module: Any, input: Tensor, output: Tensor) -> None:
        """Takes the size of the first forward: what is too small is not split from then on.

        Once: a forward and its recomputation by checkpointing must not differ, whatever was between them.
        """
        if self._work == math.inf:
            weight: Tensor = module.weight
            many = input if isinstance(module, _TRANSPOSED) else output  # one of its elements is one use of a filter
            self._work = many.numel() * weight.numel() / weight.shape[0]


class DeferrableLayers(OverlapCandidates):
    """The candidates of one round, in one forward.

    Args:
        candidates: of the round.
        modules: the layers that stand there now.
    """

    def __init__(self, candidates: Sequence[DeferrableLayer], modules: Sequence[Any]) -> None:
        super().__init__()
        self.candidates, self._modules = candidates, modules

    def shares(self, device: torch.device) -> List[Optional[Tuple[Optional[Tensor], ...]]]:
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


def apply_split(module: Any, input: Tensor, candidates: DeferrableLayers, place: int) -> Tensor:
    """Runs a convolution or linear layer, its weight gradient deferred if its round has a deferred gradient for it.

    Bitwise the same output and gradients as ``module(input)``.

    Args:
        module: the layer.
        input: as the layer takes it.
        candidates: of its round, which has run.
        place: of the layer among them.
    """
    candidate, deferred_grads = candidates.candidates[place], candidates.deferred_grads
    deferred_grad = deferred_grads[place] if deferred_grads else None
    if isinstance(module, nn.Linear) and input.dim() > 2 and not input.is_contiguous():
        deferred_grad = None  # F.linear has other kernels there
    if deferred_grad is None or not (torch.is_grad_enabled() and input.requires_grad):
        output: Tensor = module(input)
    else:
        weight, bias = module.weight, module.bias
        if getattr(module, "padding_mode", "zeros") != "zeros":  # before any cast: autocast pads in float32
            input = F.pad(input, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        fixed = _autocast(input, weight, bias)
        late = _Late(candidate.name, weight.dtype, None if bias is None else bias.dtype)
        output = (_linear if isinstance(module, nn.Linear) else _convolve)(module, deferred_grad, late, *fixed)
    candidate.note(module, input, output)
    return output


class _Late(NamedTuple):
    """What deferred gradients need to know. Not the :class:`DeferredGrad` that holds them: a reference cycle."""

    name: str
    weight_dtype: torch.dtype
    bias_dtype: Optional[torch.dtype]


def _linear(
    module: Any, deferred_grad: DeferredGrad, late: _Late, input: Tensor, weight: Tensor, bias: Optional[Tensor]
) -> Tensor:
    rows = input.reshape(-1, input.shape[-1])
    arguments = rows, deferred_grad.token, (weight, bias), deferred_grad, late, _Linear
    output: Tensor = _Split.apply(*arguments)  # type: ignore[no-untyped-call]
    return output.view(*input.shape[:-1], output.shape[-1])


def _convolve(
    module: Any, deferred_grad: DeferredGrad, late: _Late, input: Tensor, weight: Tensor, bias: Optional[Tensor]
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
    arguments = batched, deferred_grad.token, (weight, bias), deferred_grad, late, convolution
    output: Tensor = _Split.apply(*arguments)  # type: ignore[no-untyped-call]
    return output if batched is input else output.squeeze(0)


def _padding(module: nn.modules.conv._ConvNd) -> Optional[Sequence[int]]:
    """Returns the zeros on either side of each dimension; ``None`` if the sides differ."""
    if not isinstance(module.padding, str):
        return module.padding
    if module.padding == "valid":
        return [0] * len(module.stride)
    whole = [dilation * (size - 1) for dilation, size in zip(module.dilation, module.kernel_size)]
    return None if any(zeros % 2 for zeros in whole) else [zeros // 2 for zeros in whole]


def _autocast(input: Tensor, *parameters: Optional[Tensor]) -> Tuple[Any, ...]:
    """Casts as autocast does, which does not reach what an autograd Function saves; parameters outside of the graph."""
    dtype = autocast_dtype(input.device.type) if any_autocast() else None
    if dtype is None:
        return (input, *parameters)
    return tuple(
        tensor.to(dtype) if tensor is not None and tensor.dtype not in (dtype, torch.float64) else tensor
        for tensor in (input, *(parameter if parameter is None else parameter.detach() for parameter in parameters))
    )


def _cast(weight: Optional[Tensor], bias: Optional[Tensor], late: _Late) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """Casts gradients back, where autocast had cast the weight and the bias."""
    return (
        None if weight is None else cast(weight, late.weight_dtype),
        None if bias is None or late.bias_dtype is None else cast(bias, late.bias_dtype),
    )


# The overload itself: finding it by its arguments takes longer than a small gradient.
_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default


class _Convolution(NamedTuple):
    """ATen's convolution, by its arguments after the tensors."""

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
        """Returns the gradients of input, weight and bias, as far as ``mask`` wants them."""
        gradients: Sequence[Optional[Tensor]] = _CONVOLUTION_BACKWARD(grad, input, weight, bias_sizes, *self, mask)
        return gradients


class _Linear:
    """A linear layer of an input of two dimensions."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(
        grad: Tensor, input: Tensor, weight: Tensor, bias_sizes: Optional[torch.Size], mask: Sequence[bool]
    ) -> Sequence[Optional[Tensor]]:
        """As :meth:`_Convolution.backward`."""
        wanted, weight_wanted, bias_wanted = mask
        return (
            grad.mm(weight) if wanted else None,
            grad.t().mm(input) if weight_wanted else None,
            grad.sum(0) if bias_wanted else None,
        )


class _Split(Function):
    """A convolution or linear layer whose backward gives the input's gradient and leaves the rest."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        token: Tensor,
        parameters: Tuple[Tensor, Optional[Tensor]],
        deferred_grad: DeferredGrad,
        late: _Late,
        operation: Any,
    ) -> Tensor:
        # The parameters are in one argument, in which autograd does not look for inputs.
        weight, bias = parameters
        ctx.save_for_backward(input, weight)
        ctx.deferred_grad, ctx.late, ctx.operation = deferred_grad, late, operation
        ctx.bias_sizes = None if bias is None else bias.shape
        ctx.set_materialize_grads(False)
        output: Tensor = operation.forward(input, weight, bias)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        late: _Late = ctx.late
        refuse_second_derivative(late.name)
        if grad is None:  # an output that no loss uses gives no gradients, not zeros
            return (None,) * len(ctx.needs_input_grad)
        operation, arguments = ctx.operation, (grad, *ctx.saved_tensors, ctx.bias_sizes)
        gradient = operation.backward(*arguments, (True, False, False))[0]

        def weight_and_bias(needs: Sequence[bool]) -> Sequence[Optional[Tensor]]:
            _, weight, bias = operation.backward(*arguments, (False, *needs))
            return _cast(weight, bias, late)

        ctx.deferred_grad.provide(weight_and_bias)
        return gradient, None, None, None, None, None
