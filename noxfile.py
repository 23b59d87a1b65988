"""Test sessions over versions of Python and PyTorch: ``nox --list`` shows all of them.

The default sessions are those that run before every release. The others need interpreters and PyTorch builds that the
developers' machines do not have; they are listed in docs/compatibility.md as not run.
"""

from __future__ import annotations

import nox

# Python, PyTorch, and whether all tests run or only those of one process, without the embedded host.
VERSIONS = [
    nox.param("3.11", "2.13.0", id="3.11-2.13.0"),
    nox.param("3.9", "1.12.1", id="3.9-1.12.1"),
    nox.param("3.10", "2.1.2", id="3.10-2.1.2"),
    nox.param("3.12", "2.4.1", id="3.12-2.4.1"),
    nox.param("3.13", "2.13.0", id="3.13-2.13.0"),
]
SINGLE_PROCESS = [
    *("tests/test_config.py", "tests/test_convert.py", "tests/test_host.py", "tests/test_layer.py"),
    *("tests/comm/test_channel.py", "tests/ops/test_gradients.py", "tests/ops/test_moments.py"),
    "tests/ops/test_parity.py",
]

nox.options.sessions = ["tests(3.11-2.13.0)", "tests(3.9-1.12.1)", "sdist"]
nox.options.reuse_existing_virtualenvs = True


@nox.session
@nox.parametrize("python,torch", VERSIONS)
def tests(session: nox.Session, torch: str) -> None:
    """Runs the tests against one version of PyTorch."""
    old = torch.startswith("1.")
    session.install(f"torch=={torch}", *(["numpy<1.24"] if old else []))
    if old:
        session.install("pytest", "pytest-mock", "pytest-timeout", "hypothesis")
        session.install("--no-deps", ".")
        session.run("python", "-m", "pytest", "-m", "not multirank", *SINGLE_PROCESS, *session.posargs)
    else:
        session.install(".[test]")
        session.run("python", "-m", "pytest", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(python="3.11")
def sdist(session: nox.Session) -> None:
    """Builds the source distribution, and runs its own tests of one process from the unpacked archive."""
    session.install("torch==2.13.0", "build")
    session.install(".[test]")
    folder = session.create_tmp()
    session.run("python", "-m", "build", "--sdist", "--outdir", folder)
    session.chdir(folder)
    unpack = "import glob, shutil; shutil.unpack_archive(max(glob.glob('*.tar.gz')), 'unpacked', filter='data')"
    session.run("python", "-c", unpack)
    session.run("sh", "-c", "cd unpacked/* && python -m pytest -m 'not multirank'", external=True)
