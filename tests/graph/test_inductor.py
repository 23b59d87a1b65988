"""Tests of the pass over graphs of rounds: order, overlap, checkpointing, and Inductor's configuration."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Tuple

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
        count: the number of branches, at most 3.
        repeated: whether the branches are recomputed in backward.
    """

    def __init__(self, count: int = 3, repeated: bool = False) -> None:
        super().__init__()
        self.repeated = repeated
        self.first = nn.ModuleList(nn.Conv1d(2, 3, 3, bias=bias) for bias in (True, False, True)[:count])
        self.norms = nn.ModuleList(nn.BatchNorm1d(3) for _ in range(count))
        second = [nn.Conv1d(3, 3, 3), nn.Linear(6, 4), nn.ConvTranspose1d(3, 3, 3, bias=False)]
        self.second = nn.ModuleList(second[:count])

    def forward(self, x: Tensor) -> Tensor:
        run = partial(checkpoint, self.branches, use_reentrant=False) if self.repeated else self.branches
        return run(x)  # type: ignore[no-any-return]

    def branches(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for first, norm, second in zip(self.first, self.norms, self.second):
            total = total + second(norm(first(x)).relu()).square().sum()
        return total


def step(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Step:
    """Returns the rounds of a step and its gradients."""
    model.zero_grad()
    with record_rounds() as records:
        run(x).backward()
    rounds = [(each.phase, each.layers) for each in records.rounds]
    return rounds, [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]


def example(rank: int, count: int = 3, repeated: bool = False, overlap: Optional[bool] = None) -> Tuple[Any, Tensor]:
    torch.manual_seed(0)
    model = convert_sync_batchnorm(Branches(count, repeated), coalesce=False, overlap=overlap)
    return model, torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(rank))


def scheduled(graph_pass: Any, prefer_late: bool, seen: List[Any]) -> Any:
    """Returns a backend without code generation, which runs the nodes of a graph in any order that the graph allows.

    Args:
        graph_pass: a pass over the joint graph, or ``None``.
        prefer_late: whether the nodes are sorted so that the last ones in program order run as early as possible.
        seen: gets the description of the forward graph and of the backward graph.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def partition(joint: Any, *args: Any, **kwargs: Any) -> Any:
        if graph_pass is not None:
            graph_pass(joint.graph)
        return min_cut_rematerialization_partition(joint, *args, **kwargs)

    def compile_graph(module: Any, _: Any) -> Any:
        if prefer_late:
            sort_late_first(module.graph)
            module.recompile()
        seen.append(described(module.graph))
        return make_boxed_func(module.forward)

    return aot_autograd(fw_compiler=compile_graph, partition_fn=partition)


def described(graph: Any) -> List[str]:
    """Returns the operations of a graph that the tests look at, in order."""
    names = {"bagua_syncbn.launch.default": "launch", "bagua_syncbn.wait.default": "wait", "aten.mm.default": "mm"}
    found = []
    for node in graph.nodes:
        if str(node.target) == "aten.convolution_backward.default":
            found.append("input gradient" if node.args[-1] == [True, False, False] else f"gradients {node.args[-1]}")
        elif str(node.target) in names:
            found.append(names[str(node.target)])
    return found


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


def any_schedule(rank: int) -> Dict[str, Tuple[Step, List[List[str]]]]:
    from bagua_syncbn_algo.graph.inductor import RoundsPass

    dist.init_process_group("gloo")
    found: Dict[str, Any] = {}
    cases: Dict[str, Any] = {"plain": (None, False), "without": (None, True), "program order": (RoundsPass(), False)}
    cases.update({"with": (RoundsPass(), True), "no overlap": (RoundsPass(), True)})
    for repeated in (False, True):
        if repeated:
            del cases["without"], cases["no overlap"]
        model, x = example(rank, repeated=repeated)
        found[f"eager{repeated}"] = step(model, model, x), []
        for name, (graph_pass, late) in cases.items():
            torch._dynamo.reset()
            if name == "no overlap":
                model, _ = example(rank, overlap=False)
            seen: List[List[str]] = []
            compiled: Any = torch.compile(model, backend=scheduled(graph_pass, late, seen))
            found[f"{name}{repeated}"] = step(model, compiled, x), seen
    return found


@pytest.fixture(scope="module")
def schedules() -> Any:
    """The rounds, gradients and graphs of each case and rank."""
    return run_processes(2, any_schedule)


@pytest.mark.multirank
def test_rounds_keep_the_order_of_an_eager_step_in_any_schedule(schedules: Any) -> None:
    """Catches rounds without an order between them: a rank with another graph would meet another layer.

    The trap is a schedule that the graph allows without the pass. Without it, the test would show nothing. Gradients
    come from the same operations, and are bitwise equal.
    """
    for found in schedules:
        (eager, expected), _ = found["eagerFalse"]
        (plain, gradients), _ = found["plainFalse"]
        (without, _), _ = found["withoutFalse"]
        assert plain == eager and without != eager and sorted(without) == sorted(eager)
        for name in ("with", "program order", "no overlap"):
            (rounds, values), _ = found[f"{name}False"]
            assert rounds == eager, name
            assert all(map(torch.equal, values, gradients)), name
        for value, other in zip(gradients, expected):
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)  # float32 sums in another order


@pytest.mark.multirank
def test_checkpointing_sends_no_round_twice(schedules: Any) -> None:
    """Catches a forward round that the partitioner repeats in backward: an eager rank sends none there.

    Without the pass, the 3 forward rounds are repeated; the test would otherwise show nothing.
    """
    for found in schedules:
        (eager, _), _ = found["eagerFalse"]
        (repeated, gradients), _ = found["plainTrue"]
        assert len(eager) == 6 and len(repeated) == 9
        for name in ("eager", "with", "program order"):
            (rounds, values), _ = found[f"{name}True"]
            assert rounds == eager, name
            if name != "eager":
                assert all(map(torch.equal, values, gradients)), name


@pytest.mark.multirank
def test_weight_gradients_are_computed_while_a_round_is_in_flight(schedules: Any) -> None:
    """Catches a convolution that is not split, a gradient that the wait does not wait for, and one without overlap."""
    window = ["input gradient", "launch", "gradients [False, True, False]", "wait"]  # the transposed convolution
    window += ["mm", "launch", "mm", "wait", "input gradient", "launch", "gradients [False, True, True]", "wait"]
    for found in schedules:
        _, (_, backward) = found["program orderFalse"]
        first = {"gradients [False, True, True]", "gradients [False, True, False]"}  # of the layers before the rounds
        assert [each for i, each in enumerate(backward) if each not in first or backward[i - 1] == "launch"] == window
        _, (_, backward) = found["no overlapFalse"]
        assert "input gradient" not in backward


class Counted:
    """Counts the calls of a pass that the user has set."""

    calls = 0


def generated_code(rank: int) -> Tuple[Step, Step, List[str], int, List[Any]]:
    import torch._inductor.config as inductor_config
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch._inductor.utils import run_and_get_code

    class UserPass(CustomGraphPass):
        def __call__(self, graph: Any) -> None:
            Counted.calls += 1

        def uuid(self) -> Any:
            return "user"

    dist.init_process_group("gloo")
    inductor_config.fx_graph_cache = False  # a graph from the cache has no code to look at
    torch._functorch.config.enable_autograd_cache = False
    inductor_config.joint_custom_pre_pass = UserPass()
    model, x = example(rank, count=2, repeated=True)
    expected = step(model, model, x)
    found, codes = run_and_get_code(step, model, torch.compile(model), x)
    setting: Any = inductor_config.joint_custom_pre_pass
    return expected, found, codes, Counted.calls, [type(setting).__name__, setting.uuid()]


@pytest.mark.multirank
def test_inductor_generates_code_in_this_order() -> None:
    """Catches a pass that is not installed or replaces the user's, and an order that Inductor does not keep.

    Inductor reads an argument of a traced call, see `_come_after`: the list ``after`` would be empty in its code.
    """
    for expected, found, codes, calls, (name, identifier) in run_processes(2, generated_code, limit=110):
        assert calls == 1 and name == "RoundsPass" and "user" in identifier
        assert found[0] == expected[0] and len(found[0]) == 4
        for value, other in zip(found[1], expected[1]):
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)  # float32 sums in another order
        forward, backward = codes
        launches = re.findall(r"bagua_syncbn\.launch\.default\(\w+, \[.*?\], \[(.*?)\]", forward)
        assert launches[0] == "" and launches[1] != ""
        pattern = r"= torch\.ops\.\w+\.(?:launch|wait|convolution_backward)\.default\(.*|extern_kernels\.mm\("
        operations = []
        for each in re.findall(pattern, backward):
            name = re.findall(r"launch|wait|mm|\[(?:True|False), .*\]", each)[-1]
            operations.append(name if not name.startswith("[") else name.replace("True", "1").replace("False", "0"))
        first, second = ["[0, 1, 0]", "[1, 0, 0]", "launch", "[0, 1, 1]", "wait"], ["mm", "launch", "mm", "wait"]
        # The gradients of the layers before the rounds follow the wait of each.
        assert operations == [*second, *first, "[0, 1, 1]"]


def configured() -> List[Any]:
    import torch._inductor.config as inductor_config

    from bagua_syncbn_algo.graph.inductor import install

    found: List[Any] = []

    def user(graph: Any) -> None:
        found.append(graph)

    install()
    first: Any = inductor_config.joint_custom_pre_pass
    install()
    found.append(inductor_config.joint_custom_pre_pass is first and isinstance(first.uuid(), tuple))
    inductor_config.joint_custom_pre_pass = [user]
    install()
    second: Any = inductor_config.joint_custom_pre_pass
    found.append(second.uuid() is None)  # a function has no identifier: no caching
    graph = torch.fx.symbolic_trace(nn.ReLU()).graph
    before = str(graph)
    second(graph)
    found[-1:] = [found[-1] is graph and str(graph) == before]
    return found


def test_installing_keeps_the_passes_of_the_user() -> None:
    """Catches a second copy of the pass, a lost pass of the user, a cached graph without it, and a changed graph."""
    import torch._inductor.config as inductor_config

    with inductor_config.patch(joint_custom_pre_pass=None):
        assert configured() == [True, True, True]


def test_training_without_a_compiler_does_not_import_it() -> None:
    """Catches an import of Inductor by a conversion: it takes seconds."""
    code = (
        "import sys, torch, bagua_syncbn_algo as b; model = b.convert_sync_batchnorm(torch.nn.BatchNorm1d(2)); "
        "model(torch.ones(2, 2)); print('torch._inductor.config' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "False"
