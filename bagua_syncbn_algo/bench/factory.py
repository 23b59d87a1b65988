"""Models by name, for the command line."""

from __future__ import annotations

import ast
import copy
import difflib
import functools
import importlib
import inspect
import os
import re
import sys
import sysconfig
import traceback
import types
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import nn

__all__ = ["build", "describe_error"]

_FORM = "package.module:factory or 'package.module:factory(arguments)'"
# Frames of these files are not where a user's mistake is.
_LIBRARIES = tuple(
    os.path.dirname(path) + os.sep for path in (torch.__file__, importlib.__file__, os.path.dirname(__file__))
)


class _Spec(NamedTuple):
    """A parsed specification of a model."""

    module: str
    path: str  # attributes, separated by dots
    call: Optional[Tuple[Tuple[Any, ...], Dict[str, Any]]] = None  # positional and keyword arguments

    @property
    def name(self) -> str:
        return f"{self.module}:{self.path}"


def build(text: str) -> nn.Module:
    """Returns the model of a factory.

    Args:
        text: the name of a function, a class or an ``nn.Module`` instance, as ``package.module:factory``. For a
            function or class, a call with literal arguments may follow: ``package.module:factory(10, name="a")``. The
            working directory is searched, too. Of an instance, a copy is returned.

    Raises:
        ValueError: if ``text`` has another form, the name cannot be resolved, the factory raises, or the result is
            not a ``torch.nn.Module``.
    """
    spec = _parse(text)
    value = _resolve(spec)
    is_instance = isinstance(value, nn.Module)
    if not callable(value) or (is_instance and spec.call is not None):
        kind = f"{'an instance of ' if is_instance else ''}{type(value).__name__}"
        raise ValueError(f"expected a function or class at {spec.name} (got {kind}); {_remedy(is_instance)}")
    if not is_instance:
        _refuse_other_callables(spec, value)
    arguments, keywords = spec.call or ((), {})
    try:
        model = copy.deepcopy(value) if is_instance else value(*arguments, **keywords)
    except (Exception, SystemExit) as error:
        remedy = "correct the factory or its arguments"
        if isinstance(error, TypeError):
            remedy = f"give the arguments that it takes, as in '{spec.name}(10, name=\"a\")'"
        raise ValueError(f"expected {text} to build a model (got {describe_error(error)}); {remedy}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"expected {text} to build a torch.nn.Module (got {type(model).__name__} from its call); name another "
            "factory"
        )
    return model


def _refuse_other_callables(spec: _Spec, value: Any) -> None:
    """Raises an error for a function or class that cannot build a module, without calling it.

    Those are functions of the standard library and of native code, such as ``os.system``, and classes of other things.
    """
    function = value
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    is_class = isinstance(function, type)
    if is_class and issubclass(function, nn.Module):
        return
    if is_class or isinstance(function, types.BuiltinFunctionType) or _is_standard(getattr(function, "__module__", "")):
        kind = "a class of other objects" if is_class else "a function of Python itself or of native code"
        raise ValueError(
            f"expected a function or class at {spec.name} that builds a torch.nn.Module (got {kind}, which was not "
            "called); name the factory of a model"
        )


def _is_standard(name: Any) -> bool:
    """Returns whether a module is part of Python, not a module of the same name elsewhere."""
    if name in sys.builtin_module_names:
        return True
    file = getattr(sys.modules.get(str(name)), "__file__", None)
    if file is None:
        return False
    folder = os.path.realpath(sysconfig.get_paths()["stdlib"]) + os.sep
    path = os.path.realpath(file)
    return path.startswith(folder) and not re.search(r"(site|dist)-packages", path[len(folder) :])


def describe_error(error: BaseException) -> str:
    """Returns type and message of ``error`` and the innermost line outside of torch and of this package."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f for f in frames if not f.filename.startswith((*_LIBRARIES, "<"))]
    place = f" at {_shortened(places[-1].filename)}:{places[-1].lineno} in {places[-1].name}" if places else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{place}: {text}" if text else f"{type(error).__name__}{place}"


def _shortened(path: str) -> str:
    here = os.getcwd() + os.sep
    return path[len(here) :] if path.startswith(here) else path


def _remedy(is_instance: bool) -> str:
    return "omit the arguments" if is_instance else "name what builds the model"


def _parse(text: str) -> _Spec:
    module, _, expression = text.partition(":")
    shown = text if len(text) <= 200 else f"{text[:197]}..."
    error = f"expected a model as {_FORM} (got {shown}); use e.g. torchvision.models:resnet50"
    if not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(error)
    try:
        node: Any = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # null bytes, and very deep nesting
        raise ValueError(error) from None
    call = node if isinstance(node, ast.Call) else None
    attributes: List[str] = []
    function = node if call is None else call.func
    while isinstance(function, ast.Attribute):
        attributes.insert(0, function.attr)
        function = function.value
    if not isinstance(function, ast.Name):
        raise ValueError(error)
    path = ".".join([function.id, *attributes])
    if call is None:
        return _Spec(module, path)
    arguments = tuple(_literal(each, text) for each in call.args)
    keywords = {each.arg or "**": _literal(each if each.arg is None else each.value, text) for each in call.keywords}
    return _Spec(module, path, (arguments, keywords))


def _literal(node: Any, text: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # TypeError: an unhashable key
        found = "**" if isinstance(node, ast.keyword) else ast.unparse(node)
        raise ValueError(
            f"expected literal arguments: strings, numbers, booleans, None and containers of them (got {found} in "
            f"{text}); write strings in quotes and the whole model in quotes of the shell, or name a function without "
            "arguments"
        ) from None


def _resolve(spec: _Spec) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        value: Any = importlib.import_module(spec.module)
    except (Exception, SystemExit) as error:  # SystemExit: a script that reads the command line when it is imported
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing is None:
            remedy = "correct the module: it must be possible to import it"
        elif spec.module == missing or spec.module.startswith(f"{missing}."):
            remedy = "correct the name, start in the folder of the module, or install its package"
        else:
            remedy = f"install {missing}, which {spec.module} imports"
        raise ValueError(f"expected to import {spec.module} (got {describe_error(error)}); {remedy}") from error
    for part in spec.path.split("."):
        try:
            value = getattr(value, part)
        except Exception as error:  # also of a package that imports its parts at first use
            similar = difflib.get_close_matches(part, [each for each in dir(value) if not each.startswith("_")])
            remedy = f"did you mean {' or '.join(similar)}?" if similar else "correct the name"
            raise ValueError(
                f"expected a function or class at {spec.name} (got {describe_error(error)}); {remedy}"
            ) from error
    return value
