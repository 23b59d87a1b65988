"""Runs one fault on one host, and checks how the ranks end, what they say and what they have computed."""

from __future__ import annotations

import re
from typing import Dict, List, NamedTuple, Tuple

import torch
from torch import Tensor

from tests.faults import job
from tests.faults.cases import BARE, DIVERGES, EXACT, MARGIN, NAMED, RECOVERS, REFUSED, Fault
from tests.faults.model import STEPS, reference
from tests.ranks import Outcome, free_port, observe_processes

PRELOAD = ["torch._dynamo", "tests.faults.job"]
LIMIT = 45.0  # seconds of one job, after which its processes are killed and count as hung
TOLERANCE = 1e-9  # relative: the order of sums differs from that of one process, in float64
ENDING = ("kill", "terminate", "os._exit", "exit", "interrupt")  # the actions that end the rank at fault
OWN = "InjectedError"  # the exception of the fault itself

# A layer, or a place outside of rounds.
PLACES = [
    r"Net\.\w+|the check of Net's first training batch|the first use of a model's layers",
    r"the same synchronized layers and rounds|message version|number of optimizer steps",
    r"bucket \d+|end of step \d+|in the step of rank|steps without an error",
    r"comparison of parameters|the same parameters|parameter \w+|create a communicator|agreement on process groups",
]
PLACE = re.compile("|".join(PLACES))

# Errors of PyTorch's own collectives.
PYTORCH = re.compile(r"gloo|[Cc]onnection|[Tt]imed out|DDP|Expected to have finished reduction|param in process 0")


class Row(NamedTuple):
    """One row of the table."""

    fault: Fault
    host: str
    says: str  # what the ranks say, shortened
    seconds: float  # from the fault to the end of the last rank that remains; negative if no rank fails
    result: str
    problems: List[str]  # what contradicts the expectation; empty if nothing does


def run(fault: Fault, host: str) -> Row:
    """Runs a fault on a host."""
    outcomes: List[Outcome] = []
    for _ in range(3):
        outcomes = observe_processes(fault.world, job.run, fault, host, free_port(), preload=PRELOAD, limit=LIMIT)
        if not any("EADDRINUSE" in outcome.failure for outcome in outcomes):  # the port was taken meanwhile
            break
    return judge(fault, host, outcomes)


def judge(fault: Fault, host: str, outcomes: List[Outcome]) -> Row:
    """Compares the outcomes of all ranks with what is expected."""
    problems: List[str] = []
    ends = fault.action in ENDING or (fault.action == "stop" and fault.seconds is None)
    remaining = [rank for rank in range(fault.world) if not (ends and rank == fault.rank)]
    moments = [at for outcome in outcomes for name, _, at in outcome.notes if name == "fault"]
    messages = {rank: _messages(outcomes[rank]) for rank in remaining}
    seconds = -1.0
    if moments and any(messages.values()):
        times = {rank: _time_of_error(outcomes[rank]) - min(moments) for rank in remaining if messages[rank]}
        seconds = max([value for rank, value in times.items() if rank != fault.rank] or times.values())
        for rank, value in times.items():
            # A rank that pauses, or goes on after its exception, meets the end of the other ranks afterwards.
            extra = (
                (fault.seconds or 0.0) + (fault.timeout + MARGIN) * (fault.catch == "one")
                if rank == fault.rank
                else 0.0
            )
            if value > fault.timeout + MARGIN + extra:
                problems.append(f"rank {rank} ends {value:.1f} s after the fault")
    problems += [f"rank {rank} hangs" for rank in remaining if outcomes[rank].exit_code is None]
    expected = fault.expected(host)
    problems += _check_messages(fault, expected, messages)
    if expected != DIVERGES:
        problems += _check_numbers(fault, outcomes, remaining, complete=expected in (EXACT, RECOVERS))
    if expected == EXACT and any(messages.values()):
        problems.append("a rank fails")
    if expected in (EXACT, RECOVERS):
        problems += [f"rank {rank} fails" for rank in remaining if outcomes[rank].failure]
    elif expected != DIVERGES:
        # The rank with fewer batches does not fail.
        failing = [rank for rank in remaining if fault.batches is None or fault.joins or rank != fault.rank]
        problems += [f"rank {rank} does not fail" for rank in failing if not outcomes[rank].failure]
    named = all(_is_named(text, fault) for texts in messages.values() for text in texts)
    result = NAMED if expected == BARE and named else expected
    return Row(fault, host, _told(messages), seconds, result, problems)


def _is_named(text: str, fault: Fault) -> bool:
    return OWN in text[:60] or bool(PLACE.search(text) and re.search(rf"rank {fault.rank}\b", text))


def _messages(outcome: Outcome) -> List[str]:
    """Returns the texts of all errors of a rank, in order."""
    lost = [value[1] for name, value, _ in outcome.notes if name == "lost"]
    return [*lost, outcome.failure] if outcome.failure else lost


def _time_of_error(outcome: Outcome) -> float:
    """Returns the time at which a rank has caught its first error, or at which its process ended without that."""
    lost = [at for name, _, at in outcome.notes if name == "lost"]
    return lost[0] if lost else outcome.ended


def _check_messages(fault: Fault, expected: str, messages: Dict[int, List[str]]) -> List[str]:
    problems = []
    for rank, texts in messages.items():
        # The rank at fault may raise an error of its own, about its input for example.
        others = [text for text in texts if OWN not in text[:60]]
        if rank == fault.rank and fault.change == "wrong input":
            continue
        if rank == fault.rank and fault.catch == "one":
            continue  # the other ranks have ended because of it
        if expected in (NAMED, RECOVERS):
            for text in others:
                if not PLACE.search(text):
                    problems.append(f"rank {rank} names no place: {text[:300]}")
                if not re.search(rf"rank {fault.rank}\b", text):
                    problems.append(f"rank {rank} does not name rank {fault.rank}: {text[:300]}")
        first = others[0] if others else ""
        if fault.says and expected != BARE and others and not re.search(fault.says, first):
            problems.append(f"rank {rank} does not say {fault.says!r}: {first[:300]}")
        if expected == BARE and first and not PLACE.search(first) and not PYTORCH.search(first):
            problems.append(f"rank {rank} has another error than one of a collective: {first[:300]}")
        if expected == REFUSED and not re.search(r"\(got .*\); ", first):
            problems.append(f"rank {rank} names no remedy: {first[:300]}")
    return problems


# -- numbers -----------------------------------------------------------------------------------------------------------

_State = Tuple[int, Tensor, Tensor]


def _check_numbers(fault: Fault, outcomes: List[Outcome], ranks: List[int], complete: bool) -> List[str]:
    """Compares the state after each completed step with one process that trains on these steps."""
    problems = []
    lives = {rank: _lives(outcomes[rank]) for rank in ranks}
    if fault.restart:
        world = fault.world - (fault.action in ENDING)
        for rank in ranks:
            if len(lives[rank]) != 2 or len(lives[rank][1]) != STEPS + 1:
                problems.append(f"rank {rank} does not complete the second job")
            else:
                problems += _differences(rank, lives[rank][1], fault._replace(world=world), True, False)
    lost = any(name == "lost" for rank in ranks for name, _, _ in outcomes[rank].notes)
    for rank in ranks:
        problems += _differences(rank, lives[rank][0], fault, not lost, fault.joins and rank == fault.rank)
    if complete and not fault.restart:
        finals = {rank: [state for state in lives[rank][0] if state[0] == STEPS] for rank in ranks}
        if not all(finals.values()):
            return [*problems, "a rank does not complete the job"]
        for rank in ranks[1:]:
            for ours, theirs in zip(finals[rank][0][1:], finals[ranks[0]][0][1:]):
                if not torch.equal(ours, theirs):
                    problems.append(f"WRONG NUMBERS: rank {rank} ends with other values than rank {ranks[0]}")
    return problems


def _lives(outcome: Outcome) -> List[List[_State]]:
    """Returns the states of the first job, and those of a second one with another process group."""
    lives: List[List[_State]] = [[]]
    for name, value, _ in outcome.notes:
        if name == "lost" and value[0] == -1:
            lives.append([])
        elif name == "state":
            lives[-1].append(value)
    return lives


def _differences(rank: int, states: List[_State], fault: Fault, buffers: bool, early: bool) -> List[str]:
    """Compares the states of one rank.

    Args:
        rank: the rank.
        states: its states.
        fault: the fault.
        buffers: whether to compare buffers: the forward of a step that is lost may have updated them.
        early: whether the rank has fewer batches, so that its last state is that of the other ranks.
    """
    steps = list(range(STEPS)) if early else [step for step, _, _ in states if step < STEPS]
    counts = [STEPS if r != fault.rank else fault.batches or STEPS for r in range(fault.world)] if fault.joins else None
    wanted = reference(steps, fault.world, fault.data, counts, fault.change == "unused branch")
    problems = []
    for index, (step, *found) in enumerate(states):
        if not wanted:
            continue  # no step is completed
        place = len(wanted) - 1 if step == STEPS else index
        for kind, ours, theirs in zip(("parameters", "buffers"), found, wanted[place]):
            if kind == "buffers" and not buffers:
                continue
            error = float((ours - theirs).abs().max() / theirs.abs().max())
            if not error < TOLERANCE:
                problems.append(f"WRONG NUMBERS: {kind} of rank {rank} after step {step} differ by {error:.1e}")
    return problems[:1]


# -- the text of the table ---------------------------------------------------------------------------------------------

_LENGTH = 260  # characters of a message in the table


def _told(messages: Dict[int, List[str]]) -> str:
    """Returns what the ranks say, in short."""
    texts = {rank: shorten(found[0]) for rank, found in messages.items() if found}
    if not texts:
        return ""
    if len(set(texts.values())) == 1:
        who = "all" if len(texts) > 1 else f"rank {next(iter(texts))}"
        return f"{who}: {next(iter(texts.values()))}"
    return "<br>".join(f"rank {rank}: {text}" for rank, text in texts.items())


def _end_of_value(line: str) -> int:
    """Returns the index after the closing parenthesis of ``(got ...)``; the length of a line without one."""
    depth = 0
    for index in range(max(line.find("(got "), 0), len(line) if "(got " in line else 0):
        depth += {"(": 1, ")": -1}.get(line[index], 0)
        if depth == 0:
            return index + 1
    return len(line)


def shorten(message: str) -> str:
    """Returns the expectation and the value of an error, without the remedy, addresses and numbers that vary."""
    if message.startswith(OWN):
        return "its exception"
    line = re.sub(r"^SyncBatchNormError: |^RuntimeError: (?=expected)", "", message.split("\n")[0])
    line = re.sub(r" This is typically caused by .*", "", line)
    text = line[: _end_of_value(line)]
    text = re.sub(r": it terminated or runs other code(?=\))", "", text)
    remarks = re.search(r"Not the same on all ranks: .*", line)
    text += f" … {remarks[0]}" if remarks else ""
    text = re.sub(r"\[?[\w.:]+\]?:\d{4,}", "address", re.sub(r"Net_\d+", "Net", text))
    text = re.sub(r"^\w*Error: |\[\S+\.cc:\d+\] ?|\(after [\d.]+ s\)", "", text) if "expected" not in text else text
    text = text.replace("|", "/").replace("`", "'").strip()
    return f"`{text if len(text) <= _LENGTH else text[: _LENGTH - 1] + '…'}`"
