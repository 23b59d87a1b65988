"""Picks the Bagua that runs algorithms: upstream where it can run, else the embedded host. Exports it as ``bagua``."""

from __future__ import annotations

import importlib
import logging
from datetime import timedelta
from typing import Any, Dict, List, Optional

import torch

from .config import SyncBatchNormConfig
from .embedded.streams import CpuStreams, CudaStreams

__all__ = ["bagua", "is_upstream", "statistics_group", "streams"]

logger = logging.getLogger(__name__)

_UPSTREAM = "bagua.torch_api"
_EMBEDDED = f"{__package__}.embedded.torch_api"


def _choose(choice: str) -> Any:
    """Returns the host module for ``choice``: auto, upstream or embedded."""
    if choice == "embedded":
        return importlib.import_module(_EMBEDDED)
    try:
        # On a machine without CUDA upstream's first native call ends the process: being importable is not enough.
        if choice == "auto" and not torch.cuda.is_available():
            raise ImportError("CUDA is not available")
        return importlib.import_module(_UPSTREAM)
    except Exception as error:  # a native module that does not fit raises more than ImportError
        if choice == "upstream":
            raise ImportError(
                f"expected an installed Bagua that runs here, since BAGUA_SYNCBN_HOST=upstream (got {error!r}); "
                "install the extra bagua_syncbn_algo[bagua] (Python < 3.10, CUDA 11), or set "
                "BAGUA_SYNCBN_HOST=embedded"
            ) from error
        logger.debug("upstream Bagua does not run here (%s); the embedded host does", error)
        return importlib.import_module(_EMBEDDED)


bagua = _choose(SyncBatchNormConfig.from_env().host)
is_upstream = bagua.__name__ == _UPSTREAM


def streams() -> CpuStreams:
    """Returns how communication is ordered against computation on this host."""
    if is_upstream:
        return CudaStreams()
    chosen: CpuStreams = bagua.communication.streams()
    return chosen


def statistics_group(ranks: List[int], timeout: Optional[float]) -> Any:
    """Returns a new Bagua process group with a stream of its own.

    Args:
        ranks: global ranks.
        timeout: seconds; ``None`` for the default group's. Upstream's communicators know none.

    Collectives:
        Every rank of the world must call, in the same order.
    """
    options: Dict[str, Any] = {"stream": streams().new_stream()}
    if timeout is not None and not is_upstream:
        options["timeout"] = timedelta(seconds=timeout)
    return bagua.communication.new_group(ranks, **options)
