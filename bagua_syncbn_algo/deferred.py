"""Gradients that backward computes later than it could: while a round of statistics is in flight.

A :class:`Deferral` is one node of the backward graph for several tensors. Other nodes, created later in forward, take
its token; so backward runs it after them, whatever order the engine chooses among the rest. Each of the others leaves
in it what computes the gradients of its tensors.
"""

from __future__ import annotations

from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["Behind", "Deferral", "refuse_second_derivative"]

# Takes for each tensor whether a gradient is wanted; returns the gradients.
Compute = Callable[[Sequence[bool]], Sequence[Optional[Tensor]]]


class Deferral:
    """A node of the backward graph whose gradients other nodes, created later, provide for.

    Args:
        shares: tensors whose gradients come late, by the node that provides for them; one at least requires one. They
            are computed in this order.
        device: where the other nodes run: a token elsewhere would move this one to another thread of the engine.
        name: for errors.
    """

    def __init__(self, shares: Sequence[Sequence[Optional[Tensor]]], device: torch.device, name: str) -> None:
        self._computes: List[Optional[Compute]] = [None] * len(shares)
        sizes = [len(tensors) for tensors in shares]
        tensors = [tensor for share in shares for tensor in share]
        self.token: Tensor = _Deferred.apply(self._computes, sizes, device, name, *tensors)  # type: ignore[no-untyped-call]
        self._node = self.token.grad_fn

    def leave(self, place: int, compute: Compute) -> None:
        """Leaves what computes the gradients of the share at ``place``; the other node's backward calls it.

        It is dropped where this backward, one of ``torch.autograd.grad`` for other tensors, will not run the deferred
        node: nothing is held for it.
        """
        if _will_run(self._node):
            self._computes[place] = compute


class Behind:
    """What the backward round of statistics of some layers is to hide behind.

    Args:
        shares: tensors whose gradients backward can compute while the round is in flight.
    """

    def __init__(self, shares: Sequence[Sequence[Optional[Tensor]]]) -> None:
        self.shares = shares
        self.deferral: Optional[Deferral] = None  # of these shares, in order; there once the round is in the graph


class _Deferred(Function):
    @staticmethod
    def forward(
        ctx: Any,
        computes: List[Optional[Compute]],
        sizes: Sequence[int],
        device: torch.device,
        name: str,
        *tensors: Optional[Tensor],
    ) -> Tensor:
        ctx.computes, ctx.sizes, ctx.name = computes, sizes, name
        ctx.set_materialize_grads(False)
        return torch.empty((), device=device)

    @staticmethod
    def backward(ctx: Any, _: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        refuse_second_derivative(ctx.name)
        gradients: List[Optional[Tensor]] = [None] * 4
        for index, size in enumerate(ctx.sizes):
            compute, ctx.computes[index] = ctx.computes[index], None  # emptied: it holds activations
            position = len(gradients)
            needs = ctx.needs_input_grad[position : position + size]
            gradients += (None,) * size if compute is None else compute(needs)
        return tuple(gradients)


# Not before torch 2.0: there what is left is held until the graph is gone.
_will_run: Callable[[Any], bool] = getattr(torch._C, "_will_engine_execute_node", lambda node: True)


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
