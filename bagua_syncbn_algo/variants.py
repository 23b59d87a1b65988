"""SyncBatchNorm layers that are also instances of the BatchNorm classes of ``torch.nn``."""

from __future__ import annotations

from torch import nn

from .layer import SyncBatchNorm

__all__ = ["SyncBatchNorm1d", "SyncBatchNorm2d", "SyncBatchNorm3d"]


class SyncBatchNorm1d(SyncBatchNorm, nn.BatchNorm1d):
    """A :class:`SyncBatchNorm` that is also an instance of ``torch.nn.BatchNorm1d``.

    :func:`~bagua_syncbn_algo.convert_sync_batchnorm` replaces ``torch.nn.BatchNorm1d`` with this class. Code that finds
    layers by their class, for example to freeze them, also finds the converted layer. Arguments are those of
    :class:`SyncBatchNorm`.

    Shape:
        - Input: :math:`(N, C)` or :math:`(N, C, L)`
        - Output: the same shape
    """

    _plain, _dimensions = nn.BatchNorm1d, (2, 3)


class SyncBatchNorm2d(SyncBatchNorm, nn.BatchNorm2d):
    """A :class:`SyncBatchNorm` that is also an instance of ``torch.nn.BatchNorm2d``; see :class:`SyncBatchNorm1d`.

    Shape:
        - Input: :math:`(N, C, H, W)`
        - Output: the same shape
    """

    _plain, _dimensions = nn.BatchNorm2d, (4,)


class SyncBatchNorm3d(SyncBatchNorm, nn.BatchNorm3d):
    """A :class:`SyncBatchNorm` that is also an instance of ``torch.nn.BatchNorm3d``; see :class:`SyncBatchNorm1d`.

    Shape:
        - Input: :math:`(N, C, D, H, W)`
        - Output: the same shape
    """

    _plain, _dimensions = nn.BatchNorm3d, (5,)
