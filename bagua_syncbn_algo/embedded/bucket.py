"""Buckets: Bagua tensors that are communicated together."""

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
        tensors: registered tensors.
        name: unique name.
        flatten: whether to move the effective tensors into one piece of memory, so that they are sent without a copy.
        alignment: if more than 1, a padding tensor makes the number of elements a multiple of it.

    Attributes:
        tensors: as given.
        padding_tensor: ``None`` without padding.
        backend_tensor: the flat tensor over all effective tensors; ``None`` if not flattened.
        backend_bucket: what the backend knows this bucket by.

    Raises:
        ValueError: for no tensors, or tensors of several modules or dtypes.
    """

    def __init__(self, tensors: Sequence[Any], name: str, flatten: bool, alignment: int = 1) -> None:
        self.tensors, self.name, self.flatten = list(tensors), name, flatten
        modules = sorted({str(tensor.bagua_module_name) for tensor in self.tensors})
        dtypes = sorted({str(tensor.bagua_getter_closure().dtype) for tensor in self.tensors})
        if len(modules) != 1 or len(dtypes) != 1:
            raise ValueError(
                f"expected tensors of one module and one dtype in bucket {name!r} (got modules {modules}, dtypes "
                f"{dtypes}); make a bucket for each"
            )
        self.bagua_module_name = self.tensors[0].bagua_module_name
        self._bagua_backend = get_backend(self.bagua_module_name) if self.bagua_module_name else None
        self.padding_tensor: Optional[Any] = None
        padding = -sum(tensor.bagua_getter_closure().numel() for tensor in self.tensors) % alignment
        if padding:
            like: Tensor = self.tensors[0].bagua_getter_closure()
            zeros: Any = torch.zeros(padding, dtype=like.dtype, device=like.device)
            # The backend takes tensors of this name for ready at all times.
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
        """Returns a new flat tensor with the values of all effective tensors, padding included."""
        return torch.cat([tensor.detach().reshape(-1) for tensor in self._effective()])

    def check_flatten(self) -> bool:
        """Whether the effective tensors lie one behind the other in memory."""
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
        """Appends a sum or average over all ranks of ``group``, run once all tensors are marked ready.

        Args:
            hierarchical: accepted; on the embedded host it runs flat and logs so.
            average: whether to average rather than sum.
            scattergather: accepted; changes nothing here.
            compression: accepted; on the embedded host it runs exact and logs so.
            group: ``None`` for the default group.

        Collectives:
            One all-reduce of the bucket, launched by the backend.
        """
        group = _get_default_group() if group is None else group
        if hierarchical:
            logger.info("bucket %s: hierarchical communication runs flat on the embedded host", self.name)
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
        """Appends a function of the bucket's name, run by the backend after the operations before it.

        Args:
            python_function: may do anything with the bucket's tensors.
            group: on whose stream it runs; ``None`` for the default group.
        """
        group = _get_default_group() if group is None else group
        self.backend_bucket.append_python_op(python_function, group.stream, streams())

    def clear_ops(self) -> BaguaBucket:
        """Removes all operations; returns this bucket."""
        self.backend_bucket.clear_ops()
        return self

    def bytes(self) -> int:
        """Returns the size of the tensors in bytes, without padding."""
        tensors = [tensor.bagua_getter_closure() for tensor in self.tensors]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
