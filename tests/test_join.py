"""Tests of uneven data: ranks with different numbers of batches inside of ``Join``."""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import bagua_syncbn_algo.graph.split_backward as split_backward
from bagua_syncbn_algo import bagua, convert_sync_batchnorm, sync_batch_norm_joinable, sync_batchnorm_layers
from tests.ranks import run_processes

WIDTH = 6


class Branches(nn.Module):
    """Two independent layers (one coalesced round), then a layer of another width behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH))
        self.right = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH, momentum=None))
        self.head = nn.Sequential(
            nn.Conv2d(WIDTH, 40, 3, padding=1), nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 2, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.left(x) + self.right(x)))  # type: ignore[no-any-return]


def fresh_model() -> nn.Module:
    torch.manual_seed(7)
    return Branches().double()


def batch(rank: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + index)
    return torch.randn(2 + rank, 3, 6, 6, generator=generator, dtype=torch.float64) * (1 + rank)


def loss_of(output: Tensor) -> Tensor:
    return output.square().sum() / 50


def state_of(model: nn.Module) -> Dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def reference(epochs: List[Tuple[int, ...]], calls: int = 1, dynamic: bool = False) -> Dict[str, Tensor]:
    """Trains one process on the batches that the ranks have left in each iteration, without SyncBatchNorm."""
    model = fresh_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for counts in epochs:
        for step in range(max(counts) // calls):
            optimizer.zero_grad()
            active = [rank for rank, count in enumerate(counts) if step < count // calls]
            for call in range(calls):
                data = torch.cat([batch(rank, calls * step + call) for rank in active])
                (loss_of(model(data)) / (len(active) if dynamic else len(counts))).backward()
            optimizer.step()
    return state_of(model)


def train(
    rank: int,
    epochs: List[Tuple[int, ...]],
    convert: Dict[str, Any],
    ddp_options: Dict[str, Any],
    calls: int,
    dynamic: bool,
) -> Dict[str, Tensor]:
    dist.init_process_group("gloo")
    split_backward.WORTHWHILE = 0  # overlaps also with the small convolutions of this model
    model = convert_sync_batchnorm(fresh_model(), **convert)
    ddp = DistributedDataParallel(model, **ddp_options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for epoch, counts in enumerate(epochs):
        # By the model in one epoch and by its wrapper in the next one.
        joinable = sync_batch_norm_joinable(model if epoch % 2 == 0 else ddp)
        with Join([joinable, ddp], divide_by_initial_world_size=not dynamic):
            for step in range(counts[rank] // calls):
                optimizer.zero_grad()
                for call in range(calls):
                    if call + 1 < calls:
                        with ddp.no_sync():
                            loss_of(ddp(batch(rank, calls * step + call))).backward()
                    else:
                        loss_of(ddp(batch(rank, calls * step + call))).backward()
                optimizer.step()
    return state_of(model)


def check(
    epochs: List[Tuple[int, ...]],
    convert: Optional[Dict[str, Any]] = None,
    ddp: Optional[Dict[str, Any]] = None,
    calls: int = 1,
    dynamic: bool = False,
) -> None:
    wanted = reference(epochs, calls, dynamic)
    options = {"broadcast_buffers": False, **(ddp or {})}
    for found in run_processes(len(epochs[0]), train, epochs, convert or {}, options, calls, dynamic):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.multirank
@pytest.mark.parametrize(
    "convert",
    [{}, {"overlap": False}, {"coalesce": False}],
    ids=["overlapped", "coalesced", "per layer"],
)
def test_uneven_batches_equal_one_process(convert: Dict[str, Any]) -> None:
    """Catches an empty shard that changes the statistics, and running statistics that stop on a rank without data.

    The parameters and the buffers of every rank equal those of one process, in float64: only rounding differs.
    """
    check([(3, 1), (1, 2)], convert)


@pytest.mark.multirank
@pytest.mark.parametrize("convert", [{}, {"coalesce": False}], ids=["coalesced", "per layer"])
def test_a_rank_without_batches(convert: Dict[str, Any]) -> None:
    """Catches a rank that cannot answer rounds before its first forward, or cannot train after such an epoch.

    The other ranks check their regrouped forward in the first epoch, which this rank must not repeat in the second one.
    """
    check([(2, 0), (1, 2)], convert)


def train_again(rank: int, path: Optional[str]) -> Dict[str, Tensor]:
    """Trains two models, or one model in two worlds; the second rank has no batch for the first one."""
    model = None
    for number, counts in enumerate([(2, 0), (1, 2)]):
        if path is not None:
            store = dist.FileStore(f"{path}-{number}", 2)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        elif number == 0:
            dist.init_process_group("gloo")
        if model is None or path is None:
            model = convert_sync_batchnorm(fresh_model())
        ddp = DistributedDataParallel(model, broadcast_buffers=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with Join([sync_batch_norm_joinable(model), ddp]):
            for step in range(counts[rank]):
                optimizer.zero_grad()
                loss_of(ddp(batch(rank, step))).backward()
                optimizer.step()
        if path is not None:
            del ddp
            dist.barrier()
            dist.destroy_process_group()
    assert model is not None
    return state_of(model)


@pytest.mark.multirank
@pytest.mark.parametrize("in_two_worlds", [False, True])
def test_another_model_or_world_after_an_epoch_without_batches(in_two_worlds: bool, tmp_path: Path) -> None:
    """Catches a rank that replays an agreement on another model of the same class, or has none in another world."""
    wanted = reference([(2, 0), (1, 2)] if in_two_worlds else [(1, 2)])
    for found in run_processes(2, train_again, str(tmp_path / "store") if in_two_worlds else None):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def train_with_two_wrappers(rank: int, used: int) -> Dict[str, Tensor]:
    dist.init_process_group("gloo")
    model = convert_sync_batchnorm(fresh_model())
    wrappers = [DistributedDataParallel(model, broadcast_buffers=False) for _ in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Join([sync_batch_norm_joinable(model), wrappers[used]]):
        for step in range((3, 1)[rank]):
            optimizer.zero_grad()
            loss_of(wrappers[used](batch(rank, step))).backward()
            optimizer.step()
    return state_of(model)


@pytest.mark.multirank
@pytest.mark.parametrize("used", [0, 1])
def test_a_former_wrapper_of_the_model(used: int) -> None:
    """Catches a joinable that takes a former DistributedDataParallel of its model for the one in the list."""
    wanted = reference([(3, 1)])
    for found in run_processes(2, train_with_two_wrappers, used):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.multirank
def test_three_ranks_end_one_after_the_other() -> None:
    """Catches two threads that answer at different rounds; buffers are broadcast before each forward."""
    check([(1, 3, 2), (0, 1, 3)], ddp={"broadcast_buffers": True})


@pytest.mark.multirank
def test_the_number_of_ranks_with_data_divides() -> None:
    """Catches a joinable that hides the number of ranks with data from DistributedDataParallel's reducer."""
    check([(3, 1)], ddp={"find_unused_parameters": True}, dynamic=True)


@pytest.mark.multirank
def test_gradient_accumulation() -> None:
    """Catches a number of rounds that is taken from steps of the optimizer: there are two forwards in each."""
    check([(2, 4)], calls=2)


def train_groups(rank: int) -> Dict[str, Tensor]:
    dist.init_process_group("gloo")
    pair, single = dist.new_group([0, 1]), dist.new_group([2])
    model = convert_sync_batchnorm(fresh_model(), process_group=single if rank == 2 else pair)
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    for _ in range(2):
        with Join([sync_batch_norm_joinable(model), ddp]):
            for index in range((1, 2, 4)[rank]):
                loss_of(ddp(batch(rank, index))).backward()
    return state_of(model)


@pytest.mark.multirank
def test_a_group_ends_before_the_others() -> None:
    """Catches threads that answer each other without end, and a rank without other ranks in its group."""
    first, second, third = run_processes(3, train_groups)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert first["head.1.num_batches_tracked"] == 4 and third["head.1.num_batches_tracked"] == 8


class Wide(nn.Module):
    """Two independent layers whose statistics are longer than a message."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Linear(3, 3000), nn.BatchNorm1d(3000)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) * self.right(x)  # type: ignore[no-any-return]


def train_wide(rank: int) -> Dict[str, Tensor]:
    dist.init_process_group("gloo")
    torch.manual_seed(5)
    ddp = DistributedDataParallel(convert_sync_batchnorm(Wide().double()), broadcast_buffers=False)
    with Join([sync_batch_norm_joinable(ddp), ddp]):
        for _ in range(2 * rank):
            loss_of(ddp(torch.arange(12.0, dtype=torch.float64).view(4, 3).sin())).backward()
    return state_of(ddp.module)


@pytest.mark.multirank
def test_rounds_of_several_messages() -> None:
    """Catches a rank that takes each message for a round. Equal data are in each batch: only the mean moves."""
    first, second = run_processes(2, train_wide)
    assert first["left.1.num_batches_tracked"] == 2 and first["right.1.running_mean"].any()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def train_with_an_unknown_round(rank: int) -> None:
    dist.init_process_group("gloo")
    ddp = DistributedDataParallel(convert_sync_batchnorm(fresh_model()), broadcast_buffers=False)
    joinable = sync_batch_norm_joinable(ddp)
    if rank == 0:
        joinable._rounds = lambda: {}  # type: ignore[attr-defined]
    with Join([joinable, ddp]):
        for index in range(2 * rank):
            loss_of(ddp(batch(rank, index))).backward()


@pytest.mark.multirank
def test_an_unknown_round_is_an_error_on_all_ranks() -> None:
    """Catches a rank that cannot update its running statistics and does not tell the other ranks."""
    for error in run_processes(2, train_with_an_unknown_round, errors=True):
        assert error is not None
    assert "rank 0" in error and "expected a round of layers that this rank knows" in error


def train_until_a_rank_ends(rank: int, with_joinable: bool) -> Tuple[int, str]:
    dist.init_process_group("gloo")
    model = convert_sync_batchnorm(fresh_model())
    ddp = DistributedDataParallel(model)
    steps, message = 0, ""
    joinables = [sync_batch_norm_joinable(model), ddp] if with_joinable else [ddp]
    try:
        with Join(joinables, throw_on_early_termination=True):
            for index in range(1 + rank):
                loss_of(ddp(batch(rank, index))).backward()
                steps += 1
    except RuntimeError as error:
        message = str(error)
    loss_of(ddp(batch(rank, 9))).backward()  # all ranks can continue
    return steps, message


@pytest.mark.multirank
@pytest.mark.parametrize("with_joinable", [True, False])
def test_early_termination(with_joinable: bool) -> None:
    """Catches a joinable that keeps the ranks from raising together, or a refusal of what needs no joinable."""
    found = run_processes(2, train_until_a_rank_ends, with_joinable)
    assert [steps for steps, _ in found] == [1, 1]
    assert "exhausted" in found[0][1] and "exhausted" in found[1][1]


def wrong_arrangements(rank: int) -> List[str]:
    bagua.init_process_group()
    model = convert_sync_batchnorm(fresh_model())
    ddp = DistributedDataParallel(model)
    other = DistributedDataParallel(nn.Linear(2, 2))
    joinable = sync_batch_norm_joinable(model)
    messages = []

    def expect(kind: Any, *joinables: Any) -> None:
        with pytest.raises(kind) as caught, Join(list(joinables)):
            ddp(batch(rank, 0))
        messages.append(str(caught.value))

    expect(ValueError, ddp, joinable)
    expect(ValueError, joinable, other)
    expect(RuntimeError, ddp)
    ddp._join_config = ddp._join_config.construct_disabled_join_config()
    loss_of(ddp(batch(rank, 0))).backward()
    with Join([joinable, ddp], enable=False):
        loss_of(ddp(batch(rank, 1))).backward()
    plain = convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain.with_bagua([optimizer], bagua.algorithms.GlobalAlgorithmRegistry.get("sync_batchnorm")())
    expect(ValueError, sync_batch_norm_joinable(plain))
    return messages


@pytest.mark.multirank
def test_wrong_arrangements_raise() -> None:
    """Catches a context in which a rank whose data have ended hangs, and an error without a remedy."""
    for found in run_processes(2, wrong_arrangements):
        assert "another joinable before it" in found[0] and "Join([sync_batch_norm_joinable(model), ddp])" in found[0]
        assert "without the model's DistributedDataParallel" in found[1]
        assert "DistributedDataParallel as the first one" in found[2]
        assert "after with_bagua" in found[3]


def train_several_models(rank: int) -> List[Any]:
    dist.init_process_group("gloo")
    models = [convert_sync_batchnorm(fresh_model()) for _ in range(2)]
    first, second = (DistributedDataParallel(model) for model in models)
    joinables = [sync_batch_norm_joinable(model) for model in models]
    messages: List[Any] = []
    for listed in (
        [joinables[0], first, joinables[1], second],
        [joinables[1], joinables[0], first, second],
        [joinables[0], first, second],
    ):
        with pytest.raises(ValueError) as caught, Join(listed):
            loss_of(first(batch(rank, 0))).backward()
            loss_of(second(batch(rank, 0))).backward()
        messages.append(str(caught.value))
    for ddp, joinable in zip((second, first), reversed(joinables)):  # training can continue, one model after the other
        with Join([joinable, ddp]):
            for index in range(1 + rank):
                loss_of(ddp(batch(rank, index))).backward()
    loss_of(first(batch(rank, 5))).backward()
    return [messages, *map(state_of, models)]


@pytest.mark.multirank
def test_several_models_in_one_context_are_refused() -> None:
    """Catches rounds of a second model that nobody answers, and a context that stays open after an error."""
    for messages, *states in run_processes(2, train_several_models):
        for message in messages[:2]:
            assert message.startswith("expected one sync_batch_norm_joinable in Join (got those of Branches, Branches)")
        assert "got Branches.left.1 of another model in the list" in messages[2]
        assert all("put the models in one module" in message for message in messages)
        assert [int(state["head.1.num_batches_tracked"]) for state in states] == [4, 2]


class Pair(nn.Module):
    """Two models in one module, as the generator and the discriminator of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Branches(), Branches()

    def forward(self, x: Tensor, which: str) -> Tensor:
        return self.one(x) if which == "one" else self.two(x)  # type: ignore[no-any-return]


def fresh_pair() -> nn.Module:
    torch.manual_seed(7)
    return Pair().double()


def train_pair(rank: int, counts: Tuple[int, ...]) -> Dict[str, Tensor]:
    dist.init_process_group("gloo")
    model = convert_sync_batchnorm(fresh_pair())
    ddp = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Join([sync_batch_norm_joinable(model), ddp]):
        for step in range(counts[rank]):
            for which in ("one", "two"):
                optimizer.zero_grad()
                loss_of(ddp(batch(rank, step), which)).backward()
                optimizer.step()
    return state_of(model)


@pytest.mark.multirank
def test_two_models_in_one_module() -> None:
    """Catches the remedy of the error above if it does not work: the ranks would hang or differ from one process."""
    counts = (1, 3)
    model = fresh_pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(max(counts)):
        active = [rank for rank, count in enumerate(counts) if step < count]
        for which in ("one", "two"):
            optimizer.zero_grad()
            data = torch.cat([batch(rank, step) for rank in active])
            (loss_of(model(data, which)) / len(counts)).backward()
            optimizer.step()
    for found in run_processes(2, train_pair, counts):
        for name, value in state_of(model).items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def train_without_the_joinable(rank: int, counts: Tuple[int, ...], by_method: bool, stays: bool) -> str:
    dist.init_process_group("gloo", timeout=timedelta(seconds=10))
    store: Any = dist.distributed_c10d._get_default_store()
    ddp = DistributedDataParallel(convert_sync_batchnorm(fresh_model()))
    dist.barrier()
    message = ""
    try:
        with ddp.join() if by_method else Join([ddp]):
            for index in range(counts[rank]):
                loss_of(ddp(batch(rank, index))).backward()
    except RuntimeError as error:
        message = str(error)
    if not counts[rank]:
        store.set("ended", "")
    elif stays:  # until the other rank has ended, whose wait only the timeout ends
        store.wait(["ended"], timedelta(seconds=60))
    return message


@pytest.mark.multirank
@pytest.mark.parametrize("by_method", [False, True], ids=["Join([ddp])", "ddp.join()"])
def test_a_context_without_the_joinable_names_the_remedy(by_method: bool) -> None:
    """Catches a rank with data that waits for rounds which a finished rank never answers."""
    for message in run_processes(2, train_without_the_joinable, (1, 2), by_method, False):
        assert "use Join([sync_batch_norm_joinable(model), ddp])" in message


@pytest.mark.multirank
def test_a_rank_without_any_batch_ends_without_the_joinable() -> None:
    """Catches a rank without a forward, whose error only the backend can raise, that waits longer than the timeout."""
    message, bare = run_processes(2, train_without_the_joinable, (2, 0), False, True)
    assert "use Join([sync_batch_norm_joinable(model), ddp])" in message
    assert bare


def train_directly(rank: int) -> Tuple[str, Dict[str, Tensor]]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=10))
    model = convert_sync_batchnorm(fresh_model())
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    message = ""
    try:
        with Join([sync_batch_norm_joinable(model), ddp]):
            for index in range(1 + rank):
                loss_of(model(batch(rank, index))).backward()
    except RuntimeError as error:
        message = str(error)
    model.zero_grad()
    with Join([sync_batch_norm_joinable(model), ddp]):
        replica = copy.deepcopy(model)
        for index in range(1 + rank):
            model.eval()
            model(batch(rank, index))
            model.train()
            loss_of(ddp(batch(rank, index))).backward()
            with torch.no_grad():
                model(batch(rank, index))
    replica(batch(rank, 0))
    return message, state_of(model)


@pytest.mark.multirank
def test_a_model_that_is_called_directly_is_refused() -> None:
    """Catches a rank that waits for one without data, and a refusal of evaluation, copies or later direct calls."""
    found = run_processes(2, train_directly)
    for message, state in found:
        assert message.startswith("expected the first training forward inside of Join by DistributedDataParallel")
        assert state["head.1.num_batches_tracked"] == 4
        for name, value in state.items():
            assert torch.equal(value, found[0][1][name]), name


def test_models_without_layers_are_refused() -> None:
    """Catches a joinable that answers no rounds, because the model was not converted or its layers have no tags."""
    with pytest.raises(ValueError, match="convert it with convert_sync_batchnorm"):
        sync_batch_norm_joinable(fresh_model())
    model = convert_sync_batchnorm(fresh_model())
    sync_batchnorm_layers(model)[0].tag = None
    with pytest.raises(ValueError, match=r"call tag_sync_batchnorm\(model\)"):
        sync_batch_norm_joinable(model)
