"""The list of faults, and what is expected of each on both hosts."""

from __future__ import annotations

from typing import Dict, List, Mapping, NamedTuple, Optional, Tuple

TIMEOUT = 5.0  # seconds, of the process groups of all jobs
MARGIN = 3.0  # seconds after the timeout within which every rank has ended

HOSTS = ("ddp", "bagua")

# What is expected of the ranks that the fault does not end:
EXACT = "exact"  # all ranks complete all steps
RECOVERS = "recovers"  # all ranks complete the job and repeat the steps that are lost; errors name place and rank
NAMED = "named"  # all ranks end with errors that name the place and the rank at fault
REFUSED = "refused"  # all ranks end with an error that names the remedy, see `says`
DIVERGES = "parameters differ"  # all ranks end; PyTorch's reducer or optimizer steps with other values on one rank
BARE = "error of PyTorch"  # all ranks end in time; in most runs with an error of a collective of PyTorch itself


class Fault(NamedTuple):
    """A fault of one rank. All fields can be pickled."""

    name: str
    ddp: str = NAMED  # what is expected under DistributedDataParallel; empty if the fault does not exist there
    bagua: str = NAMED  # what is expected with `with_bagua`
    place: str = ""  # one of `model.PLACES`
    action: str = ""  # one of `model.ACTIONS`
    change: str = ""  # what the rank does differently, see `job.Job`
    step: int = 2  # the step in which the fault occurs: not 1, in whose forward DDP has collectives of its own
    rank: int = 1  # the global rank at fault
    world: int = 2
    timeout: float = TIMEOUT
    seconds: Optional[float] = None  # of a pause; None for no end
    catch: str = "none"  # the ranks that catch exceptions and continue: "none", "one" (at fault) or "all"
    data: str = ""  # see `model.shard`
    batches: Optional[int] = None  # of the rank at fault, if it has fewer
    joins: bool = False  # whether the ranks train inside of Join
    restart: bool = False  # whether the ranks create a new process group after an error, and train again
    env: Mapping[str, str] = {}
    env_of_rank: Mapping[str, str] = {}  # of the rank at fault
    says: str = ""  # a regular expression for the messages of all ranks that remain
    note: str = ""  # an explanation for the table

    def expected(self, host: str) -> str:
        return self.ddp if host == "ddp" else self.bagua


def _at(action: str, places: Dict[str, Tuple[str, str]], verb: str, **options: object) -> List[Fault]:
    """Returns one fault for each place, with the expectations under DDP and with Bagua."""
    return [
        Fault(f"{verb}: {place}", ddp, bagua, place=place, action=action, **options)  # type: ignore[arg-type]
        for place, (ddp, bagua) in places.items()
    ]


_BY_LAYER = {"BAGUA_SYNCBN_COALESCE": "0"}  # otherwise an attribute that forward reads is another graph

ONE_RANK_DIFFERS = [
    Fault("skips a layer from the start", change="skipped layer", step=0, says=r"Net\.(one|two|mix)"),
    Fault("sets an attribute that forward reads, coalesced", change="skipped layer", says="first training batch"),
    Fault("skips a layer in the third step", change="skipped layer", says=r"Net\.(one|two)", env=_BY_LAYER),
    Fault("applies a layer twice", change="layer twice", says=r"Net\.(one|two)", env=_BY_LAYER),
    Fault("swaps two layers", change="swapped layers", says=r"Net\.one.*Net\.two", env=_BY_LAYER),
    Fault("is in evaluation mode", ddp=BARE, change="evaluation mode"),
    Fault("has not converted its model", ddp=BARE, change="not converted", step=0),
    Fault("has a frozen weight from the start", ddp=BARE, change="frozen weight", step=0),
    Fault("freezes a weight in the third step", ddp=DIVERGES, change="frozen later"),
    Fault("does not use a branch", EXACT, EXACT, change="unused branch", step=0),
    Fault("has images of another size", EXACT, EXACT, data="sizes"),
    Fault("has an empty batch", EXACT, EXACT, data="empty"),
    Fault("has an input that needs a gradient", EXACT, EXACT, change="input with a gradient"),
    Fault("has a layer input of another dtype", change="other dtype", says="length|kind"),
    Fault("has a layer input of another shape", change="wrong input", says=r"Net\.\w+ \(forward\)", env=_BY_LAYER),
    Fault("has another width", ddp=BARE, change="other width", step=0),
    Fault("has modules in another order", change="other order", step=0),
    Fault("has other initial weights", EXACT, EXACT, change="other weights", step=0),
    Fault("has other initial running statistics", NAMED, EXACT, change="other buffers", step=0),
    Fault("has another momentum", change="other momentum", step=0, says="momentum=0.1"),
    Fault("has another optimizer state", "", EXACT, change="optimizer state", step=0),
    Fault("has a forward hook", change="hook", step=0, says="forward hook"),
    Fault("runs one more training forward", ddp=BARE, change="two forwards", says=r"Net\.\w+ \((forward|backward)\)"),
    Fault("evaluates between steps", EXACT, EXACT, change="evaluation"),
    Fault("runs backward twice", BARE, NAMED, change="second backward"),
    Fault("accumulates gradients", ddp=BARE, change="no_sync"),
    Fault("runs forward in another thread", EXACT, EXACT, change="other thread"),
    Fault("uses activation checkpointing", EXACT, EXACT, change="checkpoint"),
    Fault("uses torch.compile", EXACT, EXACT, change="compiled", timeout=30.0),
    Fault("has a NaN, with the check on", data="nan", env={"BAGUA_SYNCBN_CHECK": "nonfinite"}, says="finite"),
    Fault("sets BAGUA_SYNCBN_COALESCE=0", step=0, env_of_rank={"BAGUA_SYNCBN_COALESCE": "0"}),
    Fault("sets BAGUA_SYNCBN_OVERLAP=0", EXACT, EXACT, env_of_rank={"BAGUA_SYNCBN_OVERLAP": "0"}),
    Fault("sets BAGUA_SYNCBN_CHECK=nonfinite", step=0, env_of_rank={"BAGUA_SYNCBN_CHECK": "nonfinite"}),
    Fault("sets BAGUA_SYNCBN_NORMALIZE_OVER=rank", EXACT, env_of_rank={"BAGUA_SYNCBN_NORMALIZE_OVER": "rank"}),
    Fault("sets BAGUA_SYNCBN_TIMEOUT=4", EXACT, EXACT, env_of_rank={"BAGUA_SYNCBN_TIMEOUT": "4"}),
    Fault("has another message version", change="message version", says="version .*99 on rank 1"),
]

ENDS = [
    *_at(
        "kill",
        {
            "before the process group": (BARE, BARE),
            "before the wrapper": (BARE, NAMED),
            "in the wrapper's broadcast": (BARE, NAMED),
            "forward, between two rounds": (NAMED, NAMED),
            "backward, before the first round": (NAMED, NAMED),
            "backward, between two rounds": (NAMED, NAMED),
            "backward, after the last round": (BARE, NAMED),
            "optimizer step": (NAMED, NAMED),
            "end of the step": (NAMED, NAMED),
        },
        "SIGKILL",
    ),
    *_at("kill", {"forward, before the first round": (NAMED, NAMED)}, "SIGKILL, first step", step=0),
    Fault("SIGKILL of rank 0", place="forward, between two rounds", action="kill", rank=0),
    Fault("SIGKILL of one of three ranks", place="forward, between two rounds", action="kill", world=3),
    Fault("SIGTERM", place="forward, between two rounds", action="terminate"),
    Fault("os._exit in forward", place="forward, between two rounds", action="os._exit"),
    Fault("sys.exit in forward", place="forward, between two rounds", action="exit"),
    Fault("SIGINT in forward", place="forward, between two rounds", action="interrupt"),
    Fault("SIGINT in backward", place="backward, between two rounds", action="interrupt"),
    Fault("SIGSTOP for 1.5 s in forward", EXACT, EXACT, "forward, between two rounds", "stop", seconds=1.5),
    Fault("SIGSTOP for 1.5 s in backward", EXACT, EXACT, "backward, between two rounds", "stop", seconds=1.5),
    Fault("SIGSTOP for ever in forward", place="forward, between two rounds", action="stop"),
    Fault("SIGSTOP for ever in backward", place="backward, between two rounds", action="stop"),
    Fault("SIGSTOP of rank 0 for ever", place="forward, between two rounds", action="stop", rank=0),
    Fault("SIGSTOP of one of three ranks", place="forward, between two rounds", action="stop", world=3),
    Fault("slow data loading, 2 s", EXACT, EXACT, "data loading", "sleep", seconds=2.0),
    Fault("data loading that takes longer than the timeout", place="data loading", action="sleep", seconds=7.0),
]

_PLACES = {
    "data loading": (NAMED, NAMED),
    "forward, before the first round": (NAMED, NAMED),
    "forward, between two rounds": (NAMED, NAMED),
    "forward, after the last round": (NAMED, NAMED),
    "loss": (NAMED, NAMED),
    "backward, between two rounds": (NAMED, NAMED),
    "backward, after the last round": (BARE, NAMED),
    "optimizer step": (NAMED, NAMED),
}
_CAUGHT = {
    "data loading": (RECOVERS, RECOVERS),
    "forward, between two rounds": (RECOVERS, RECOVERS),
    "loss": (BARE, RECOVERS),
    "backward, between two rounds": (BARE, RECOVERS),
    "optimizer step": (DIVERGES, NAMED),
}

EXCEPTIONS = [
    *_at("raise", _PLACES, "exception"),
    *_at("raise", _CAUGHT, "exception caught on all ranks", catch="all"),
    *_at(
        "raise",
        dict.fromkeys(["forward, between two rounds", "backward, between two rounds"], (NAMED, NAMED)),
        "exception caught on one rank",
        catch="one",
    ),
]

JOBS = [
    Fault("fewer batches, then the end of the process", batches=2),
    Fault("fewer batches, then other code", batches=2, seconds=8.0),
    Fault("fewer batches inside of Join", EXACT, REFUSED, batches=2, joins=True, says="after with_bagua"),
    Fault(
        "exception, then a new process group", RECOVERS, RECOVERS, "forward, between two rounds", "raise", restart=True
    ),
    Fault(
        "SIGKILL of one of three ranks, then a new process group",
        RECOVERS,
        RECOVERS,
        "forward, between two rounds",
        "kill",
        world=3,
        restart=True,
    ),
]

SECTIONS = {
    "A rank that differs": ONE_RANK_DIFFERS,
    "A rank that ends, stops or is late": ENDS,
    "Exceptions": EXCEPTIONS,
    "Batches and restarts": JOBS,
}
FAULTS = [fault for faults in SECTIONS.values() for fault in faults]
