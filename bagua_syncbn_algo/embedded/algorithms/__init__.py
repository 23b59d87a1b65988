"""The algorithms of the embedded host."""

from . import gradient_allreduce
from .base import Algorithm, AlgorithmImpl, GlobalAlgorithmRegistry

__all__ = ["Algorithm", "AlgorithmImpl", "GlobalAlgorithmRegistry", "gradient_allreduce"]

GlobalAlgorithmRegistry.register(
    "gradient_allreduce",
    gradient_allreduce.GradientAllReduceAlgorithm,
    description="Gradients averaged over all ranks",
)
