"""Checks of the command line before a measurement, whose results would otherwise be lost."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Optional

__all__ = ["check_files", "check_picture", "require_packages"]


def require_packages(*packages: str) -> None:
    """Checks that packages of the extra ``bench`` are installed.

    Raises:
        ValueError: if one is missing.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"expected {' and '.join(packages)} to be installed (got an environment without {' and '.join(missing)}); "
            "run pip install bagua_syncbn_algo[bench]"
        )


def check_files(*paths: Optional[Path]) -> None:
    """Creates the folders of files to write.

    Args:
        *paths: the files; ``None`` for a file that is not written.

    Raises:
        ValueError: if a file cannot be written.
    """
    for path in paths:
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"expected a folder for {path} (got {type(error).__name__}: {error.strerror}); name another file"
            ) from error
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            found = "a folder" if path.is_dir() else "a folder without write permission"
            raise ValueError(f"expected a file that can be written at {path} (got {found}); name another file")


def check_picture(path: Optional[Path]) -> None:
    """Checks that matplotlib can write a picture with the suffix of ``path``, unless ``path`` is ``None``.

    Raises:
        ValueError: for another suffix or none.
    """
    if path is None:
        return
    from matplotlib.backend_bases import FigureCanvasBase

    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"expected a picture with a suffix among {', '.join(formats)} (got {path}); use e.g. step.png")
