"""Errors inside an exchange: the report to the other ranks, and the comparison of headers and of texts."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from torch import Tensor

from .wire import FAULT, FUSED, HEADER_BYTES, TRITON, SyncBatchNormError, SyncPoint, phase_name

__all__ = [
    "CHECK",
    "FIRST_USE",
    "Told",
    "error_text",
    "first_difference",
    "header_error",
    "reporting_errors",
    "require_one_state",
]

_KINDS = {FUSED: "fused", TRITON: "fused by Triton"}
CHECK = "the check of "  # how the names of the sync points begin at which ranks agree on a regrouped forward
FIRST_USE = "the first use of a model's layers"  # the sync point at which the ranks compare their layers
_EXPLANATION = (
    ". The check compares the regrouped forward of a module with its own forward, once, on its first training batch. A "
    "rank that is elsewhere runs the module's own forward, e.g. because of a hook that only this rank has"
)


class reporting_errors:  # noqa: N801  # a contextlib generator would cost 1 µs more, four times per layer
    """A context manager that reports an exception in its block to the other ranks. The exception propagates.

    Args:
        channel: the :class:`~.channel.Channel` of the ranks that receive the report.
        point: the sync point of the block.
        phase: ``FORWARD`` or ``BACKWARD``.
    """

    __slots__ = ("_channel", "_phase", "_point")

    def __init__(self, channel: Any, point: Any, phase: int) -> None:
        self._channel, self._point, self._phase = channel, point, phase

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Optional[BaseException], trace: Any) -> None:
        if isinstance(error, Exception):
            self._channel.fail(self._point, self._phase, error)


class Told(NamedTuple):
    """What a rank tells the others if the ranks are at different layers."""

    position: str  # layer and phase, in words
    remarks: str  # what is special about its models, such as hooks

    def text(self) -> str:
        """Returns one string for :meth:`of`."""
        return f"{self.position}\0{self.remarks}"

    @classmethod
    def of(cls, text: str) -> Told:
        """Returns what :meth:`text` has encoded."""
        position, _, remarks = text.partition("\0")
        return cls(position, remarks)


def error_text(error: BaseException, most: int) -> bytes:
    """Returns class and message of an error as at most ``most`` bytes. A longer text ends with an ellipsis."""
    text = f"{type(error).__name__}: {error}".encode()
    return text if len(text) <= most else text[: most - 3] + b"..."


def header_error(
    rows: List[List[int]],
    words: List[int],
    point: SyncPoint,
    phase: int,
    gathered: Tensor,
    own: int,
    names: Dict[int, str],
    ranks: Sequence[int],
    ask: Callable[[str], Dict[int, Told]] = lambda position: {},
) -> SyncBatchNormError:
    """Returns the error for a round whose headers differ.

    Args:
        rows: the headers of all ranks.
        words: the header of this rank.
        point: the sync point of this rank.
        phase: the phase of this rank.
        gathered: the messages of all ranks, ``(W, capacity)``.
        own: the number of this rank in the channel.
        names: the names of this rank's sync points, by key.
        ranks: the global ranks of the channel.
        ask: tells the other ranks the position of this rank; returns what they have told, by global rank. Called if
            the ranks are at different layers, which all of them find out.
    """
    where = f"{point.name} ({phase_name(phase)})"
    for index, (_, _, flags, length) in enumerate(rows):
        if flags & FAULT and index != own:
            text = bytes(gathered[index, HEADER_BYTES : HEADER_BYTES + max(length, 0)].tolist())
            explanation = _EXPLANATION if point.name.startswith(CHECK) else ""
            return SyncBatchNormError(
                f"expected rank {ranks[index]} to send statistics at {where} "
                f"(got its error: {text.decode(errors='replace')}); fix the error on that rank{explanation}"
            )
    if any(row[:2] != words[:2] for row in rows):
        told = ask(where)
        positions = []
        for rank, (key, phase_, _, _) in zip(ranks, rows):
            known = f"{names[key]} ({phase_name(phase_)})" if key in names else ""
            unknown = f"a layer unknown on this rank ({phase_name(phase_)})"
            positions.append(known or (told[rank].position if rank in told else unknown))
        places = ", ".join(f"rank {rank} at {position}" for rank, position in zip(ranks, positions))
        explanation = _EXPLANATION if any(position.startswith(CHECK) for position in positions) else ""
        remarks = _differing({rank: each.remarks.splitlines() for rank, each in told.items()})
        return SyncBatchNormError(
            f"expected every rank to be at the same layer (got {places}); make all ranks run the same "
            f"synchronized layers in the same order, and skip a layer on all ranks or on none{explanation}{remarks}"
        )
    kinds = [_KINDS.get(row[2] & (FUSED | TRITON), "exact") for row in rows]
    if len(set(kinds)) > 1:
        found = ", ".join(f"{kind} on rank {rank}" for rank, kind in zip(ranks, kinds))
        return SyncBatchNormError(
            f"expected statistics of one kind at {where} (got {found}); use the same input dtype, eps, "
            "momentum and dtype of the running statistics on all ranks, and Triton on all ranks or on none "
            "(BAGUA_SYNCBN_TRITON=0)"
        )
    lengths = ", ".join(f"{row[3]} bytes on rank {rank}" for rank, row in zip(ranks, rows))
    return SyncBatchNormError(
        f"expected statistics of one length at {where} (got {lengths}); "
        "use the same num_features and input dtype on all ranks"
    )


def first_difference(texts: List[str], ranks: Sequence[int], remarks: Sequence[str] = ()) -> str:
    """Returns an error message that names the first line in which the ranks' texts differ.

    Args:
        texts: the text of each rank.
        ranks: the global rank of each text.
        remarks: lines of each rank that explain its text, such as the hooks of its model.
    """
    first, reference = ranks[0], texts[0].splitlines()
    for rank, text in zip(ranks, texts):
        lines = text.splitlines()
        for index in range(max(len(reference), len(lines))):
            ours = reference[index] if index < len(reference) else "nothing"
            theirs = lines[index] if index < len(lines) else "nothing"
            if ours != theirs:
                return (
                    f"expected the same synchronized layers and rounds on every rank (got {len(reference)} on rank "
                    f"{first}, {len(lines)} on rank {rank}; the first difference is number {index}: {ours} on rank "
                    f"{first}, {theirs} on rank {rank}); build and convert the same model on every rank, with the same "
                    f"options{_differing({r: each.splitlines() for r, each in zip(ranks, remarks)})}"
                )
    raise AssertionError("digests differ but texts do not")


def require_one_state(states: Sequence[int], ranks: Sequence[int], layers: Sequence[Tuple[str, int]]) -> None:
    """Raises an error if the running statistics of ranks differ before the first round.

    The rounds move them by the same amounts, so a difference would remain: each rank would evaluate another model.

    Args:
        states: the digest of each rank; 0 if it is not known.
        ranks: the global rank of each digest.
        layers: names and widths of the layers.

    Raises:
        SyncBatchNormError: on all ranks, if two digests differ.
    """
    known = [(rank, state) for rank, state in zip(ranks, states) if state]
    differing = [rank for rank, state in known if state != known[0][1]]
    if differing:
        more = f" and {len(layers) - 1} more layers" if len(layers) > 1 else ""
        raise SyncBatchNormError(
            f"expected the same running statistics on every rank at {FIRST_USE} (got different ones on rank "
            f"{known[0][0]} and rank {differing[0]} in {layers[0][0]}{more}); load the same checkpoint on all ranks, "
            "or let DistributedDataParallel broadcast the buffers of rank 0 (omit broadcast_buffers=False; new "
            "versions of PyTorch broadcast them once with forward_sync_buffers=False)"
        )


_MOST_REMARKS = 5  # of one rank in an error


def _differing(lines: Dict[int, List[str]]) -> str:
    """Returns the lines that not all ranks have, as the end of a sentence; empty without any."""
    shared = set.intersection(*map(set, lines.values())) if lines else set()
    found: List[Tuple[int, List[str]]] = []
    for rank, own in sorted(lines.items()):
        special = [line for line in own if line not in shared]
        if special:
            more = [f"{len(special) - _MOST_REMARKS} more"] if len(special) > _MOST_REMARKS else []
            found.append((rank, special[:_MOST_REMARKS] + more))
    if not found:
        return ""
    return ". Not the same on all ranks: " + "; ".join(f"on rank {rank}, {', '.join(each)}" for rank, each in found)
