"""Tests of the embedded host, Bagua's API over torch.distributed, against torch's DistributedDataParallel."""

from __future__ import annotations

import copy
import gc
import os
import threading
import time
import weakref
from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch
import torch.distributed as dist
from ranks import run_processes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bagua_syncbn_algo import bagua


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def batch(step: int, rank: int) -> Tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 6, generator=generator), torch.randint(3, (4,), generator=generator)


def gradient_allreduce(**options: Any) -> Any:
    return bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithm(**options)


def ulps(a: Tensor, b: Tensor) -> int:
    """Returns the largest distance in units in the last place."""
    order = [t.detach().contiguous().view(torch.int32).long() for t in (a, b)]
    order = [torch.where(t < 0, -(2**31) - t, t) for t in order]
    return int((order[0] - order[1]).abs().max())


# -- against DistributedDataParallel ----------------------------------------------------------------------------------


def _five_steps(rank: int, optimizer_name: str, set_to_none: bool) -> Any:
    bagua.init_process_group()
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    }[optimizer_name]
    ours, theirs = net(seed=rank), net(seed=0)  # with_bagua must broadcast rank 0's parameters
    our_optimizer, their_optimizer = make(ours.parameters()), make(theirs.parameters())
    ours.with_bagua([our_optimizer], gradient_allreduce())
    ddp = nn.parallel.DistributedDataParallel(theirs)
    for step in range(5):
        x, target = batch(step, rank)
        for model, optimizer in ((ours, our_optimizer), (ddp, their_optimizer)):
            optimizer.zero_grad(set_to_none=set_to_none)
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
    return max(ulps(a, b) for a, b in zip(ours.parameters(), theirs.parameters())), len(ours.bagua_buckets)


@pytest.mark.multirank
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_five_steps_equal_ddp(optimizer: str, set_to_none: bool) -> None:
    """Catches gradients summed instead of averaged, parameters not broadcast, a gradient outside its bucket."""
    for distance, buckets in run_processes(
        2, _five_steps, optimizer, set_to_none, env={"BAGUA_DEFAULT_BUCKET_SIZE": "600"}
    ):
        assert distance <= 1
        assert buckets > 2


# -- semantics --------------------------------------------------------------------------------------------------------


class Recorder(bagua.algorithms.AlgorithmImpl):  # type: ignore[misc, name-defined]
    """Averages gradients and records the order of its hooks."""

    def __init__(self, process_group: Any) -> None:
        super().__init__(process_group)
        self.events: List[str] = []

    def need_reset(self) -> bool:
        self.events.append("need_reset")
        return False

    def init_tensors(self, bagua_ddp: Any) -> Any:
        self.events.append("init_tensors")
        return super().init_tensors(bagua_ddp)

    def tensors_to_buckets(self, tensors: Any, do_flatten: bool) -> Any:
        self.events.append("tensors_to_buckets")
        return super().tensors_to_buckets(tensors, do_flatten)

    def init_operations(self, bagua_ddp: Any, bucket: Any) -> None:
        self.events.append("init_operations")
        bucket.append_centralized_synchronous_op(group=self.process_group)

    def init_forward_pre_hook(self, bagua_ddp: Any) -> Any:
        return lambda input: self.events.append(f"forward {bagua_ddp.bagua_train_step_counter}")

    def init_backward_hook(self, bagua_ddp: Any) -> Any:
        mark = super().init_backward_hook(bagua_ddp)

        def hook(name: str, parameter: Any) -> None:
            self.events.append(f"gradient {name}")
            mark(name, parameter)

        return hook

    def init_post_backward_hook(self, bagua_ddp: Any) -> Any:
        wait = super().init_post_backward_hook(bagua_ddp)

        def hook() -> None:
            self.events.append("post_backward")
            wait()

        return hook

    def init_post_optimizer_step_hook(self, bagua_ddp: Any) -> Any:
        return lambda optimizer: self.events.append("post_step")


class RecorderAlgorithm(bagua.algorithms.Algorithm):  # type: ignore[misc, name-defined]
    def reify(self, process_group: Any) -> Recorder:
        return Recorder(process_group)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.head, self.body, self.reentrant = nn.Linear(6, 6), nn.Linear(6, 6), reentrant

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.body, self.head(x).tanh(), use_reentrant=self.reentrant)
        return y


class RootParameter(nn.Module):
    """A root module with a parameter, a parameter that is never used, and a submodule that is used on request."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.unused = nn.Parameter(torch.ones(2))
        self.sometimes = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor, use: bool = True) -> Dict[str, Any]:
        y = x * self.w
        return {"out": [self.sometimes(y) if use else y]}


def _semantics(rank: int) -> Any:
    bagua.init_process_group()
    report: Dict[str, Any] = {}
    ranks = (bagua.get_rank(), bagua.get_world_size(), bagua.get_local_rank(), bagua.get_local_size())
    report["ranks"] = ranks

    # collectives
    t = torch.arange(3.0) + rank
    out = torch.empty(3)
    bagua.allreduce(t, out)
    report["allreduce"] = (t.tolist(), out.tolist())
    for name in ("AVG", "MAX", "MIN", "PRODUCT"):
        t = torch.tensor([2.0 + rank])
        bagua.allreduce_inplace(t, getattr(bagua.ReduceOp, name))
        report[name] = t.item()
    t = torch.tensor([float(rank)])
    bagua.broadcast(t, src=1)
    report["broadcast"] = t.item()
    out = torch.empty(4)
    bagua.allgather(torch.tensor([1.0, 2.0]) + 10 * rank, out)
    report["allgather"] = out.tolist()
    out = torch.zeros(4)
    out[2 * rank : 2 * rank + 2] = rank + 1.0
    bagua.allgather_inplace(out)
    report["allgather_inplace"] = out.tolist()
    out = torch.zeros(1)
    bagua.reduce(torch.tensor([rank + 1.0]), out, dst=1)
    report["reduce"] = out.item()
    out = torch.tensor([rank + 1.0])
    bagua.communication.reduce_inplace(out, 0, bagua.ReduceOp.MAX)
    report["reduce_inplace"] = out.item()
    report["object"] = bagua.communication.broadcast_object({"rank": rank}, src=1)
    bagua.barrier()
    single = bagua.communication.new_group([1])
    t = torch.tensor([7.0])
    bagua.allreduce_inplace(t, comm=single.get_global_communicator())  # no effect on rank 0, which is not a member
    report["outside"] = t.item()
    pair = bagua.communication.new_group()
    report["group"] = (single.ranks, pair.ranks, pair.get_global_communicator().nranks())
    try:
        bagua.communication.new_group([0, 2])
    except ValueError as error:
        report["bad group"] = str(error)
    try:
        bagua.init_process_group()
    except RuntimeError as error:
        report["twice"] = str(error)

    # the order of hooks; evaluation runs no hooks; autograd.grad communicates nothing
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.with_bagua([optimizer], RecorderAlgorithm())
    x, _ = batch(0, rank)
    model(x).sum().backward()
    optimizer.step()
    report["events"] = list(model.bagua_algorithm.events)
    model.bagua_algorithm.events.clear()
    model.eval()(x)
    model.train()
    torch.autograd.grad(model(x.requires_grad_()).sum(), x)
    report["quiet events"] = list(model.bagua_algorithm.events)

    # re-wrapping removes the first algorithm's hooks
    first = model.bagua_algorithm
    first.events.clear()
    model.with_bagua([optimizer], gradient_allreduce())
    model.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    report["re-wrapped"] = (first.events, model[0].weight.grad.clone())

    # a parameter on the root, one unused everywhere, one unused on rank 1
    root = RootParameter()
    root.with_bagua([], gradient_allreduce(average=False))
    root(torch.ones(2, 3) * (1 + rank), use=rank == 0)["out"][0].sum().backward()
    report["root"] = (root.w.grad.clone(), root.unused.grad.clone(), root.sometimes.weight.grad.clone())
    report["root weight"] = root.sometimes.weight.detach().clone()

    # two forwards, then two backwards; accumulation without communication
    model = net()
    model.with_bagua([], gradient_allreduce())
    xs = [batch(step, rank)[0] for step in range(2)]
    losses = [model(x).pow(2).sum() for x in xs]
    for loss in losses:
        loss.backward()
    report["two backwards"] = model[0].weight.grad.clone()
    model.zero_grad()
    model.bagua_ddp.require_backward_grad_sync = False
    model(xs[0]).pow(2).sum().backward()
    report["local"] = model[0].weight.grad.clone()
    model.bagua_ddp.require_backward_grad_sync = True
    model(xs[1]).pow(2).sum().backward()
    report["accumulated"] = model[0].weight.grad.clone()
    replica = copy.deepcopy(model)
    replica(xs[0])
    report["copy counts"] = model.bagua_ddp.bagua_train_step_counter
    report["dist"] = dist.is_initialized()
    return report


@pytest.fixture(scope="module")
def semantics() -> Any:
    return run_processes(2, _semantics, env={"BAGUA_DEFAULT_BUCKET_SIZE": "600"})


@pytest.mark.multirank
def test_collectives(semantics: Any) -> None:
    """Catches a reduction, a root or an order that differs from upstream's."""
    for rank, report in enumerate(semantics):
        assert report["ranks"] == (rank, 2, rank, 2)
        assert report["allreduce"] == ([0.0 + rank, 1.0 + rank, 2.0 + rank], [1.0, 3.0, 5.0])
        assert [report[name] for name in ("AVG", "MAX", "MIN", "PRODUCT")] == [2.5, 3.0, 2.0, 6.0]
        assert report["broadcast"] == 1.0 and report["object"] == {"rank": 1}
        assert report["allgather"] == [1.0, 2.0, 11.0, 12.0] and report["allgather_inplace"] == [1.0, 1.0, 2.0, 2.0]
        assert report["reduce"] == (0.0, 3.0)[rank] and report["reduce_inplace"] == 2.0
        assert report["outside"] == 7.0
        assert report["group"] == ([1], [0, 1], 2)
        assert "expected ranks from 0 to 1 (got 2)" in report["bad group"]
        assert "expected init_process_group to be called once" in report["twice"]


@pytest.mark.multirank
def test_hooks_run_in_upstreams_order(semantics: Any) -> None:
    """Catches a hook that is missing, runs twice, or runs at another point than algorithms for upstream expect."""
    for report in semantics:
        events = report["events"]
        assert events[:2] == ["init_tensors", "tensors_to_buckets"]
        assert set(events[2 : events.index("need_reset")]) == {"init_operations"}
        step = events[events.index("need_reset") :]
        assert step[:2] == ["need_reset", "forward 1"] and step[-2:] == ["post_backward", "post_step"]
        gradients = [event.split()[1] for event in step[2:-2]]
        assert [name[0] for name in gradients] == ["4", "4", "2", "2", "0", "0"]  # the order of backward
        assert sorted(gradients) == sorted(name for name, _ in net().named_parameters())


@pytest.mark.multirank
def test_no_hooks_where_nothing_trains(semantics: Any) -> None:
    """Catches forward hooks in evaluation, and gradients that `torch.autograd.grad` overwrites by communicating."""
    for report in semantics:
        assert report["quiet events"] == ["need_reset", "need_reset", "forward 2"]


@pytest.mark.multirank
def test_wrapping_again(semantics: Any) -> None:
    """Catches two active algorithms after a second `with_bagua`: gradients averaged twice, or not at all."""
    reference = net()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    x = torch.cat([batch(0, rank)[0] for rank in range(2)])
    for _ in range(2):
        optimizer.zero_grad()
        (reference(x).sum() / 2).backward()
        expected = reference[0].weight.grad
        optimizer.step()
    for report in semantics:
        events, gradient = report["re-wrapped"]
        assert events == []
        torch.testing.assert_close(gradient, expected)


@pytest.mark.multirank
def test_unused_parameters_do_not_stall(semantics: Any) -> None:
    """Catches a bucket that waits for a gradient never computed: upstream then sends nothing and raises nothing."""
    weight = semantics[0]["root weight"]
    for report in semantics:
        w, unused, sometimes = report["root"]
        # rank 0: column sums of the linear layer, summed over 2 samples; rank 1, with inputs of 2: 2 · 2
        torch.testing.assert_close(w, 2 * weight.sum(0) + 4)
        assert torch.equal(unused, torch.zeros(2))
        torch.testing.assert_close(sometimes, torch.full((3, 3), 2.0))


@pytest.mark.multirank
def test_several_backwards(semantics: Any) -> None:
    """Catches a backward whose communication is not waited for, and gradients averaged without gradient sync."""
    reference = net()
    losses = []
    for step in range(2):
        x = torch.cat([batch(step, rank)[0] for rank in range(2)])
        losses.append(reference(x).pow(2).sum() / 2)
    (first,) = torch.autograd.grad(losses[0], [reference[0].weight], retain_graph=True)
    expected = torch.autograd.grad(sum(losses), [reference[0].weight])[0]
    for report in semantics:
        torch.testing.assert_close(report["two backwards"], expected)
        torch.testing.assert_close(report["accumulated"], expected)
        assert report["copy counts"] == 4
    assert not torch.equal(semantics[0]["local"], semantics[1]["local"])
    torch.testing.assert_close((semantics[0]["local"] + semantics[1]["local"]) / 2, first)


# -- the memory of gradients ------------------------------------------------------------------------------------------


def _moving(rank: int, has_use_count: bool) -> Any:
    """Runs five backwards of one model, with or without PyTorch's count of the users of a storage."""
    if not has_use_count:
        torch._C._storage_Use_Count = None  # type: ignore[attr-defined]
    bagua.init_process_group()
    model = net()
    model.with_bagua([], gradient_allreduce())
    parameters = list(model.parameters())

    def backward(step: int) -> List[Any]:
        model.zero_grad(set_to_none=True)
        model(batch(step, rank)[0]).pow(2).sum().backward()
        return [parameter.grad for parameter in parameters]

    shared = [t for bucket in model.bagua_buckets if len(bucket.tensors) > 1 for t in bucket.tensors]
    places = []
    for step in range(2):
        backward(step)
        places.append([parameter.grad.data_ptr() for parameter in shared])
    together = [bucket.check_flatten() for bucket in model.bagua_buckets]
    kept = backward(0)
    before = [gradient.clone() for gradient in kept]
    following = [gradient.clone() for gradient in backward(1)]
    unharmed = all(torch.equal(a, b) for a, b in zip(kept, before))
    own = [torch.zeros_like(parameter) for parameter in parameters]
    for parameter, gradient in zip(parameters, own):
        parameter.grad = gradient
    model(batch(1, rank)[0]).pow(2).sum().backward()
    return places[0] == places[1] and len(shared) > 4, together, unharmed, kept, following, own


def _expected(step: int) -> Any:
    reference = net()
    loss = sum(reference(batch(step, rank)[0]).pow(2).sum() for rank in range(2)) / 2
    return torch.autograd.grad(loss, list(reference.parameters()))


@pytest.mark.multirank
@pytest.mark.parametrize("has_use_count", [True, False])
def test_new_gradients_move_into_their_bucket(has_use_count: bool) -> None:
    """Catches gradients copied to their bucket and back at every step after ``zero_grad(set_to_none=True)``.

    Also catches errors of moving gradients: the next step overwrites an earlier gradient that the user has kept, or a
    tensor that the user has set as the gradient stays local.
    """
    reports = run_processes(2, _moving, has_use_count, env={"BAGUA_DEFAULT_BUCKET_SIZE": "600"})
    for same_place, together, unharmed, kept, following, own in reports:
        assert len(together) > 2 and all(together)
        assert same_place or not has_use_count
        assert unharmed
        torch.testing.assert_close(kept, list(_expected(0)))
        torch.testing.assert_close(following, list(_expected(1)))
        torch.testing.assert_close(own, list(_expected(1)))


def _not_flat(rank: int) -> Any:
    bagua.init_process_group()
    model = net()
    model.with_bagua([], gradient_allreduce(), do_flatten=False)
    model.zero_grad(set_to_none=True)
    seen = []
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad))
    model(batch(0, rank)[0]).pow(2).sum().backward()
    return seen[0] is model[0].weight.grad, [parameter.grad for parameter in model.parameters()]


@pytest.mark.multirank
def test_gradients_stay_where_they_are_without_flattening() -> None:
    """Catches a gradient that moves in spite of ``do_flatten=False``."""
    for stays, gradients in run_processes(2, _not_flat):
        assert stays
        torch.testing.assert_close(gradients, list(_expected(0)))


class _WithoutSetter(bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithmImpl):  # type: ignore[misc, name-defined]
    """Registers gradients with a getter closure only."""

    def init_tensors(self, bagua_ddp: Any) -> Any:
        tensors = super().init_tensors(bagua_ddp)
        for tensor in tensors:
            tensor._bagua_setter_closure = None
        return tensors


class _WithoutSetterAlgorithm(bagua.algorithms.Algorithm):  # type: ignore[misc, name-defined]
    def reify(self, process_group: Any) -> Any:
        return _WithoutSetter(process_group)


def _without_setter(rank: int) -> Any:
    bagua.init_process_group()
    model = net()
    model.with_bagua([], _WithoutSetterAlgorithm())
    model.zero_grad(set_to_none=True)
    model(batch(0, rank)[0]).pow(2).sum().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.multirank
def test_gradients_registered_without_a_setter() -> None:
    """Catches a bucket that moves gradients through a setter closure which the algorithm has not registered."""
    for gradients in run_processes(2, _without_setter, env={"BAGUA_DEFAULT_BUCKET_SIZE": "600"}):
        torch.testing.assert_close(gradients, list(_expected(0)))


# -- checkpointing ----------------------------------------------------------------------------------------------------


def _checkpointing(rank: int, reentrant: bool) -> Any:
    bagua.init_process_group()
    torch.manual_seed(0)
    model = Checkpointed(reentrant)
    model.with_bagua([], gradient_allreduce())
    x, _ = batch(0, rank)
    model(x).pow(2).sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.multirank
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_waits_for_all_gradients(reentrant: bool) -> None:
    """Catches the end of an inner reentrant backward taken for the outer end: earlier layers' gradients stay local."""
    torch.manual_seed(0)
    reference = Checkpointed(reentrant)
    x = torch.cat([batch(0, rank)[0] for rank in range(2)])
    (reference(x).pow(2).sum() / 2).backward()
    for gradients in run_processes(2, _checkpointing, reentrant):
        for gradient, parameter in zip(gradients, reference.parameters()):
            torch.testing.assert_close(gradient, parameter.grad)


# -- state and settings -----------------------------------------------------------------------------------------------


def _starting_state(rank: int) -> Any:
    bagua.init_process_group()
    model = net(seed=rank)
    model[2].weight.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1 if rank == 0 else 0.5)
    if rank == 0:  # as after loading a checkpoint on rank 0 only
        model(batch(0, 0)[0]).sum().backward()
        optimizer.step()
    ignored = model[4].bias.detach().clone()
    model._bagua_params_and_buffers_to_ignore = ["4.bias"]
    model.with_bagua([optimizer], gradient_allreduce(hierarchical=True))
    state = optimizer.state_dict()
    model(batch(1, rank)[0]).sum().backward()
    return (
        [p.detach() for p in model.parameters()],
        (state["param_groups"][0]["lr"], state["state"][0]["exp_avg"]),
        torch.equal(model[4].bias, ignored),
        model[4].bias.grad,
    )


@pytest.mark.multirank
def test_parameters_and_optimizer_state_come_from_rank_0() -> None:
    """Catches frozen parameters, learning rates or moments that differ between ranks throughout training."""
    (p0, state0, same0, bias0), (p1, state1, same1, bias1) = run_processes(2, _starting_state)
    for index, (a, b) in enumerate(zip(p0, p1)):
        assert torch.equal(a, b) == (index != 5), index  # 5 is the ignored bias
    assert state0[0] == state1[0] == 0.1 and torch.equal(state0[1], state1[1])
    assert same0 and same1
    assert bias0 is not None and bias1 is not None


def _errors(rank: int) -> Any:
    texts = {}

    def expect(name: str, call: Any) -> None:
        try:
            call()
        except Exception as error:
            texts[name] = f"{type(error).__name__}: {error}"

    model = net()
    expect("not initialized", lambda: model.with_bagua([], gradient_allreduce()))
    bagua.init_process_group()
    expect("no algorithm", lambda: model.with_bagua([], "gradient_allreduce"))
    expect("no list", lambda: model.with_bagua(torch.optim.SGD(model.parameters(), lr=1.0), gradient_allreduce()))
    expect("unknown", lambda: bagua.algorithms.Algorithm.init("gradient_allredcue"))
    sparse = nn.Embedding(3, 2, sparse=True)
    expect("sparse", lambda: sparse.with_bagua([], gradient_allreduce()))
    t = torch.zeros(2).ensure_bagua_tensor("t")
    expect("mark", t.bagua_mark_communication_ready)
    expect("rename", lambda: t.ensure_bagua_tensor("u"))
    expect("setter", lambda: torch.zeros(2).ensure_bagua_tensor("v", setter_closure=lambda p, g: None))
    double = torch.zeros(2, dtype=torch.float64).ensure_bagua_tensor("d")
    expect("dtypes", lambda: bagua.bucket.BaguaBucket([t, double], "b", flatten=False))
    expect("taken", lambda: bagua.algorithms.GlobalAlgorithmRegistry.register("sync_batchnorm", object))
    shared = Checkpointed(True)
    shared.head = shared.body
    shared.with_bagua([], gradient_allreduce())
    expect("second", lambda: shared(torch.randn(2, 6).requires_grad_()).sum().backward())
    return texts


@pytest.mark.multirank
def test_errors_say_what_was_expected() -> None:
    """Catches wrong usage that surfaces as an AttributeError, an assertion or a hang."""
    (texts,) = run_processes(1, _errors, env={"BAGUA_DEFAULT_BUCKET_SIZE": "1"})
    for name, start in {
        "not initialized": "RuntimeError: expected an initialized process group (got none)",
        "no algorithm": "TypeError: expected a Bagua algorithm (got 'gradient_allreduce')",
        "no list": "TypeError: expected a list of optimizers (got SGD)",
        "unknown": 'KeyError: "expected one of the algorithms gradient_allreduce, sync_batchnorm (got',
        "sparse": "NotImplementedError: expected dense gradients (got sparse=True at Embedding)",
        "mark": "RuntimeError: expected 't' to be registered with a module_name",
        "rename": "ValueError: expected a registered tensor to keep its name",
        "setter": "ValueError: expected a getter_closure with the setter_closure",
        "dtypes": "ValueError: expected tensors of one module and one dtype in bucket 'b'",
        "taken": "ValueError: expected a new algorithm name (got 'sync_batchnorm'",
        "second": "RuntimeError: expected one gradient per backward for ",
    }.items():
        assert texts.get(name, "no error").startswith(start), (name, texts.get(name))
    assert texts["rename"].endswith("call with_bagua on copy.deepcopy(model)")


def _broken_backward(rank: int) -> Any:
    bagua.init_process_group()
    model = net()
    model.with_bagua([], gradient_allreduce())
    x, _ = batch(0, rank)
    y = model(x)

    def explode(gradient: Tensor) -> None:
        raise MemoryError("in the middle of backward")

    handle = model[0].weight.register_hook(explode)
    with pytest.raises(MemoryError):
        y.sum().backward()
    handle.remove()
    model.zero_grad()
    model(x).sum().backward()
    return model[0].weight.grad, os.environ["RANK"]


@pytest.mark.multirank
def test_a_step_after_a_broken_backward() -> None:
    """Catches a bucket queue that an exception leaves half-processed: the next step would send the wrong buckets."""
    reference = net()
    x = torch.cat([batch(0, rank)[0] for rank in range(2)])
    (reference(x).sum() / 2).backward()
    for gradient, _ in run_processes(2, _broken_backward, env={"BAGUA_DEFAULT_BUCKET_SIZE": "1"}):
        torch.testing.assert_close(gradient, reference[0].weight.grad)


def test_a_worker_that_cannot_use_its_device_says_so(mocker: Any) -> None:
    """Catches a communication thread that ends on an error before its first bucket: the step would hang.

    The thread must use the tensors' device. The local rank may be no valid device where each rank sees only one GPU.
    """
    from bagua_syncbn_algo.embedded.core import BaguaBucketPy, BaguaCommBackendPy

    seen = []

    def set_device(device: torch.device) -> None:
        seen.append(device)
        raise RuntimeError("invalid device ordinal")

    mocker.patch.object(torch.cuda, "set_device", set_device)
    mocker.patch.object(BaguaBucketPy, "device", torch.device("cuda", 3))
    backend = BaguaCommBackendPy()
    tensor: Any = torch.zeros(2).ensure_bagua_tensor("t", "m")  # type: ignore[attr-defined]
    backend.register_ordered_buckets([BaguaBucketPy("b", [tensor.bagua_backend_tensor()])])
    backend.mark_communication_ready(tensor.bagua_backend_tensor(), None)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        backend.wait_pending_comm_ops()
    assert seen == [torch.device("cuda", 3)]


def _frozen_and_thawed(rank: int) -> Any:
    bagua.init_process_group()
    model, reference = net(), net()
    model[2].weight.requires_grad_(False)
    model.with_bagua([], gradient_allreduce())
    seen = []
    for frozen in ((2,), (0, 2), (), (4,)):
        for candidate in (model, reference):
            candidate.zero_grad(set_to_none=True)
            for index in (0, 2, 4):
                candidate[index].weight.requires_grad_(index not in frozen)
        model(batch(0, rank)[0]).sum().backward()
        (reference(torch.cat([batch(0, r)[0] for r in range(2)])).sum() / 2).backward()
        pairs = zip(model.parameters(), reference.parameters())
        seen.append(
            [
                (a.grad is None) == (b.grad is None) and (a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-6))
                for a, b in pairs
            ]
        )
    return seen


@pytest.mark.multirank
def test_parameters_frozen_and_thawed_after_with_bagua() -> None:
    """Catches a bucket that waits for a frozen parameter (then no gradient is sent), or an unfrozen one left local."""
    for seen in run_processes(2, _frozen_and_thawed):
        assert all(all(step) for step in seen), seen


def _converted(model: nn.Module) -> None:
    model.double()
    model.float()


def _reloaded(model: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def _extended(model: Any) -> None:
    torch.manual_seed(1)
    model.append(nn.Linear(3, 3))


def _changed_after_with_bagua(rank: int, change: Callable[[Any], None]) -> Any:
    bagua.init_process_group()
    model, reference = net(), net()
    model.with_bagua([], gradient_allreduce())
    model(batch(0, rank)[0]).sum().backward()
    for candidate in (model, reference):
        change(candidate)
        candidate.zero_grad(set_to_none=True)
    model(batch(0, rank)[0]).sum().backward()
    (reference(torch.cat([batch(0, r)[0] for r in range(2)])).sum() / 2).backward()
    pairs = zip(model.named_parameters(), reference.parameters())
    return [name for (name, a), b in pairs if not torch.allclose(a.grad, b.grad, atol=1e-6)]


@pytest.mark.multirank
@pytest.mark.parametrize("change", [_converted, _reloaded, _extended])
def test_parameters_changed_after_with_bagua(change: Callable[[Any], None]) -> None:
    """Catches gradients that stay local without an error, because the parameter has another node or is another one."""
    for differing in run_processes(2, _changed_after_with_bagua, change):
        assert differing == []


def _frozen_without_gradients(rank: int) -> Any:
    bagua.init_process_group()
    model = net()
    model.with_bagua([], gradient_allreduce())
    for mode, index in ((torch.no_grad, 0), (torch.inference_mode, 2)):
        model[index].requires_grad_(False)
        with mode():
            model(batch(0, rank)[0])
    model(batch(0, rank)[0]).sum().backward()
    return model[4].weight.grad


@pytest.mark.multirank
def test_a_forward_without_gradients_after_freezing() -> None:
    """Catches hooks on gradients that are registered in no_grad, where parameters have no node to accumulate into."""
    first, second = run_processes(2, _frozen_without_gradients)
    assert torch.equal(first, second)


def _copies(rank: int) -> Any:
    bagua.init_process_group()
    model = net()
    model.with_bagua([], gradient_allreduce())
    replica = copy.deepcopy(model)
    replica.with_bagua([], gradient_allreduce())
    gradients = []
    for each in (model, replica):
        each(batch(0, rank)[0]).sum().backward()
        gradients.append(each[0].weight.grad.clone())
    scripted = torch.jit.script(nn.Linear(2, 2))(torch.ones(1, 2)).shape
    return gradients, model.bagua_module_name != replica.bagua_module_name, scripted


@pytest.mark.multirank
def test_a_copy_is_wrapped_by_itself() -> None:
    """Catches a wrapped copy (such as a teacher model) that uses the hooks and buckets of the original."""
    reference = net()
    (reference(torch.cat([batch(0, rank)[0] for rank in range(2)])).sum() / 2).backward()
    for gradients, own_name, scripted in run_processes(2, _copies):
        assert own_name and tuple(scripted) == (1, 2)
        for gradient in gradients:
            torch.testing.assert_close(gradient, reference[0].weight.grad)


def _different_models(rank: int) -> None:
    bagua.init_process_group()
    model = net()
    if rank == 1:
        model.append(nn.Linear(3, 2))
    model.with_bagua([torch.optim.SGD(model.parameters(), lr=0.1)], gradient_allreduce())


@pytest.mark.multirank
def test_different_models_are_refused_before_anything_is_sent() -> None:
    """Catches a broadcast of different lengths, with which gloo ends the process or hangs."""
    for text in run_processes(2, _different_models, errors=True):
        assert "expected the same parameters on every rank (got 6 on rank 0, 8 on rank 1" in text
        assert "parameter 6: no such parameter on rank 0, 5.weight (2, 3) torch.float32 on rank 1" in text


def _two_worlds(rank: int) -> Any:
    bagua.init_process_group()
    mine = [[0, 1], [2, 3]][rank // 2]
    group = bagua.communication.new_group(mine)
    from bagua_syncbn_algo import SyncBatchNormAlgorithm, convert_sync_batchnorm

    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(2, momentum=1.0)))
    model.with_bagua([], SyncBatchNormAlgorithm(), process_group=group)
    model(torch.full((2, 2), float(rank)))
    return model[0].running_mean[0].item()


@pytest.mark.multirank
def test_two_groups_train_two_models_at_once() -> None:
    """Catches groups created at the same time under one name, which connect to each other's ranks."""
    assert run_processes(4, _two_worlds) == [0.5, 0.5, 2.5, 2.5]


def _gone(rank: int) -> Any:
    bagua.init_process_group()
    threads = threading.active_count()
    weights = []
    for _ in range(3):
        model = net()
        model.with_bagua([], gradient_allreduce())
        model(batch(0, rank)[0]).sum().backward()
        weights.append(weakref.ref(model[0].weight))
        del model
    for _ in range(3):  # gc cannot see reference cycles through native nodes: each pass can expose more
        gc.collect()
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.05)
    alive = sum(weight() is not None for weight in weights)
    dist.destroy_process_group()
    return alive, threading.active_count() - threads, bagua.is_initialized()


@pytest.mark.multirank
def test_nothing_outlives_a_model() -> None:
    """Catches models and threads that the host keeps alive, and groups that outlive destroy_process_group."""
    assert run_processes(2, _gone) == [(0, 0, False)] * 2
