"""The plugin for the Trainer of the package ``pytorch_lightning``; see also ``integrations.lightning``."""

from __future__ import annotations

from .layer_sync import SyncBatchNormPlugin

try:
    from pytorch_lightning.plugins.layer_sync import LayerSync
except ImportError as error:
    raise ImportError(
        "expected the package pytorch_lightning for bagua_syncbn_algo.integrations.pytorch_lightning "
        f"(got {error!r}); install it, or import bagua_syncbn_algo.integrations.lightning if the Trainer comes from "
        "lightning"
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

        from pytorch_lightning import Trainer

        trainer = Trainer(devices=8, strategy="ddp", plugins=[BaguaSyncBatchNorm()])  # without sync_batchnorm=True
    """
