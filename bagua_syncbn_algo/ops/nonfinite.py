"""The check for statistics that are not finite (``BAGUA_SYNCBN_CHECK=nonfinite``).

Every rank has the statistics of every rank, so all ranks find the same layer and rank without a further message. On
CUDA, the host waits for the device in every round: switch the check on to find the cause of a NaN, not permanently.
"""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

from ..comm.channel import Channel
from ..comm.wire import BACKWARD, PHASES, SyncBatchNormError, is_capturing

__all__ = ["require_finite"]


def require_finite(
    gathered: Tensor,
    channel: Channel,
    phase: int,
    names: Sequence[str],
    features: Sequence[int],
    inverse: bool = False,
) -> None:
    """Checks the statistics of all ranks, if the channel checks them.

    Args:
        gathered: two vectors of each rank, shape ``(W, 2ΣC)``: means and variances, or two gradient sums.
        channel: the channel that has received them.
        phase: ``FORWARD`` or ``BACKWARD``.
        names: the names of the layers.
        features: the numbers of channels of the layers.
        inverse: whether the second vector is ``1/√(variance + eps)``, which is 0 for an infinite variance.

    Raises:
        SyncBatchNormError: on all ranks, if a value is not finite. The message names the first layer of the round, and
            the first rank with such a value in that layer.

    Collectives:
        None. On CUDA, the host waits for the device. Inside of a captured CUDA graph there is no check.
    """
    if not channel.checks_finite or is_capturing(gathered):
        return
    both = gathered.view(len(gathered), 2, -1)
    wrong = ~torch.isfinite(both)
    if inverse:
        wrong[:, 1] |= both[:, 1] == 0
    wrong = wrong.any(1)
    if not bool(wrong.any()):
        return
    for name, part in zip(names, wrong.cpu().split(list(features), dim=1)):
        for rank, channels in zip(channel.ranks, part.unbind(0)):
            if bool(channels.any()):
                first, count = int(channels.int().argmax()), int(channels.sum())
                kind = "gradient sums" if phase == BACKWARD else "statistics"
                cause = "output gradient" if phase == BACKWARD else "input"
                raise SyncBatchNormError(
                    f"expected finite {kind} at {name} ({PHASES[phase]}) (got NaN or infinity on rank {rank} in "
                    f"{count} of {len(channels)} channels, the first is {first}); look for the first operation on that "
                    f"rank whose result is not finite, in the {cause} of this layer or before"
                )
