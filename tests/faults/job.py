"""A training job of several ranks with one fault, on one of two hosts."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from datetime import timedelta
from typing import Any, Callable, ContextManager, Dict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from bagua_syncbn_algo import (
    bagua,
    convert_sync_batchnorm,
    enable_sync_batchnorm,
    sync_batch_norm_joinable,
)
from bagua_syncbn_algo.comm import version
from tests.faults.cases import Fault
from tests.faults.model import (
    ACTIONS,
    STEPS,
    Net,
    fresh_model,
    in_thread,
    loss_of,
    optimizer_of,
    shard,
    state_of,
    trigger,
)

Note = Callable[..., None]
ATTEMPTS = 8  # steps that a rank begins, at most


def run(rank: int, note: Note, fault: Fault, host: str, second_port: int) -> None:
    """Runs the job on this rank.

    ``note("state", ...)`` sends the number of each completed step, the parameters and the buffers;
    ``note("lost", ...)`` the text of an exception that is caught; ``note("fault")`` the moment of the fault.
    """
    faulty = rank == fault.rank
    os.environ["BAGUA_SYNCBN"] = "1"
    os.environ.update(fault.env)
    if faulty:
        os.environ.update(fault.env_of_rank)
        if fault.place:

            def act() -> None:
                note("fault")
                ACTIONS[fault.action](note, fault.seconds)

            trigger.set(fault.place, fault.step, act)
    Job(rank, int(os.environ["WORLD_SIZE"]), note, fault, host, second_port).run()


class Job:
    """One training on this rank, from the process group to the last step."""

    def __init__(self, rank: int, world: int, note: Note, fault: Fault, host: str, second_port: int) -> None:
        self.rank, self.world, self.note, self.fault, self.host = rank, world, note, fault, host
        self.second_port, self.faulty = second_port, rank == fault.rank
        # What this rank does differently; empty on all other ranks.
        self.change = fault.change if self.faulty else ""
        self.catches = fault.catch == "all" or (fault.catch == "one" and self.faulty)

    def run(self) -> None:
        trigger.now = self.fault.step  # for the places before the first step
        self.start()
        failure = ""
        try:
            self.prepare()
            with self.join():
                self.train()
        except Exception as error:
            if not self.fault.restart:
                raise
            failure = f"{type(error).__name__}: {error}"
        if failure:
            self.note("lost", (-1, failure))
            self.start_again()
        else:
            self.note("state", (STEPS, *state_of(self.net)))

    def start(self) -> None:
        trigger.reached("before the process group")
        if self.change == "message version":
            self.note("fault")
            version.MESSAGE_VERSION = 99  # type: ignore[misc]
        dist.init_process_group("gloo", timeout=timedelta(seconds=self.fault.timeout))
        trigger.reached("before the wrapper")
        if self.host == "bagua":
            bagua.init_process_group()

    def start_again(self) -> None:
        """Trains from the start with the ranks that are left, which also destroy their process group first."""
        # Connections are closed with the last reference to the group, which DistributedDataParallel holds, too. Until
        # then the other ranks wait for their timeout.
        del self.model, self.net, self.optimizer
        gc.collect()
        dist.destroy_process_group()
        left = [rank for rank in range(self.world) if self.fault.action == "raise" or rank != self.fault.rank]
        os.environ.update(
            RANK=str(left.index(self.rank)),
            WORLD_SIZE=str(len(left)),
            LOCAL_RANK=str(left.index(self.rank)),
            LOCAL_WORLD_SIZE=str(len(left)),
            MASTER_PORT=str(self.second_port),
        )
        fault = Fault(self.fault.name, rank=-1)
        Job(left.index(self.rank), len(left), self.note, fault, self.host, 0).run()

    # -- the model ------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Builds, converts and wraps the model."""
        change = self.change
        if self.fault.env_of_rank and self.faulty:
            self.note("fault")
        if change and self.fault.step == 0:
            self.note("fault")
        self.net: Net = fresh_model(
            seed=5 if change == "other weights" else 0,
            width=5 if change == "other width" else 6,
            reverse=change == "other order",
        )
        if change == "other buffers":
            self.net.one.running_mean.fill_(3.0)  # type: ignore[union-attr]
        if change == "other momentum":
            self.net.one.momentum = 0.3
        if change == "frozen weight":
            self.net.mix.weight.requires_grad_(False)
        if change == "hook":
            self.net.left.register_forward_hook(log_shape)
        self.net.stem[0].weight.register_hook(self._on_last_gradient)
        if self.fault.step == 0:
            self.net.variant = change
        self.optimizer = optimizer_of(self.net)
        self.optimizer.register_step_pre_hook(lambda *unused: trigger.reached("optimizer step"))
        if change == "optimizer state":
            for parameter in self.net.parameters():
                self.optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
        self.model: Any = self.net
        if self.host == "ddp":
            self._prepare_ddp()
        else:
            self._prepare_bagua()
        if change == "compiled":
            self.model = torch.compile(self.model, backend="aot_eager")

    def _prepare_ddp(self) -> None:
        import torch.nn.parallel.distributed as distributed

        if self.change != "not converted":
            self.net = convert_sync_batchnorm(self.net)  # type: ignore[assignment]
        if self.faulty and self.fault.place == "in the wrapper's broadcast":
            distributed._sync_module_states = lambda *a, **k: trigger.reached("in the wrapper's broadcast")
        unused = self.fault.change == "unused branch"
        self.model = DistributedDataParallel(self.net, broadcast_buffers=False, find_unused_parameters=unused)

    def _prepare_bagua(self) -> None:
        from bagua_syncbn_algo.embedded.bagua_distributed import BaguaDistributedDataParallel

        owner: Any = BaguaDistributedDataParallel
        if self.faulty and self.fault.place == "in the wrapper's broadcast":
            owner._bagua_broadcast_parameters = lambda _: trigger.reached("in the wrapper's broadcast")
        algorithm = bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithm()
        if self.change == "not converted":
            self.net.with_bagua([self.optimizer], algorithm)
            return
        model, algorithm = enable_sync_batchnorm(self.net, algorithm)
        model.with_bagua([self.optimizer], algorithm)

    def _on_last_gradient(self, gradient: Tensor) -> None:
        trigger.reached("backward, after the last round")

    # -- training -------------------------------------------------------------------------------------------------

    def join(self) -> ContextManager[Any]:
        if not self.fault.joins:
            return contextlib.nullcontext()
        if self.host == "bagua":
            return Join([sync_batch_norm_joinable(self.net)])
        return Join([sync_batch_norm_joinable(self.net), self.model])

    def train(self) -> None:
        steps = self.fault.batches if self.faulty and self.fault.batches is not None else STEPS
        step = attempts = 0
        while step < steps:
            trigger.now, attempts = step, attempts + 1
            if self.change in LATER and step == self.fault.step:
                self.note("fault")
                LATER[self.change](self)
            try:
                self.step(step)
            except Exception as error:
                if not self.catches or attempts == ATTEMPTS:
                    raise
                self.note("lost", (step, f"{type(error).__name__}: {error}"))
                continue  # the same batch again
            self.note("state", (step, *state_of(self.net)))
            trigger.reached("end of the step")
            step += 1
        if steps < STEPS and not self.fault.joins:
            self.note("fault")
            time.sleep(self.fault.seconds or 0.0)

    def step(self, step: int) -> None:
        trigger.reached("data loading")
        x = shard(step, self.rank, self.fault.data)
        due = step >= self.fault.step
        if self.faulty and self.fault.data == "nan" and step == self.fault.step:
            self.note("fault")
        if self.change == "input with a gradient":
            x.requires_grad_()
        self.optimizer.zero_grad()
        if self.change == "two forwards" and step == self.fault.step:
            self.note("fault")
            with torch.no_grad():
                self.model(x)
        if self.change == "evaluation" and due:
            with torch.no_grad():
                self.model.eval()(x)
            self.model.train()
        if self.change == "no_sync" and step == self.fault.step:
            self._accumulate(x)
        y = self.forward(x)
        trigger.reached("loss")
        loss = loss_of(y)
        if self.change == "second backward" and step == self.fault.step:
            self.note("fault")
            loss.backward(retain_graph=True)
        loss.backward()
        self.optimizer.step()

    def forward(self, x: Tensor) -> Tensor:
        if self.change == "other thread":
            return in_thread(lambda: self.model(x))  # type: ignore[no-any-return]
        if self.change == "checkpoint":
            return checkpoint(self.model, x, use_reentrant=False)  # type: ignore[no-any-return]
        return self.model(x)  # type: ignore[no-any-return]

    def _accumulate(self, x: Tensor) -> None:
        """Runs a forward and a backward without the reduction of gradients."""
        self.note("fault")
        if self.host == "ddp":
            with self.model.no_sync():
                loss_of(self.model(x)).backward()
            return
        ddp: Any = self.net.bagua_ddp
        ddp.require_backward_grad_sync = False
        loss_of(self.model(x)).backward()
        ddp.require_backward_grad_sync = True


def log_shape(module: nn.Module, args: Any, output: Tensor) -> None:
    """A hook that only one rank has."""


def _set_variant(job: Job) -> None:
    job.net.variant = job.change


def _freeze(job: Job) -> None:
    job.net.mix.weight.requires_grad_(False)


def _evaluate(job: Job) -> None:
    job.model.eval()


# Changes in the middle of the training, before the step of the fault.
LATER: Dict[str, Callable[[Job], None]] = {
    **dict.fromkeys(["skipped layer", "layer twice", "swapped layers", "other dtype", "wrong input"], _set_variant),
    "frozen later": _freeze,
    "evaluation mode": _evaluate,
}
