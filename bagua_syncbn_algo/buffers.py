"""Buffers and buckets of the algorithm: broadcast and errors, which name layers and ranks."""

from __future__ import annotations

from typing import Any, Sequence

from .comm.errors import SyncBatchNormError, first_line
from .host import bagua, explaining

__all__ = ["broadcast_buffers", "message_bucket", "running_error"]


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
    communicator = group.get_global_communicator()
    for layer in layers:
        for name, buffer in layer._buffers.items():
            if buffer is not None:
                where = f"{layer.sync_name}.{name}"
                with explaining(communicator, where, "broadcast buffers"):
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
