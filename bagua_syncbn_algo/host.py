"""The host of Bagua algorithms, exported as ``bagua``: upstream Bagua if it runs here, else the embedded host."""

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
    """Returns the host module.

    Args:
        choice: ``"auto"``, ``"upstream"`` or ``"embedded"``.

    Raises:
        ImportError: if ``choice`` is ``"upstream"`` and upstream Bagua cannot be imported.
    """
    if choice == "embedded":
        return importlib.import_module(_EMBEDDED)
    try:
        # Without CUDA, upstream Bagua may be importable, but its first native call terminates the process.
        if choice == "auto" and not torch.cuda.is_available():
            raise ImportError("CUDA is not available")
        return importlib.import_module(_UPSTREAM)
    except Exception as error:  # an incompatible native module raises other errors than ImportError
        if choice == "upstream":
            raise ImportError(
                f"expected an installed Bagua that runs on this machine with BAGUA_SYNCBN_HOST=upstream (got {error!r}"
                "); install the extra bagua_syncbn_algo[bagua] (Python < 3.10, CUDA 11), or set "
                "BAGUA_SYNCBN_HOST=embedded"
            ) from error
        logger.debug("upstream Bagua does not run on this machine (%s); using the embedded host", error)
        return importlib.import_module(_EMBEDDED)


bagua = _choose(SyncBatchNormConfig.from_env().host)
is_upstream = bagua.__name__ == _UPSTREAM


def streams() -> CpuStreams:
    """Returns the stream operations of the host, which order communication and computation."""
    if is_upstream:
        return CudaStreams()
    chosen: CpuStreams = bagua.communication.streams()
    return chosen


def statistics_group(ranks: List[int], timeout: Optional[float]) -> Any:
    """Creates a Bagua process group with a separate stream.

    Args:
        ranks: the global ranks of the group.
        timeout: the timeout in seconds; ``None`` for that of the default group. No effect under upstream Bagua.

    Returns:
        The process group.

    Collectives:
        Every rank of the world must call, in the same order.
    """
    options: Dict[str, Any] = {"stream": streams().new_stream()}
    if timeout is not None and not is_upstream:
        options["timeout"] = timedelta(seconds=timeout)
    return bagua.communication.new_group(ranks, **options)
