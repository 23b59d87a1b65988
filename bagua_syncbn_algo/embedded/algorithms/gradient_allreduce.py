"""Data parallelism in its plain form: gradients are averaged over all ranks while backward runs."""

from __future__ import annotations

from typing import Any

from ..bucket import BaguaBucket
from .base import Algorithm, AlgorithmImpl

__all__ = ["GradientAllReduceAlgorithm", "GradientAllReduceAlgorithmImpl"]


class GradientAllReduceAlgorithmImpl(AlgorithmImpl):
    """See :class:`GradientAllReduceAlgorithm`."""

    def __init__(self, process_group: Any, hierarchical: bool = False, average: bool = True) -> None:
        super().__init__(process_group)
        self.hierarchical, self.average = hierarchical, average

    def init_operations(self, bagua_ddp: Any, bucket: BaguaBucket) -> None:
        bucket.clear_ops()
        bucket.append_centralized_synchronous_op(
            hierarchical=self.hierarchical, average=self.average, group=self.process_group
        )


class GradientAllReduceAlgorithm(Algorithm):
    """Averages gradients over all ranks.

    Args:
        hierarchical: reduce within a node first; the embedded host runs flat and logs so.
        average: whether to average rather than sum.

    Collectives:
        One all-reduce a bucket and backward.
    """

    def __init__(self, hierarchical: bool = False, average: bool = True) -> None:
        self.hierarchical, self.average = hierarchical, average

    def reify(self, process_group: Any) -> GradientAllReduceAlgorithmImpl:
        return GradientAllReduceAlgorithmImpl(process_group, self.hierarchical, self.average)
