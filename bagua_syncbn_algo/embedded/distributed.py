"""``torch.nn.Module.with_bagua``; importing this module puts it there."""

from __future__ import annotations

import itertools
from typing import Any, List, Optional, Sequence

import torch

from .bagua_distributed import BaguaDistributedDataParallel
from .communication import BaguaProcessGroup, _get_default_group

__all__ = ["BaguaModule"]


class BaguaModule:
    """The methods and properties that ``torch.nn.Module`` gains."""

    def with_bagua(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        algorithm: Any,
        process_group: Optional[BaguaProcessGroup] = None,
        do_flatten: bool = True,
    ) -> Any:
        """Makes this module train data-parallel.

        Parameters and optimizer state are broadcast from rank 0. To leave parameters out, put their names into
        ``module._bagua_params_and_buffers_to_ignore`` before.

        Args:
            optimizers: the optimizers of this module.
            algorithm: how to communicate, e.g. ``GradientAllReduceAlgorithm()``.
            process_group: ``None`` for the default group.
            do_flatten: whether each bucket's gradients lie in one piece of memory. One that a backward has made moves
                there before that backward ends: hold on to parameters, not to gradients seen in hooks.

        Returns:
            This module.

        Raises:
            TypeError: if ``algorithm`` is no algorithm, or ``optimizers`` no sequence of optimizers.
            RuntimeError: without an initialised process group.

        Collectives:
            Broadcasts, and what the algorithm does at its start. Every rank of the group must call.
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
            # No name yet, or one that came with a copy of another model.
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

    # None before `with_bagua`, not an error: torch.compile reads every attribute that a module's class lists.

    @property
    def bagua_module_name(self) -> Optional[str]:
        """The name by which Bagua tells this module from others."""
        return self.__dict__.get("_bagua_module_name")

    @bagua_module_name.setter
    def bagua_module_name(self, name: str) -> None:
        self._bagua_module_name = name

    @property
    def bagua_algorithm(self) -> Any:
        """The live algorithm."""
        return getattr(self.__dict__.get("bagua_ddp"), "bagua_algorithm", None)

    @property
    def bagua_optimizers(self) -> Optional[List[torch.optim.Optimizer]]:
        """The optimizers given to ``with_bagua``."""
        return getattr(self.__dict__.get("bagua_ddp"), "bagua_optimizers", None)

    @property
    def bagua_buckets(self) -> Optional[List[Any]]:
        """The gradient buckets."""
        return getattr(self.__dict__.get("bagua_ddp"), "bagua_buckets", None)


_numbers = itertools.count()

for _name in ("with_bagua", "bagua_module_name", "bagua_algorithm", "bagua_optimizers", "bagua_buckets"):
    _attribute: Any = vars(BaguaModule)[_name]
    if isinstance(_attribute, property):
        torch.jit.unused(_attribute)  # type: ignore[arg-type,unused-ignore]  # or TorchScript would compile it in every module, with or without Bagua
    setattr(torch.nn.Module, _name, _attribute)
