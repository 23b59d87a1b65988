"""Injects all faults on both hosts and writes docs/fault_table.md; `make faults` runs this command."""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from tests.faults.cases import FAULTS, HOSTS, MARGIN, SECTIONS, TIMEOUT, Fault
from tests.faults.check import Row, run

PAGE = Path(__file__).parent.parent.parent / "docs" / "fault_table.md"

HEADING = f"""# Injected faults

`make faults` injects {{faults}} faults into training jobs of 2 or 3 real processes, and writes this page. It uses two
hosts: `DistributedDataParallel` (DDP), and `with_bagua` on the embedded host (Bagua). The model has five synchronized
layers in four rounds. The timeout of the process groups is {TIMEOUT:.0f} s. Unless the name of a fault says otherwise,
rank 1 is at fault, in the third step.

Each run is checked for three things:

1. Every rank that the fault does not end ends by itself, at most {MARGIN:.0f} s after the timeout.
2. Its error names the place and the global rank at fault. The place is a layer, a bucket, a broadcast or an agreement.
3. The parameters and buffers after each completed step equal those of one process, in float64, to 1e-9.

| result | meaning |
|---|---|
| exact | the fault is legal: all ranks complete all steps without an error |
| recovers | exceptions are caught and steps are repeated: all ranks complete the job |
| named | every rank ends with an error that names the place and the rank |
| refused | every rank ends with an error that names the remedy |
| error of PyTorch | every rank ends in time; an error of a collective of PyTorch itself does not name place and rank |
| parameters differ | PyTorch's own reducer or optimizer steps with other values on one rank, unseen by this package |

*Seconds* are those from the fault to the end of the last of the other ranks, or until they have caught their error.
"""


def cases(only: str = "") -> List[Tuple[Fault, str]]:
    """Returns the faults and hosts whose name contains a text."""
    found = [(fault, host) for fault in FAULTS for host in HOSTS if fault.expected(host)]
    return [(fault, host) for fault, host in found if only in f"{fault.name} [{host}]"]


def text_of(rows: Dict[Tuple[str, str], Row]) -> str:
    """Returns the text of the page."""
    lines = [HEADING.format(faults=len(FAULTS))]
    for section, faults in SECTIONS.items():
        lines += [
            f"## {section}",
            "",
            "| fault | host | what the ranks say | seconds | result |",
            "|---|---|---|---|---|",
        ]
        for fault in faults:
            for host in HOSTS:
                row = rows.get((fault.name, host))
                if row is not None:
                    seconds = f"{row.seconds:.1f}" if row.seconds >= 0 else ""
                    result = f"**{'; '.join(row.problems)}**" if row.problems else row.result
                    named = {"ddp": "DDP", "bagua": "Bagua"}[host]
                    lines.append(f"| {fault.name} | {named} | {row.says} | {seconds} | {result} |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument(
        "--only", default="", help="run the faults whose name and host contain this text; write nothing"
    )
    parser.add_argument("--jobs", type=int, default=3, help="jobs at a time; most of them wait (default: %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="print what the ranks say")
    options = parser.parse_args(arguments)
    chosen, start = cases(options.only), time.monotonic()
    rows: Dict[Tuple[str, str], Row] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(lambda case: run(*case), chosen):
            rows[row.fault.name, row.host] = row
            seconds = f"{row.seconds:5.1f} s" if row.seconds >= 0 else "       "
            print(f"{seconds}  {row.host:5}  {row.fault.name}: {'; '.join(row.problems) or row.result}", flush=True)
            if options.verbose:
                print(row.says.replace("<br>", "\n"))
    failed = [row for row in rows.values() if row.problems]
    if not options.only:
        PAGE.write_text(text_of(rows))
    print(
        f"{len(rows)} runs of {len({name for name, _ in rows})} faults in {time.monotonic() - start:.0f} s, "
        f"{len(failed)} failed"
    )
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
