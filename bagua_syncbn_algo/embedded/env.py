"""Ranks and sizes: from ``torch.distributed`` if it is initialized, else from the launcher's environment variables."""

from __future__ import annotations

import os

import torch.distributed as dist

__all__ = ["get_default_bucket_size", "get_local_rank", "get_local_size", "get_rank", "get_world_size"]


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Returns the rank of this process in the default group, from 0 to the world size − 1."""
    return dist.get_rank() if _initialized() else int(os.environ.get("RANK", 0))


def get_world_size() -> int:
    """Returns the number of processes in the default group."""
    return dist.get_world_size() if _initialized() else int(os.environ.get("WORLD_SIZE", 1))


def get_local_rank() -> int:
    """Returns the rank of this process on its node (``LOCAL_RANK``, 0 by default)."""
    return int(os.environ.get("LOCAL_RANK", 0))


def get_local_size() -> int:
    """Returns the number of processes on this node (``LOCAL_WORLD_SIZE``, 1 by default)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def get_default_bucket_size() -> int:
    """Returns the size of a gradient bucket in bytes (``BAGUA_DEFAULT_BUCKET_SIZE``, 10 MiB by default)."""
    return int(os.environ.get("BAGUA_DEFAULT_BUCKET_SIZE", 10 * 1024**2))
