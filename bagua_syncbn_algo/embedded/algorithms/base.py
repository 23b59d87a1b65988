"""What a Bagua algorithm is: a description (``Algorithm``), made live (``AlgorithmImpl``), known by name."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Set, Tuple

import torch

from ..bucket import BaguaBucket

__all__ = ["Algorithm", "AlgorithmImpl", "GlobalAlgorithmRegistry"]


class Algorithm:
    """A description of how to train data-parallel; holds no live state."""

    def reify(self, process_group: Any) -> AlgorithmImpl:
        """Returns the live algorithm on ``process_group``."""
        raise NotImplementedError(f"expected {type(self).__name__} to define reify (got none); define it")

    @classmethod
    def init(cls, name: str, **kwargs: Any) -> Algorithm:
        """Returns the registered algorithm ``name``, built with ``kwargs``.

        Raises:
            KeyError: for an unknown name; lists the known ones.
        """
        algorithm: Algorithm = GlobalAlgorithmRegistry.get(name)(**kwargs)
        return algorithm


class AlgorithmImpl:
    """A live algorithm: hooks that the data-parallel module calls, each made anew for every event.

    Args:
        process_group: the Bagua process group to work on.
    """

    _communication_tensor_names: Set[str]

    def __init__(self, process_group: Any) -> None:
        self.process_group = process_group

    def need_reset(self) -> bool:
        """Whether tensors, buckets and operations are to be made again; asked once a forward."""
        return False

    def init_tensors(self, bagua_ddp: Any) -> List[Any]:
        """Returns the tensors to communicate; by default the gradients, in reverse order of the parameters."""
        parameters = bagua_ddp.bagua_build_params()
        self._communication_tensor_names = {name for name, _ in parameters}
        return [
            parameter.bagua_ensure_grad().ensure_bagua_tensor(
                name, bagua_ddp.bagua_module_name, getter_closure=_get_grad, setter_closure=_set_grad
            )
            for name, parameter in reversed(parameters)
        ]

    def tensors_to_buckets(self, tensors: List[List[Any]], do_flatten: bool) -> List[BaguaBucket]:
        """Returns buckets for the suggested grouping of tensors."""
        return [BaguaBucket(group, flatten=do_flatten, name=str(i)) for i, group in enumerate(tensors)]

    def init_forward_pre_hook(self, bagua_ddp: Any) -> Callable[[Any], None]:
        """Returns what to call with the module's input before a training forward."""

        def hook(input: Any) -> None:
            pass

        return hook

    def init_backward_hook(self, bagua_ddp: Any) -> Callable[[str, torch.nn.Parameter], None]:
        """Returns what to call with a parameter's name and itself once its gradient is there."""

        def hook(parameter_name: str, parameter: Any) -> None:
            if parameter_name in self._communication_tensor_names:
                parameter.bagua_mark_communication_ready()

        return hook

    def init_post_backward_hook(self, bagua_ddp: Any) -> Callable[[], None]:
        """Returns what to call when backward is done."""

        def hook() -> None:
            bagua_ddp._bagua_backend.wait_pending_comm_ops()

        return hook

    def init_post_optimizer_step_hook(self, bagua_ddp: Any) -> Callable[[torch.optim.Optimizer], None]:
        """Returns what to call with an optimizer after its ``step()``."""

        def hook(optimizer: torch.optim.Optimizer) -> None:
            pass

        return hook

    def init_operations(self, bagua_ddp: Any, bucket: BaguaBucket) -> None:
        """Appends to ``bucket`` the operations to run once its tensors are ready."""

    # For an algorithm that communicates outside of its buckets. Not in upstream, which never calls them.

    @property
    def step_failed(self) -> bool:
        """Whether communication outside of the buckets failed on this rank since the last :meth:`recover`."""
        return False

    def communication_counts(self) -> List[int]:
        """Returns how many messages this rank has sent on each communicator of its own; as many on every rank."""
        return []

    def leave_step(self, in_forward: bool) -> bool:
        """Tells the ranks that wait for this one, outside of the buckets, that an exception broke off its step.

        Args:
            in_forward: whether it was in the forward, not in the backward.

        Returns:
            Whether there may be such ranks.
        """
        return False

    def recover(self, counts: List[Tuple[int, ...]]) -> None:
        """Brings the communicators of its own back into step.

        Args:
            counts: the :meth:`communication_counts` of all ranks.
        """


def _get_grad(parameter: Any) -> Any:
    # `zero_grad(set_to_none=True)` leaves no gradient behind, and a parameter that took no part gets none.
    return parameter.bagua_ensure_grad().grad


def _set_grad(parameter: Any, gradient: Any) -> None:
    parameter.grad = gradient


class _AlgorithmRegistry(Dict[str, Dict[str, Any]]):
    """Algorithms by name."""

    def register(self, name: str, algorithm: Callable[..., Algorithm], description: Optional[str] = None) -> None:
        """Makes ``algorithm`` known as ``name``.

        Raises:
            TypeError: for a name that is no string.
            ValueError: for a name that is taken.
        """
        if not isinstance(name, str):
            raise TypeError(f"expected the algorithm's name to be a str (got {name!r}); pass one")
        if name in self:
            raise ValueError(f"expected a new algorithm name (got {name!r}, which is registered); choose another")
        self[name] = {"algorithm": algorithm, "description": description or ""}

    def get(self, name: str) -> Callable[..., Algorithm]:  # type: ignore[override]
        """Returns the algorithm known as ``name``.

        Raises:
            KeyError: for an unknown name; lists the known ones.
        """
        if name not in self:
            raise KeyError(
                f"expected one of the algorithms {', '.join(sorted(self)) or 'none'} (got {name!r}); choose one of "
                "them or register yours"
            )
        algorithm: Callable[..., Algorithm] = self[name]["algorithm"]
        return algorithm

    def available_algorithms(self) -> List[str]:
        """Returns the known names."""
        return list(self)

    def __str__(self) -> str:
        return f"Registered Algorithms: {', '.join(self)}"


GlobalAlgorithmRegistry = _AlgorithmRegistry()
