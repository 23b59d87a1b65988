"""A Runner of MMEngine whose models have synchronized layers of this package."""

from __future__ import annotations

from typing import Any, Dict, Optional

from torch import nn

from ..convert import convert_sync_batchnorm

try:
    from mmengine.model import is_model_wrapper
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner
except ImportError as error:
    raise ImportError(
        f"expected the package mmengine for bagua_syncbn_algo.integrations.mmengine (got {error!r}); install mmengine"
    ) from error

__all__ = ["SyncBatchNormRunner"]


@RUNNERS.register_module()  # type: ignore[untyped-decorator, unused-ignore]
class SyncBatchNormRunner(Runner):
    """A Runner that converts the BatchNorm layers of its model before it wraps the model.

    Select it with ``runner_type = "SyncBatchNormRunner"`` in a config, and import this module with ``custom_imports``.
    Do not set ``sync_bn``. Without a launcher, the model is not converted.
    """

    def wrap_model(self, model_wrapper_cfg: Optional[Dict[str, Any]], model: nn.Module) -> Any:
        """Converts the layers of ``model`` in distributed training, then wraps it as the base class does.

        Args:
            model_wrapper_cfg: the configuration of the wrapper, or ``None``.
            model: the model; changed in place.

        Returns:
            The wrapped model.

        Raises:
            ValueError: if the configuration sets ``sync_bn``.

        Collectives:
            Those of the wrapper.
        """
        if self.distributed and not is_model_wrapper(model):
            if self.cfg.get("sync_bn") is not None:
                raise ValueError(
                    f"expected no sync_bn in a config of SyncBatchNormRunner (got {self.cfg.sync_bn!r}); remove it: "
                    "this runner synchronizes the BatchNorm layers"
                )
            model = convert_sync_batchnorm(model)
        return super().wrap_model(model_wrapper_cfg, model)
