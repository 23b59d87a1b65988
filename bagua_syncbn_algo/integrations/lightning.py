"""The plugin for the Trainer of the package ``lightning``; see also ``integrations.pytorch_lightning``."""

from __future__ import annotations

from .layer_sync import SyncBatchNormPlugin

try:
    from lightning.pytorch.plugins.layer_sync import LayerSync
except ImportError as error:
    raise ImportError(
        f"expected the package lightning for bagua_syncbn_algo.integrations.lightning (got {error!r}); install "
        "it, or import bagua_syncbn_algo.integrations.pytorch_lightning if the Trainer comes from pytorch_lightning"
    ) from error

__all__ = ["BaguaSyncBatchNorm"]


class BaguaSyncBatchNorm(SyncBatchNormPlugin, LayerSync):
    """Synchronizes the BatchNorm layers of a LightningModule while the Trainer fits it.

    The strategy calls the plugin after ``configure_model``, before it creates the optimizers and wraps the model. At
    the end of ``fit``, the strategy converts the layers back. Strategies for one device do not call the plugin.

    Args:
        process_group: the process group to normalize over; ``None`` for all ranks.
        coalesce: whether independent layers share a round; see :func:`~bagua_syncbn_algo.convert_sync_batchnorm`.
        overlap: whether backward rounds overlap with weight gradients.

    Example::

        from lightning.pytorch import Trainer

        trainer = Trainer(devices=8, strategy="ddp", plugins=[BaguaSyncBatchNorm()])  # without sync_batchnorm=True
    """
