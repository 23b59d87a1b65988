"""Tests of the commands: models by name, inputs, messages about mistakes. `test_bench.py` tests the measurements."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, List, Optional

import pytest
import torch
from models import Pyramid
from torch import Tensor, nn

from bagua_syncbn_algo import SyncPlan, __version__, convert_sync_batchnorm, plan_of
from bagua_syncbn_algo.__main__ import main
from bagua_syncbn_algo.bench import steps
from bagua_syncbn_algo.bench.factory import build
from bagua_syncbn_algo.bench.inputs import DTYPES, make_inputs

ROOT = Path(__file__).parent.parent


class Recorder(nn.Module):
    """A model that keeps the arguments of its construction."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.args, self.kwargs = args, kwargs


class Lookup(nn.Module):
    """A model whose second input is optional: only with it, its second BatchNorm layer runs."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.table = nn.Embedding(2, width)
        self.first, self.second = nn.BatchNorm1d(width), nn.BatchNorm1d(width)

    def forward(self, x: Tensor, index: Optional[Tensor] = None) -> Tensor:
        y: Tensor = self.first(x)
        return y if index is None else y + self.second(self.table(index))


class Indices(nn.Module):
    """A model whose output has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).argmax(1)


class Wrapped(nn.BatchNorm1d):
    """A BatchNorm class that cannot be converted."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def fails(message: str = "the weights are missing") -> nn.Module:
    raise RuntimeError(message)


def number() -> int:
    return 8


INSTANCE = Lookup(8)


def planned(tmp_path: Path, *arguments: str) -> SyncPlan:
    main(["plan", *arguments, "--json", str(tmp_path / "plan.json")])
    return SyncPlan.from_json((tmp_path / "plan.json").read_text())


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bagua_syncbn_algo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def message_of(arguments: List[str]) -> str:
    """Returns the message of a command that must fail without a traceback."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return str(caught.value)


# -- output ------------------------------------------------------------------------------------------------------------


def test_the_command_line(capsys: Any, tmp_path: Path) -> None:
    """Catches a table without its last line, and a file from which no plan can be read."""
    main(["plan", "models:Pyramid", "--json", str(tmp_path / "new" / "plan.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "layers 13, rounds forward 7, backward 7"
    assert lines[0].split() == ["round", "region", "level", "layers", "bytes", "members", "overlapped", "with"]
    assert lines[-2] == "backward rounds that overlap with weight gradients: 4"
    assert [line.split()[3] for line in lines[1:8]] == ["1", "1", "2", "2", "1", "3", "3"]
    assert "upstream Bagua's SyncBatchNorm" in lines[-3]
    assert SyncPlan.from_json((tmp_path / "new" / "plan.json").read_text()).layers == 13
    assert json.loads((tmp_path / "new" / "plan.json").read_text())["model"] == "Pyramid"


def test_a_module_in_the_working_directory(tmp_path: Path) -> None:
    """Catches a process that finds only installed modules, and one that ends with a traceback or with status 0."""
    lines = ["from torch import nn", "def tower(width):", "    return nn.Sequential(nn.BatchNorm1d(width))"]
    (tmp_path / "mine.py").write_text("\n".join([*lines, ""]))
    done = run("plan", "mine:tower(6)", "--input", "4,6", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "layers 1, rounds forward 1, backward 0"
    failed = run("plan", "mine:tower(-1)", cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith(
        "expected mine:tower(-1) to build a model (got RuntimeError at mine.py:3 in tower: "
    )
    assert len(failed.stderr.splitlines()) == 1


def test_versions(tmp_path: Path) -> None:
    """Catches a version that differs from the package's."""
    done = run("--version", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith(f"bagua_syncbn_algo {__version__}, PyTorch {torch.__version__}, Python 3.")


@pytest.mark.parametrize("command", [[], ["plan"], ["bench"], ["timeline"]])
def test_help(command: List[str], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a help text that argparse cannot format, that is too wide, or that omits the form of a model."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0 and max(map(len, printed.splitlines())) <= 80
    assert """'timm:create_model("hrnet_w18", num_classes=10)'""" in printed
    assert ("--input 2,16:int64" in printed) == bool(command)


# -- models by name ----------------------------------------------------------------------------------------------------


def test_a_factory_with_arguments(tmp_path: Path) -> None:
    """Catches arguments that do not reach the factory."""
    found = planned(tmp_path, "models:Pyramid(8, depth=1)")
    assert found == plan_of(convert_sync_batchnorm(Pyramid(8, depth=1))) != plan_of(convert_sync_batchnorm(Pyramid()))


def test_every_kind_of_literal() -> None:
    """Catches an argument that is passed as text or lost."""
    model = build("test_command_line: Recorder(1, -2.5, 'a:b', None, [1, (2,)], {'k': True}, key={3}, other='x')")
    assert isinstance(model, Recorder)
    assert model.args == (1, -2.5, "a:b", None, [1, (2,)], {"k": True}) and model.kwargs == {"key": {3}, "other": "x"}
    assert isinstance(build("torch:nn.modules.BatchNorm2d(3)"), nn.BatchNorm2d)


def test_an_instance_is_copied() -> None:
    """Catches one instance that several variants of `bench` change: a converted one would be measured as local."""
    first, second = build("test_command_line:INSTANCE"), build("test_command_line:INSTANCE")
    assert first is not second and first is not INSTANCE and isinstance(first, Lookup)


@pytest.mark.parametrize(
    "text",
    [
        *("models", "models:", ":Pyramid", "models.py", "a/models.py:Pyramid", "..models:Pyramid"),
        *("models:Pyramid(1", "models:Pyramid()()", "models:Pyramid[0]", "models:1", "models:Pyramid; 1", "models:\0"),
    ],
)
def test_another_form(text: str) -> None:
    """Catches a traceback of the parser or of the import for a text that names no factory."""
    assert message_of(["plan", text]).startswith("expected a model as package.module:factory or 'package.module:fact")


@pytest.mark.parametrize(
    ("argument", "found"),
    [
        ("hrnet_w18", "hrnet_w18"),
        ("__import__('os').mkdir('evaluated')", "__import__('os').mkdir('evaluated')"),
        ("*[1]", "*[1]"),
        ("**{'a': 1}", "**"),
        ("{[]: 1}", "{[]: 1}"),
        ("a=1 + True", "1 + True"),
    ],
)
def test_arguments_are_literals(argument: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an argument that is evaluated, and a quotation mark lost in the shell that is reported as a NameError."""
    monkeypatch.chdir(tmp_path)
    message = message_of(["plan", f"test_command_line:Recorder({argument})"])
    assert message.startswith("expected literal arguments") and f"(got {found} in test_command_line" in message
    assert not (tmp_path / "evaluated").exists()


@pytest.mark.parametrize(
    ("model", "messages"),
    [
        (
            "no_such_package.a:x",
            ["(got ModuleNotFoundError: No module named 'no_such_package'); correct the name, start in"],
        ),
        ("models.part:x", ["expected to import models.part", "correct the name"]),
        ("models:Pyramids", ["expected a function or class at models:Pyramids", "did you mean Pyramid?"]),
        ("models:Nothing.at_all", ["expected a function or class at models:Nothing.at_all", "correct the name"]),
        ("math:tau", ["expected a function or class at math:tau (got float); name what builds the model"]),
        ("math:tau.hex", ["(got a function of Python itself or of native code, which was not called)"]),
        ("os:system", ["expected a function or class at os:system that builds a torch.nn.Module", "was not called"]),
        ("os:abort", ["was not called"]),
        ("os:popen('exit 1')", ["was not called"]),
        ("pathlib:Path", ["(got a class of other objects, which was not called)"]),
        ("test_command_line:number", ["to build a torch.nn.Module (got int from its call); name another factory"]),
        ("test_command_line:f" + "(" * 5000, ["expected a model as package.module:factory"]),
        ("test_command_line:INSTANCE(2)", ["(got an instance of Lookup); omit the arguments"]),
        (
            "models:Pyramid(8, size=1)",
            ["to build a model (got TypeError", "'size'", "give the arguments that it takes"],
        ),
        ("models:_Block", ["to build a model (got TypeError", "channels_in"]),
        (
            "test_command_line:fails",
            ["(got RuntimeError at ", "test_command_line.py:", " in fails: the weights are mis"],
        ),
        ("test_command_line:fails('two\\n lines')", [" in fails: two lines); correct the factory or its arguments"]),
        ("test_command_line:Wrapped(4)", ["expected BatchNorm layers whose forward can be converted", "Wrapped"]),
        ("torch:nn.LazyBatchNorm1d", ["expected layers with initialized parameters", "run one batch"]),
    ],
)
@pytest.mark.parametrize("command", ["plan", "timeline"])
def test_models_that_cannot_be_built(command: str, model: str, messages: List[str]) -> None:
    """Catches a traceback in place of a message about a wrong name, argument or factory."""
    found = message_of([command, model])
    assert all(message in found for message in messages), found


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        ("import no_such_package", ["(got ModuleNotFoundError at ", "install no_such_package, which broken imports"]),
        ("def f(:", ["expected to import broken (got SyntaxError", "correct the module"]),
        (
            "import sys\nsys.exit('usage: train.py DATA')",
            ["(got SystemExit at ", "broken.py:2", "usage: train.py DATA"],
        ),
    ],
)
def test_modules_that_cannot_be_imported(
    source: str, messages: List[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a module blamed for what it imports, and a script that ends the command when it is imported."""
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = message_of(["plan", "broken:f"])
    assert found.startswith("expected to import broken") and all(message in found for message in messages), found


# -- inputs ------------------------------------------------------------------------------------------------------------


def test_the_plan_of_a_call(tmp_path: Path) -> None:
    """Catches inputs that do not reach the conversion: without them, the forward is traced with its defaults."""
    found = planned(tmp_path, "test_command_line:Lookup", "--input", "4,4", "--input", "4:int64")
    example = (torch.randn(4, 4), torch.zeros(4, dtype=torch.int64))
    assert found == plan_of(convert_sync_batchnorm(Lookup(), example_inputs=example))
    assert [each.layers for each in found.rounds] == [("Lookup.first", "Lookup.second")]
    assert planned(tmp_path, "test_command_line:Lookup").rounds_forward == 2


@pytest.mark.multirank
def test_bench_with_several_inputs(tmp_path: Path, capsys: Any) -> None:
    """Catches ranks that receive only the first input, and a conversion without them, whose layers share no round."""
    files = ["--json", str(tmp_path / "found.json")]
    inputs = ["--input", "4,4", "--input", "4:int64"]
    main(["bench", "test_command_line:Lookup(4)", *inputs, "--steps", "2", *files, "--variants", "local", "coalesced"])
    found = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert {name: each["rounds"] for name, each in found["variants"].items()} == {"local": 0, "coalesced": 2}
    assert "test_command_line:Lookup(4), 4x4 and 4:int64 a rank" in " ".join(capsys.readouterr().out.split())


def test_values_of_inputs() -> None:
    """Catches a dtype without values, and indices that a table of two rows does not have."""
    for name in DTYPES:
        (value,) = make_inputs([f"64,2:{name}"])
        assert value.shape == (64, 2) and value.dtype == getattr(torch, name) and len(value.unique()) > 1
        assert value.is_floating_point() or set(value.flatten().tolist()) == {0, 1}
    assert make_inputs(["3"])[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("large", "expected numbers separated by commas (got large)"),
        ("", "expected numbers separated by commas (got )"),
        ("4,,3", "expected numbers separated by commas (got 4,,3)"),
        ("4,0,16", "expected sizes of at least 1 (got 4,0,16)"),
        ("4,3:float", "expected a dtype among float32, float64"),
        ("4,3:", "expected a dtype among float32, float64"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "bench"])
def test_an_input_of_another_form(command: str, text: str, message: str, capsys: Any) -> None:
    """Catches a message of `int()` or `torch.randn`, which does not name the expected form."""
    with pytest.raises(SystemExit):
        main([command, "models:Pyramid", "--input", text])
    assert f"argument --input: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        ("models:Pyramid", ["2,5,32,32"], "got RuntimeError at "),
        ("models:Pyramid", ["2,3,32,32:int64"], "got RuntimeError at "),
        ("models:Pyramid", ["2,3,32,32", "2"], "forward() takes 2 positional arguments but 3 were given"),
        ("test_command_line:Lookup", ["4,5"], "test_command_line.py:"),
        ("test_command_line:Lookup", ["4,4", "4"], "got RuntimeError at "),
    ],
)
@pytest.mark.parametrize("command", ["plan", "bench", "timeline"])
def test_a_forward_that_fails(command: str, model: str, inputs: List[str], message: str) -> None:
    """Catches a plan without the check that the input asks for, and a traceback of each rank."""
    found = message_of([command, model, *(part for text in inputs for part in ("--input", text))])
    assert found.startswith(f"expected a training step of {model} on the input {' and '.join(inputs)} to run"), found
    assert message in found and "pass --input once for each tensor that its forward takes" in found


def test_a_batch_too_small_for_one_rank(tmp_path: Path) -> None:
    """Catches a trial in one process that refuses what several ranks accept: one value per channel on each rank."""
    assert planned(tmp_path, "torch:nn.BatchNorm1d(4)", "--input", "1,4").layers == 1
    steps.check(steps.Options("torch:nn.BatchNorm1d(4)", ("1,4",), variants=("per layer", "overlapped")))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        steps.check(steps.Options("torch:nn.BatchNorm1d(4)", ("1,4",), variants=("local", "overlapped")))


def test_a_model_without_gradients() -> None:
    """Catches an output without floating-point values that each rank reports by a traceback."""
    message = message_of(["bench", "test_command_line:Indices", "--input", "4,4"])
    assert "expected the model to return floating-point tensors" in message


# -- nothing to measure, nowhere to write ------------------------------------------------------------------------------


def test_a_model_without_batch_norm(tmp_path: Path, capsys: Any) -> None:
    """Catches a table of no rows, and a measurement of nothing. A plan without rounds is an answer, not an error."""
    found = planned(tmp_path, "torch:nn.Linear(4, 2)", "--input", "3,4")
    assert found == SyncPlan("Linear")
    first, last = capsys.readouterr().out.splitlines()
    assert first == "Linear has no BatchNorm layers: a training step exchanges no statistics"
    assert last == "layers 0, rounds forward 0, backward 0"
    for command in ("bench", "timeline"):
        message = message_of([command, "torch:nn.Linear(4, 2)", "--input", "3,4"])
        assert message.startswith("expected BatchNorm layers in torch:nn.Linear(4, 2) (got none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "models:Pyramid", "--bandwidth", "0"], "a positive bandwidth"),
        (["plan", "models:Pyramid", "--json", "."], "expected a file that can be written at . (got a folder)"),
        (["plan", "models:Pyramid", "--json", "file/plan.json"], "expected a folder for file/plan.json (got"),
        (["bench", "models:Pyramid", "--json", "file/found.json"], "expected a folder for file/found.json (got"),
        (["bench", "models:Pyramid", "-o", "found.jpgg"], "expected a picture with a suffix among "),
        (["timeline", "models:Pyramid", "-o", "step"], "(got step); use e.g. step.png"),
        (["timeline", "models:Pyramid", "--trace", "."], "expected a file that can be written at . (got a folder)"),
    ],
)
def test_mistakes_that_would_lose_the_results(
    arguments: List[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a file that cannot be written, found only after minutes of measurements."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert message in message_of(arguments)
