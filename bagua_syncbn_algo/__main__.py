"""``python -m bagua_syncbn_algo plan package.module:factory``: what a model's statistics cost, without training it."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any, List, Optional, Sequence

from torch import nn

from .coalesce import coalesce
from .convert import convert_sync_batchnorm
from .plan import SyncPlan


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Runs the command line; a mistake in it ends the program with a message."""
    parser = argparse.ArgumentParser(prog="python -m bagua_syncbn_algo", description=(__doc__ or "").split(":", 1)[1])
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="which layers share a round of statistics, and why others do not")
    plan.add_argument("model", metavar="package.module:factory", help="a function or class that builds the model")
    plan.add_argument("--json", type=Path, metavar="FILE", help="also write the plan there")
    plan.add_argument("--ranks", type=int, default=2, help="for the modelled communication time (default: 2)")
    plan.add_argument("--latency", type=float, default=500e-6, help="seconds of the smallest round (default: 0.0005)")
    plan.add_argument("--bandwidth", type=float, default=1e9, help="bytes a second between two ranks (default: 1e9)")
    options = parser.parse_args(arguments)
    found = coalesce(convert_sync_batchnorm(build(options.model), coalesce=False))
    try:
        prediction = found.predict(options.ranks, options.latency, options.bandwidth)
        if options.json is not None:
            options.json.write_text(found.to_json() + "\n")
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    for line in table(found):
        print(line)
    print(
        f"modelled communication a step on {options.ranks} ranks: original's scheme "
        f"{1000 * prediction.original:.2f} ms, a round a layer {1000 * prediction.per_layer:.2f} ms, "
        f"this plan {1000 * prediction.planned:.2f} ms"
    )
    print(found.summary())


def build(name: str) -> nn.Module:
    """Returns the model that ``package.module:factory`` builds; ends the program if there is none."""
    module_name, _, attribute = name.partition(":")
    if not attribute:
        sys.exit(f"expected a model as package.module:factory (got {name}); e.g. torchvision.models:resnet50")
    sys.path.insert(0, os.getcwd())
    try:
        value: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        sys.exit(f"expected a function or class at {name} (got {error}); correct the name or install its package")
    model = value if isinstance(value, nn.Module) else value()
    if not isinstance(model, nn.Module):
        sys.exit(f"expected {name} to build a torch.nn.Module (got {type(model).__name__}); name another factory")
    return model


def table(plan: SyncPlan) -> List[str]:
    """Returns the plan as lines of text: a round each, then what was left as written."""
    rows = [("round", "region", "level", "layers", "bytes", "members")]
    prefix = f"{plan.model}."
    for number, planned in enumerate(plan.rounds, start=1):
        members = ", ".join(name[len(prefix) :] if name.startswith(prefix) else name for name in planned.layers)
        cells = (number, planned.region or plan.model, planned.level or "-", len(planned.layers), planned.payload())
        rows.append((*map(str, cells), members if len(members) <= 60 else f"{members[:57]}..."))  # type: ignore[arg-type]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join([*(cell.rjust(width) for cell, width in zip(row, widths)), row[5]]).rstrip() for row in rows]
    return [*lines, *(f"left as written: {name} {reason}" for name, reason in plan.left)]


if __name__ == "__main__":
    main()
