"""The algorithm interface: a description (``Algorithm``), its live form (``AlgorithmImpl``), and the registry."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Set, Tuple

import torch

from ..bucket import BaguaBucket

__all__ = ["Algorithm", "AlgorithmImpl", "GlobalAlgorithmRegistry"]


class Algorithm:
    """The description of a data-parallel training algorithm. It holds no live state."""

    def reify(self, process_group: Any) -> AlgorithmImpl:
        """Returns the live algorithm.

        Args:
            process_group: the Bagua process group over which the algorithm communicates.
        """
        raise NotImplementedError(f"expected {type(self).__name__} to define reify (got none); override reify")

    @classmethod
    def init(cls, name: str, **kwargs: Any) -> Algorithm:
        """Creates a registered algorithm.

        Args:
            name: a registered name.
            **kwargs: arguments of the algorithm's constructor.

        Raises:
            KeyError: if ``name`` is not registered. The message lists the registered names.
        """
        algorithm: Algorithm = GlobalAlgorithmRegistry.get(name)(**kwargs)
        return algorithm


class AlgorithmImpl:
    """A live algorithm.

    At each event the data-parallel module calls the matching ``init_*_hook`` method, and then the hook it returns.

    Args:
        process_group: the Bagua process group over which the algorithm communicates.
    """

    _communication_tensor_names: Set[str]

    def __init__(self, process_group: Any) -> None:
        self.process_group = process_group

    def need_reset(self) -> bool:
        """Returns whether to create tensors, buckets and operations again. Called before each forward."""
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
        """Returns one bucket for each suggested group of tensors."""
        return [BaguaBucket(group, flatten=do_flatten, name=str(i)) for i, group in enumerate(tensors)]

    def init_forward_pre_hook(self, bagua_ddp: Any) -> Callable[[Any], None]:
        """Returns the hook that is called with the module's input before each training forward."""

        def hook(input: Any) -> None:
            pass

        return hook

    def init_backward_hook(self, bagua_ddp: Any) -> Callable[[str, torch.nn.Parameter], None]:
        """Returns the hook that is called with a parameter's name and the parameter once its gradient is computed."""

        def hook(parameter_name: str, parameter: Any) -> None:
            if parameter_name in self._communication_tensor_names:
                parameter.bagua_mark_communication_ready()

        return hook

    def init_post_backward_hook(self, bagua_ddp: Any) -> Callable[[], None]:
        """Returns the hook that is called at the end of each backward."""

        def hook() -> None:
            bagua_ddp._bagua_backend.wait_pending_comm_ops()

        return hook

    def init_post_optimizer_step_hook(self, bagua_ddp: Any) -> Callable[[torch.optim.Optimizer], None]:
        """Returns the hook that is called with an optimizer after its ``step()``."""

        def hook(optimizer: torch.optim.Optimizer) -> None:
            pass

        return hook

    def init_operations(self, bagua_ddp: Any, bucket: BaguaBucket) -> None:
        """Appends the operations to ``bucket`` that run once its tensors are ready."""

    # The following methods are for algorithms that communicate outside of buckets. Upstream does not call them.

    @property
    def step_failed(self) -> bool:
        """Whether communication outside of buckets has failed on this rank since the last :meth:`recover`."""
        return False

    def message_counts(self) -> List[int]:
        """Returns the number of messages sent on each of the algorithm's own communicators.

        The list has the same length on all ranks.
        """
        return []

    def abort_step(self, in_forward: bool) -> bool:
        """Notifies ranks that wait for this rank outside of buckets that an exception interrupted its step.

        Args:
            in_forward: whether the exception interrupted the forward pass, not the backward pass.

        Returns:
            Whether other ranks may be waiting.
        """
        return False

    def recover(self, counts: List[Tuple[int, ...]]) -> None:
        """Synchronizes the algorithm's own communicators after an interrupted step.

        Args:
            counts: the :meth:`message_counts` of all ranks, in rank order.
        """


def _get_grad(parameter: Any) -> Any:
    # There is no gradient after `zero_grad(set_to_none=True)`, and for a parameter that backward did not reach.
    return parameter.bagua_ensure_grad().grad


def _set_grad(parameter: Any, gradient: Any) -> None:
    parameter.grad = gradient


class _AlgorithmRegistry(Dict[str, Dict[str, Any]]):
    """A registry of algorithms by name."""

    def register(self, name: str, algorithm: Callable[..., Algorithm], description: Optional[str] = None) -> None:
        """Registers an algorithm.

        Args:
            name: the name to register.
            algorithm: an :class:`Algorithm` subclass, or a function that returns an algorithm.
            description: a description for users.

        Raises:
            TypeError: if ``name`` is not a string.
            ValueError: if ``name`` is already registered.
        """
        if not isinstance(name, str):
            raise TypeError(f"expected the algorithm's name to be a str (got {name!r}); pass a str")
        if name in self:
            raise ValueError(f"expected a new algorithm name (got {name!r}, which is registered); choose another name")
        self[name] = {"algorithm": algorithm, "description": description or ""}

    def get(self, name: str) -> Callable[..., Algorithm]:  # type: ignore[override]
        """Returns the algorithm that is registered as ``name``.

        Raises:
            KeyError: if ``name`` is not registered. The message lists the registered names.
        """
        if name not in self:
            raise KeyError(
                f"expected one of the algorithms {', '.join(sorted(self)) or 'none'} (got {name!r}); choose one of "
                "them or register a new one"
            )
        algorithm: Callable[..., Algorithm] = self[name]["algorithm"]
        return algorithm

    def available_algorithms(self) -> List[str]:
        """Returns the registered names."""
        return list(self)

    def __str__(self) -> str:
        return f"Registered Algorithms: {', '.join(self)}"


GlobalAlgorithmRegistry = _AlgorithmRegistry()
