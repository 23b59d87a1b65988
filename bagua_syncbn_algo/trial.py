"""The trial run that shows whether the converter can replace a BatchNorm subclass with its own forward."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["is_act_style"]


@torch.no_grad()
def is_act_style(layer: _BatchNorm) -> bool:
    """Returns whether a trial run shows that the layer's forward is normalization, then ``drop``, then ``act``."""
    drop, act = layer._modules.get("drop"), layer._modules.get("act")
    if drop is None or act is None:
        return False
    modes = {part: part.training for part in layer.modules()}
    parameters, buffers = dict(layer._parameters), dict(layer._buffers)
    features = layer.num_features
    like = next(
        (tensor for tensor in (layer.weight, layer.running_mean) if tensor is not None), torch.empty(0, device="cpu")
    )
    if like.is_meta:
        return True  # meta tensors have no values for a trial run

    def ramp(low: float, high: float, *shape: int) -> Tensor:
        return torch.linspace(low, high, math.prod(shape), dtype=like.dtype, device=like.device).view(shape)

    try:
        layer.eval()  # no random dropout, no update of the running statistics
        # The state of a new layer makes normalization almost the identity, so that an activation before it would give
        # the same output. The trial run uses another state.
        for name, low, high in (("weight", 0.5, 2.0), ("bias", -1.0, 1.0)):
            if parameters.get(name) is not None:
                layer._parameters[name] = nn.Parameter(ramp(low, high, features))
        for name, low, high in (("running_mean", -0.5, 1.0), ("running_var", 0.5, 3.0)):
            if buffers.get(name) is not None:
                layer._buffers[name] = ramp(low, high, features)
        inner = 1 if isinstance(layer, nn.BatchNorm1d) else 3 if isinstance(layer, nn.BatchNorm3d) else 2
        probe = ramp(-2, 2, 4, features, *[1] * inner)
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
        return False  # the forward does not accept one input of the usual shape
    finally:
        layer._parameters.update(parameters)
        layer._buffers.update(buffers)
        for part, training in modes.items():
            part.training = training
