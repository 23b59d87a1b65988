"""Gradients that backward computes while an all-gather of statistics is in flight.

A :class:`DeferredGrad` is an autograd node whose gradients are computed by a node created later in the forward pass.
Of the nodes that are ready, the autograd engine runs the one created last. So the order of creation decides what
backward computes while the all-gather is in flight::

    created in forward:   finish      weight      launch       convolution
    run in backward:         4    <--    3    <--    2     <--     1

    1  convolution   computes the input gradient, provides the weight gradient's computation to `weight`
    2  launch        sums the gradient of the normalization's output, starts the all-gather, provides to `finish`
    3  weight        computes the weight gradient, while the all-gather is in flight
    4  finish        waits for the all-gather, computes the input gradient of the normalization

`finish` and `weight` are deferred gradients. If an engine chooses another order, the gradients are still right.
"""

from __future__ import annotations

from typing import Any, Callable, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..compat import will_run

__all__ = ["Compute", "DeferredGrad", "OverlapCandidates", "refuse_second_derivative"]

# Takes for each tensor whether its gradient is needed; returns the gradients.
Compute = Callable[[Sequence[bool]], Sequence[Optional[Tensor]]]


class DeferredGrad:
    """An autograd node whose gradients are computed by a node created later in the forward pass.

    There is one for each node that provides gradients. A backward for some tensors only, as in
    ``torch.autograd.grad``, then runs the same nodes as without deferred gradients. Running more of them could start a
    round that other ranks do not take part in.

    Args:
        tensors: whose gradients are deferred; at least one requires a gradient.
        device: of the node that provides them. A token on another device would move this node to another thread of the
            engine.
        name: for errors.
    """

    def __init__(self, tensors: Sequence[Optional[Tensor]], device: torch.device, name: str) -> None:
        self.token: Tensor = _Deferred.apply((device, name), *tensors)  # type: ignore[no-untyped-call]
        self._node: Any = self.token.grad_fn

    def provide(self, compute: Compute) -> bool:
        """Provides the computation of the gradients; the backward of the other node calls this.

        Returns:
            Whether the deferred node will run in this backward. If it will not, because ``torch.autograd.grad`` asks
            for other tensors, nothing is kept.
        """
        taken = will_run(self._node)
        if taken:
            self._node.compute = compute
        return taken


class OverlapCandidates:
    """The gradients that backward can compute while the all-gather of one round is in flight, in one forward."""

    def __init__(self) -> None:
        #: One for each entry of :meth:`shares`; empty where backward will have no round.
        self.deferred_grads: Sequence[Optional[DeferredGrad]] = ()

    def shares(self, device: torch.device) -> Sequence[Optional[Sequence[Optional[Tensor]]]]:
        """Returns tensors on ``device`` whose gradients backward can compute while the all-gather is in flight.

        One entry for each node that will provide gradients, in the order of the forward; ``None`` for a node that will
        not.
        """
        raise NotImplementedError

    def defer(self, tensors: Sequence[Optional[Tensor]], device: torch.device, name: str) -> Optional[DeferredGrad]:
        """Creates the deferred gradients of all shares, and that of the round itself.

        Args:
            tensors: whose gradients wait for the round.
            device: of the round.
            name: of the round, for errors.

        Returns:
            The deferred gradient of ``tensors``; ``None`` without a share.
        """
        shares = self.shares(device)
        if all(share is None for share in shares):
            return None
        with torch.enable_grad():
            finish = DeferredGrad(tensors, device, name)  # created first: backward runs it last
            self.deferred_grads = [None if share is None else DeferredGrad(share, device, name) for share in shares]
        return finish


class _Deferred(Function):
    @staticmethod
    def forward(ctx: Any, where: Tuple[torch.device, str], *tensors: Optional[Tensor]) -> Tensor:
        device, ctx.layer = where
        ctx.compute = None
        ctx.set_materialize_grads(False)
        return torch.empty((), device=device)

    @staticmethod
    def backward(ctx: Any, _: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        refuse_second_derivative(ctx.layer)
        compute, ctx.compute = ctx.compute, None  # emptied: it holds activations
        needs = ctx.needs_input_grad[1:]
        return (None, *([None] * len(needs) if compute is None else compute(needs)))


def refuse_second_derivative(name: str) -> None:
    """Raises where backward is asked for a graph of itself: deferred gradients would silently be missing from it.

    Raises:
        RuntimeError: under ``create_graph=True``.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"expected a backward without create_graph through {name} (got create_graph=True), whose gradients are "
            "computed while statistics are in flight; switch that off by convert_sync_batchnorm(model, overlap=False) "
            "or BAGUA_SYNCBN_OVERLAP=0"
        )
