"""The timeline of one training step: the computation of each rank, the rounds in flight, the waits for rounds."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import torch
import torch.distributed as dist

from ..comm.recorder import record_rounds
from ..host import bagua
from .factory import build
from .inputs import make_inputs
from .latency import add_latency
from .measure import run_ranks
from .schemes import build_variant, channel_of_model
from .steps import Options, loss_of, title_of

__all__ = ["Span", "draw", "record_step", "write_trace"]

_STEPS = 7  # recorded steps; the one of median length is drawn
LANES = ("computation", "statistics", "gradients")
# Color and legend by kind of span.
_STYLES = {
    "forward": ("#56B4E9", "forward"),
    "backward": ("#0072B2", "backward"),
    "wait": ("#D55E00", "waiting for statistics"),
    "overlapped": ("#009E73", "in flight while the rank computes"),
    "exposed": ("#D55E00", "in flight while the rank waits"),
    "bucket": ("#A6A6A6", "gradient bucket"),
}


class Span(NamedTuple):
    """A period of time on one rank."""

    rank: int
    lane: str  # one of LANES
    kind: str  # computation: forward, backward, wait; statistics: overlapped, exposed; gradients: bucket
    name: str
    start: float  # seconds from the beginning of the step
    end: float


def record_step(options: Options) -> List[Span]:
    """Runs steps of the first of ``options.variants`` on new rank processes and returns the step of median length.

    Args:
        options: the options of the measurement.

    Returns:
        The spans of all ranks.

    Raises:
        torch.multiprocessing.ProcessException: if a rank failed.
    """
    spans: List[Span] = [Span(*each) for each in run_ranks(_run_rank, options, ranks=options.ranks)]
    return spans


def _recorded_algorithm(events: List[Tuple[str, float, float]]) -> Any:
    """Returns a gradient all-reduce that appends the name, start and end of each bucket to ``events``."""

    class RecordedAllReduce(bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithm):  # type: ignore[misc]
        def reify(self, process_group: Any) -> Any:
            implementation = super().reify(process_group)
            starts: Dict[str, float] = {}

            def init_operations(ddp: Any, bucket: Any) -> None:
                bucket.clear_ops()
                bucket.append_python_op(lambda name: starts.update({name: time.perf_counter()}), group=process_group)
                bucket.append_centralized_synchronous_op(average=True, group=process_group)
                bucket.append_python_op(
                    lambda name: events.append((name, starts[name], time.perf_counter())), group=process_group
                )

            implementation.init_operations = init_operations
            return implementation

    return RecordedAllReduce()


def _run_rank(rank: int, options: Options) -> List[Tuple[Any, ...]]:
    bagua.init_process_group()
    torch.manual_seed(rank)
    inputs = make_inputs(options.inputs)
    torch.manual_seed(0)
    buckets: List[Tuple[str, float, float]] = []
    algorithm = _recorded_algorithm(buckets)
    model = build_variant(options.variants[0], build(options.model), algorithm, example_inputs=inputs)
    steps: List[List[Span]] = []
    for number in range(3 + _STEPS):
        if number == 3:  # the first steps check the graph and form the buckets
            add_latency(channel_of_model(model), options.latency)
        dist.barrier()
        buckets.clear()
        for parameter in model.parameters():
            parameter.grad = None
        with record_rounds() as rounds:
            begin = time.perf_counter()
            loss = loss_of(model(*inputs))
            middle = time.perf_counter()
            loss.backward()
            end = time.perf_counter()
        spans = [
            Span(rank, "computation", "forward", "forward", begin, middle),
            Span(rank, "computation", "backward", "backward", middle, end),
        ]
        for entry in rounds:
            if entry.wait is None or entry.finish is None:
                continue
            name = f"{', '.join(entry.layers)} ({entry.phase}, {entry.bytes} bytes)"
            wait = min(max(entry.wait, entry.launch), entry.finish)
            if wait > entry.launch:
                spans.append(Span(rank, "statistics", "overlapped", name, entry.launch, wait))
            if entry.finish > wait:
                spans.append(Span(rank, "statistics", "exposed", name, wait, entry.finish))
                spans.append(Span(rank, "computation", "wait", name, wait, entry.finish))
        spans += [Span(rank, "gradients", "bucket", *bucket) for bucket in buckets]
        if number >= 3:
            steps.append(spans)
    gathered = [[[Span(*span) for span in step] for step in each] for each in _gather_json(steps, options.ranks)]

    # All ranks run on one machine and share its clock.
    def length(index: int) -> float:
        ends = [span.end for each in gathered for span in each[index]]
        return float(max(ends) - min(span.start for each in gathered for span in each[index]))

    chosen = sorted(range(_STEPS), key=length)[_STEPS // 2]
    spans = [span for each in gathered for span in each[chosen]]
    origin = min(span.start for span in spans)
    return [tuple(span._replace(start=span.start - origin, end=span.end - origin)) for span in spans]


def _gather_json(value: Any, ranks: int) -> List[Any]:
    """Returns the value of each rank, which is sent as JSON.

    Collectives:
        Two all-gathers. Every rank must call.
    """
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]
    dist.all_gather(lengths, torch.tensor([content.numel()]))
    longest = max(int(length) for length in lengths)
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(ranks)]
    dist.all_gather(texts, torch.nn.functional.pad(content, (0, longest - content.numel())))
    return [json.loads(bytes(text[: int(length)].tolist()).decode()) for text, length in zip(texts, lengths)]


def write_trace(spans: List[Span], path: Path) -> None:
    """Writes a Chrome trace for ``chrome://tracing`` and Perfetto, with a process per rank and a thread per lane."""
    events: List[Dict[str, Any]] = []
    for rank in sorted({span.rank for span in spans}):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        for number, lane in enumerate(LANES):
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": number, "args": {"name": lane}})
    for span in spans:
        events.append(
            {
                "ph": "X",
                "name": span.name,
                "cat": span.kind,
                "pid": span.rank,
                "tid": LANES.index(span.lane),
                "ts": 1e6 * span.start,
                "dur": 1e6 * (span.end - span.start),
            }
        )
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")


def draw(spans: List[Span], options: Options, path: Path) -> None:
    """Draws the step, with one group of lanes per rank, and below it an enlarged part of backward.

    Args:
        spans: the result of :func:`record_step`.
        options: the options of that call.
        path: the image file to write.
    """
    from matplotlib.figure import Figure

    ranks = sorted({span.rank for span in spans})
    figure = Figure(figsize=(13, 2.2 + 2.0 * len(ranks)), dpi=140, layout="constrained")
    full, detail = figure.subplots(2, 1)
    backward = next(span for span in spans if span.kind == "backward")
    width = (backward.end - backward.start) / 5
    middle = (backward.start + backward.end) / 2
    _draw_lanes(full, spans, ranks)
    full.axvspan(1000 * (middle - width / 2), 1000 * (middle + width / 2), color="#F0E442", alpha=0.25, zorder=0)
    _draw_lanes(detail, spans, ranks)
    detail.set_xlim(1000 * (middle - width / 2), 1000 * (middle + width / 2))
    detail.set_title("the part of backward marked above, enlarged", fontsize=9, loc="left")
    detail.set_xlabel("ms")
    waited = sum(span.end - span.start for span in spans if span.kind == "wait" and span.rank == ranks[0])
    overlapped = sum(span.end - span.start for span in spans if span.kind == "overlapped" and span.rank == ranks[0])
    summary = f"rank {ranks[0]} waits {1000 * waited:.0f} ms, {1000 * overlapped:.0f} ms of rounds are overlapped"
    full.set_title(f"One step ({options.variants[0]}): {summary}", fontsize=10, loc="left")
    shown = {span.kind for span in spans}
    handles = [_patch(color, label) for kind, (color, label) in _STYLES.items() if kind in shown and kind != "exposed"]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.suptitle(title_of(vars(options)), fontsize=9, x=0.01, ha="left")
    figure.savefig(path)


def _patch(color: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=color, label=label)


def _draw_lanes(axis: Any, spans: List[Span], ranks: List[int]) -> None:
    height = len(LANES) + 0.6
    ticks: Dict[float, str] = {}
    for rank in ranks:
        for number, lane in enumerate(LANES):
            place = -(rank * height + number)
            ticks[place] = f"rank {rank}: {lane}" if lane == LANES[0] else lane
            for kind, (color, _) in _STYLES.items():
                bars = [
                    (1000 * span.start, 1000 * (span.end - span.start))
                    for span in spans
                    if span.rank == rank and span.lane == lane and span.kind == kind
                ]
                axis.broken_barh(bars, (place - 0.4, 0.8), color=color, linewidth=0)
    axis.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    axis.set_ylim(min(ticks) - 0.7, 0.7)
    axis.set_xlim(0, 1000 * max(span.end for span in spans))
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
