"""``bagua_core`` for machines without CUDA: the names of upstream's native module, over the embedded host's core.

On the import path this module takes the place of upstream's compiled one. Communicators connect through the default
store of upstream's ``init_process_group``, under the unique id that upstream passes to NCCL.
"""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from bagua_syncbn_algo.embedded.core import BaguaBucketPy, BaguaCommBackendPy, BaguaTensorPy
from bagua_syncbn_algo.embedded.core import BaguaSingleCommunicatorPy as _Communicator
from bagua_syncbn_algo.embedded.streams import CpuStreams

__all__ = ["BaguaBucketPy", "BaguaCommBackendPy", "BaguaSingleCommunicatorPy", "BaguaTensorPy"]


class BaguaSingleCommunicatorPy(_Communicator):
    """A communicator with upstream's constructor."""

    def __init__(self, rank: int, nranks: int, device_id: int, stream_ptr: int, nccl_unique_id_str: str) -> None:
        from bagua.torch_api import communication

        store = dist.PrefixStore(nccl_unique_id_str, communication._default_store)
        group = dist.ProcessGroupGloo(store, rank, nranks, timedelta(seconds=60))
        super().__init__(group, None, CpuStreams())
        self._own = group  # the base class holds it weakly

    @staticmethod
    def generate_nccl_unique_id_str() -> str:
        """Returns a unique name for a communicator."""
        return uuid.uuid4().hex

    def barrier(self) -> Any:
        """Waits until every rank of the communicator has called it."""
        return self._group.barrier().wait()
