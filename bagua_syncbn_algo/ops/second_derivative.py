"""The derivative of a round's backward, for losses that contain gradients, such as a gradient penalty.

Backward maps the gradient ``g`` of the output, the input ``x`` and the weight ``w`` to the gradients of input, weight
and bias. Let ``x̂ = (x − μ) σ``, where ``σ`` is the inverse standard deviation, and ``⟨·⟩`` a mean over the elements of
all ranks::

    dx = w σ (g − ⟨g⟩ − x̂ ⟨g x̂⟩)        dw = Σ g x̂        db = Σ g        (sums over the elements of this rank)

Let ``u``, ``p`` and ``q`` be the gradients of a loss with respect to dx, dw and db, and ``v = w u``. The loss then
depends on ``g``, ``x`` and ``w`` like ::

    F = Σ v σ (g − ⟨g⟩ − x̂ ⟨g x̂⟩) + Σ p g x̂ + Σ q g                       (sums over the elements of all ranks)

This file contains the derivatives of F, where ``μ`` and ``σ`` depend on ``x``, too.
"""

from __future__ import annotations

from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..comm.channel import Channel
from ..comm.report import reporting_errors
from ..comm.wire import BACKWARD, SyncPoint
from .moments import LayerStatistics, cast

__all__ = ["LayerBackward", "second_derivatives"]

_SUMS = 7  # per channel, in the message


class LayerBackward(NamedTuple):
    """The backward of one layer, and the gradients of a loss with respect to its results; ``None`` for zero."""

    input: Tensor  # (N, C, ...)
    weight: Optional[Tensor]  # (C,)
    grad: Optional[Tensor]  # g: the gradient of the output
    statistics: LayerStatistics
    of_input: Optional[Tensor]  # u
    of_weight: Optional[Tensor]  # p
    of_bias: Optional[Tensor]  # q


def second_derivatives(
    layers: Sequence[LayerBackward], channel: Channel, point: SyncPoint
) -> List[Tuple[Tensor, Tensor, Optional[Tensor]]]:
    """Returns the gradients of a loss over all ranks with respect to ``grad``, ``input`` and ``weight`` of each layer.

    Args:
        layers: the layers of one round.
        channel: the ranks to normalize over.
        point: identifies the round to the other ranks.

    Raises:
        SyncBatchNormError: if another rank failed, is at another layer or did not arrive.

    Collectives:
        One all-gather of ``8 + 56C`` payload bytes for each layer. Every rank must call.
    """
    with reporting_errors(channel, point, BACKWARD):
        terms = [_Terms(layer) for layer in layers]
        payload = torch.cat([part for each in terms for part in (each.count, *each.sums)])
    (gathered,) = channel.exchange(point, BACKWARD, [payload])
    with reporting_errors(channel, point, BACKWARD):
        totals = gathered.sum(0).split_with_sizes([1 + _SUMS * each.mean.numel() for each in terms])
        return [each.gradients(total[0], total[1:].view(_SUMS, -1)) for each, total in zip(terms, totals)]


class _Terms:
    """The terms of one layer on this rank. Sums are float64, as the arithmetic of a round's statistics is."""

    def __init__(self, layer: LayerBackward) -> None:
        self.mean, self._layer = layer.statistics.mean, layer
        x = self._wide(layer.input)
        self._sigma = self._channels(layer.statistics.invstd)
        self._normalized = (x - self._channels(self.mean)) * self._sigma
        self._grad = torch.zeros_like(x) if layer.grad is None else self._wide(layer.grad)
        self._of_input = torch.zeros_like(x) if layer.of_input is None else self._wide(layer.of_input)
        self._of_weight = None if layer.of_weight is None else self._channels(self._wide(layer.of_weight))
        self._of_bias = None if layer.of_bias is None else self._channels(self._wide(layer.of_bias))
        weight = None if layer.weight is None else self._channels(self._wide(layer.weight))
        self._v = self._of_input if weight is None else self._of_input * weight
        self.count = torch.full((1,), x.numel() // x.shape[1], dtype=torch.float64, device=x.device)
        g, v, normalized = self._grad, self._v, self._normalized
        sums = [self._sum(each) for each in (g, g * normalized, v, v * normalized, v * g)]
        p = 0.0 if self._of_weight is None else self._of_weight.double().view(-1)
        self.sums = [*sums, sums[0] * p, sums[1] * p]

    def gradients(self, count: Tensor, totals: Tensor) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
        """Returns the gradients of ``grad``, ``input`` and ``weight``.

        Args:
            count: the elements per channel of all ranks.
            totals: the sums of all ranks, shape ``(7, C)``.
        """
        layer, g, v, normalized, sigma = self._layer, self._grad, self._v, self._normalized, self._sigma
        double_sigma = layer.statistics.invstd.double()
        means = totals / count
        mean_g, mean_gx, mean_v, mean_vx, mean_vg, mean_pg, mean_pgx = means.unbind(0)
        # The derivative with respect to x̂ is h = p g − σ (g ⟨v x̂⟩ + v ⟨g x̂⟩); that with respect to σ, over N, is
        # `slope`. The mean of h x̂ and `slope` together are the coefficient of x̂.
        mean_h = mean_pg - double_sigma * (mean_g * mean_vx + mean_v * mean_gx)
        mean_hx = mean_pgx - 2 * double_sigma * mean_gx * mean_vx
        slope = mean_vg - mean_g * mean_v - mean_gx * mean_vx
        per_channel: Callable[[Tensor], Tensor] = lambda each: self._channels(self._wide(each))  # noqa: E731
        own_gx, own_vx = per_channel(mean_gx), per_channel(mean_vx)
        h = -sigma * (g * own_vx + v * own_gx)
        of_grad = sigma * (v - per_channel(mean_v) - normalized * own_vx)
        if self._of_weight is not None:
            h = h + self._of_weight * g
            of_grad = of_grad + self._of_weight * normalized
        if self._of_bias is not None:
            of_grad = of_grad + self._of_bias
        of_input = sigma * (h - per_channel(mean_h) - normalized * per_channel(mean_hx + double_sigma * slope))
        of_weight = None
        if layer.weight is not None:
            # Of the weight of this rank, in its own elements: the optimizer's algorithm sums over ranks.
            own = self._of_input * sigma * (g - per_channel(mean_g) - normalized * own_gx)
            of_weight = self._sum(own).to(layer.weight.dtype)
        return cast(of_grad, layer.input.dtype), cast(of_input, layer.input.dtype), of_weight

    def _wide(self, tensor: Tensor) -> Tensor:
        return cast(tensor, self.mean.dtype)

    def _channels(self, vector: Tensor) -> Tensor:
        return vector.view((1, -1) + (1,) * (self._layer.input.dim() - 2))

    def _sum(self, tensor: Tensor) -> Tensor:
        return tensor.sum([d for d in range(tensor.dim()) if d != 1], dtype=torch.float64)
