"""Gradient all-reduce: gradients are averaged over all ranks during the backward pass."""

from __future__ import annotations

from typing import Any

from ..bucket import BaguaBucket
from .base import Algorithm, AlgorithmImpl

__all__ = ["GradientAllReduceAlgorithm", "GradientAllReduceAlgorithmImpl"]


class GradientAllReduceAlgorithmImpl(AlgorithmImpl):
    """The live form of :class:`GradientAllReduceAlgorithm`."""

    def __init__(self, process_group: Any, hierarchical: bool = False, average: bool = True) -> None:
        super().__init__(process_group)
        self.hierarchical, self.average = hierarchical, average

    def init_operations(self, bagua_ddp: Any, bucket: BaguaBucket) -> None:
        bucket.clear_ops()
        bucket.append_centralized_synchronous_op(
            hierarchical=self.hierarchical, average=self.average, group=self.process_group
        )


class GradientAllReduceAlgorithm(Algorithm):
    """The algorithm that averages gradients over all ranks.

    Args:
        hierarchical: whether to reduce within each node first. The embedded host ignores this and logs a message.
        average: whether to average gradients. ``False`` sums them.

    Collectives:
        One all-reduce for each bucket in each backward.
    """

    def __init__(self, hierarchical: bool = False, average: bool = True) -> None:
        self.hierarchical, self.average = hierarchical, average

    def reify(self, process_group: Any) -> GradientAllReduceAlgorithmImpl:
        return GradientAllReduceAlgorithmImpl(process_group, self.hierarchical, self.average)
