"""The part of ``bagua.torch_api`` that algorithms use, over ``torch.distributed``.

Names and semantics are those of upstream (Bagua 0.9.2). Like upstream, the import of this module adds Bagua's methods
to ``torch.Tensor`` and ``torch.nn.Module``.
"""

from . import algorithms, bagua_distributed, bucket, communication, env, tensor
from .communication import (
    ReduceOp,
    allgather,
    allgather_inplace,
    allreduce,
    allreduce_inplace,
    barrier,
    broadcast,
    broadcast_object,
    from_torch_group,
    get_backend,
    init_process_group,
    is_initialized,
    new_group,
    reduce,
    reduce_inplace,
)
from .distributed import BaguaModule
from .env import get_local_rank, get_local_size, get_rank, get_world_size
from .tensor import BaguaTensor

__all__ = [
    "BaguaModule",
    "BaguaTensor",
    "ReduceOp",
    "algorithms",
    "allgather",
    "allgather_inplace",
    "allreduce",
    "allreduce_inplace",
    "bagua_distributed",
    "barrier",
    "broadcast",
    "broadcast_object",
    "bucket",
    "communication",
    "env",
    "from_torch_group",
    "get_backend",
    "get_local_rank",
    "get_local_size",
    "get_rank",
    "get_world_size",
    "init_process_group",
    "is_initialized",
    "new_group",
    "reduce",
    "reduce_inplace",
    "tensor",
]
