"""The configuration, an immutable value. This module is the only reader of ``BAGUA_SYNCBN_*`` variables."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Mapping, Optional, Union

__all__ = ["SyncBatchNormConfig", "check_normalize_over"]

_PREFIX = "BAGUA_SYNCBN"
_BOOLEANS = {"0": False, "1": True}
_HOSTS = ("auto", "upstream", "embedded")
_SCOPES = ("world", "node", "rank")


@dataclass(frozen=True)
class SyncBatchNormConfig:
    """The configuration of synchronized batch normalization.

    Attributes:
        enabled: whether ``enable_sync_batchnorm`` has an effect (``BAGUA_SYNCBN=0|1``).
        host: the Bagua that runs the algorithm (``BAGUA_SYNCBN_HOST=auto|upstream|embedded``).
        normalize_over: the ranks that normalize together: ``"world"``, ``"node"``, ``"rank"`` or a number of ranks
            (``BAGUA_SYNCBN_NORMALIZE_OVER``).
        coalesce: whether independent layers share a round of statistics (``BAGUA_SYNCBN_COALESCE=0|1``).
        overlap: whether backward rounds overlap with weight gradients (``BAGUA_SYNCBN_OVERLAP=0|1``).
        triton: whether a Triton kernel merges statistics on CUDA, if Triton is installed (``BAGUA_SYNCBN_TRITON=0|1``).
        timeout: the number of seconds that a rank waits for the statistics of the other ranks; ``None`` for the timeout
            of the process group (``BAGUA_SYNCBN_TIMEOUT``).

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

    def __post_init__(self) -> None:
        for name in ("enabled", "coalesce", "overlap", "triton"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"expected {name} to be True or False (got {getattr(self, name)!r}); pass a bool")
        if self.host not in _HOSTS:
            raise ValueError(f"expected host to be one of {', '.join(_HOSTS)} (got {self.host!r}); pass one of them")
        check_normalize_over(self.normalize_over, "normalize_over")
        if self.timeout is not None and not 0 < self.timeout < float("inf"):
            raise ValueError(
                f"expected timeout to be a positive number of seconds (got {self.timeout!r}); "
                "pass a positive number, or None for the timeout of the process group"
            )

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
            *(f"{_PREFIX}_{name}" for name in ("COALESCE", "HOST", "NORMALIZE_OVER", "OVERLAP", "TIMEOUT", "TRITON")),
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
        host = environ.get(f"{_PREFIX}_HOST", "auto")
        if host not in _HOSTS:
            raise ValueError(
                f"expected {_PREFIX}_HOST to be one of {', '.join(_HOSTS)} (got {host!r}); set it to one of them"
            )
        normalize_over: Union[str, int] = environ.get(f"{_PREFIX}_NORMALIZE_OVER", "world")
        normalize_over = int(normalize_over) if str(normalize_over).isdecimal() else normalize_over
        check_normalize_over(normalize_over, f"{_PREFIX}_NORMALIZE_OVER")
        text = environ.get(f"{_PREFIX}_TIMEOUT")
        try:
            timeout = None if text is None else float(text)
            return cls(enabled, host, normalize_over, coalesce, overlap, triton, timeout)
        except ValueError:
            raise ValueError(
                f"expected {_PREFIX}_TIMEOUT to be a positive number of seconds (got {text!r}); set it to e.g. 600"
            ) from None


def check_normalize_over(value: object, name: str) -> None:
    """Raises an error if ``value`` does not specify a set of ranks.

    Args:
        value: the value to check.
        name: the name of the value, for the error.

    Raises:
        ValueError: unless ``value`` is ``"world"``, ``"node"``, ``"rank"`` or an integer of at least 1.
    """
    number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not number and value not in _SCOPES:
        raise ValueError(
            f"expected {name} to be one of {', '.join(_SCOPES)} or a number of ranks (got {value!r}); pass one of them"
        )
