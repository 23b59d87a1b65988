"""Buffers and buckets of the algorithm: broadcast and errors, which name layers and ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any, Sequence, Tuple

from .comm.errors import SyncBatchNormError, explaining, first_line
from .comm.groups import default_store
from .host import bagua

__all__ = ["broadcast_buffers", "message_bucket", "running_error"]

_broadcasts: Counter[Tuple[int, ...]] = Counter()  # by the ranks of the group


def broadcast_buffers(layers: Sequence[Any], group: Any) -> None:
    """Broadcasts the buffers of rank 0 to all ranks: Bagua broadcasts parameters only.

    Args:
        layers: the layers; the same on all ranks.
        group: the Bagua process group.

    Raises:
        SyncBatchNormError: if a rank terminates or does not arrive. The message names the buffer and the rank.

    Collectives:
        One broadcast for each buffer. Every rank of ``group`` must call.
    """
    members, communicator = tuple(group.ranks), group.get_global_communicator()
    label = f"bagua_syncbn/buffers/{'_'.join(map(str, members))}"
    for layer in layers:
        for name, buffer in layer._buffers.items():
            if buffer is not None:
                _broadcasts[members] += 1
                where, sequence = f"{layer.sync_name}.{name}", _broadcasts[members]
                with explaining(
                    where, "broadcast buffers", bagua.get_rank(), members, label, sequence, default_store()
                ):
                    bagua.communication.broadcast(buffer, src=0, comm=communicator)


def message_bucket(message: Any, round_name: str, bagua_ddp: Any) -> Any:
    """Returns a bucket whose one registered tensor carries the statistics of a round."""
    name = f"syncbn.{round_name}"
    tensor = message.ensure_bagua_tensor(name, f"{bagua_ddp.bagua_module_name}/syncbn")
    return bagua.bucket.BaguaBucket([tensor], name, False)


def running_error(names: Sequence[str], error: RuntimeError) -> SyncBatchNormError:
    """Returns the error for running statistics that could not be summed over the world.

    Args:
        names: the names of the layers.
        error: the error of the bucket.
    """
    more = f" and {len(names) - 1} more layers" if len(names) > 1 else ""
    return SyncBatchNormError(
        f"expected all ranks to sum the running statistics of {names[0]}{more} after backward (got on rank "
        f"{bagua.get_rank()}: {first_line(error)}); read the output of the rank that ended first"
    )
