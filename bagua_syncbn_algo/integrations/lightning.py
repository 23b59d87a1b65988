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
    """The plugin of ``lightning.pytorch``; arguments and behaviour are those of :class:`.SyncBatchNormPlugin`.

    Example::

        from lightning.pytorch import Trainer

        trainer = Trainer(devices=8, strategy="ddp", plugins=[BaguaSyncBatchNorm()])  # without sync_batchnorm=True
    """
