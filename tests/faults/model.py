"""The model and the data of the jobs, the places at which a fault occurs, and the reference in one process."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

STEPS = 4

# The places of a job, in their order.
PLACES = [
    "before the process group",
    "before the wrapper",
    "in the wrapper's broadcast",
    "data loading",
    "forward, before the first round",
    "forward, between two rounds",
    "forward, after the last round",
    "loss",
    "backward, before the first round",
    "backward, between two rounds",
    "backward, after the last round",
    "optimizer step",
    "end of the step",
]


class Trigger:
    """What happens on this rank, and where. It is a global object: graphs contain calls of :func:`place` only."""

    def __init__(self) -> None:
        self.place, self.step, self.now = "", -1, 0
        self.act: Optional[Callable[[], None]] = None

    def set(self, place: str, step: int, act: Callable[[], None]) -> None:
        assert place in PLACES, place
        self.place, self.step, self.act = place, step, act

    def reached(self, name: str) -> None:
        if self.act is not None and name == self.place and self.now == self.step:
            act, self.act = self.act, None
            act()


trigger = Trigger()


def place(name: str, h: Tensor) -> Tensor:
    """Runs the fault that is due at this place, or when backward reaches it."""
    trigger.reached(f"forward, {name}")
    backward = {"after the last round": "before the first round", "between two rounds": "between two rounds"}
    due = name in backward and trigger.place == f"backward, {backward[name]}" and trigger.now == trigger.step
    if due and h.requires_grad:
        h.register_hook(lambda gradient: trigger.reached(trigger.place))
    return h


torch.fx.wrap("place")  # traced as one call


class Net(nn.Module):
    """Four rounds: a layer, two independent layers, and two layers of one width.

    Attributes:
        variant: what this rank does differently in forward; empty for nothing.
    """

    variant = ""

    def __init__(self, width: int = 6, reverse: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, width, 3), nn.BatchNorm2d(width))
        for name in ("right", "left") if reverse else ("left", "right"):
            setattr(self, name, nn.Sequential(nn.Conv2d(width, 4, 3, padding=1), nn.BatchNorm2d(4)))
        self.one, self.mix, self.two = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(place("before the first round", x)).tanh()
        left, right = self.left(h), self.right(h)
        if self.variant == "unused branch":
            right = right.detach()
        h = place("between two rounds", left.tanh() + right)
        one, two = (self.two, self.one) if self.variant == "swapped layers" else (self.one, self.two)
        if self.variant != "skipped layer":
            h = one(h)
        if self.variant == "layer twice":
            h = one(h)
        if self.variant == "wrong input":
            h = h[:, :, :, :0].sum(3)
        h = self.mix(h.tanh())
        h = two(h.float()).double() if self.variant == "other dtype" else two(h)
        h = place("after the last round", h)
        return self.fc(h.tanh().mean((2, 3)))  # type: ignore[no-any-return]


def fresh_model(seed: int = 0, **arguments: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**arguments).double()


def shard(step: int, rank: int, data: str = "") -> Tensor:
    """Returns the batch of a rank.

    Args:
        step: the number of the step.
        rank: the rank.
        data: ``"sizes"`` for images of another size, ``"empty"`` for no images, ``"nan"`` for a NaN on rank 1.
    """
    generator = torch.Generator().manual_seed(100 * step + rank)
    other = data if rank == 1 else ""
    shape = (0 if other == "empty" else 3 + rank, 2, 9 if other == "sizes" else 7, 7)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + rank)
    if other == "nan" and step > 1:
        x[0, 0, 0, 0] = float("nan")
    return x


def loss_of(output: Tensor) -> Tensor:
    return output.pow(3).sum() / 20


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def state_of(model: nn.Module) -> Tuple[Tensor, Tensor]:
    """Returns all parameters, and all buffers, by name so that the order of registration does not matter."""
    found: List[Tensor] = []
    for named in (model.named_parameters(), model.named_buffers()):
        found.append(torch.cat([value.detach().double().flatten() for _, value in sorted(named)]))
    return found[0], found[1]


_random = threading.Lock()  # the random number generator is that of all threads


# -- the reference -----------------------------------------------------------------------------------------------------


def _normalized(layer: nn.BatchNorm2d, shards: Sequence[Tensor]) -> List[Tensor]:
    """Normalizes over all shards, which may have different sizes."""
    flat = [h.transpose(0, 1).flatten(1) for h in shards]
    y = F.batch_norm(
        torch.cat(flat, 1).t(),
        layer.running_mean,
        layer.running_var,
        layer.weight,
        layer.bias,
        True,
        layer.momentum or 0.0,
        layer.eps,
    )
    assert layer.num_batches_tracked is not None
    layer.num_batches_tracked += 1
    parts = y.t().split([h.shape[1] for h in flat], 1)
    return [p.reshape(h.transpose(0, 1).shape).transpose(0, 1) for p, h in zip(parts, shards)]


def _outputs(net: Any, shards: Sequence[Tensor], unused: bool) -> List[Tensor]:
    """Computes the forward of the model, written a second time: every convolution by shard, every layer over all."""
    h = [y.tanh() for y in _normalized(net.stem[1], [net.stem[0](x) for x in shards])]
    left = _normalized(net.left[1], [net.left[0](x) for x in h])
    right = _normalized(net.right[1], [net.right[0](x) for x in h])
    if unused:
        right[1] = right[1].detach()
    h = _normalized(net.one, [a.tanh() + b for a, b in zip(left, right)])
    h = _normalized(net.two, [net.mix(x.tanh()) for x in h])
    return [net.fc(x.tanh().mean((2, 3))) for x in h]


def reference(
    steps: Sequence[int], world: int, data: str = "", counts: Optional[Sequence[int]] = None, unused: bool = False
) -> List[Tuple[Tensor, Tensor]]:
    """Trains plain BatchNorm in one process on the batches of all ranks.

    Args:
        steps: the numbers of the steps that are not lost.
        world: the number of ranks.
        data: see :func:`shard`.
        counts: the number of batches of each rank, if they differ.
        unused: whether the loss of rank 1 does not depend on a branch.

    Returns:
        Parameters and buffers after each step.
    """
    with _random:
        model = fresh_model()
    optimizer = optimizer_of(model)
    found = []
    for step in steps:
        optimizer.zero_grad()
        active = [rank for rank in range(world) if counts is None or step < counts[rank]]
        outputs = _outputs(model, [shard(step, rank, data) for rank in active], unused)
        torch.stack([loss_of(output) / world for output in outputs]).sum().backward()
        optimizer.step()
        found.append(state_of(model))
    return found


# -- actions -----------------------------------------------------------------------------------------------------------


class InjectedError(Exception):
    """The exception of a fault."""


def _raise(note: Any, seconds: Any) -> None:
    raise InjectedError("made up")


def _signal(number: int) -> Callable[[Any, Any], None]:
    def send(note: Any, seconds: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.01)  # Python runs the handler of SIGINT between two instructions

    return send


# By name: what a fault does to its process. `seconds` is the time of a pause; None for no end.
ACTIONS: Dict[str, Callable[[Any, Any], None]] = {
    "kill": _signal(signal.SIGKILL),
    "terminate": _signal(signal.SIGTERM),
    "interrupt": _signal(signal.SIGINT),
    "stop": lambda note, seconds: note("stop", seconds),
    "sleep": lambda note, seconds: time.sleep(seconds),
    "exit": lambda note, seconds: sys.exit(3),
    "os._exit": lambda note, seconds: os._exit(3),
    "raise": _raise,
}


def in_thread(function: Callable[[], Any]) -> Any:
    """Returns the result of a function that runs in another thread."""
    found: List[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]
