"""The configuration, an immutable value. This module is the only reader of ``BAGUA_SYNCBN_*`` variables."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Mapping, Optional, Union

__all__ = ["SyncBatchNormConfig"]

_PREFIX = "BAGUA_SYNCBN"
_BOOLEANS = {"0": False, "1": True}
_HOSTS = ("auto", "upstream", "embedded")
_SCOPES = ("world", "node", "rank")
_CHECKS = ("none", "nonfinite")
_SHORTEST, _LONGEST = 0.001, 1e8  # seconds of a timeout: backends count milliseconds, and nanoseconds in 64 bits
_MOST_DIGITS = 9  # of a number of ranks


@dataclass(frozen=True)
class SyncBatchNormConfig:
    """The configuration of synchronized batch normalization.

    ``host`` and ``triton`` take effect from the environment only, not in a configuration that a caller creates.

    Attributes:
        enabled: whether ``enable_sync_batchnorm`` has an effect (``BAGUA_SYNCBN=0|1``).
        host: the Bagua that runs the algorithm (``BAGUA_SYNCBN_HOST=auto|upstream|embedded``).
        normalize_over: the ranks that normalize together: ``"world"``, ``"node"``, ``"rank"`` or a number of ranks
            (``BAGUA_SYNCBN_NORMALIZE_OVER``).
        coalesce: whether independent layers share a round of statistics (``BAGUA_SYNCBN_COALESCE=0|1``).
        overlap: whether backward rounds overlap with weight gradients (``BAGUA_SYNCBN_OVERLAP=0|1``).
        triton: whether a Triton kernel merges statistics on CUDA, if Triton is installed (``BAGUA_SYNCBN_TRITON=0|1``).
        timeout: the number of seconds that a rank waits for the statistics of the other ranks, from 0.001 to 1e8;
            ``None`` for the timeout of the process group (``BAGUA_SYNCBN_TIMEOUT``).
        check: ``"nonfinite"`` to raise an error on all ranks that names the first layer and rank whose statistics or
            gradient sums are not finite. The host then waits for the device in every round
            (``BAGUA_SYNCBN_CHECK=none|nonfinite``).

    Raises:
        ValueError: if a value is invalid.
    """

    enabled: bool = True
    host: str = "auto"
    normalize_over: Union[str, int] = "world"
    coalesce: bool = True
    overlap: bool = True
    triton: bool = True
    timeout: Optional[float] = None
    check: str = "none"

    def __post_init__(self) -> None:
        for name in ("enabled", "coalesce", "overlap", "triton"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"expected {name} to be True or False (got {getattr(self, name)!r}); pass a bool")
        if self.host not in _HOSTS:
            raise ValueError(f"expected host to be one of {', '.join(_HOSTS)} (got {self.host!r}); pass one of them")
        _check_normalize_over(self.normalize_over, "normalize_over")
        if self.timeout is not None and not _is_timeout(self.timeout):
            raise ValueError(
                f"expected timeout to be a positive number of seconds (got {_shortened(self.timeout)}); "
                "pass a number from 0.001 to 1e8, or None for the timeout of the process group"
            )
        if self.check not in _CHECKS:
            raise ValueError(f"expected check to be one of {', '.join(_CHECKS)} (got {self.check!r}); pass one of them")

    @classmethod
    def from_env(cls, environ: Optional[Mapping[str, str]] = None) -> SyncBatchNormConfig:
        """Reads the configuration from environment variables.

        Args:
            environ: the environment variables; ``None`` for ``os.environ``.

        Returns:
            The configuration. Unset variables have their defaults, but ``enabled`` is ``False`` unless
            ``BAGUA_SYNCBN=1``.

        Raises:
            ValueError: if a variable that starts with ``BAGUA_SYNCBN`` is unknown or its value is invalid. The message
                lists the valid ones.
        """
        environ = os.environ if environ is None else environ
        known = {
            _PREFIX,
            *(f"{_PREFIX}_{name}" for name in ("CHECK", "COALESCE", "HOST", "NORMALIZE_OVER", "OVERLAP")),
            *(f"{_PREFIX}_{name}" for name in ("TIMEOUT", "TRITON")),
        }
        for name in sorted(environ):
            if name.startswith(_PREFIX) and name not in known:
                raise ValueError(
                    f"expected one of {', '.join(sorted(known))} (got the environment variable {name}); "
                    "correct its name or unset it"
                )
        switches = {_PREFIX: environ.get(_PREFIX, "0")}
        for switch in ("COALESCE", "OVERLAP", "TRITON"):
            switches[f"{_PREFIX}_{switch}"] = environ.get(f"{_PREFIX}_{switch}", "1")
        for name, value in switches.items():
            if value not in _BOOLEANS:
                raise ValueError(f"expected {name} to be 0 or 1 (got {value!r}); set it to 1 to enable or 0 to disable")
        enabled, coalesce, overlap, triton = (_BOOLEANS[value] for value in switches.values())
        host, check = environ.get(f"{_PREFIX}_HOST", "auto"), environ.get(f"{_PREFIX}_CHECK", "none")
        for name, value, choices in ((f"{_PREFIX}_HOST", host, _HOSTS), (f"{_PREFIX}_CHECK", check, _CHECKS)):
            if value not in choices:
                raise ValueError(
                    f"expected {name} to be one of {', '.join(choices)} (got {value!r}); set it to one of them"
                )
        scope = environ.get(f"{_PREFIX}_NORMALIZE_OVER", "world")
        is_number = scope.isascii() and scope.isdecimal() and len(scope) <= _MOST_DIGITS
        normalize_over: Union[str, int] = int(scope) if is_number else scope
        _check_normalize_over(normalize_over, f"{_PREFIX}_NORMALIZE_OVER")
        text = environ.get(f"{_PREFIX}_TIMEOUT")
        try:
            timeout = None if text is None else float(text)
        except ValueError:
            timeout = float("nan")
        if timeout is not None and not _is_timeout(timeout):
            raise ValueError(
                f"expected {_PREFIX}_TIMEOUT to be a positive number of seconds (got {_shortened(text)}); set it to a "
                "number from 0.001 to 1e8, e.g. 600"
            )
        return cls(enabled, host, normalize_over, coalesce, overlap, triton, timeout, check)


def _is_timeout(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and _SHORTEST <= value <= _LONGEST


def _shortened(value: object) -> str:
    """Returns the text of a value for an error; a long one only in part."""
    if isinstance(value, int) and abs(value) >= 10**_MOST_DIGITS:
        return "a number of too many digits"  # Python refuses to print very long ones
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}... of {len(text)} characters"


def _check_normalize_over(value: object, name: str) -> None:
    """Raises an error if ``value`` does not specify a set of ranks.

    Args:
        value: the value to check.
        name: the name of the value, for the error.

    Raises:
        ValueError: unless ``value`` is ``"world"``, ``"node"``, ``"rank"`` or an integer of at least 1.
    """
    number = isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 10**_MOST_DIGITS
    if not number and not (isinstance(value, str) and value in _SCOPES):
        raise ValueError(
            f"expected {name} to be one of {', '.join(_SCOPES)} or a number of ranks (got {_shortened(value)}); pass "
            "one of them"
        )
