"""Tests of restarts: by the launcher, of the process group in one process, and of a checkpoint in another layout."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bagua_syncbn_algo import convert_sync_batchnorm, sync_batchnorm_layers, tag_sync_batchnorm
from tests import restart_job as job
from tests.ranks import free_port, run_processes

REPOSITORY = Path(__file__).resolve().parent.parent
proc = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts in /proc")


def assert_equal(found: Dict[str, Any], wanted: Dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def assert_close(found: Dict[str, Any], wanted: Dict[str, Any]) -> None:
    """Compares float64 states whose sums have another order: only rounding differs."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


# -- by the launcher ---------------------------------------------------------------------------------------------------


def launch(folder: Path, *arguments: str, limit: float = 80.0) -> List[Dict[str, Any]]:
    """Runs the job on two ranks under torchrun; returns the result of each rank."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", "--monitor-interval", "0.1", str(REPOSITORY / "tests" / "restart_job.py")]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    # By default, torchrun of some versions (seen in 2.13) uses the store of the first attempt again. With gloo, a rank
    # may then connect to a process that has ended, also without this package: init_process_group fails or hangs.
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    log = folder / "log"
    with log.open("w") as output:
        streams: Any = {"stdout": output, "stderr": output}
        command += [str(folder), *arguments]
        done = subprocess.run(command, env=environment, timeout=limit, check=False, **streams)
    assert done.returncode == 0, log.read_text()[-3000:]
    return [torch.load(folder / f"result{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.multirank
@pytest.mark.timeout(180)
@pytest.mark.parametrize("host", job.HOSTS)
def test_a_job_restarts_after_a_rank_was_killed(host: str, tmp_path: Path) -> None:
    """Catches state that a checkpoint does not contain, and a restarted rank that meets keys of the former attempt.

    Of two ranks, sums do not depend on the order, so all values are bitwise those of a run without a restart.
    """
    wanted = launch(tmp_path / "undisturbed", host)
    found = launch(tmp_path / "killed", host, "--kill")
    for ours, theirs in zip(found, wanted):
        assert (theirs.pop("attempt"), theirs.pop("first")) == (0, 0)
        assert (ours.pop("attempt"), ours.pop("first")) == (1, 1)
        assert any(name.startswith("optimizer") for name in theirs)
        assert_equal(ours, theirs)


# -- in one process ----------------------------------------------------------------------------------------------------


def reference(steps: int, start: Optional[Dict[str, Any]] = None, first: int = 0) -> Dict[str, Any]:
    """Trains one process on the batches of all ranks, without SyncBatchNorm; returns its state."""
    model = job.fresh_model()
    optimizer = job.fresh_optimizer(model)
    if start is not None:
        model.load_state_dict(start["model"])
        optimizer.load_state_dict(start["optimizer"])
    for number in range(first, first + steps):
        job.train_step(model, optimizer, job.shard(*divmod(number, job.STEPS), 0, 1))
    return job.state_of(model, optimizer)


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def enter(number: int, world: int, path: str, host: str) -> None:
    """Starts world ``number`` of this process, over a store of its own."""
    os.environ.update(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    job.start_world(host, dist.FileStore(f"{path}-{number}", world))


def wait_for(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(0.05)


def train_in_worlds(
    rank: int, host: str, worlds: Sequence[int], path: str, keeps_former: bool = False
) -> Dict[str, Tensor]:
    """Trains two steps in each world, with one model and one optimizer. Ranks outside of a world wait for the next."""
    model = convert_sync_batchnorm(job.fresh_model())
    optimizer = job.fresh_optimizer(model)
    kept: List[Any] = []
    for number, world in enumerate(worlds):
        if rank >= world:
            continue
        enter(number, world, path, host)
        if number and world > worlds[number - 1]:  # the state of a rank that was not there
            checkpoint = Path(f"{path}-checkpoint")
            if rank == 0:
                job.save(checkpoint, job.state_of(model, optimizer))
            dist.barrier()
            load(checkpoint, model, optimizer)
        called = job.wrap(model, optimizer, host)
        kept.append((called, dist.group.WORLD))
        for step in (2 * number, 2 * number + 1):
            job.train_step(called, optimizer, job.shard(*divmod(step, job.STEPS), rank, world))
            del kept[:-1]  # the former world is freed only now, after this one has created its groups
            gc.collect()
        del called
        if not keeps_former:
            kept.clear()
        dist.barrier()
        dist.destroy_process_group()
    return job.flat(job.state_of(model, optimizer))


@pytest.mark.multirank
@pytest.mark.parametrize("keeps_former", [False, True], ids=["freed", "freed late"])
@pytest.mark.parametrize("host", job.HOSTS)
def test_two_worlds_in_one_process(host: str, keeps_former: bool, tmp_path: Path) -> None:
    """Catches layers that stay bound to a destroyed world, and a destroyed world that closes groups of the next one."""
    wanted = run_processes(2, train_undisturbed, host, 4)
    found = run_processes(2, train_in_worlds, host, (2, 2), str(tmp_path / "store"), keeps_former)
    for ours, theirs in zip(found, wanted):
        assert_equal(ours, theirs)


def train_undisturbed(rank: int, host: str, steps: int) -> Dict[str, Tensor]:
    job.start_world(host)
    model = convert_sync_batchnorm(job.fresh_model())
    optimizer = job.fresh_optimizer(model)
    called = job.wrap(model, optimizer, host)
    for step in range(steps):
        job.train_step(called, optimizer, job.shard(*divmod(step, job.STEPS), rank, dist.get_world_size()))
    return job.flat(job.state_of(model, optimizer))


@pytest.mark.multirank
@pytest.mark.parametrize("host", job.HOSTS)
@pytest.mark.parametrize("worlds", [(2, 1), (2, 1, 2), (1, 2)], ids=str)
def test_worlds_of_other_sizes(host: str, worlds: Tuple[int, ...], tmp_path: Path) -> None:
    """Catches a number of ranks, a group or an agreement that is kept from the former world."""
    found = run_processes(2, train_in_worlds, host, worlds, str(tmp_path / "store"))
    wanted = job.flat(reference(2 * len(worlds)))
    for state in found[: worlds[-1]]:
        assert_close(state, wanted)


def free_the_store(rank: int, host: str, port: int) -> bool:
    """Returns whether the server of the store ends with the world, although the model is kept."""
    model = convert_sync_batchnorm(job.fresh_model())
    optimizer = job.fresh_optimizer(model)
    store: Any = dist.TCPStore("127.0.0.1", port, 2, rank == 0)
    job.start_world(host, store)
    del store
    called = job.wrap(model, optimizer, host)
    job.train_step(called, optimizer, job.shard(0, 0, rank, 2))
    dist.barrier()
    del called
    dist.destroy_process_group()
    gc.collect()
    with socket.socket() as probe:
        return rank != 0 or probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.multirank
@pytest.mark.parametrize("host", job.HOSTS)
def test_a_destroyed_world_frees_its_store(host: str) -> None:
    """Catches layers that keep the server of the store: the next world on this port would find the former keys."""
    assert run_processes(2, free_the_store, host, free_port()) == [True, True]


def keep_a_group(rank: int, path: str) -> Tuple[str, Dict[str, Tensor]]:
    """Trains with an explicit group in two worlds."""
    enter(0, 2, path, "ddp")
    model = convert_sync_batchnorm(job.fresh_model(), process_group=dist.new_group([0, 1]))
    optimizer = job.fresh_optimizer(model)
    for step in (0, 1):
        called = job.wrap(model, optimizer, "ddp")
        job.train_step(called, optimizer, job.shard(0, step, rank, 2))
    del called
    dist.destroy_process_group()
    enter(1, 2, path, "ddp")
    called = job.wrap(model, optimizer, "ddp")
    with pytest.raises(RuntimeError) as caught:
        called(job.shard(0, 2, rank, 2))
    group = dist.new_group([0, 1])
    for layer in sync_batchnorm_layers(model):
        layer.process_group = group
    tag_sync_batchnorm(model)
    called = job.wrap(model, optimizer, "ddp")
    for step in (2, 3):
        job.train_step(called, optimizer, job.shard(*divmod(step, job.STEPS), rank, 2))
    return str(caught.value), job.flat(job.state_of(model, optimizer))


@pytest.mark.multirank
def test_a_group_of_a_destroyed_world_is_named(tmp_path: Path) -> None:
    """Catches a layer that waits in a destroyed group, or a remedy that does not work."""
    wanted = run_processes(2, train_undisturbed, "ddp", 4)
    for (message, state), undisturbed in zip(run_processes(2, keep_a_group, str(tmp_path / "store")), wanted):
        assert "got a destroyed one); set process_group of each of sync_batchnorm_layers(model)" in message
        assert_equal(state, undisturbed)


# -- after a rank has ended --------------------------------------------------------------------------------------------


def survive(rank: int, host: str, path: str) -> Dict[str, Tensor]:
    """Rank 1 ends between forward and backward. Rank 0 continues alone; then a new rank 1 joins it."""
    model = convert_sync_batchnorm(job.fresh_model())
    optimizer = job.fresh_optimizer(model)
    checkpoint = Path(f"{path}-checkpoint")
    if rank != 2:
        enter(0, 2, path, host)
        called = job.wrap(model, optimizer, host)
        job.train_step(called, optimizer, job.shard(0, 0, rank, 2))
        if rank == 0:
            job.save(checkpoint, job.state_of(model, optimizer))
        dist.barrier()
        with pytest.raises(RuntimeError):
            job.train_step(called, optimizer, job.shard(0, 1, rank, 2), lambda: rank and os._exit(0))  # type: ignore[func-returns-value]
        dist.destroy_process_group()
        enter(1, 1, path, host)
        load(checkpoint, model, optimizer)
        called = job.wrap(model, optimizer, host)
        job.train_step(called, optimizer, job.shard(0, 1, 0, 1))
        job.save(checkpoint, job.state_of(model, optimizer))
        dist.destroy_process_group()
        job.save(Path(f"{path}-alone"), True)
    else:
        wait_for(f"{path}-alone")
        os.environ.update(RANK="1", LOCAL_RANK="1")
        load(checkpoint, model, optimizer)
    enter(2, 2, path, host)
    called = job.wrap(model, optimizer, host)
    for number in (2, 3):
        job.train_step(called, optimizer, job.shard(*divmod(number, job.STEPS), dist.get_rank(), 2))
    dist.barrier()
    return job.flat(job.state_of(model, optimizer))


@pytest.mark.multirank
@pytest.mark.parametrize("host", job.HOSTS)
def test_a_rank_that_survives_continues_with_another_process(host: str, tmp_path: Path) -> None:
    """Catches errors of the former world that are raised in the next one, and a check that only new processes run."""
    path = str(tmp_path / "store")
    errors = run_processes(3, survive_and_save, host, path, errors=True, limit=60)
    assert errors[0] is None and errors[2] is None, (errors[0], errors[2])
    first, second = (torch.load(f"{path}-result{rank}", weights_only=True) for rank in (0, 2))
    assert_equal(second, first)
    assert_close(first, job.flat(reference(4)))


def survive_and_save(rank: int, host: str, path: str) -> None:
    job.save(Path(f"{path}-result{rank}"), survive(rank, host, path))


# -- resources ---------------------------------------------------------------------------------------------------------


def resources() -> Tuple[int, int]:
    """Returns the numbers of descriptors and of threads of this process."""
    for _ in range(4):  # a parameter and its autograd node are freed one after the other
        gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def many_worlds(rank: int, host: str, path: str, count: int) -> List[Tuple[int, int]]:
    model = convert_sync_batchnorm(job.fresh_model())
    optimizer = job.fresh_optimizer(model)
    found = []
    for number in range(count):
        enter(number, 2, path, host)
        called = job.wrap(model, optimizer, host)
        job.train_step(called, optimizer, job.shard(0, 0, rank, 2))
        dist.barrier()
        dist.destroy_process_group()
        del called
        if number in (3, count - 1):
            found.append(resources())
    return found


@proc
@pytest.mark.multirank
@pytest.mark.parametrize("host", job.HOSTS)
def test_destroyed_worlds_keep_no_descriptors_and_threads(host: str, tmp_path: Path) -> None:
    """Catches communicators, stores or threads of destroyed worlds, of which some hundred reach the limits."""
    for (first_files, first_threads), (files, threads) in run_processes(
        2, many_worlds, host, str(tmp_path / "store"), 20
    ):
        assert files <= first_files + 2 and threads <= first_threads + 2


# -- checkpoints in another layout -------------------------------------------------------------------------------------

LAYOUTS: Dict[str, Callable[[nn.Module], nn.Module]] = {
    "BatchNorm": lambda model: model,
    "torch.nn.SyncBatchNorm": lambda model: nn.SyncBatchNorm.convert_sync_batchnorm(model),
    "per layer": lambda model: convert_sync_batchnorm(model, coalesce=False),
    "coalesced": convert_sync_batchnorm,
}


def resumed(rank: int, layout: str, host: str, path: str, steps: int) -> Dict[str, Any]:
    """Continues from the file ``path``, if there is one, in a world; returns the state."""
    job.start_world(host)
    model = LAYOUTS[layout](job.fresh_model())
    optimizer = job.fresh_optimizer(model)
    if path:
        load(Path(path), model, optimizer)
    called = job.wrap(model, optimizer, host)
    first = 2 if path else 0
    for number in range(first, first + steps):
        job.train_step(called, optimizer, job.shard(*divmod(number, job.STEPS), rank, dist.get_world_size()))
    return job.state_of(model, optimizer)


@pytest.mark.multirank
@pytest.mark.parametrize("host", job.HOSTS)
@pytest.mark.parametrize("layout", ["per layer", "coalesced"])
def test_checkpoints_move_between_one_and_four_ranks(layout: str, host: str, tmp_path: Path) -> None:
    """Catches state that depends on the number of ranks or on the layout, such as a buffer of one of them."""
    path = tmp_path / "checkpoint"
    job.save(path, reference(2))
    whole = job.flat(reference(4))
    for state in run_processes(4, resumed, layout, host, str(path), 2):
        assert_close(job.flat(state), whole)
    on_four = run_processes(4, resumed, layout, host, "", 2)[0]
    job.save(path, on_four)
    on_four = torch.load(path, weights_only=True)
    assert_close(job.flat(reference(2, on_four, 2)), whole)


@pytest.mark.multirank
def test_every_layout_loads_the_checkpoint_of_every_other_one() -> None:
    """Catches other keys, shapes or dtypes, and an evaluation that is not bitwise that of BatchNorm."""
    (trained,) = run_processes(1, resumed, "coalesced", "ddp", "", 2)
    images = job.shard(2, 0, 0, 1)
    states, outputs = {}, {}
    for name, layout in LAYOUTS.items():
        model = layout(job.fresh_model())
        model.load_state_dict(trained["model"], strict=True)
        states[name], outputs[name] = model.state_dict(), model.eval()(images)
    for name, state in states.items():
        assert list(state) == list(states["BatchNorm"]), name
        assert state._metadata == states["BatchNorm"]._metadata, name
        assert torch.equal(outputs[name], outputs["BatchNorm"]), name
        assert_equal(dict(state), dict(states["BatchNorm"]))
        for other, layout in LAYOUTS.items():
            model = layout(job.fresh_model())
            model.load_state_dict(state, strict=True)
            assert torch.equal(model.eval()(images), outputs["BatchNorm"]), (name, other)


def test_the_state_of_a_compiled_model_has_the_prefix_of_torch() -> None:
    """Catches keys of a compiled model that differ from those of the model in more than ``_orig_mod.``."""
    model = convert_sync_batchnorm(job.fresh_model())
    compiled: Any = torch.compile(model)
    assert list(compiled.state_dict()) == [f"_orig_mod.{name}" for name in model.state_dict()]
    plain = job.fresh_model()
    plain.load_state_dict(compiled._orig_mod.state_dict(), strict=True)
    in_place = convert_sync_batchnorm(job.fresh_model())
    in_place.compile()
    assert list(in_place.state_dict()) == list(plain.state_dict())
