"""The command line: ``python -m bagua_syncbn_algo plan | bench | timeline package.module:factory``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Optional, Sequence

from .bench.factory import build
from .convert import convert_sync_batchnorm
from .graph.coalesce import coalesce


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Runs a command.

    Args:
        arguments: the command-line arguments; ``None`` for those of the process.

    Raises:
        SystemExit: if an argument is invalid, with the error message.
    """
    description = "Shows the cost of exchanging the statistics of a model."
    parser = argparse.ArgumentParser(prog="python -m bagua_syncbn_algo", description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_plan(commands)
    _add_bench(commands)
    _add_timeline(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="package.module:factory", help="a function or class that builds the model")


# -- plan --------------------------------------------------------------------------------------------------------------


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser("plan", help="print the rounds of statistics, their layers and the modelled cost")
    _add_model(plan)
    plan.add_argument("--json", type=Path, metavar="FILE", help="also write the plan to this file")
    plan.add_argument("--ranks", type=int, default=2, help="ranks in the cost model (default: 2)")
    plan.add_argument("--latency", type=float, default=500e-6, help="seconds of the smallest round (default: 0.0005)")
    plan.add_argument("--bandwidth", type=float, default=1e9, help="bytes per second between two ranks (default: 1e9)")
    plan.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    found = coalesce(convert_sync_batchnorm(build(options.model), coalesce=False))
    prediction = found.predict(options.ranks, options.latency, options.bandwidth)
    if options.json is not None:
        options.json.write_text(found.to_json() + "\n")
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
    _add_model(parser)
    parser.add_argument(
        "--input", type=_shape, default=(4, 3, 64, 64), metavar="N,C,H,W", help="input of one rank (default: 4,3,64,64)"
    )
    parser.add_argument("--nproc", type=int, default=2, help="gloo ranks to start on this machine (default: 2)")
    parser.add_argument(
        "--latency", type=float, default=0.0, metavar="MS", help="milliseconds added to every round (default: 0)"
    )


def _shape(text: str) -> Sequence[int]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers separated by commas (got {text}); pass e.g. 4,3,64,64"
        ) from None


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="measure step times of all variants on local ranks, interleaved")
    _add_ranks(bench)
    bench.add_argument("--steps", type=int, default=20, help="timed steps of each variant (default: 20)")
    bench.add_argument("--variants", nargs="+", metavar="NAME", help="the variants to measure (default: all)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    bench.add_argument("-o", "--plot", type=Path, metavar="FILE", help="also draw the results to this file")
    bench.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> None:
    _require("rich", *(["matplotlib"] if options.plot else []))
    from rich.console import Console
    from rich.table import Table

    from .bench import steps
    from .bench.measure import write

    chosen = {} if options.variants is None else {"variants": tuple(options.variants)}
    run = steps.Options(options.model, options.input, options.nproc, options.steps, options.latency / 1000, **chosen)
    build(options.model)  # reports a wrong name once, before any rank starts
    found = steps.measure(run)
    heading, *rows = steps.rows_of(found)
    caption = f"medians (middle half) of {run.steps} steps, interleaved"
    table = Table(*heading, title=steps.title_of(found["options"]), caption=caption)
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
    timeline = commands.add_parser("timeline", help="draw one step: rounds in flight, waits and gradients")
    _add_ranks(timeline)
    timeline.add_argument("-o", "--output", type=Path, default=Path("step.png"), help="the picture (default: step.png)")
    timeline.add_argument("--trace", type=Path, help="the Chrome trace (default: the output, with suffix .json)")
    timeline.add_argument("--variant", default="overlapped", help="variant to draw (default: overlapped)")
    timeline.set_defaults(run=_timeline)


def _timeline(options: argparse.Namespace) -> None:
    _require("matplotlib")
    from .bench import steps, timeline

    run = steps.Options(
        options.model, options.input, options.nproc, latency=options.latency / 1000, variants=(options.variant,)
    )
    build(options.model)
    spans = timeline.record_step(run)
    trace = options.output.with_suffix(".json") if options.trace is None else options.trace
    timeline.write_trace(spans, trace)
    timeline.draw(spans, run, options.output)
    print(f"picture: {options.output}; trace for chrome://tracing or Perfetto: {trace}")


def _require(*packages: str) -> None:
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"expected {' and '.join(packages)} to be installed (got an environment without {' and '.join(missing)}); "
            "run pip install bagua_syncbn_algo[bench]"
        )


if __name__ == "__main__":
    main()
