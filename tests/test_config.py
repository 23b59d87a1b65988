"""Tests of the configuration: valid and invalid values, from the environment and from the constructor."""

from __future__ import annotations

import dataclasses

import pytest

from bagua_syncbn_algo import SyncBatchNormAlgorithm, SyncBatchNormConfig


def test_defaults_and_environment() -> None:
    """Catches a switch that an empty environment turns on, and a variable that is not read."""
    assert SyncBatchNormConfig() == SyncBatchNormConfig(enabled=True, host="auto", normalize_over="world", timeout=None)
    assert SyncBatchNormConfig.from_env({}) == SyncBatchNormConfig(enabled=False)
    environ = {"BAGUA_SYNCBN": "1", "BAGUA_SYNCBN_HOST": "embedded", "BAGUA_SYNCBN_TIMEOUT": "2.5", "OTHER": "x"}
    assert SyncBatchNormConfig.from_env(environ) == SyncBatchNormConfig(True, "embedded", timeout=2.5)
    assert not SyncBatchNormConfig.from_env({"BAGUA_SYNCBN": "0"}).enabled
    assert SyncBatchNormConfig.from_env({"BAGUA_SYNCBN_CHECK": "nonfinite"}).check == "nonfinite"
    for text, value in (("node", "node"), ("rank", "rank"), ("4", 4)):
        assert SyncBatchNormConfig.from_env({"BAGUA_SYNCBN_NORMALIZE_OVER": text}).normalize_over == value


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"BAGUA_SYNCBN": "yes"}, r"expected BAGUA_SYNCBN to be 0 or 1 \(got 'yes'\)"),
        ({"BAGUA_SYNCBN_HOST": "horovod"}, r"HOST to be one of auto, upstream, embedded \(got 'horovod'\)"),
        (
            {"BAGUA_SYNCBN_NORMALIZE_OVER": "host"},
            r"expected BAGUA_SYNCBN_NORMALIZE_OVER to be one of world, node, rank",
        ),
        ({"BAGUA_SYNCBN_NORMALIZE_OVER": "0"}, r"or a number of ranks \(got 0\)"),
        ({"BAGUA_SYNCBN_TIMEOUT": "soon"}, r"TIMEOUT to be a positive number of seconds \(got 'soon'\)"),
        ({"BAGUA_SYNCBN_TIMEOUT": "-1"}, r"TIMEOUT to be a positive number of seconds \(got '-1'\)"),
        ({"BAGUA_SYNCBN_TIMEOUT": "1e300"}, r"a positive number of seconds \(got '1e300'\)"),
        ({"BAGUA_SYNCBN_TIMEOUT": "1e-9"}, r"a positive number of seconds \(got '1e-9'\)"),
        ({"BAGUA_SYNCBN_TIMEOUT": "nan"}, r"a positive number of seconds \(got 'nan'\)"),
        ({"BAGUA_SYNCBN_TIMEOUT": "9" * 5000}, r"a positive number of seconds \(got '999.* of 5002 characters\)"),
        ({"BAGUA_SYNCBN_NORMALIZE_OVER": "9" * 5000}, r"a number of ranks \(got '999.* of 5002 characters\)"),
        ({"BAGUA_SYNCBN_NORMALIZE_OVER": "٤"}, r"a number of ranks \(got '٤'\)"),
        ({"BAGUA_SYNCBN_CHECK": "inf"}, r"BAGUA_SYNCBN_CHECK to be one of none, nonfinite \(got 'inf'\)"),
        ({"BAGUA_SYNCBN_HOSTS": "auto"}, r"expected one of BAGUA_SYNCBN, .*\(got the environment variable BAGUA_SYN"),
    ],
)
def test_unknown_values_are_refused(environ: dict[str, str], message: str) -> None:
    """Catches a misspelled name or value in a job script that is ignored without an error."""
    with pytest.raises(ValueError, match=message):
        SyncBatchNormConfig.from_env(environ)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"enabled": "1"}, "expected enabled to be True or False"),
        ({"host": "here"}, "expected host to be one of auto, upstream, embedded"),
        ({"normalize_over": True}, "expected normalize_over to be one of world, node, rank or a number of ranks"),
        ({"normalize_over": 10**5000}, r"a number of ranks \(got a number of too many digits\)"),
        ({"normalize_over": ["world"]}, r"a number of ranks \(got \['world'\]\)"),
        ({"timeout": 1e300}, "expected timeout to be a positive number of seconds .*pass a number from 0.001 to 1e8"),
        ({"timeout": float("nan")}, "expected timeout to be a positive number of seconds"),
        ({"timeout": "5"}, "expected timeout to be a positive number of seconds"),
        ({"check": "all"}, "expected check to be one of none, nonfinite"),
        ({"timeout": 0.0}, "expected timeout to be a positive number of seconds"),
    ],
)
def test_constructor_refuses_too(values: dict[str, object], message: str) -> None:
    """Catches a value that the constructor accepts although the environment refuses it."""
    with pytest.raises(ValueError, match=message):
        SyncBatchNormConfig(**values)  # type: ignore[arg-type]


def test_frozen() -> None:
    """Catches a configuration that changes while it is in use."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        SyncBatchNormConfig().enabled = False  # type: ignore[misc]


def test_the_algorithm_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a variable that ``enable_sync_batchnorm`` reads and ``SyncBatchNormAlgorithm`` ignores."""
    monkeypatch.setenv("BAGUA_SYNCBN_NORMALIZE_OVER", "2")
    monkeypatch.setenv("BAGUA_SYNCBN_TIMEOUT", "7")
    monkeypatch.setenv("BAGUA_SYNCBN_CHECK", "nonfinite")
    found = SyncBatchNormAlgorithm()
    assert (found.normalize_over, found.timeout, found.check) == (2, 7.0, "nonfinite")
    given = SyncBatchNormAlgorithm(normalize_over="world", timeout=3.0, check="none")
    assert (given.normalize_over, given.timeout, given.check) == ("world", 3.0, "none")
