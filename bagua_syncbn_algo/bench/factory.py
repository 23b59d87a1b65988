"""Models by name, for the command line."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from torch import nn

__all__ = ["build"]


def build(name: str) -> nn.Module:
    """Returns the model of a factory.

    Args:
        name: the name of a function, a class or an ``nn.Module`` instance, as ``package.module:factory``. The working
            directory is searched, too.

    Raises:
        SystemExit: if the name cannot be resolved or is not a ``torch.nn.Module``.
    """
    module_name, _, attribute = name.partition(":")
    if not attribute:
        sys.exit(f"expected a model as package.module:factory (got {name}); use e.g. torchvision.models:resnet50")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        value: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        sys.exit(f"expected a function or class at {name} (got {error}); correct the name or install its package")
    model = value if isinstance(value, nn.Module) else value()
    if not isinstance(model, nn.Module):
        sys.exit(f"expected {name} to build a torch.nn.Module (got {type(model).__name__}); name another factory")
    return model
