"""The warning about converted layers that ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` has replaced.

That function replaces every BatchNorm subclass, also a converted one, and calls no code of the layer. Therefore the
replacement is noticed later: by a regrouped forward, and by ``with_bagua``.
"""

from __future__ import annotations

import warnings
import weakref
from typing import List, Sequence

from torch import nn

__all__ = ["check_replaced", "shortened", "warn_replaced"]

_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_replaced(module: nn.Module, name: str) -> None:
    """Warns once if a module whose layers were converted has ``torch.nn.SyncBatchNorm`` layers.

    Args:
        module: a module with a regrouped forward.
        name: its qualified name.
    """
    if module in _warned:
        return
    replaced = [path for path, part in module.named_modules() if isinstance(part, nn.SyncBatchNorm)]
    if replaced:
        _warned.update(module.modules())
        warn_replaced(type(module).__name__, [f"{name}.{path}" for path in replaced], stacklevel=3)


def warn_replaced(model: str, layers: List[str], stacklevel: int = 2) -> None:
    """Warns about ``torch.nn.SyncBatchNorm`` layers in a model that should have converted ones.

    Args:
        model: the name of the model.
        layers: the names of the layers.
        stacklevel: as in ``warnings.warn``, for the caller of this function.
    """
    warnings.warn(
        f"expected {model} to have SyncBatchNorm layers of bagua_syncbn_algo (got torch.nn.SyncBatchNorm at "
        f"{shortened(layers)}; torch.nn.SyncBatchNorm.convert_sync_batchnorm replaces converted layers, too); call "
        "convert_sync_batchnorm(model) of bagua_syncbn_algo last, or omit PyTorch's conversion (in Lightning: "
        "sync_batchnorm=False)",
        stacklevel=stacklevel + 1,
    )


def shortened(names: Sequence[str]) -> str:
    """Returns the first five names as text, and the number of the others."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
