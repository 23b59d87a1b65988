"""One training of a case of `benchmarks/frameworks.py`: data, optimizer, and what is recorded of each step."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bagua_syncbn_algo import convert_sync_batchnorm, plan_of
from bagua_syncbn_algo.bench.schemes import channel_of_model

SHARDS = 2  # ranks
STEPS = 4  # the first one contains the equivalence check; the last one is compared
LEARNING_RATE = 1e-3

Batch = Tuple[Tensor, Any]  # images, and targets: a tensor, or a list with one entry for each image


@dataclass
class Case:
    """A framework and one of its entry points.

    Attributes:
        framework: the name of the framework.
        entry: what calls the model, and how.
        build: returns the model with plain BatchNorm layers.
        train: trains a model on the data of a job, as the framework does.
        reference: trains a model in one process; the same function in distributed training if ``train`` is ``None``.
        loss: returns the loss of a batch. The loss of several shards is the mean of their losses.
        targets: returns the targets of a number of images.
        size: height and width of the images.
        images: the images of one shard in a batch.
        accumulate: the number of batches whose gradients one step sums.
        autocast: whether the model is float32 under autocast to bfloat16; otherwise everything is float64.
        calls: for each converted model, the forwards and backwards of its parts in one batch, by the part's path;
            ``""`` for the model itself.
        note: a remark on the numbers.
    """

    framework: str
    entry: str
    build: Callable[[], nn.Module]
    train: Optional[Callable[[Job, nn.Module], None]] = None
    reference: Optional[Callable[[Job, nn.Module], None]] = None
    loss: Callable[[Callable[..., Any], Batch], Tensor] = None  # type: ignore[assignment]
    targets: Callable[[int, torch.Generator], Any] = None  # type: ignore[assignment]
    size: int = 64
    images: int = 2
    accumulate: int = 1
    autocast: bool = False
    calls: List[Dict[str, Tuple[int, int]]] = field(default_factory=lambda: [{"": (1, 1)}])
    note: str = ""


class Job:
    """A training of a case on one rank, or in one process on the data of all ranks.

    Args:
        case: the case.
        shards: the parts of the data that this process trains on.
        synchronized: whether this process is one of several ranks, and converts the model.
        whole: whether the shards of a batch are one forward; otherwise there is one forward for each shard, so that
            each shard has its own statistics.
        autocast: whether the loop enables autocast; by default as the case does.
    """

    def __init__(
        self, case: Case, shards: List[int], synchronized: bool, whole: bool = True, autocast: Optional[bool] = None
    ) -> None:
        self.case, self.shards, self.synchronized, self.whole = case, shards, synchronized, whole
        self.autocast = case.autocast if autocast is None else autocast
        self.dtype = torch.float32 if self.autocast else torch.float64
        self.gradients: Dict[str, Tensor] = {}  # of the last step
        self.statistics: Dict[str, Tensor] = {}  # the running statistics after the last step
        self.rounds: List[int] = []  # the rounds until the end of each step
        self.planned: List[int] = []  # the rounds of a step by the plan: at conversion, then after each step
        self.layers = 0  # the rounds of a step without coalescing; the caller counts them
        self.steps_done = 0
        self.skipped: List[Tuple[str, str]] = []
        self._model: Any = None
        self._converted: Tuple[nn.Module, ...] = ()

    def convert(self, model: Any) -> Any:
        """Returns ``model``, in distributed training with synchronized layers."""
        return convert_sync_batchnorm(model) if self.synchronized else model

    def wrap(self, model: Any, **options: Any) -> Any:
        """Returns ``model``, in distributed training wrapped by DistributedDataParallel."""
        return DistributedDataParallel(model, broadcast_buffers=False, **options) if self.synchronized else model

    def batch(self, number: int, shard: int) -> Batch:
        generator = torch.Generator().manual_seed(100 * number + shard)
        size = (self.case.images, 3, self.case.size, self.case.size)
        # Shards of different distributions: with statistics of one shard, the gradients would be others.
        images = (1 + shard) * torch.randn(size, generator=generator, dtype=torch.float64) + 0.5 * shard
        return images.to(self.dtype), self.case.targets(self.case.images, generator)

    def batches(self, step: int) -> List[Batch]:
        """Returns the batches whose gradients a step sums, for each the loss is divided by their number."""
        found: List[Batch] = []
        for number in range(step * self.case.accumulate, (step + 1) * self.case.accumulate):
            parts = [self.batch(number, shard) for shard in self.shards]
            found += [_concatenate(parts)] if self.whole else parts
        return found

    def all_batches(self) -> List[Batch]:
        """Returns the batches of all steps."""
        return [batch for step in range(STEPS) for batch in self.batches(step)]

    def precision(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.autocast)

    def optimizer(self, model: nn.Module, last: bool = True, parameters: Any = None) -> Recorder:
        """Returns the optimizer of ``model``.

        Args:
            model: the model or a part of it.
            last: whether this is the last optimizer of a step.
            parameters: the parameters that it changes; all by default.
        """
        return Recorder(self, model, last, parameters)

    def observe(self, model: nn.Module, *converted: nn.Module) -> None:
        """Sets the model that is trained. Call this function after the conversion.

        Args:
            model: the model.
            *converted: the modules that were converted; by default ``model``.
        """
        self._model, self._converted = model, converted or (model,)
        if self.synchronized:
            self._note_plan()

    def record(self, gradients: Dict[str, Tensor], last: bool) -> None:
        """Records the gradients of one optimizer, and, for the last one, the rounds of the step."""
        self.gradients.update(gradients)
        if not last:
            return
        self.steps_done += 1
        model = self._model
        self.statistics = {
            _name(name): buffer.detach().double().clone()
            for name, buffer in model.named_buffers()
            if name.endswith(("running_mean", "running_var"))
        }
        if self.synchronized:
            self.rounds.append(channel_of_model(model).rounds)
            self._note_plan()

    def _note_plan(self) -> None:
        total = 0
        for converted, calls in zip(self._converted, self.case.calls):
            plan = plan_of(converted)
            self.skipped += [each for each in plan.skipped if each not in self.skipped]
            for path, (forwards, backwards) in calls.items():
                prefix = f"{plan.model}.{path}" if path else ""
                rounds = [planned for planned in plan.rounds if planned.layers[0].startswith(prefix)]
                total += sum(forwards + backwards * planned.backward for planned in rounds)
        self.planned.append(total * self.case.accumulate)


class Recorder(torch.optim.SGD):
    """Stochastic gradient descent that gives the gradients to the job before each step.

    A framework calls ``step`` exactly once for each training step, so no framework needs another instrumentation.
    """

    def __init__(self, job: Job, model: nn.Module, last: bool, parameters: Any = None) -> None:
        # Without references to the module: accelerate and Lightning copy or inspect optimizers.
        self._job, self._last = job, last
        chosen = list(model.parameters() if parameters is None else parameters)
        self._names = {id(parameter): _name(name) for name, parameter in model.named_parameters()}
        super().__init__(chosen, lr=LEARNING_RATE)

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:  # Lightning runs forward and backward in it
            with torch.enable_grad():
                loss = closure()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        found = {self._names.get(id(p), str(i)): _whole(p.grad) for i, p in enumerate(parameters) if p.grad is not None}
        self._job.record(found, self._last)
        super().step()
        return loss


def loop(job: Job, model: nn.Module) -> None:
    """The usual training loop, under DistributedDataParallel in distributed training."""
    with_options()(job, model)


def with_options(before: Any = None, **options: Any) -> Callable[[Job, nn.Module], None]:
    """Returns the usual training loop with options of DistributedDataParallel.

    Args:
        before: a function that changes the wrapped model, such as ``torch.compile``.
        **options: the options.
    """

    def train(job: Job, model: nn.Module) -> None:
        model = job.convert(model)
        job.observe(model)
        wrapped = job.wrap(model, **options)
        if job.synchronized and before is not None:
            wrapped = before(wrapped)
        optimizer = job.optimizer(model)
        steps(job, wrapped, optimizer)

    return train


def steps(job: Job, model: Any, optimizer: Any, after: Callable[[], None] = lambda: None) -> None:
    """Runs all steps of ``job``. All batches but the last one of a step accumulate without communication.

    Args:
        job: the job.
        model: the model, perhaps wrapped.
        optimizer: the optimizer.
        after: a function to call after each step.
    """
    for step in range(STEPS):
        optimizer.zero_grad()
        batches = job.batches(step)
        for number, batch in enumerate(batches):
            local = hasattr(model, "no_sync") and number + 1 < len(batches)
            with model.no_sync() if local else _nothing():
                with job.precision():
                    loss = job.case.loss(model, batch)
                (loss / len(batches)).backward()
        optimizer.step()
        after()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def collected_warnings() -> Iterator[List[str]]:
    """Collects the first lines of the warnings about synchronized layers."""
    found: List[str] = []
    show = warnings.showwarning

    def collect(message: Any, *arguments: Any, **options: Any) -> None:
        text = str(message)
        if "bagua" in str(arguments[1:2]) or "regrouped" in text or "SyncBatchNorm" in text:
            found.append(text)
        show(message, *arguments, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = collect
        handler = _ListHandler(found)
        logging.getLogger("bagua_syncbn_algo").addHandler(handler)
        try:
            yield found
        finally:
            logging.getLogger("bagua_syncbn_algo").removeHandler(handler)


class _ListHandler(logging.Handler):
    def __init__(self, found: List[str]) -> None:
        super().__init__(logging.WARNING)
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        self._found.append(record.getMessage())


def largest_difference(found: Dict[str, Tensor], expected: Dict[str, Tensor]) -> float:
    """Returns the largest difference of a tensor, relative to its norm.

    The norm counts as at least a thousandth of the largest norm of all tensors: the gradient of a bias before a
    normalization is 0, so that every difference would be large.

    Raises:
        ValueError: if the names differ.
    """
    if set(found) != set(expected):
        raise ValueError(
            f"expected the tensors of the reference (got {len(found)} of {len(expected)}; different: "
            f"{sorted(set(found) ^ set(expected))[:4]}); give the optimizer the parameters of the model"
        )
    floor = 1e-3 * max(float(tensor.norm()) for tensor in expected.values())
    return max(
        float((found[name].double() - expected[name]).norm()) / max(float(expected[name].norm()), floor)
        for name in expected
    )


def _name(name: str) -> str:
    """Returns the name of a parameter without the prefixes of wrappers."""
    for prefix in ("module.", "_orig_mod.", "_forward_module."):
        name = name.replace(prefix, "")
    return name


def _whole(gradient: Any) -> Tensor:
    """Returns a copy of a gradient; all ranks of FSDP must call."""
    whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return whole.detach().double().clone()


def _concatenate(parts: List[Batch]) -> Batch:
    images = torch.cat([images for images, _ in parts])
    targets = [targets for _, targets in parts]
    if isinstance(targets[0], Tensor):
        return images, torch.cat(targets)
    return images, [target for shard in targets for target in shard]


def start(rank: int) -> None:
    """Creates the default process group, for cases whose framework does not."""
    if not dist.is_initialized():
        from datetime import timedelta

        dist.init_process_group("gloo", timeout=timedelta(seconds=90))
