"""Gradients that backward computes later than it could: while a round of statistics is in flight.

A :class:`Deferral` is a node of the backward graph that another node, created later in forward, gives its work to. The
engine runs, of the nodes that are ready, the one that was created last; so the order of creation decides what runs
while something else is in flight. Whichever order an engine chooses, the gradients are right.
"""

from __future__ import annotations

from typing import Any, Callable, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["Behind", "Compute", "Deferral", "refuse_second_derivative"]

# Takes for each tensor whether a gradient is wanted; returns the gradients.
Compute = Callable[[Sequence[bool]], Sequence[Optional[Tensor]]]


class Deferral:
    """A node of the backward graph for whose gradients another node, created later, provides.

    One for each node that provides: a backward for some tensors only, as ``torch.autograd.grad`` has it, then runs what
    it would run without deferrals, and no more. More could be a round of statistics that other ranks do not come to.

    Args:
        tensors: whose gradients come late; one at least requires one.
        device: where the other node runs: a token elsewhere would move this one to another thread of the engine.
        name: for errors.
    """

    def __init__(self, tensors: Sequence[Optional[Tensor]], device: torch.device, name: str) -> None:
        self.token: Tensor = _Deferred.apply((device, name), *tensors)  # type: ignore[no-untyped-call]
        self._node: Any = self.token.grad_fn

    def leave(self, compute: Compute) -> bool:
        """Leaves what computes the gradients; the other node's backward calls it.

        Returns:
            Whether it is taken. It is dropped where this backward, one of ``torch.autograd.grad`` for other tensors,
            will not run the deferred node: nothing is held for it.
        """
        taken = _will_run(self._node)
        if taken:
            self._node.compute = compute
        return taken


class Behind:
    """What the backward round of statistics of some layers is to hide behind, in one forward."""

    def __init__(self) -> None:
        #: One for each share that there is; none where backward will not have a round.
        self.deferrals: Sequence[Optional[Deferral]] = ()

    def shares(self, device: torch.device) -> Sequence[Optional[Sequence[Optional[Tensor]]]]:
        """Returns tensors on ``device`` whose gradients backward can compute while the round is in flight.

        By the nodes that will provide for them, in the order of forward; ``None`` for a node that is not to.
        """
        raise NotImplementedError

    def defer(self, tensors: Sequence[Optional[Tensor]], device: torch.device, name: str) -> Optional[Deferral]:
        """Makes the deferrals of all shares; returns that of ``tensors``, the round's own, or ``None`` without a share.

        Args:
            tensors: whose gradients wait for the round.
            device: of the round.
            name: of the round, for errors.
        """
        shares = self.shares(device)
        if all(share is None for share in shares):
            return None
        # Backward comes to what was created last first: the launch, what it hides behind, and last of all the wait.
        with torch.enable_grad():
            finish = Deferral(tensors, device, name)
            self.deferrals = [None if share is None else Deferral(share, device, name) for share in shares]
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
