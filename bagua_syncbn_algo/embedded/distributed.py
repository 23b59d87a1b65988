"""``torch.nn.Module.with_bagua``, which the import of this module adds."""

from __future__ import annotations

import itertools
from typing import Any, List, Optional, Sequence

import torch

from .bagua_distributed import BaguaDistributedDataParallel
from .communication import BaguaProcessGroup, _get_default_group

__all__ = ["BaguaModule"]


class BaguaModule:
    """The methods and properties that the import of this module adds to ``torch.nn.Module``."""

    def with_bagua(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        algorithm: Any,
        process_group: Optional[BaguaProcessGroup] = None,
        do_flatten: bool = True,
    ) -> Any:
        """Prepares this module for data-parallel training.

        Parameters and optimizer states are broadcast from rank 0. To exclude parameters, list their names in
        ``module._bagua_params_and_buffers_to_ignore`` before the call.

        Args:
            optimizers: the optimizers of this module.
            algorithm: the training algorithm, for example ``GradientAllReduceAlgorithm()``.
            process_group: the ranks that train together; ``None`` for the default group.
            do_flatten: whether the gradients of a bucket share contiguous memory. A gradient that a backward creates
                may move into that memory before the backward ends, so a gradient that a hook has stored may be stale.

        Returns:
            This module.

        Raises:
            TypeError: if ``algorithm`` is not an algorithm, or ``optimizers`` is not a list or tuple.
            RuntimeError: if no process group is initialized, or the ranks have different parameters.
            NotImplementedError: if a submodule has sparse gradients.

        Collectives:
            The first call for ``process_group`` creates a communicator for CPU tensors. One all-gather, one broadcast
            for each parameter, two for each optimizer, and those of the algorithm. Every rank of the group must call.
        """
        if not hasattr(algorithm, "reify"):
            raise TypeError(
                f"expected a Bagua algorithm (got {algorithm!r}); pass an instance, e.g. GradientAllReduceAlgorithm()"
            )
        if not isinstance(optimizers, (list, tuple)):
            raise TypeError(f"expected a list of optimizers (got {type(optimizers).__name__}); pass [optimizer]")
        group = _get_default_group() if process_group is None else process_group
        previous = self.__dict__.get("bagua_ddp")
        if "_bagua_module_name" not in self.__dict__ or (previous is not None and previous.module is not self):
            # There is no name yet, or the name was copied with another model.
            self._bagua_module_name = f"{type(self).__name__}_{next(_numbers)}"
        self.bagua_ddp = BaguaDistributedDataParallel(
            self,  # type: ignore[arg-type]
            optimizers,
            algorithm,
            group,
            self._bagua_module_name,
            gradient_as_bucket_view=do_flatten,
        )
        return self

    # `None` before `with_bagua` instead of an error: torch.compile reads every attribute of a module's class.

    @property
    def bagua_module_name(self) -> Optional[str]:
        """The unique name of this module; ``None`` before ``with_bagua``."""
        return self.__dict__.get("_bagua_module_name")

    @bagua_module_name.setter
    def bagua_module_name(self, name: str) -> None:
        self._bagua_module_name = name

    @property
    def bagua_algorithm(self) -> Any:
        """The live algorithm; ``None`` before ``with_bagua``."""
        return getattr(self.__dict__.get("bagua_ddp"), "bagua_algorithm", None)

    @property
    def bagua_optimizers(self) -> Optional[List[torch.optim.Optimizer]]:
        """The optimizers given to ``with_bagua``; ``None`` before."""
        return getattr(self.__dict__.get("bagua_ddp"), "bagua_optimizers", None)

    @property
    def bagua_buckets(self) -> Optional[List[Any]]:
        """The gradient buckets; ``None`` before ``with_bagua``."""
        return getattr(self.__dict__.get("bagua_ddp"), "bagua_buckets", None)


_numbers = itertools.count()

for _name in ("with_bagua", "bagua_module_name", "bagua_algorithm", "bagua_optimizers", "bagua_buckets"):
    _attribute: Any = vars(BaguaModule)[_name]
    if isinstance(_attribute, property):
        # Without this, TorchScript would compile the property in every module, with or without Bagua.
        torch.jit.unused(_attribute)  # type: ignore[arg-type,unused-ignore]
    setattr(torch.nn.Module, _name, _attribute)
