"""Synchronized batch normalization, as a Bagua algorithm and under ``DistributedDataParallel``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, List

from .comm.recorder import RoundRecord, RoundRecords, record_rounds
from .comm.wire import SyncBatchNormError
from .config import SyncBatchNormConfig
from .convert import (
    BatchNormNd,
    SyncBatchNormAct,
    convert_sync_batchnorm,
    register_conversion,
    revert_sync_batchnorm,
    sync_batchnorm_layers,
    tag_sync_batchnorm,
    tag_table,
)
from .graph.coalesce import plan_of
from .graph.plan import PlannedRound, Prediction, SyncPlan
from .graph.report import StepReport, report
from .layer import SyncBatchNorm, SyncTag
from .variants import SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d

if TYPE_CHECKING:
    from .algorithm import SyncBatchNormAlgorithm, SyncBatchNormAlgorithmImpl, enable_sync_batchnorm
    from .host import bagua
    from .join import sync_batch_norm_joinable

__version__ = "0.1.0"

__all__ = [
    "BatchNormNd",
    "PlannedRound",
    "Prediction",
    "RoundRecord",
    "RoundRecords",
    "StepReport",
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "SyncBatchNormAct",
    "SyncBatchNormAlgorithm",
    "SyncBatchNormAlgorithmImpl",
    "SyncBatchNormConfig",
    "SyncBatchNormError",
    "SyncPlan",
    "SyncTag",
    "bagua",
    "convert_sync_batchnorm",
    "enable_sync_batchnorm",
    "plan_of",
    "record_rounds",
    "register_conversion",
    "report",
    "revert_sync_batchnorm",
    "sync_batch_norm_joinable",
    "sync_batchnorm_layers",
    "tag_sync_batchnorm",
    "tag_table",
]

# Imported at first use (PEP 562): importing the package must not patch `torch.nn.Module.with_bagua`.
_LAZY = {
    "SyncBatchNormAlgorithm": "algorithm",
    "SyncBatchNormAlgorithmImpl": "algorithm",
    "enable_sync_batchnorm": "algorithm",
    "bagua": "host",
    "sync_batch_norm_joinable": "join",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "bagua":
        importlib.import_module(f"{__name__}.algorithm")  # registers "sync_batchnorm" with the host
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return sorted(set(globals()) | set(__all__))
