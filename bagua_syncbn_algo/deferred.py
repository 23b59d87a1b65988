"""Gradients that backward computes later than it could: while a round of statistics is in flight.

PyTorch's engine runs, of the nodes that are ready, the one that was created last in forward. A :class:`Deferral` is a
node created *before* another one, which takes its token: what the other one's backward leaves in the deferral runs
once everything created between the two has run that can. Whichever order an engine chooses, the gradients are right.
"""

from __future__ import annotations

from typing import Any, Callable, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["Deferral", "refuse_second_derivative"]

Gradients = Sequence[Optional[Tensor]]


class Deferral:
    """A node of the backward graph whose gradients another node, created later, provides for.

    Args:
        tensors: whose gradients come late; at least one of them requires one.
        device: where the other node runs: a token elsewhere would move this one to another thread of the engine.
        name: of the layer, for errors.
    """

    def __init__(self, tensors: Sequence[Optional[Tensor]], device: torch.device, name: str) -> None:
        cell = _Cell()
        # The token alone holds the node: whoever holds this object after backward holds no graph.
        self.token: Tensor = _Deferred.apply(cell, device, name, *tensors)  # type: ignore[no-untyped-call]
        self.name, self._cell, self._node = name, cell, self.token.grad_fn

    def leave(self, compute: Callable[[Sequence[bool]], Gradients]) -> None:
        """Leaves what computes the gradients; the other node's backward calls it.

        Args:
            compute: takes for each tensor whether a gradient is wanted. Dropped where this backward, one of
                ``torch.autograd.grad`` for other tensors, will not run the deferred node: nothing is held for it.
        """
        if _will_run(self._node):
            self._cell.compute = compute


class _Cell:
    compute: Optional[Callable[[Sequence[bool]], Gradients]] = None


class _Deferred(Function):
    @staticmethod
    def forward(ctx: Any, cell: _Cell, device: torch.device, name: str, *tensors: Optional[Tensor]) -> Tensor:
        ctx.cell, ctx.name, ctx.count = cell, name, len(tensors)
        ctx.set_materialize_grads(False)
        return torch.empty((), device=device)

    @staticmethod
    def backward(ctx: Any, _: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        refuse_second_derivative(ctx.name)
        compute, ctx.cell.compute = ctx.cell.compute, None  # emptied: it holds activations
        gradients: Gradients = (None,) * ctx.count if compute is None else compute(ctx.needs_input_grad[3:])
        return (None, None, None, *gradients)


def _will_run(node: Any) -> bool:
    ask = getattr(torch._C, "_will_engine_execute_node", None)  # not before torch 2.0
    return True if ask is None else bool(ask(node))


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
