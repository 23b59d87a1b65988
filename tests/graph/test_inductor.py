"""Tests of the pass over graphs of rounds: order, overlap, checkpointing, and Inductor's configuration."""

from __future__ import annotations

import re
from functools import partial
from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch
import torch.distributed as dist
from ranks import run_processes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bagua_syncbn_algo import convert_sync_batchnorm
from bagua_syncbn_algo.comm.recorder import record_rounds

Step = Tuple[List[Tuple[str, Tuple[str, ...]]], List[Tensor]]


class Branches(nn.Module):
    """Independent branches of convolution, normalization and a second layer: a convolution or a linear layer.

    Args:
        repeated: whether the branches are recomputed in backward.
    """

    def __init__(self, repeated: bool = False) -> None:
        super().__init__()
        self.repeated = repeated
        self.first = nn.ModuleList(nn.Conv1d(2, 3, 3, bias=bias) for bias in (True, False, True))
        self.norms = nn.ModuleList(nn.BatchNorm1d(3) for _ in range(3))
        self.second = nn.ModuleList([nn.Conv1d(3, 3, 3), nn.ConvTranspose1d(3, 3, 3, bias=False), nn.Linear(6, 4)])

    def forward(self, x: Tensor) -> Tensor:
        run = partial(checkpoint, self.branches, use_reentrant=False) if self.repeated else self.branches
        return run(x)  # type: ignore[no-any-return]

    def branches(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for first, norm, second in zip(self.first, self.norms, self.second):
            total = total + second(norm(first(x)).relu()).square().sum()
        return total


def steps(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Step:
    """Returns the rounds of a step and its gradients."""
    model.zero_grad()
    with record_rounds() as records:
        run(x).backward()
    rounds = [(each.phase, each.layers) for each in records.rounds]
    return rounds, [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]


def example(rank: int, repeated: bool = False) -> Tuple[Any, Tensor]:
    torch.manual_seed(0)
    model = convert_sync_batchnorm(Branches(repeated), coalesce=False)
    return model, torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(rank))


def scheduled(graph_pass: Any, prefer_late: bool, seen: List[Any]) -> Any:
    """Returns a backend without code generation, which runs the nodes of a graph in any order that the graph allows.

    Args:
        graph_pass: a pass over the joint graph, or ``None``.
        prefer_late: whether the nodes are sorted so that the last ones in program order run as early as possible.
        seen: gets the targets of forward and backward graphs in the order in which they run.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def partition(joint: Any, *args: Any, **kwargs: Any) -> Any:
        if graph_pass is not None:
            graph_pass(joint.graph)
        return min_cut_rematerialization_partition(joint, *args, **kwargs)

    def compile_graph(module: Any, _: Any) -> Any:
        if prefer_late:
            sort_late_first(module.graph)
            module.recompile()
        seen.append([node.target for node in module.graph.nodes])
        return module.forward

    return aot_autograd(fw_compiler=compile_graph, partition_fn=partition)


def sort_late_first(graph: Any) -> None:
    """Sorts a graph so that nodes without order between them run in reverse program order."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    done = {node for node in graph.nodes if node.op == "placeholder"}
    output = next(node for node in graph.nodes if node.op == "output")
    while nodes:
        ready = next(node for node in reversed(nodes) if all(each in done for each in node.all_input_nodes))
        nodes.remove(ready)
        done.add(ready)
        output.prepend(ready)
    graph.lint()


def any_schedule(rank: int) -> Dict[str, Step]:
    from bagua_syncbn_algo.graph.inductor import RoundsPass

    dist.init_process_group("gloo")
    model, x = example(rank)
    found = {"eager": steps(model, model, x)}
    cases = {"with": (RoundsPass(), True), "without": (None, True), "plain": (None, False)}
    cases["no overlap"] = (RoundsPass(overlap=False), True)
    for name, (graph_pass, late) in cases.items():
        torch._dynamo.reset()
        seen: List[Any] = []
        found[name] = steps(model, torch.compile(model, backend=scheduled(graph_pass, late, seen)), x)
    return found


@pytest.mark.multirank
def test_rounds_keep_the_order_of_an_eager_step_in_any_schedule() -> None:
    """Catches rounds without an order between them: a rank with another graph would meet another layer.

    The trap is a schedule that the graph allows without the pass. Without it, the test would show nothing. Gradients
    are those of the same operations, thus bitwise equal.
    """
    for found in run_processes(2, any_schedule):
        eager, gradients = found["plain"]
        assert found["eager"][0] == eager
        assert found["without"][0] != eager and sorted(found["without"][0]) == sorted(eager)
        assert found["with"][0] == eager and found["no overlap"][0] == eager
        for name in ("with", "without", "no overlap"):
            assert all(map(torch.equal, found[name][1], gradients)), name
        for value, expected in zip(found["eager"][1], gradients):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)  # float32 sums in another order
