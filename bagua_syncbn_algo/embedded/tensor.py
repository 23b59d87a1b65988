"""Bagua tensors: ``torch.Tensor`` methods that register a tensor for communication.

A registered tensor is a *proxy*. A getter closure returns the *effective* tensor, which is communicated: a parameter's
gradient, for example. A setter closure replaces the effective tensor.
"""

from __future__ import annotations

from typing import Any, Callable, Optional, Tuple

import torch
from torch import Tensor

from .communication import get_backend, streams
from .core import BaguaTensorPy

__all__ = ["BaguaTensor"]

Getter = Callable[[Tensor], Tensor]
Setter = Callable[[Tensor, Tensor], None]


class BaguaTensor:
    """The methods that the import of this module adds to ``torch.Tensor``."""

    bagua_tensor_name: str
    bagua_module_name: Optional[str]

    def is_bagua_tensor(self) -> bool:
        """Returns whether this tensor is registered."""
        return hasattr(self, "_bagua_backend_tensor")

    def ensure_bagua_tensor(
        self,
        name: Optional[str] = None,
        module_name: Optional[str] = None,
        getter_closure: Optional[Getter] = None,
        setter_closure: Optional[Setter] = None,
    ) -> Any:
        """Registers this tensor in place.

        Args:
            name: a name that is unique among the tensors of a backend.
            module_name: the name of the backend's module; required for marking the tensor ready.
            getter_closure: a function from the proxy to the effective tensor; ``None`` for the identity.
            setter_closure: a function of the proxy and a tensor that replaces the effective tensor; requires a getter.

        Returns:
            This tensor.

        Raises:
            ValueError: for a setter without a getter, or if this tensor is registered with another name.
        """
        if setter_closure is not None and getter_closure is None:
            raise ValueError("expected a getter_closure with the setter_closure (got None); pass both or neither")
        if (
            self.is_bagua_tensor()
            and name is not None
            and (name, module_name)
            != (
                self.bagua_tensor_name,
                self.bagua_module_name,
            )
        ):
            raise ValueError(
                f"expected a registered tensor to keep its name (got {name!r} of {module_name!r} for "
                f"{self.bagua_tensor_name!r} of {self.bagua_module_name!r}); register another tensor. Parameters keep "
                "their names and model after with_bagua: to move them, call with_bagua on copy.deepcopy(model)"
            )
        self.bagua_tensor_name = name if name is not None else ""
        self.bagua_module_name = module_name
        self.bagua_backend = None if module_name is None else get_backend(module_name)
        self._bagua_getter_closure, self._bagua_setter_closure = getter_closure, setter_closure
        self._bagua_backend_tensor = BaguaTensorPy(name=self.bagua_tensor_name, torch_tensor=self)  # type: ignore[arg-type]
        self._bagua_bucket: Any = None
        return self

    def to_bagua_tensor(
        self,
        name: Optional[str] = None,
        module_name: Optional[str] = None,
        getter_closure: Optional[Getter] = None,
        setter_closure: Optional[Setter] = None,
    ) -> Any:
        """Returns a registered view of this tensor. The arguments are those of :meth:`ensure_bagua_tensor`."""
        tensor: Any = self
        return tensor.view(tensor.dtype).ensure_bagua_tensor(name, module_name, getter_closure, setter_closure)

    def bagua_getter_closure(self) -> Any:
        """Returns the effective tensor."""
        return self if self._bagua_getter_closure is None else self._bagua_getter_closure(self)  # type: ignore[arg-type]

    def bagua_setter_closure(self, tensor: Tensor) -> None:
        """Replaces the effective tensor with ``tensor``.

        Raises:
            RuntimeError: if this tensor was registered without a setter closure.
        """
        if self._bagua_setter_closure is None:
            raise RuntimeError(
                f"expected {self.bagua_tensor_name!r} to be registered with a setter_closure (got none); pass one"
            )
        self._bagua_setter_closure(self, tensor)  # type: ignore[arg-type]

    def bagua_backend_tensor(self) -> BaguaTensorPy:
        """Returns the tensor in the form that the backend registers."""
        return self._bagua_backend_tensor

    def bagua_ensure_grad(self) -> Any:
        """Sets the gradient of a parameter without one to zeros, and returns the parameter."""
        parameter: Any = self
        if parameter.grad is None:
            with torch.no_grad():
                parameter.grad = torch.zeros_like(parameter.data)
        return self

    def bagua_mark_communication_ready(self) -> None:
        """Marks this tensor ready once the work queued on the current stream so far is done.

        Raises:
            RuntimeError: if this tensor was registered without ``module_name``, or is in no registered bucket.
        """
        self._bagua_mark(streams().record_event())

    def bagua_mark_communication_ready_without_synchronization(self) -> None:
        """Marks this tensor ready now.

        Raises:
            RuntimeError: if this tensor was registered without ``module_name``, or is in no registered bucket.
        """
        self._bagua_mark(None)

    def bagua_set_storage(self, storage: Any, storage_offset: int = 0) -> None:
        """Moves the effective tensor to ``storage`` without copying its values.

        Args:
            storage: the storage to use.
            storage_offset: the offset in ``storage``, in elements.
        """
        with torch.no_grad():
            effective = self.bagua_getter_closure()
            if self._bagua_setter_closure is None:
                effective.set_(storage, storage_offset, effective.shape, _contiguous_strides(effective))
            else:
                moved = torch.empty(0, dtype=effective.dtype, device=effective.device)
                self.bagua_setter_closure(
                    moved.set_(storage, storage_offset, effective.shape, _contiguous_strides(effective))
                )

    def _bagua_mark(self, event: Any) -> None:
        if self.bagua_backend is None:
            raise RuntimeError(
                f"expected {self.bagua_tensor_name!r} to be registered with a module_name (got None); pass "
                "model.bagua_module_name"
            )
        self.bagua_backend.mark_communication_ready(self._bagua_backend_tensor, event)


def _contiguous_strides(tensor: Tensor) -> Tuple[int, ...]:
    return tensor.stride() if tensor.is_contiguous() else torch.empty(tensor.shape, device="meta").stride()


for _name, _method in list(vars(BaguaTensor).items()):
    if callable(_method) and not _name.startswith("__"):
        setattr(torch.Tensor, _name, _method)
