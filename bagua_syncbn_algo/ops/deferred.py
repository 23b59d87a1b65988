"""Autograd nodes whose gradients are computed by a node created later in the forward pass.

They let backward compute weight gradients while an all-gather of statistics is in flight. Example: a normalization
followed by a convolution. Forward creates the nodes 1 to 4. Backward runs them in the order (a) to (d)::

    node 4: convolution               (a) computes its input gradient; provides its weight gradient to `weight`
      +-- token ---> node 2: weight   (c) computes the weight gradient, while the all-gather is in flight
      v
    node 3: launch                    (b) computes gradient sums, starts the all-gather; provides its wait to `finish`
      | token
      v
    node 1: finish                    (d) waits for the all-gather, computes the normalization's input gradient
      v
    nodes of earlier layers

`finish` and `weight` are :class:`DeferredGrad` nodes. A *token* is a scalar tensor that carries no gradient. It makes
the deferred node run after the node that takes the token and *provides* the function that computes the gradients.

Of the nodes that are ready, the autograd engine runs the one created last. After (a), `launch` and `weight` are ready.
After (b), `weight` and `finish` are ready. In another order the gradients would be the same, without the overlap.
"""

from __future__ import annotations

from typing import Any, Callable, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..compat import will_run

__all__ = ["Compute", "DeferredGrad", "OverlapCandidates", "refuse_second_derivative"]

# Takes for each tensor whether its gradient is needed. Returns the gradients.
Compute = Callable[[Sequence[bool]], Sequence[Optional[Tensor]]]


class DeferredGrad:
    """An autograd node whose gradients are computed by a node created later in the forward pass.

    Each providing node has its own deferred node. A backward for some tensors only, as in ``torch.autograd.grad``, then
    runs the same nodes as without deferred gradients. An additional node could start a round in which the other ranks
    do not participate.

    Args:
        tensors: the tensors whose gradients are deferred; at least one requires a gradient.
        device: the device of the node that provides the gradients. With a token on another device, another thread of
            the autograd engine would run the deferred node.
        name: the name of the layer or round, for errors.

    Attributes:
        token: an input for the node that provides the gradients; a scalar tensor on ``device``.
    """

    def __init__(self, tensors: Sequence[Optional[Tensor]], device: torch.device, name: str) -> None:
        self.token: Tensor = _Deferred.apply((device, name), *tensors)  # type: ignore[no-untyped-call]
        self._node: Any = self.token.grad_fn

    def provide(self, compute: Compute) -> bool:
        """Provides the computation of the gradients. The backward of the node that takes the token calls this method.

        Args:
            compute: a function that returns the gradients of ``tensors``.

        Returns:
            Whether the deferred node runs in this backward pass. If not, because ``torch.autograd.grad`` requests other
            gradients, ``compute`` is not kept.
        """
        runs = will_run(self._node)
        if runs:
            self._node.compute = compute
        return runs


class OverlapCandidates:
    """Gradients that backward can compute while the all-gather of one round is in flight, for one forward.

    Attributes:
        deferred_grads: one entry for each entry of :meth:`deferrable_tensors`; empty if none was created.
    """

    def __init__(self) -> None:
        self.deferred_grads: Sequence[Optional[DeferredGrad]] = ()

    def deferrable_tensors(self, device: torch.device) -> Sequence[Optional[Sequence[Optional[Tensor]]]]:
        """Returns the tensors whose gradients backward can compute while the all-gather is in flight.

        Args:
            device: the device of the round; the tensors are on it.

        Returns:
            One entry for each candidate, in the order of the forward; ``None`` for a candidate without deferred
            gradients.
        """
        raise NotImplementedError

    def defer(self, tensors: Sequence[Optional[Tensor]], device: torch.device, name: str) -> Optional[DeferredGrad]:
        """Creates the deferred node of the round and those of all candidates.

        Args:
            tensors: the tensors whose gradients depend on the round.
            device: the device of the round.
            name: the name of the round, for errors.

        Returns:
            The deferred node of ``tensors``; ``None`` if no candidate has deferred gradients.
        """
        candidates = self.deferrable_tensors(device)
        if all(each is None for each in candidates):
            return None
        with torch.enable_grad():
            finish = DeferredGrad(tensors, device, name)  # created first: backward runs it last
            self.deferred_grads = [None if each is None else DeferredGrad(each, device, name) for each in candidates]
        return finish


class _Deferred(Function):
    @staticmethod
    def forward(ctx: Any, device_and_name: Tuple[torch.device, str], *tensors: Optional[Tensor]) -> Tensor:
        device, ctx.layer = device_and_name
        ctx.compute = None
        ctx.set_materialize_grads(False)
        return torch.empty((), device=device)

    @staticmethod
    def backward(ctx: Any, _: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        refuse_second_derivative(ctx.layer)
        compute, ctx.compute = ctx.compute, None  # released, because it holds activations
        needs = ctx.needs_input_grad[1:]
        return (None, *([None] * len(needs) if compute is None else compute(needs)))


def refuse_second_derivative(name: str) -> None:
    """Raises an error in a backward with ``create_graph=True``, whose graph would silently lack deferred gradients.

    Args:
        name: the name of the layer or round, for the error.

    Raises:
        RuntimeError: under ``create_graph=True``.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"expected a backward without create_graph through {name}, whose gradients are computed while statistics "
            "are in flight (got create_graph=True); disable the overlap with convert_sync_batchnorm(model, "
            "overlap=False) or BAGUA_SYNCBN_OVERLAP=0"
        )
