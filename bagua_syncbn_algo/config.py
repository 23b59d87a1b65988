"""Configuration as a frozen value; the only reader of ``BAGUA_SYNCBN_*``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Mapping, Optional, Union

__all__ = ["SyncBatchNormConfig", "check_normalize_over"]

_PREFIX = "BAGUA_SYNCBN"
_SWITCH = {"0": False, "1": True}
_HOSTS = ("auto", "upstream", "embedded")
_SPANS = ("world", "node", "rank")


@dataclass(frozen=True)
class SyncBatchNormConfig:
    """How synchronized batch normalization is switched on.

    Raises:
        ValueError: if a value is not one of those listed.
    """

    enabled: bool = True  # BAGUA_SYNCBN=0|1: whether `enable_sync_batchnorm` does anything
    host: str = "auto"  # BAGUA_SYNCBN_HOST=auto|upstream|embedded: which Bagua runs the algorithm
    normalize_over: Union[str, int] = "world"  # BAGUA_SYNCBN_NORMALIZE_OVER=world|node|rank or a number of ranks
    coalesce: bool = True  # BAGUA_SYNCBN_COALESCE=0|1: whether independent layers share a round of statistics
    overlap: bool = True  # BAGUA_SYNCBN_OVERLAP=0|1: whether backward rounds overlap with weight gradients
    timeout: Optional[float] = None  # BAGUA_SYNCBN_TIMEOUT, seconds: how long a rank waits for the others' statistics

    def __post_init__(self) -> None:
        for name in ("enabled", "coalesce", "overlap"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"expected {name} to be True or False (got {getattr(self, name)!r}); pass a bool")
        if self.host not in _HOSTS:
            raise ValueError(f"expected host to be one of {', '.join(_HOSTS)} (got {self.host!r}); choose one of them")
        check_normalize_over(self.normalize_over, "normalize_over")
        if self.timeout is not None and not 0 < self.timeout < float("inf"):
            raise ValueError(
                f"expected timeout to be a positive number of seconds (got {self.timeout!r}); "
                "pass one, or None for the process group's own"
            )

    @classmethod
    def from_env(cls, environ: Optional[Mapping[str, str]] = None) -> SyncBatchNormConfig:
        """Reads the configuration from environment variables; an unset one keeps its default, but for the switch.

        Args:
            environ: where to read; ``os.environ`` by default.

        Returns:
            The configuration. ``enabled`` is ``False`` unless ``BAGUA_SYNCBN=1``: a program that asks the environment
            leaves the decision to it.

        Raises:
            ValueError: for an unknown variable that starts with ``BAGUA_SYNCBN``, or an unknown value; lists the valid
                ones.
        """
        environ = os.environ if environ is None else environ
        known = {
            _PREFIX,
            *(f"{_PREFIX}_{name}" for name in ("COALESCE", "HOST", "NORMALIZE_OVER", "OVERLAP", "TIMEOUT")),
        }
        for name in sorted(environ):
            if name.startswith(_PREFIX) and name not in known:
                raise ValueError(
                    f"expected one of {', '.join(sorted(known))} (got the environment variable {name}); "
                    "correct its name or unset it"
                )
        switches = {
            name: environ.get(name, default)
            for name, default in ((_PREFIX, "0"), (f"{_PREFIX}_COALESCE", "1"), (f"{_PREFIX}_OVERLAP", "1"))
        }
        for name, switch in switches.items():
            if switch not in _SWITCH:
                raise ValueError(f"expected {name} to be 0 or 1 (got {switch!r}); set it to 1 to switch on, 0 to off")
        enabled, coalesce, overlap = (_SWITCH[switch] for switch in switches.values())
        host = environ.get(f"{_PREFIX}_HOST", "auto")
        if host not in _HOSTS:
            raise ValueError(
                f"expected {_PREFIX}_HOST to be one of {', '.join(_HOSTS)} (got {host!r}); set it to one of them"
            )
        span: Union[str, int] = environ.get(f"{_PREFIX}_NORMALIZE_OVER", "world")
        span = int(span) if str(span).isdecimal() else span
        check_normalize_over(span, f"{_PREFIX}_NORMALIZE_OVER")
        text = environ.get(f"{_PREFIX}_TIMEOUT")
        try:
            timeout = None if text is None else float(text)
            return cls(enabled, host, span, coalesce, overlap, timeout)
        except ValueError:
            raise ValueError(
                f"expected {_PREFIX}_TIMEOUT to be a positive number of seconds (got {text!r}); set it to, say, 600"
            ) from None


def check_normalize_over(value: object, name: str) -> None:
    """Refuses a value that says no set of ranks.

    Raises:
        ValueError: unless ``value`` is one of ``"world"``, ``"node"``, ``"rank"`` or a whole number of at least 1.
    """
    number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not number and value not in _SPANS:
        raise ValueError(
            f"expected {name} to be one of {', '.join(_SPANS)} or a number of ranks (got {value!r}); choose one of them"
        )
