"""Step times of a model with every scheme of statistics exchange, measured interleaved on new rank processes."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..comm.recorder import RoundRecords, record_rounds
from ..graph.coalesce import plan_of
from ..host import bagua
from .factory import build
from .inputs import make_inputs, parse_input
from .latency import add_latency
from .measure import RANKS, interleave, run_ranks
from .schemes import COLORS, EAGER_VARIANTS, VARIANTS, build_variant, channel_of_model
from .trial import as_on_two_ranks, check_step, convert, has_batch_norms

__all__ = ["Options", "bars_of", "check", "draw", "measure", "rows_of", "training_step"]

_RECORDED = 5  # steps of each variant under record_rounds, after the timed steps


@dataclass(frozen=True)
class Options:
    """The options of a measurement.

    Raises:
        ValueError: for no or an unknown variant, an input that is no shape, fewer than 2 ranks or steps, or a negative
            latency.
    """

    model: str  # as in `bench.factory`
    inputs: Tuple[str, ...] = ("4,3,64,64",)  # the inputs of one rank, as in `bench.inputs`
    ranks: int = RANKS
    steps: int = 20  # timed steps of each variant
    latency: float = 0.0  # seconds added to every round of statistics
    variants: Tuple[str, ...] = EAGER_VARIANTS

    def __post_init__(self) -> None:
        for text in self.inputs:
            parse_input(text)
        if self.ranks < 2 or self.steps < 2 or self.latency < 0:
            raise ValueError(
                f"expected at least 2 ranks and 2 steps and a latency of at least 0 (got {self.ranks}, {self.steps}, "
                f"{self.latency}); increase the value that is too small"
            )
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown or not self.variants:
            raise ValueError(
                f"expected variants among {', '.join(VARIANTS)} (got {', '.join(unknown) or 'none'}); use these names"
            )


def training_step(model: nn.Module, *inputs: Tensor) -> Callable[[], None]:
    """Returns a function that runs one forward and backward. The loss is :func:`loss_of` the output."""

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        loss_of(model(*inputs)).backward()

    return step


def loss_of(output: Any) -> Tensor:
    """Returns the sum over all floating-point output tensors of the mean of their squares.

    Args:
        output: a tensor, or tensors in nested containers.

    Raises:
        ValueError: if the output has no floating-point tensor.
    """
    leaves = [leaf for leaf in pytree.tree_flatten(output)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not leaves:
        raise ValueError(
            f"expected the model to return floating-point tensors (got {type(output).__name__} without any); use "
            "a model that does"
        )
    return torch.stack([leaf.float().square().mean() for leaf in leaves]).sum()


def check(options: Options) -> None:
    """Builds the model and runs one step in this process, so that a mistake is reported once and before ranks start.

    Args:
        options: the options of the measurement.

    Raises:
        ValueError: if the model cannot be built or converted, has no BatchNorm layers, or does not run on the inputs.
    """
    model = build(options.model)
    if not has_batch_norms(model):
        raise ValueError(
            f"expected BatchNorm layers in {options.model} (got none, so that there is nothing to measure); use a "
            "model with BatchNorm layers"
        )
    inputs = make_inputs(options.inputs)
    if {"local", "compiled local"} & set(options.variants):
        check_step(training_step(model, *inputs), options.model, options.inputs)
    if not set(options.variants) <= {"local", "compiled local"}:
        model = as_on_two_ranks(convert(model))
        check_step(training_step(model, *inputs), options.model, options.inputs)


def measure(options: Options) -> Dict[str, Any]:
    """Measures all variants, interleaved, on new rank processes.

    Args:
        options: the options of the measurement.

    Returns:
        The results:

        - ``options``: the fields of ``options``;
        - ``plan``: a summary of the plan, or ``None`` without a coalesced variant;
        - ``variants``: for each variant the number of ``rounds`` per step, the seconds of a step (``median``, and the
          quartiles ``low`` and ``high``), and ``phases``: the ``duration`` and the ``exposed`` seconds of the rounds
          per step, in forward and in backward. ``phases`` is empty for a variant without this package's channel.

    Raises:
        torch.multiprocessing.ProcessException: if a rank failed.
    """
    results: Dict[str, Any] = run_ranks(_run_rank, options, ranks=options.ranks)
    return results


def _run_rank(rank: int, options: Options) -> Dict[str, Any]:
    from rich.progress import Progress

    bagua.init_process_group()
    torch.manual_seed(rank)
    inputs = make_inputs(options.inputs)
    built: Dict[str, Any] = {}
    for name in options.variants:
        torch.manual_seed(0)
        built[name] = build_variant(name, build(options.model), example_inputs=inputs)
    steps = {name: training_step(each, *inputs) for name, each in built.items()}
    warmup = 5
    with Progress(transient=True, disable=rank != 0) as progress:
        task = progress.add_task("measuring", total=len(built) * (options.steps + warmup))
        for step in steps.values():  # without added latency: the first batch checks the regrouped graph
            step()
        channels = {name: channel_of_model(each) for name, each in built.items()}
        for channel in channels.values():
            add_latency(channel, options.latency)
        spreads = interleave(steps, options.steps, warmup, lambda: progress.advance(task))
    variants = {}
    for name, step in steps.items():
        before = channels[name].rounds
        with record_rounds() as record:
            for _ in range(_RECORDED):
                record.next_step()
                step()
        rounds = (channels[name].rounds - before) // _RECORDED
        variants[name] = {"rounds": rounds, **spreads[name]._asdict(), "phases": _phases(record)}
    planned = [name for kind in ("overlapped", "coalesced") for name in built if name.endswith(kind)]
    plan = plan_of(built[planned[0]]) if planned else None
    summary = None if plan is None else f"{plan.summary()}, overlapped {plan.rounds_overlapped}"
    return {"options": asdict(options), "plan": summary, "variants": variants}


def _phases(record: RoundRecords) -> Dict[str, Dict[str, float]]:
    """Returns the median over steps of the rounds' seconds, by phase."""
    phases: Dict[str, Dict[str, float]] = {}
    for phase in ("forward", "backward"):
        entries = [[e for e in step if e.phase == phase] for step in record.by_step().values()]
        if any(entries):
            phases[phase] = {
                "duration": statistics.median(sum(e.duration for e in step) for step in entries),
                "exposed": statistics.median(sum(e.exposed for e in step) for step in entries),
            }
    return phases


def rows_of(results: Mapping[str, Any]) -> List[Tuple[str, ...]]:
    """Returns a table of the results of :func:`measure`: a heading, then a row for each variant."""
    variants = results["variants"]
    local, upstream = variants.get("local"), variants.get("upstream")
    heading = ("variant", "step, ms", "x local", "overhead / upstream's", "rounds", "waits, ms: forward", "backward")
    rows: List[Tuple[str, ...]] = [heading]
    for name, each in variants.items():
        median, low, high = (f"{1000 * each[key]:.1f}" for key in ("median", "low", "high"))
        ratio = "" if local is None else f"{each['median'] / local['median']:.2f}"
        overhead = overhead_of(results, name) if local is not None and upstream is not None else None
        waits = [
            f"{1000 * each['phases'][phase]['exposed']:.1f}" if phase in each["phases"] else ""
            for phase in ("forward", "backward")
        ]
        share = "" if overhead is None else f"{overhead:.2f}"
        rows.append((name, f"{median} ({low}-{high})", ratio, share, str(each["rounds"]), *waits))
    return rows


def overhead_of(results: Mapping[str, Any], name: str, of: str = "upstream") -> float:
    """Returns the overhead of a variant over local BatchNorm, relative to the overhead of another variant.

    Args:
        results: the results of :func:`measure`.
        name: the name of the variant.
        of: the name of the other variant.
    """
    local, other, this = (results["variants"][each]["median"] for each in ("local", of, name))
    return float((this - local) / (other - local))


def title_of(options: Mapping[str, Any]) -> str:
    """Returns a title for figures and tables from the fields of :class:`Options`."""
    inputs = " and ".join(text.replace(",", "x") for text in options["inputs"])
    latency = options["latency"]
    added = f"{1000 * latency:g} ms added to every round" if latency else "no latency added"
    return f"{options['model']}, {inputs} a rank, {options['ranks']} gloo ranks, {added}"


def bars_of(spreads: Mapping[str, Any], names: Sequence[str]) -> Tuple[List[float], List[List[float]], Dict[str, Any]]:
    """Returns the data of a bar chart of step times.

    Args:
        spreads: ``median``, ``low`` and ``high`` in seconds, by variant.
        names: the variants, in the order of the bars.

    Returns:
        The lengths of the bars in ms, the error bars below and above them, and further options of matplotlib.
    """
    times = [1000 * spreads[name]["median"] for name in names]
    below = [time - 1000 * spreads[name]["low"] for time, name in zip(times, names)]
    above = [1000 * spreads[name]["high"] - time for time, name in zip(times, names)]
    style = {"color": [COLORS[name] for name in names], "error_kw": {"elinewidth": 1, "ecolor": "#404040"}}
    return times, [below, above], style


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draws a bar chart of the step times, labeled with the rounds of a step.

    Args:
        results: the results of :func:`measure`.
        path: the image file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), dpi=150, layout="constrained")
    axis = figure.subplots()
    variants = results["variants"]
    names = list(variants)[::-1]
    times, errors, style = bars_of(variants, names)
    bars = axis.barh(names, times, xerr=errors, **style)
    labels = [f"{time:.0f} ms, {variants[name]['rounds']} rounds" for time, name in zip(times, names)]
    axis.bar_label(bars, labels, fontsize=8, padding=8)
    axis.set_xlim(0, 1.3 * max(times))
    axis.set_xlabel("step time, ms (median and middle half)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title_of(results["options"]), fontsize=9, loc="left")
    figure.savefig(path)
