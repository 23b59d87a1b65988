"""Buckets of Bagua tensors that are communicated together."""

from __future__ import annotations

import logging
from typing import Any, Callable, List, Optional, Sequence

import torch
from torch import Tensor

from .communication import BaguaProcessGroup, _get_default_group, get_backend, streams
from .core import BaguaBucketPy, flat_view

__all__ = ["BaguaBucket"]

logger = logging.getLogger(__name__)


class BaguaBucket:
    """A bucket of Bagua tensors of one module and dtype.

    Args:
        tensors: the registered tensors, at least one.
        name: unique name of the bucket.
        flatten: whether to move the effective tensors into contiguous memory, so that they are sent without a copy.
        alignment: the number of elements is padded to a multiple of this number.

    Attributes:
        tensors: the registered tensors, without padding.
        padding_tensor: the tensor that pads the bucket; ``None`` without padding.
        backend_tensor: the flat tensor over all effective tensors; ``None`` if the bucket is not flattened.
        backend_bucket: the bucket in the form that the backend registers.

    Raises:
        ValueError: if ``tensors`` is empty, or has tensors of several modules or dtypes.
    """

    def __init__(self, tensors: Sequence[Any], name: str, flatten: bool, alignment: int = 1) -> None:
        self.tensors, self.name, self.flatten = list(tensors), name, flatten
        modules = sorted({str(tensor.bagua_module_name) for tensor in self.tensors})
        dtypes = sorted({str(tensor.bagua_getter_closure().dtype) for tensor in self.tensors})
        if len(modules) != 1 or len(dtypes) != 1:
            raise ValueError(
                f"expected tensors of one module and one dtype in bucket {name!r} (got modules {modules}, dtypes "
                f"{dtypes}); create one bucket for each module and dtype"
            )
        self.bagua_module_name = self.tensors[0].bagua_module_name
        self._bagua_backend = get_backend(self.bagua_module_name) if self.bagua_module_name else None
        self.padding_tensor: Optional[Any] = None
        padding = -sum(tensor.bagua_getter_closure().numel() for tensor in self.tensors) % alignment
        if padding:
            like: Tensor = self.tensors[0].bagua_getter_closure()
            zeros: Any = torch.zeros(padding, dtype=like.dtype, device=like.device)
            # The backend treats tensors with this name prefix as always ready.
            self.padding_tensor = zeros.ensure_bagua_tensor(
                f"bagua_padding_tensor_bucket_{name}", self.bagua_module_name
            )
        self._all_tensors = self.tensors + ([] if self.padding_tensor is None else [self.padding_tensor])
        self.backend_tensor: Optional[Tensor] = None
        if flatten:
            self._flatten_()
        self.backend_bucket = BaguaBucketPy(name, [tensor.bagua_backend_tensor() for tensor in self._all_tensors])
        self.backend_bucket.memory = self.backend_tensor
        for tensor in self._all_tensors:
            tensor._bagua_bucket = self

    def _effective(self) -> List[Tensor]:
        return [tensor.bagua_getter_closure() for tensor in self._all_tensors]

    def flattened_tensor(self) -> Tensor:
        """Returns a new flat tensor with the values of all effective tensors and the padding."""
        return torch.cat([tensor.detach().reshape(-1) for tensor in self._effective()])

    def check_flatten(self) -> bool:
        """Returns whether the effective tensors are adjacent in memory, in order."""
        return flat_view(self._effective()) is not None

    @torch.no_grad()
    def _flatten_(self) -> None:
        if not self.check_flatten():
            flat = self.flattened_tensor()
            offset = 0
            for tensor in self._all_tensors:
                tensor.bagua_set_storage(flat.untyped_storage(), offset)
                offset += tensor.bagua_getter_closure().numel()
        self.backend_tensor = flat_view(self._effective())
        assert self.backend_tensor is not None

    def append_centralized_synchronous_op(
        self,
        hierarchical: bool = False,
        average: bool = True,
        scattergather: bool = False,
        compression: Optional[str] = None,
        group: Optional[BaguaProcessGroup] = None,
    ) -> None:
        """Appends a sum or an average over all ranks of ``group``. It runs once all tensors are marked ready.

        Args:
            hierarchical: ignored with a log message; the embedded host reduces over all ranks at once.
            average: whether to average. ``False`` sums.
            scattergather: ignored.
            compression: ignored with a log message; the embedded host sends exact values.
            group: the process group; ``None`` for the default group.

        Collectives:
            One all-reduce of the bucket, which the backend launches.
        """
        group = _get_default_group() if group is None else group
        if hierarchical:
            logger.info("bucket %s: the embedded host ignores hierarchical=True", self.name)
        self.backend_bucket.append_centralized_synchronous_op(
            group.get_global_communicator(),
            None,
            hierarchical=hierarchical,
            average=average,
            scattergather=scattergather,
            compression=compression,
        )

    def append_python_op(
        self, python_function: Callable[[str], None], group: Optional[BaguaProcessGroup] = None
    ) -> None:
        """Appends a Python function, which the backend runs after the operations that were appended before.

        Args:
            python_function: receives the name of the bucket; may change the bucket's tensors.
            group: the process group on whose stream the function runs; ``None`` for the default group.
        """
        group = _get_default_group() if group is None else group
        self.backend_bucket.append_python_op(python_function, group.stream, streams())

    def clear_ops(self) -> BaguaBucket:
        """Removes all operations and returns this bucket."""
        self.backend_bucket.clear_ops()
        return self

    def bytes(self) -> int:
        """Returns the number of bytes of the tensors, without padding."""
        tensors = [tensor.bagua_getter_closure() for tensor in self.tensors]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
