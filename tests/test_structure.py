"""Tests of the package structure: import order, imports without side effects, and one reader of the environment."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Iterator, List, Tuple

import pytest

PACKAGE = Path(__file__).parent.parent / "bagua_syncbn_algo"

# A module may import only modules that precede it.
ORDER = [
    "config",
    "compat",
    "ops.moments",
    "embedded",
    "comm",
    "comm.errors",
    "comm.recorder",
    "comm.names",
    "comm.groups",
    "comm.wire",
    "comm.report",
    "comm.turns",
    "comm.version",
    "comm.ring",
    "comm.monitor",
    "comm.pending",
    "comm.channel",
    "comm.finished",
    "comm.local",
    "comm.transport",
    "ops",
    "ops.recompute",
    "ops.deferred",
    "ops.nonfinite",
    "ops.exact",
    "ops.operators",
    "ops.in_graph",
    "ops.merge_kernel",
    "ops.fused",
    "ops.second_derivative",
    "ops.functional",
    "ops.running_stats",
    "checks",
    "graph",
    "graph.inductor",
    "capture",
    "layer",
    "variants",
    "graph.plan",
    "graph.replaced",
    "graph.module_state",
    "graph.guards",
    "graph.call_pattern",
    "graph.shapes",
    "graph.proxies",
    "graph.progress",
    "graph.tracing",
    "graph.split_backward",
    "graph.ordering",
    "graph.levels",
    "graph.verify",
    "graph.variant",
    "graph.compiled",
    "graph.forward",
    "graph.coalesce",
    "graph.remarks",
    "trial",
    "graph.report",
    "convert",
    "join",
    "embedded.env",
    "embedded.streams",
    "embedded.agreement",
    "embedded.core",
    "embedded.objects",
    "embedded.communication",
    "embedded.tensor",
    "embedded.bucket",
    "embedded.algorithms.base",
    "embedded.algorithms.gradient_allreduce",
    "embedded.algorithms",
    "embedded.bagua_distributed",
    "embedded.distributed",
    "embedded.torch_api",
    "host",
    "buffers",
    "algorithm",
    "",
    "integrations",
    "integrations.layer_sync",
    "integrations.lightning",
    "integrations.pytorch_lightning",
    "integrations.mmengine",
    "bench",
    "bench.checks",
    "bench.factory",
    "bench.inputs",
    "bench.trial",
    "bench.measure",
    "bench.schemes",
    "bench.latency",
    "bench.steps",
    "bench.timeline",
    "__main__",
]

# Upstream's SyncBatchNorm has the converter as a class method.
ALLOWED_UPWARD_IMPORTS = {("layer", "convert")}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def internal_imports(path: Path) -> Iterator[str]:
    name = module_name(path)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            if node.module:
                yield ".".join([*base, node.module])
            else:
                for alias in node.names:
                    yield ".".join([*base, alias.name])


def files() -> List[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_imports_descend() -> None:
    """Catches an import of a later module, such as communication in mathematics: neither could be read separately."""
    seen: List[Tuple[str, str]] = []
    for path in files():
        name = module_name(path)
        assert name in ORDER, f"expected {name} in ORDER; add it after the modules that it imports"
        for target in internal_imports(path):
            if ORDER.index(target) >= ORDER.index(name):
                seen.append((name, target))
    assert set(seen) == ALLOWED_UPWARD_IMPORTS


def test_only_the_configuration_reads_its_variables() -> None:
    """Catches another module that reads BAGUA_SYNCBN_* variables without the check of their values."""
    for path in files():
        if module_name(path) != "config":
            assert not re.search(r"(environ|getenv)[\[.(].*BAGUA_SYNCBN", path.read_text()), path


def test_files_stay_small_and_use_one_vocabulary() -> None:
    """Catches a file too long to read at once, and a second word for one thing."""
    replaced = r"\b(rehears\w*|twins?|twin_of|deferrals?|followers?|hide_behind|hidden|normalize_together|why_whole)\b"
    for path in files():
        text = path.read_text()
        assert not re.search(replaced, text, re.IGNORECASE), path
        assert text.count("\n") <= 400 or "embedded" in path.parts, f"split {path}"


def test_nothing_is_unpickled_outside_of_the_restricted_unpickler() -> None:
    """Catches an exchange that runs code which another rank has chosen, by pickle or by an object collective."""
    for path in files():
        text = path.read_text()
        assert not re.search(r"^\s*(import|from) (pickle|cPickle|dill|cloudpickle)\b", text, re.MULTILINE), path
        assert not re.search(r"\b(all_gather|broadcast|gather|scatter|send|recv)_object(_list)?\(", text) or (
            "embedded" in path.parts
        ), path
        for call in re.findall(r"torch\.load\([^\n]*", text):
            assert "weights_only=True" in call, path


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=PACKAGE.parent
    ).stdout.strip()


def test_tensors_are_created_on_a_stated_device() -> None:
    """Catches a tensor on the device of ``torch.set_default_device``, such as a header in the memory of a GPU."""
    factories = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros"}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "bench":  # creates inputs for models, which may be on the default device
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in factories}:
                assert any(each.arg == "device" for each in node.keywords), f"{path}:{node.lineno}"


def test_importing_patches_nothing_until_bagua_is_touched() -> None:
    """Catches an import that patches torch for users of the layer only."""
    code = "import torch, bagua_syncbn_algo as b; before = hasattr(torch.nn.Module, 'with_bagua'); b.SyncBatchNorm(3);"
    assert run(code + "b.bagua; print(before, hasattr(torch.nn.Module, 'with_bagua'))") == "False True"
    assert run(code + "b.SyncBatchNormAlgorithm; print(before, hasattr(torch.nn.Module, 'with_bagua'))") == "False True"


def test_choosing_a_host_patches_nothing_yet() -> None:
    """Catches an import of the embedded host that patches torch: upstream could not be imported afterwards."""
    code = "import torch, bagua_syncbn_algo.embedded.core; print(hasattr(torch.Tensor, 'bagua_backend_tensor'))"
    assert run(code) == "False"


def test_no_framework_is_imported() -> None:
    """Catches an import of an adapter by the package, which would then need the framework."""
    code = "import bagua_syncbn_algo as b, bagua_syncbn_algo.__main__, sys; b.bagua; "
    assert run(code + "print([name for name in sys.modules if 'integrations' in name])") == "[]"


@pytest.mark.parametrize("framework", ["lightning", "pytorch_lightning", "mmengine"])
def test_a_missing_framework_has_a_remedy(framework: str) -> None:
    """Catches an adapter that fails with an error that does not name the package to install."""
    code = f"import sys; sys.modules['{framework}'] = None\ntry: import bagua_syncbn_algo.integrations.{framework}\n"
    found = run(code + "except ImportError as error: print(error)")
    assert f"expected the package {framework}" in found and "install" in found


def test_touching_bagua_registers_the_algorithm() -> None:
    """Catches an algorithm that is registered only by another import."""
    code = "from bagua_syncbn_algo import bagua; print(sorted(bagua.algorithms.GlobalAlgorithmRegistry))"
    assert run(code) == "['gradient_allreduce', 'sync_batchnorm']"


def test_public_names_resolve() -> None:
    """Catches a name in __all__ that does not exist, and an unknown name that raises no error."""
    import bagua_syncbn_algo

    for name in bagua_syncbn_algo.__all__:
        assert getattr(bagua_syncbn_algo, name) is not None and name in dir(bagua_syncbn_algo)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        bagua_syncbn_algo.nonsense  # noqa: B018
