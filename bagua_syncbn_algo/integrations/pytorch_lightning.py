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
    """The plugin of ``pytorch_lightning``; arguments and behaviour are those of :class:`.SyncBatchNormPlugin`.

    Example::

        from pytorch_lightning import Trainer

        trainer = Trainer(devices=8, strategy="ddp", plugins=[BaguaSyncBatchNorm()])  # without sync_batchnorm=True
    """
