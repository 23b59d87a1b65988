"""Writes all results as tables into docs/measured.md; the last step of `make bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, Iterable, List, Sequence

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "measured.md"


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> List[str]:
    """Returns a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in [heading, ["---"] * len(heading), *rows]]


def milliseconds(spread: Dict[str, float]) -> str:
    return f"{1000 * spread['median']:.0f} ({1000 * spread['low']:.0f}–{1000 * spread['high']:.0f})"


def coalescing(rows: Any) -> List[str]:
    names = list(rows[0]["spreads"])
    body = [
        [
            row["case"]["model"],
            *(f"{milliseconds(row['spreads'][name])}, {row['rounds'][name]}" for name in names),
            *(f"{ratio:.2f}" for ratio in row["overhead"].values()),
        ]
        for row in rows
    ]
    ratios = [f"overhead, overlapped / {name}" for name in rows[0]["overhead"]]
    return table(["model", *(f"{name}: ms, rounds" for name in names), *ratios], body)


def overlap(rows: Any) -> List[str]:
    heading = ["width, images", "added", "steps", "one round a level", "overlapped", "saved", "could be saved"]
    heading += ["saved / could", "exposed backward, ms", "ratio", "gradients longer than rounds", "a core is busy"]
    body = [
        [
            f"{row['width']}, {row['size']}²",
            f"{row['latency_ms']:g} ms",
            words,
            *(milliseconds(row[kind]["variants"][name]) for name in ("coalesced", "overlapped")),
            f"{1000 * row[kind]['saved']:.1f}",
            f"{1000 * row['could']:.1f}",
            f"{row[kind]['share']:.2f}",
            " → ".join(f"{1000 * row[kind]['exposed'][name]:.1f}" for name in ("coalesced", "overlapped")),
            f"{row[kind]['exposed_ratio']:.2f}",
            f"{row[kind]['gradients_longer_than_rounds']:.0%}",
            f"{row[kind]['busy']:.0%}",
        ]
        for row in rows
        for kind, words in (("training", "training"), ("alone", "accumulating"))
    ]
    return table(heading, body)


def memory(rows: Any) -> List[str]:
    names = list(rows[0]["peaks"])
    body = [
        [
            row["model"],
            *(f"{row['peaks'][n] / 2**20:.1f} ({row['peaks'][n] / row['peaks'][names[0]]:.2f})" for n in names),
        ]
        for row in rows
    ]
    return table(["model", *(f"{name}, MiB" for name in names)], body)


def prediction(rows: Any) -> List[str]:
    body = [
        [
            row["model"],
            row["scheme"].replace("_", " "),
            *(f"{1000 * row[key]:.1f}" for key in ("measured", "predicted")),
            f"{row['predicted'] / row['measured']:.2f}",
        ]
        for row in rows["rows"]
    ]
    return table(["model", "scheme", "measured, ms", "predicted, ms", "ratio"], body)


def running_stats(rows: Any) -> List[str]:
    body = [
        [
            str(row["width"]),
            f"{1000 * row['spreads']['bare'][0]:.1f}",
            f"{row['ratio']:.3f}",
            f"{1000 * row['duration']:.1f}",
            f"{row['exposed']:.0%}",
        ]
        for row in rows
    ]
    return table(["width", "without the plugin, ms", "with it, ratio", "the round, ms", "exposed"], body)


def kernels(rows: Any) -> List[str]:
    body = [
        [
            "×".join(map(str, row["shape"])),
            row["layout"],
            f"{1e6 * row['seconds']['nn.BatchNorm2d'][0]:.0f}",
            *(f"{row['ratios'][name]:.2f}" for name in ("kernels", "function")),
        ]
        for row in rows
    ]
    return table(["input", "layout", "nn.BatchNorm2d, µs", "tensor functions", "with autograd and channel"], body)


SECTIONS = {
    coalescing: "Schemes: step time (median, middle half) and rounds a step",
    overlap: "Overlapped backward rounds: the residual network, batch 4 a rank",
    memory: "Peak memory of a step (ratio to one round a layer)",
    prediction: "The cost model against measured communication",
    running_stats: 'World-wide running statistics with `normalize_over="rank"`',
    kernels: "The arithmetic without communication, against nn.BatchNorm2d (ratios)",
}


def main() -> None:
    lines = ["# Measured", "", "`make bench` writes this page from `benchmarks/results/`.", ""]
    for section, title in SECTIONS.items():
        name = section.__name__
        found = json.loads((RESULTS / f"{name}.json").read_text())
        machine = found["machine"]
        conditions = (
            f"{machine['processor']}, {machine['cores']} cores, one thread a rank, Python {machine['python']}, "
        )
        lines += [f"## {title}", "", f"`python benchmarks/{name}.py`; {conditions}torch {machine['torch']}.", ""]
        lines += [*section(found["rows"]), ""]
    PAGE.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
