"""The host of Bagua algorithms, exported as ``bagua``: upstream Bagua if it runs here, else the embedded host."""

from __future__ import annotations

import contextlib
import importlib
import logging
import weakref
from datetime import timedelta
from typing import Any, Callable, ContextManager, Dict, List, Optional, Tuple

import torch

from .comm.errors import SyncBatchNormError
from .comm.groups import default_group
from .comm.transport import state_of_channels
from .config import SyncBatchNormConfig
from .embedded.streams import CpuStreams, CudaStreams

__all__ = ["agree_on_groups", "bagua", "explaining", "is_upstream", "statistics_group", "streams"]

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


# By role, ranks and timeout, for the lifetime of the world. All ranks create and find a group in the same calls,
# independent of the models that a rank still references. A communicator has threads and connections: one for each model
# would be too many for a program that wraps a model often.
_groups: Dict[Tuple[str, Tuple[int, ...], Optional[float]], Tuple[Callable[[], Any], Any]] = {}


def explaining(communicator: Any, where: str, purpose: str) -> ContextManager[None]:
    """Returns a context that describes a failed collective; it does nothing in upstream, which explains no errors.

    Args:
        communicator: the communicator of the collective.
        where: the place in the model, for the error.
        purpose: what the ranks do together.
    """
    if not hasattr(communicator, "explaining"):
        return contextlib.nullcontext()
    return communicator.explaining(where, purpose)  # type: ignore[no-any-return]


def agree_on_groups(process_group: Any, device: torch.device, ranks_per_group: int) -> None:
    """Makes the next calls of :func:`statistics_group` create groups if an exchange over one of them has failed.

    Args:
        process_group: the Bagua process group of the training.
        device: the device of its messages.
        ranks_per_group: the number of ranks that normalize together, on this rank.

    Raises:
        SyncBatchNormError: on all ranks, if ``ranks_per_group`` differs: the ranks would create different groups. On
            the embedded host also if a rank does not arrive. The message names the ranks.

    Collectives:
        One all-gather. Every rank of the training must call.
    """
    communicator, ranks = process_group.get_global_communicator(), tuple(process_group.ranks)
    if len(ranks) <= 1:
        return
    for key in [key for key, (held, _) in _groups.items() if held() is not default_group()]:
        del _groups[key]
    # With different numbers of messages over the same ranks, the ranks are at different messages.
    own = [0, 0, ranks_per_group]
    for (_, members, _), (_, group) in _groups.items():
        failed, frames = state_of_channels(group)
        own[0] += failed
        own[1] += frames if members == ranks else 0
    rows = torch.empty(communicator.nranks() * len(own), dtype=torch.int64, device=device)
    with explaining(communicator, "the agreement on process groups", "agree on process groups for statistics"):
        bagua.communication.allgather(torch.tensor(own, dtype=torch.int64, device=device), rows, communicator)
    found = rows.view(-1, len(own)).tolist()
    if any(size != ranks_per_group for _, _, size in found):
        sizes = ", ".join(f"{row[2]} on rank {rank}" for rank, row in zip(ranks, found))
        raise SyncBatchNormError(
            f"expected one number of ranks that normalize together at the agreement on process groups (got {sizes}); "
            "use the same normalize_over (BAGUA_SYNCBN_NORMALIZE_OVER) on all ranks"
        )
    if any(failed or frames != found[0][1] for failed, frames, _ in found):
        for key in [key for key in _groups if set(key[1]) <= set(ranks)]:
            del _groups[key]


def statistics_group(role: str, ranks: List[int], timeout: Optional[float]) -> Any:
    """Returns a Bagua process group with a separate stream, for the statistics of all models.

    Args:
        role: distinguishes the groups of one model that are over the same ranks.
        ranks: the global ranks of the group.
        timeout: the timeout in seconds; ``None`` for that of the default group. No effect under upstream Bagua.

    Returns:
        The process group.

    Collectives:
        The first call creates the group. Every rank of the world must call, in the same order.
    """
    key, world = (role, tuple(ranks), timeout), default_group()
    held, group = _groups.get(key, (None, None))
    if held is not None and held() is world:
        return group
    options: Dict[str, Any] = {"stream": streams().new_stream()}
    if timeout is not None and not is_upstream:
        options["timeout"] = timedelta(seconds=timeout)
    group = bagua.communication.new_group(ranks, **options)
    _groups[key] = (lambda: None) if world is None else weakref.ref(world), group
    return group
