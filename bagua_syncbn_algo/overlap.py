"""Hiding a backward round of statistics behind the weight gradients of the layers that follow.

The weight gradient of a convolution does not depend on the statistics of the normalization before it. Its backward is
split in two: the input gradient at once, because the statistics wait for it, and the weight gradient while they travel.
"""

from __future__ import annotations

from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .deferred import Deferral, refuse_second_derivative

__all__ = ["apply_split", "defer_weights", "is_weighted", "why_whole"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_SPLIT = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_weighted(module: nn.Module) -> bool:
    """Whether a module is of a kind whose weight gradient could be computed later."""
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))


def why_whole(module: nn.Module) -> Optional[str]:
    """Returns why the backward of a convolution or linear layer cannot be split; ``None`` if it can."""
    if type(module) not in _SPLIT:
        return f"is a {type(module).__name__}, which may do more than a layer of torch.nn"
    if "forward" in module.__dict__:
        return "has a forward of its own making"
    if any(module.__dict__.get(kind) for kind in _HOOKS):
        return "has hooks"
    if isinstance(module, _CONVOLUTIONS) and module.padding_mode == "zeros" and _padding(module) is None:
        return "pads one side more than the other"
    return None


def defer_weights(module: nn.Module, name: str, device: torch.device) -> Optional[Deferral]:
    """Defers the gradients of a layer's weight and bias, from where this is called in forward.

    Args:
        module: a convolution or linear layer.
        name: of the layer, for errors.
        device: of its input.

    Returns:
        What :func:`apply_split` takes; ``None`` where the layer is to run as it is.
    """
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    needed = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not needed or weight.device != device or why_whole(module) is not None:
        return None
    return Deferral((weight, bias), device, name)


def apply_split(module: nn.Module, input: Tensor, deferral: Optional[Deferral]) -> Tensor:
    """Runs a convolution or linear layer, its weight gradient deferred.

    Bitwise the same output and gradients as ``module(input)``.

    Args:
        module: the layer.
        input: as the layer takes it.
        deferral: from :func:`defer_weights`; ``None`` to run the layer as it is.
    """
    if deferral is None or not (torch.is_grad_enabled() and input.requires_grad):
        output: Tensor = module(input)
        return output
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    input, fixed_weight, fixed_bias = _autocast(input, weight.detach(), None if bias is None else bias.detach())
    dtypes = weight.dtype, None if bias is None else bias.dtype
    if isinstance(module, nn.Linear):
        shape = input.shape
        rows = input.reshape(-1, shape[-1])
        output = _SplitLinear.apply(  # type: ignore[no-untyped-call]
            rows, fixed_weight, fixed_bias, deferral.token, deferral, dtypes
        )
        return output.view(*shape[:-1], output.shape[-1])
    assert isinstance(module, nn.modules.conv._ConvNd)
    geometry = _Geometry(
        list(module.stride),
        [0] * len(module.stride),
        list(module.dilation),
        isinstance(module, _TRANSPOSED),
        list(module.output_padding),
        module.groups,
    )
    if module.padding_mode != "zeros":
        input = F.pad(input, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    else:
        padding = _padding(module)
        assert padding is not None
        geometry = geometry._replace(padding=padding)
    batched = input if input.dim() == weight.dim() else input.unsqueeze(0)
    output = _SplitConvolution.apply(  # type: ignore[no-untyped-call]
        batched, fixed_weight, fixed_bias, deferral.token, deferral, geometry, dtypes
    )
    return output if batched is input else output.squeeze(0)


class _Geometry(NamedTuple):
    """The arguments of ATen's convolution after its tensors."""

    stride: List[int]
    padding: List[int]
    dilation: List[int]
    transposed: bool
    output_padding: List[int]
    groups: int


def _padding(module: nn.modules.conv._ConvNd) -> Optional[List[int]]:
    """Returns the zeros on either side of each dimension; ``None`` if the sides differ."""
    if not isinstance(module.padding, str):
        return list(module.padding)
    if module.padding == "valid":
        return [0] * len(module.stride)
    whole = [dilation * (size - 1) for dilation, size in zip(module.dilation, module.kernel_size)]
    return None if any(zeros % 2 for zeros in whole) else [zeros // 2 for zeros in whole]


def _autocast(*tensors: Optional[Tensor]) -> Tuple[Any, ...]:
    """Casts as autocast does: it does not reach what an autograd Function saves."""
    device = tensors[0].device.type if tensors[0] is not None else "cpu"
    dtype = _autocast_dtype(device)
    if dtype is None:
        return tensors
    return tuple(
        tensor
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64
        else tensor.to(dtype)
        for tensor in tensors
    )


def _autocast_dtype(device: str) -> Optional[torch.dtype]:
    try:
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    except (AttributeError, TypeError):  # before torch 2.4
        if device == "cuda":
            return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None


def _cast(gradients: Sequence[Optional[Tensor]], dtypes: Sequence[Optional[torch.dtype]]) -> List[Optional[Tensor]]:
    return [None if g is None or dtype is None else g.to(dtype) for g, dtype in zip(gradients, dtypes)]


class _SplitConvolution(Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        token: Tensor,
        deferral: Deferral,
        geometry: _Geometry,
        dtypes: Sequence[Optional[torch.dtype]],
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.deferral, ctx.geometry, ctx.dtypes = deferral, geometry, dtypes
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        output: Tensor = torch.ops.aten.convolution.default(input, weight, bias, *geometry)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        refuse_second_derivative(ctx.deferral.name)
        input, weight = ctx.saved_tensors
        bias_sizes, geometry, dtypes = ctx.bias_sizes, ctx.geometry, ctx.dtypes

        def backward(mask: Sequence[bool]) -> Sequence[Optional[Tensor]]:
            gradients: Sequence[Optional[Tensor]] = torch.ops.aten.convolution_backward.default(
                grad, input, weight, bias_sizes, *geometry, mask
            )
            return gradients

        gradient = backward([True, False, False])[0]
        ctx.deferral.leave(lambda needs: _cast(backward([False, *needs])[1:], dtypes))
        return (gradient, *(None,) * 6)


class _SplitLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        token: Tensor,
        deferral: Deferral,
        dtypes: Sequence[Optional[torch.dtype]],
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.deferral, ctx.dtypes = deferral, dtypes
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        refuse_second_derivative(ctx.deferral.name)
        input, weight = ctx.saved_tensors
        dtypes = ctx.dtypes

        def weight_and_bias(needs: Sequence[bool]) -> List[Optional[Tensor]]:
            wanted, bias_wanted = needs
            return _cast([grad.t().mm(input) if wanted else None, grad.sum(0) if bias_wanted else None], dtypes)

        ctx.deferral.leave(weight_and_bias)
        return (grad.mm(weight), *(None,) * 5)
