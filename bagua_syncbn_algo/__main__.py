"""The command line: ``python -m bagua_syncbn_algo plan | bench | timeline MODEL``."""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path
from typing import Any, Optional, Sequence

import torch

from bagua_syncbn_algo import __version__

from .bench.checks import check_files, check_picture, require_packages
from .bench.factory import build
from .bench.inputs import make_inputs, parse_input
from .bench.trial import as_on_two_ranks, check_step, convert, has_batch_norms
from .graph.coalesce import plan_of

_MODELS = """\
MODEL is the name of a function, a class or an nn.Module instance in a module
that can be imported from the working directory:

  torchvision.models:resnet50

For a function or class, a call with literal arguments (strings, numbers,
booleans, None, and containers of them) is written in quotes of the shell:

  'timm:create_model("hrnet_w18", num_classes=10)'
"""
_INPUTS = """
--input is the shape of a tensor, with an optional dtype. If the forward takes
several tensors, repeat the option in their order:

  --input 4,3,64,64
  --input 2,16:int64 --input 2,16:bool

Floating-point inputs have a normal distribution, integers are zeros and ones.
"""


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Runs a command.

    Args:
        arguments: the command-line arguments; ``None`` for those of the process.

    Raises:
        SystemExit: if an argument is invalid, with the error message.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bagua_syncbn_algo",
        description="Shows what the exchange of BatchNorm statistics costs for a model.",
        epilog=f"{_MODELS}\nThe option --help after a command describes the command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    versions = f"bagua_syncbn_algo {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}"
    parser.add_argument("--version", action="version", version=versions, help="print the versions and exit")
    commands = parser.add_subparsers(dest="command", required=True, title="commands", metavar="COMMAND")
    _add_plan(commands)
    _add_bench(commands)
    _add_timeline(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


def _add_command(commands: Any, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=_MODELS + _INPUTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="what builds the model, as package.module:factory (see below)")
    return parser


def _add_input(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument(
        "--input", type=_input, action="append", metavar="N,C,...[:DTYPE]", help=f"{meaning}; may be repeated"
    )


def _input(text: str) -> str:
    try:
        parse_input(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


# -- plan --------------------------------------------------------------------------------------------------------------


def _add_plan(commands: Any) -> None:
    plan = _add_command(
        commands,
        "plan",
        "print the rounds of statistics, their layers and the modelled cost",
        "Prints the rounds of statistics of a training step, the layers that share a\n"
        "round, the layers and modules that are not coalesced or not overlapped with,\n"
        "with the reasons, and the modelled communication time. Nothing is trained.",
    )
    _add_input(plan, "an input of the forward. The plan is then that of this call, and is checked with it")
    plan.add_argument("--json", type=Path, metavar="FILE", help="also write the plan to this file")
    plan.add_argument("--ranks", type=int, default=2, metavar="N", help="ranks in the cost model (default: 2)")
    plan.add_argument(
        "--latency", type=float, default=500e-6, metavar="SECONDS", help="time of the smallest round (default: 0.0005)"
    )
    plan.add_argument(
        "--bandwidth",
        type=float,
        default=1e9,
        metavar="BYTES",
        help="bytes per second between two ranks (default: 1e9)",
    )
    plan.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    check_files(options.json)
    model = build(options.model)
    has_layers = has_batch_norms(model)
    inputs = None if options.input is None else make_inputs(options.input)
    model = convert(model, inputs)
    found = plan_of(model)
    if inputs is not None:  # the conversion itself continues without a check if the forward raises
        as_on_two_ranks(model).train()
        check_step(lambda: model(*inputs), options.model, options.input)
    prediction = found.predict(options.ranks, options.latency, options.bandwidth)
    if options.json is not None:
        options.json.write_text(found.to_json() + "\n")
    if not has_layers:
        print(f"{found.model} has no BatchNorm layers: a training step exchanges no statistics")
        print(found.summary())
        return
    for line in found.table():
        print(line)
    print(
        f"modelled communication a step on {options.ranks} ranks: upstream Bagua's SyncBatchNorm "
        f"{1000 * prediction.upstream:.2f} ms, a round a layer {1000 * prediction.per_layer:.2f} ms, "
        f"this plan {1000 * prediction.planned:.2f} ms"
    )
    print(f"backward rounds that overlap with weight gradients: {found.rounds_overlapped}")
    print(found.summary())


# -- bench and timeline ------------------------------------------------------------------------------------------------


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    _add_input(parser, "an input of one rank (default: 4,3,64,64)")
    parser.add_argument("--nproc", type=int, default=2, metavar="N", help="gloo ranks to start here (default: 2)")
    parser.add_argument(
        "--latency", type=float, default=0.0, metavar="MS", help="milliseconds added to every round (default: 0)"
    )


def _run_options(options: argparse.Namespace, **others: Any) -> Any:
    from .bench.steps import Options

    if options.input is not None:
        others["inputs"] = tuple(options.input)
    return Options(options.model, ranks=options.nproc, latency=options.latency / 1000, **others)


def _add_bench(commands: Any) -> None:
    bench = _add_command(
        commands,
        "bench",
        "measure the step times of all schemes on local ranks, interleaved",
        "Measures the training step with every scheme of statistics exchange on ranks\n"
        "of this machine, interleaved. The schemes are local BatchNorm, those of\n"
        "upstream Bagua and of torch, and three of this package.",
    )
    _add_ranks(bench)
    bench.add_argument("--steps", type=int, default=20, metavar="N", help="timed steps of each variant (default: 20)")
    bench.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        help='after MODEL, the variants to measure among local, upstream, torch, "per layer", coalesced and overlapped '
        "(default: all)",
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    bench.add_argument("-o", "--plot", type=Path, metavar="FILE", help="also draw the results to this file")
    bench.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> None:
    require_packages("rich", *(["matplotlib"] if options.plot else []))
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from .bench import steps
    from .bench.measure import write

    run = _run_options(
        options, steps=options.steps, **({"variants": tuple(options.variants)} if options.variants else {})
    )
    check_picture(options.plot)
    check_files(options.json, options.plot)
    steps.check(run)
    found = steps.measure(run)
    heading, *rows = steps.rows_of(found)
    caption = f"medians (middle half) of {run.steps} steps, interleaved"
    table = Table(*heading, title=Text(steps.title_of(found["options"]), style="table.title"), caption=caption)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
    if found["plan"] is not None:
        print(found["plan"])
    if options.json is not None:
        write(options.json, found)
    if options.plot is not None:
        steps.draw(found, options.plot)


def _add_timeline(commands: Any) -> None:
    timeline = _add_command(
        commands,
        "timeline",
        "draw one step: rounds in flight, waits and gradients",
        "Draws one training step on ranks of this machine: the computation of each\n"
        "rank, the rounds of statistics in flight, the waits for them, and the gradient\n"
        "buckets. The step is also written as a Chrome trace.",
    )
    _add_ranks(timeline)
    timeline.add_argument(
        "-o", "--output", type=Path, default=Path("step.png"), metavar="FILE", help="the picture (default: step.png)"
    )
    timeline.add_argument(
        "--trace", type=Path, metavar="FILE", help="the Chrome trace (default: the picture's name with suffix .json)"
    )
    timeline.add_argument(
        "--variant", default="overlapped", metavar="NAME", help="a variant of bench (default: overlapped)"
    )
    timeline.set_defaults(run=_timeline)


def _timeline(options: argparse.Namespace) -> None:
    require_packages("matplotlib")
    from .bench import steps, timeline

    run = _run_options(options, variants=(options.variant,))
    trace = options.output.with_suffix(".json") if options.trace is None else options.trace
    check_picture(options.output)
    check_files(options.output, trace)
    steps.check(run)
    spans = timeline.record_step(run)
    timeline.write_trace(spans, trace)
    timeline.draw(spans, run, options.output)
    print(f"picture: {options.output}; trace for chrome://tracing or Perfetto: {trace}")


if __name__ == "__main__":
    main()
