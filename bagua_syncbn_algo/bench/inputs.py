"""Inputs of a forward by shape and dtype, for the command line."""

from __future__ import annotations

from typing import Sequence, Tuple

import torch
from torch import Tensor

__all__ = ["DTYPES", "make_inputs", "parse_input"]

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def parse_input(text: str) -> Tuple[Tuple[int, ...], torch.dtype]:
    """Returns shape and dtype of an input.

    Args:
        text: the sizes, separated by commas, and optionally a colon and one of :data:`DTYPES`: ``4,3,64,64`` or
            ``2,16:int64``. Default dtype: ``float32``.

    Raises:
        ValueError: if ``text`` has another form or a size is less than 1.
    """
    sizes, colon, name = text.partition(":")
    try:
        shape = tuple(int(part) for part in sizes.split(","))
    except ValueError:
        raise ValueError(f"expected numbers separated by commas (got {sizes}); pass e.g. 4,3,64,64") from None
    if min(shape) < 1:
        raise ValueError(f"expected sizes of at least 1 (got {sizes}); pass batch, channels and size, e.g. 4,3,64,64")
    if colon and name not in DTYPES:
        raise ValueError(f"expected a dtype among {', '.join(DTYPES)} (got {name}); pass e.g. 2,16:int64")
    dtype: torch.dtype = getattr(torch, name or "float32")
    return shape, dtype


def make_inputs(texts: Sequence[str]) -> Tuple[Tensor, ...]:
    """Returns a random tensor for each text of :func:`parse_input`.

    Floating-point values have a normal distribution. Other values are 0 or 1, which are valid as indices and as masks.
    """
    parsed = [parse_input(text) for text in texts]
    return tuple(
        torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.randint(0, 2, shape).to(dtype)
        for shape, dtype in parsed
    )
