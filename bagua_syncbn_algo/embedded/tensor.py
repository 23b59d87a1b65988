"""Bagua tensors: ``torch.Tensor`` methods that register a tensor for communication.

A registered tensor is a *proxy*: a getter closure gives the tensor that is communicated (the *effective* tensor, a
parameter's gradient, say), a setter closure replaces it.
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
    """The methods; importing this module puts them on ``torch.Tensor``."""

    bagua_tensor_name: str
    bagua_module_name: Optional[str]

    def is_bagua_tensor(self) -> bool:
        """Whether this tensor is registered."""
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
            name: unique among the tensors of a backend.
            module_name: names the backend; needed to mark the tensor ready.
            getter_closure: maps the proxy to the effective tensor; ``None`` for the identity.
            setter_closure: replaces the effective tensor; needs a getter.

        Returns:
            This tensor.

        Raises:
            ValueError: for a setter without a getter, or another name than it has.
        """
        if setter_closure is not None and getter_closure is None:
            raise ValueError("expected a getter_closure with the setter_closure (got None); pass both, or neither")
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
                f"{self.bagua_tensor_name!r} of {self.bagua_module_name!r}); register another tensor"
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
        """Returns a registered view of this tensor; see :meth:`ensure_bagua_tensor`."""
        tensor: Any = self
        return tensor.view(tensor.dtype).ensure_bagua_tensor(name, module_name, getter_closure, setter_closure)

    def bagua_getter_closure(self) -> Any:
        """Returns the effective tensor."""
        return self if self._bagua_getter_closure is None else self._bagua_getter_closure(self)  # type: ignore[arg-type]

    def bagua_setter_closure(self, tensor: Tensor) -> None:
        """Replaces the effective tensor."""
        if self._bagua_setter_closure is None:
            raise RuntimeError(
                f"expected {self.bagua_tensor_name!r} to be registered with a setter_closure (got none); pass one"
            )
        self._bagua_setter_closure(self, tensor)  # type: ignore[arg-type]

    def bagua_backend_tensor(self) -> BaguaTensorPy:
        """Returns what the backend knows this tensor by."""
        return self._bagua_backend_tensor

    def bagua_ensure_grad(self) -> Any:
        """Gives a parameter without a gradient one of zeros; returns the parameter."""
        parameter: Any = self
        if parameter.grad is None:
            with torch.no_grad():
                parameter.grad = torch.zeros_like(parameter.data)
        return self

    def bagua_mark_communication_ready(self) -> None:
        """Tells the backend that what the current stream has been given so far makes this tensor ready."""
        self._bagua_mark(streams().record_event())

    def bagua_mark_communication_ready_without_synchronization(self) -> None:
        """Tells the backend that this tensor is ready now."""
        self._bagua_mark(None)

    def bagua_set_storage(self, storage: Any, storage_offset: int = 0) -> None:
        """Moves the effective tensor to ``storage``, without its values."""
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
