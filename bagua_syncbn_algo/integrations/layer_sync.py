"""The methods of a layer synchronization plugin, for both packages that contain Lightning."""

from __future__ import annotations

from typing import Any, Optional

from torch import nn

from ..convert import convert_sync_batchnorm, revert_sync_batchnorm

__all__ = ["SyncBatchNormPlugin"]


class SyncBatchNormPlugin:
    """Synchronizes the BatchNorm layers of a LightningModule while the Trainer fits it.

    The strategy calls the plugin after ``configure_model``, before it creates the optimizers and wraps the model. At
    the end of ``fit``, the strategy converts the layers back. Strategies for one device do not call the plugin.

    Args:
        process_group: the process group to normalize over; ``None`` for all ranks.
        coalesce: whether independent layers share a round; see :func:`~bagua_syncbn_algo.convert_sync_batchnorm`.
        overlap: whether backward rounds overlap with weight gradients.
    """

    def __init__(
        self, process_group: Optional[Any] = None, coalesce: Optional[bool] = None, overlap: Optional[bool] = None
    ) -> None:
        self.process_group, self.coalesce, self.overlap = process_group, coalesce, overlap

    def apply(self, model: nn.Module) -> nn.Module:
        """Converts the BatchNorm layers of ``model``. The Trainer calls this method before it wraps the model.

        Args:
            model: the LightningModule; changed in place.

        Returns:
            ``model``.

        Collectives:
            None.
        """
        return convert_sync_batchnorm(model, self.process_group, coalesce=self.coalesce, overlap=self.overlap)

    def revert(self, model: nn.Module) -> nn.Module:
        """Converts the layers of ``model`` back to the classes they were converted from.

        Args:
            model: the LightningModule; changed in place.

        Returns:
            ``model``.

        Collectives:
            None.
        """
        return revert_sync_batchnorm(model)
