"""Tests of SyncBatchNormAlgorithm on the embedded host: binding, delegation, registered messages, switches."""

from __future__ import annotations

import logging
import os
import time
import warnings
from typing import Any, Dict

import pytest
import torch
import torch.distributed as dist
from ranks import run_processes
from torch import Tensor, nn

from bagua_syncbn_algo import (
    SyncBatchNorm,
    SyncBatchNormAlgorithm,
    SyncBatchNormConfig,
    SyncBatchNormError,
    bagua,
    convert_sync_batchnorm,
    enable_sync_batchnorm,
    sync_batchnorm_layers,
)


def net(seed: int = 0, norm: Any = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        norm(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, bias=False),
        norm(6),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )


def batch(step: int, rank: int, size: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(size, 3, 8, 8, generator=generator) * (1 + rank) + rank


def loss_of(output: Tensor) -> Tensor:
    return (output - 1).square().mean()


def single_process(steps: int, world: int) -> nn.Module:
    """Returns the model that one process trains on the whole batch: the expected result of all ranks."""
    model = net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model(torch.cat([batch(step, rank) for rank in range(world)]).double())).backward()
        optimizer.step()
    return model


def train(model: Any, rank: int, steps: int, optimizer: Any, parallel: Any = None) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss_of((parallel or model)(batch(step, rank).to(next(model.parameters()).dtype))).backward()
        optimizer.step()


def state(model: nn.Module) -> Dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _train_wrapped(rank: int, build: str) -> Any:
    bagua.init_process_group()
    model = convert_sync_batchnorm(net(seed=rank)).double()  # to be replaced by rank 0's parameters
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if rank == 1:
        model[1].running_mean.fill_(7.0)  # a buffer that differs at the start
    algorithm = {
        "default": lambda: SyncBatchNormAlgorithm(),
        "instance": lambda: SyncBatchNormAlgorithm(
            bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithm(hierarchical=True)
        ),
        "name": lambda: bagua.algorithms.Algorithm.init(
            "sync_batchnorm", inner="gradient_allreduce", hierarchical=True
        ),
    }[build]()
    model = model.with_bagua([optimizer], algorithm)
    train(model, rank, 4, optimizer)
    impl = model.bagua_algorithm
    channel = impl.channel
    messages = [bucket.tensors[0] for bucket in channel.buckets]
    return {
        "state": state(model),
        "rounds": channel.rounds,
        "messages": [(t.bagua_tensor_name, t.bagua_module_name, t.dtype, t.numel()) for t in messages],
        "sent": [bool(t.any()) for t in messages],
        "capacity": channel.capacity,
        "module": model.bagua_module_name,
        "foreign": [t.bagua_tensor_name for b in model.bagua_buckets for t in b.tensors if "syncbn" in b.name],
        "hierarchical": impl.hierarchical,
        "groups": (impl.process_group is impl.inner.process_group, impl._group is not impl.process_group),
    }


@pytest.mark.multirank
@pytest.mark.parametrize(("world", "build"), [(2, "default"), (2, "instance"), (2, "name"), (3, "default")])
def test_training_equals_one_process_on_the_whole_batch(world: int, build: str) -> None:
    """Catches a difference between training on W ranks and in one process; 1e-11 is float64 rounding in four steps.

    Also catches a registered message that is never sent, statistics among the gradient buckets (the `decentralized`
    algorithm fails on them), and arguments that do not reach the inner algorithm.
    """
    expected = state(single_process(4, world))
    for report in run_processes(world, _train_wrapped, build):
        for name, value in expected.items():
            torch.testing.assert_close(report["state"][name], value, rtol=1e-10, atol=1e-11)
        assert report["rounds"] == 4 * 2 * 2
        assert report["messages"] == [
            (f"syncbn.Sequential.{i}", report["module"] + "/syncbn", torch.uint8, report["capacity"]) for i in (1, 4)
        ]
        assert report["sent"] == [True, True] and report["foreign"] == []
        assert report["hierarchical"] is (build != "default") and report["groups"] == (True, True)


def _ddp(rank: int, how: str) -> Any:
    dist.init_process_group("gloo")
    half = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2] if how == "group" else None
    model = convert_sync_batchnorm(net(), process_group=half).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # older releases lack the replacement of `broadcast_buffers`
        ddp = nn.parallel.DistributedDataParallel(
            model, broadcast_buffers=False, process_group=half, find_unused_parameters=how == "unused"
        )
    train(model, rank % 2, 4, optimizer, ddp)
    dist.barrier()  # the other pair still uses the store in rank 0's process
    return state(model), model[1]._channel.rounds, model[1].tag.group


@pytest.mark.multirank
@pytest.mark.parametrize(("how", "world"), [("world", 2), ("unused", 2), ("group", 4)])
def test_plain_ddp(how: str, world: int) -> None:
    """Catches a converted model that trains correctly only with the algorithm; `group`: two pairs train two models."""
    expected = state(single_process(4, 2))
    for rank, (actual, rounds, group) in enumerate(run_processes(world, _ddp, how)):
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-11)
        assert rounds == 16
        assert group == (None if how != "group" else ((0, 1), (2, 3))[rank // 2])


def _different_models(rank: int) -> None:
    bagua.init_process_group()
    model = net()
    if rank == 1:
        model.append(nn.Sequential(nn.Unflatten(1, (2, 1)), nn.BatchNorm1d(2)))
    convert_sync_batchnorm(model)
    model._bagua_params_and_buffers_to_ignore = [name for name, _ in model.named_parameters() if name.startswith("9")]
    model.with_bagua([], SyncBatchNormAlgorithm())


@pytest.mark.multirank
def test_ranks_with_different_layer_counts_at_with_bagua() -> None:
    """Catches ranks with different models that hang at the first layer of only one rank."""
    for text in run_processes(2, _different_models, errors=True):
        assert "expected the same synchronized layers and rounds on every rank (got 2 on rank 0, 3 on rank 1" in text
        assert "number 2: nothing on rank 0, Sequential.9.1 with 2 features, eps=1e-05, momentum=0.1 on rank 1" in text


def _warnings(rank: int) -> Any:
    bagua.init_process_group()
    report = {}

    def wrap(name: str, model: Any) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.with_bagua([], SyncBatchNormAlgorithm())
        report[name] = [
            str(w.message) for w in caught if "SyncBatchNorm" in str(w.message) or "BatchNorm" in str(w.message)
        ]

    wrap("unconverted", net())
    wrap("none", nn.Sequential(nn.Linear(2, 2)))
    half = convert_sync_batchnorm(net())
    half.append(nn.BatchNorm1d(2))
    wrap("half", half)
    wrap("all", convert_sync_batchnorm(net()))
    wrap("replaced", nn.SyncBatchNorm.convert_sync_batchnorm(convert_sync_batchnorm(net())))
    by_hand = net(norm=SyncBatchNorm)
    wrap("by hand", by_hand)
    report["tags"] = [layer.tag.name for layer in sync_batchnorm_layers(by_hand)]
    return report


@pytest.mark.multirank
def test_warnings_name_what_was_left() -> None:
    """Catches a missing warning for an algorithm without effect because convert_sync_batchnorm was not called."""
    for report in run_processes(2, _warnings):
        assert "(got 1, 4, which normalize over one rank)" in report["unconverted"][0]
        assert "expected SyncBatchNorm layers in Sequential (got none)" in report["none"][0]
        assert "(got 9, which normalize over one rank)" in report["half"][0]
        assert len(report["replaced"]) == 1 and "got torch.nn.SyncBatchNorm at 1, 4; " in report["replaced"][0]
        assert report["all"] == [] and report["by hand"] == []
        assert report["tags"] == ["Sequential.1", "Sequential.4"]


def _fail_in_user_code(rank: int) -> Any:
    """Runs two forwards, the second of which fails in user code on rank 1."""
    bagua.init_process_group()
    model = convert_sync_batchnorm(net())
    model.with_bagua([], SyncBatchNormAlgorithm())
    x = batch(0, rank)
    model(x).sum().backward()
    if rank == 1:
        x = x[:, :, :2]  # too small for the first convolution: an error before any exchange
    try:
        loss_of(model(x)).backward()
    except SyncBatchNormError as error:
        return str(error)
    except RuntimeError as error:
        return f"own: {error}"
    return "no error"


@pytest.mark.multirank
def test_an_error_in_user_code_on_one_rank_ends_the_others() -> None:
    """Catches a rank that waits forever in an exchange for a rank that has raised an exception."""
    waiting, own = run_processes(2, _fail_in_user_code, env={"BAGUA_SYNCBN_TIMEOUT": "5"}, limit=60)
    assert own.startswith("own: ")
    assert "exchange statistics at Sequential.1 (forward)" in waiting and "rank 1 did not arrive" in waiting


def _rewrap(rank: int) -> Any:
    bagua.init_process_group()
    model = convert_sync_batchnorm(net()).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        model.with_bagua([optimizer], SyncBatchNormAlgorithm())
    train(model, rank, 4, optimizer)
    return state(model), model.bagua_algorithm.channel.rounds


@pytest.mark.multirank
def test_wrapping_again_binds_again() -> None:
    """Catches layers that remain bound to the first channel, and tensors registered under an existing name."""
    expected = state(single_process(4, 2))
    for actual, rounds in run_processes(2, _rewrap):
        assert rounds == 16
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-11)


class CountingImpl(bagua.algorithms.AlgorithmImpl):  # type: ignore[misc, name-defined]
    """An algorithm that counts the calls of every hook, resets once, and has an additional method."""

    def __init__(self, process_group: Any) -> None:
        super().__init__(process_group)
        self.calls: Dict[str, int] = {}

    def _count(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    def abort(self) -> str:
        return "aborted"

    def need_reset(self) -> bool:
        self._count("need_reset")
        return self.calls["need_reset"] == 2

    def init_tensors(self, bagua_ddp: Any) -> Any:
        self._count("init_tensors")
        return super().init_tensors(bagua_ddp)

    def tensors_to_buckets(self, tensors: Any, do_flatten: bool) -> Any:
        self._count("tensors_to_buckets")
        return super().tensors_to_buckets(tensors, do_flatten)

    def init_forward_pre_hook(self, bagua_ddp: Any) -> Any:
        self._count("init_forward_pre_hook")
        return super().init_forward_pre_hook(bagua_ddp)

    def init_backward_hook(self, bagua_ddp: Any) -> Any:
        self._count("init_backward_hook")
        return super().init_backward_hook(bagua_ddp)

    def init_post_backward_hook(self, bagua_ddp: Any) -> Any:
        self._count("init_post_backward_hook")
        return super().init_post_backward_hook(bagua_ddp)

    def init_post_optimizer_step_hook(self, bagua_ddp: Any) -> Any:
        self._count("init_post_optimizer_step_hook")
        return super().init_post_optimizer_step_hook(bagua_ddp)

    def init_operations(self, bagua_ddp: Any, bucket: Any) -> None:
        self._count("init_operations")
        bucket.clear_ops()
        bucket.append_centralized_synchronous_op(group=self.process_group)


class Counting(bagua.algorithms.Algorithm):  # type: ignore[misc, name-defined]
    def reify(self, process_group: Any) -> CountingImpl:
        return CountingImpl(process_group)


def _delegation(rank: int) -> Any:
    bagua.init_process_group()
    results = []
    for wrap in (lambda inner: inner, SyncBatchNormAlgorithm):
        model = convert_sync_batchnorm(net()).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model.with_bagua([optimizer], wrap(Counting()))
        train(model, rank, 4, optimizer)
        impl = model.bagua_algorithm
        results.append((impl.calls, impl.abort(), state(model)))
        assert not hasattr(impl, "nonsense")
    return results


@pytest.mark.multirank
def test_every_hook_and_attribute_is_the_inner_ones() -> None:
    """Catches a hook that is not forwarded, or forwarded twice: each call of `need_reset` has side effects."""
    for bare, wrapped in run_processes(2, _delegation):
        assert wrapped[0] == bare[0] and wrapped[1] == bare[1] == "aborted"
        assert bare[0]["need_reset"] == 4 and bare[0]["init_tensors"] == 2
        assert len(bare[0]) == 8
        for name, value in bare[2].items():
            assert torch.equal(wrapped[2][name], value), name


def _flag(rank: int) -> Any:
    bagua.init_process_group()
    model, algorithm = enable_sync_batchnorm(net(), bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithm())
    model.with_bagua([], algorithm)
    model(batch(0, rank))
    return type(model[1]).__name__, type(algorithm).__name__, model[1].running_mean


@pytest.mark.multirank
@pytest.mark.parametrize("value", ["0", "1"])
def test_the_environment_switches_it_on(value: str) -> None:
    """Catches a flag that changes only the model or only the algorithm, and one that has an effect when it is off."""
    first, second = run_processes(2, _flag, env={"BAGUA_SYNCBN": value})
    if value == "1":
        assert first[:2] == ("SyncBatchNorm2d", "SyncBatchNormAlgorithm")
    else:
        assert first[:2] == ("BatchNorm2d", "GradientAllReduceAlgorithm")
    assert torch.equal(first[2], second[2]) == (value == "1")


def test_off_changes_nothing() -> None:
    """Catches a converted model or a wrapped algorithm although the flag is off."""
    model, algorithm = net(), object()
    layer = model[1]
    assert enable_sync_batchnorm(model, algorithm, SyncBatchNormConfig(enabled=False)) == (model, algorithm)
    assert model[1] is layer and type(layer) is nn.BatchNorm2d


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("gradient_allredcue",), {}, KeyError, "expected one of the algorithms .*gradient_allreduce"),
        ((), {"timeout": -1.0}, ValueError, r"expected timeout to be a positive number of seconds \(got -1.0\)"),
        ((42,), {}, TypeError, r"expected inner to be a Bagua algorithm or a registered name \(got 42\)"),
        (
            (bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithm(),),
            {"hierarchical": True},
            TypeError,
            r"expected no further arguments with an algorithm instance \(got hierarchical\)",
        ),
    ],
)
def test_bad_inner_algorithms(arguments: Any, options: Any, error: Any, message: str) -> None:
    """Catches a wrong inner algorithm that is detected only when training starts."""
    with pytest.raises(error, match=message):
        SyncBatchNormAlgorithm(*arguments, **options)


def _one_rank(rank: int) -> Any:
    bagua.init_process_group()
    model = convert_sync_batchnorm(net()).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.with_bagua([optimizer], SyncBatchNormAlgorithm())
    train(model, 0, 4, optimizer)
    return state(model)


@pytest.mark.multirank
def test_one_rank_is_plain_batch_norm() -> None:
    """Catches an algorithm that fails on a single rank, where users try it first."""
    (actual,) = run_processes(1, _one_rank)
    for name, value in state(single_process(4, 1)).items():
        assert torch.equal(actual[name], value), name


def _convert_late(rank: int) -> Any:
    bagua.init_process_group()
    model = net()
    model.with_bagua([], bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithm())
    with pytest.raises(RuntimeError, match="call convert_sync_batchnorm or revert_sync_batchnorm before with_bagua"):
        convert_sync_batchnorm(model)
    return type(model[1]).__name__


@pytest.mark.multirank
def test_convert_after_with_bagua() -> None:
    """Catches a conversion that is accepted for a model that with_bagua has wrapped."""
    assert run_processes(1, _convert_late) == ["BatchNorm2d"]


def _load_into_plain(rank: int) -> Any:
    logging.getLogger("bagua_syncbn_algo").setLevel(logging.INFO)
    bagua.init_process_group()
    model = convert_sync_batchnorm(net())
    model.with_bagua([], SyncBatchNormAlgorithm())
    model(batch(0, rank))
    saved = model.state_dict()
    plain = net(seed=3)
    plain.load_state_dict(saved)
    time.sleep(0.1 * rank)  # evaluation has no collectives
    x = batch(1, 0)
    return torch.equal(plain.eval()(x), model.eval()(x)), list(saved) == list(net().state_dict()), os.getpid()


@pytest.mark.multirank
def test_a_checkpoint_of_a_wrapped_model_loads_into_a_plain_one() -> None:
    """Catches state_dict keys that the wrapping adds."""
    for same, keys, _ in run_processes(2, _load_into_plain):
        assert same and keys
