"""Python objects as bytes, for broadcasts: JSON and the memory of tensors, without pickle.

Parameter lists and the states of PyTorch's optimizers consist of numbers, strings, containers and tensors. They are
sent as JSON text, followed by the bytes of the tensors, and reading them runs no code of the sender.

The state of another optimizer may contain other objects, such as tensors of a subclass. Only these objects are pickled,
and read by PyTorch's restricted unpickler: ``torch.load(weights_only=True)``. It accepts tensors, containers of the
standard library and the classes that ``torch.serialization.add_safe_globals`` names (torch 2.4 and later). Every rank
must name the same classes before the broadcast.
"""

from __future__ import annotations

import base64
import ctypes
import io
import json
from collections import OrderedDict
from typing import Any, Callable, Dict, List, Optional

import torch
from torch import Tensor

__all__ = ["pack", "unpack"]

_DTYPES = {
    str(dtype).split(".")[1]: dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
_KIND = "kind"  # the key of the objects in the JSON text that stand for other values than JSON has
_MOST_DIGITS = 18  # of integers that JSON carries as numbers: Python refuses to read very long ones


def pack(value: object) -> bytes:
    """Returns a value as bytes: the length of the JSON text, the text, and the memory of the tensors.

    A value that cannot be sent is not an error here: :func:`unpack` raises the error, on all ranks.

    Args:
        value: the value.
    """
    tensors: List[bytes] = []
    try:
        text = json.dumps(_encoded(value, tensors))
    except Exception as error:  # pickling runs methods of the object
        tensors.clear()
        text = json.dumps({_KIND: "error", "value": f"{type(error).__name__}: {error}"})
    encoded = text.encode()
    return b"".join([len(encoded).to_bytes(8, "little"), encoded, *tensors])


def unpack(content: bytes, device: Optional[torch.device] = None) -> Any:
    """Returns the value of :func:`pack`.

    Args:
        content: the bytes.
        device: the device of tensors that were on a CUDA device; ``None`` for the CPU.

    Raises:
        ValueError: if the value has objects that the restricted unpickler refuses, or the bytes are not those of
            :func:`pack`.
    """
    length = int.from_bytes(content[:8], "little")
    try:
        tree = json.loads(content[8 : 8 + length].decode())
        return _decoded(tree, memoryview(content)[8 + length :], device)
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError, RuntimeError) as error:
        raise ValueError(
            f"expected an object as broadcast_object sends it (got {len(content)} bytes, {error}); use the same "
            "version of bagua_syncbn_algo on all ranks"
        ) from error


def _encoded(value: Any, tensors: List[bytes]) -> Any:
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        return value if abs(value) < 10**_MOST_DIGITS else {_KIND: "int", "value": hex(value)}
    if kind is list:
        return [_encoded(each, tensors) for each in value]
    if kind in (tuple, torch.Size, set, frozenset):
        return {_KIND: kind.__name__, "value": [_encoded(each, tensors) for each in value]}
    if kind in (dict, OrderedDict):
        pairs = [[_encoded(key, tensors), _encoded(each, tensors)] for key, each in value.items()]
        return {_KIND: kind.__name__, "value": pairs}
    if kind is bytes:
        return {_KIND: "bytes", "value": base64.b64encode(value).decode()}
    if kind is torch.dtype and str(value).split(".")[1] in _DTYPES:
        return {_KIND: "dtype", "value": str(value).split(".")[1]}
    if _is_plain(value):
        memory = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        start = sum(map(len, tensors))
        tensors.append(ctypes.string_at(memory.data_ptr(), memory.numel()) if memory.numel() else b"")
        name = str(value.dtype).split(".")[1]
        return {_KIND: "tensor", "value": [name, list(value.shape), start, len(tensors[-1])], "cuda": value.is_cuda}
    file = io.BytesIO()
    torch.save(value, file)
    tensors.append(file.getvalue())
    start = sum(map(len, tensors[:-1]))
    name = f"{kind.__module__}.{kind.__qualname__}"
    return {_KIND: "pickle", "value": [name, start, len(tensors[-1])]}


def _is_plain(value: Any) -> bool:
    """Returns whether a value is a dense tensor of no subclass, whose memory describes it."""
    if type(value) is not Tensor or value.layout != torch.strided or value.is_meta or value.is_quantized:
        return False
    return value.dtype in _DTYPES.values() and not value.requires_grad


def _decoded(tree: Any, memory: memoryview, device: Optional[torch.device]) -> Any:
    if isinstance(tree, list):
        return [_decoded(each, memory, device) for each in tree]
    if not isinstance(tree, dict):
        return tree
    kind, value = tree[_KIND], tree["value"]
    if kind == "error":
        raise ValueError(
            f"expected an object that can be sent to other ranks (got {value}); send numbers, strings, containers and "
            "tensors, such as a state_dict"
        )
    if kind == "tensor":
        name, shape, start, size = value
        if start + size > len(memory):
            raise TypeError("of which the end is missing")
        tensor = torch.frombuffer(bytearray(memory[start : start + size]), dtype=_DTYPES[name]) if size else None
        found = torch.empty(shape, dtype=_DTYPES[name], device="cpu") if tensor is None else tensor.reshape(shape)
        return found if device is None or not tree["cuda"] else found.to(device)
    if kind == "pickle":
        name, start, size = value
        return _restricted(name, bytes(memory[start : start + size]), device)
    if kind in ("dict", "OrderedDict"):
        pairs = [(_decoded(key, memory, device), _decoded(each, memory, device)) for key, each in value]
        return dict(pairs) if kind == "dict" else OrderedDict(pairs)
    if kind in _SEQUENCES:
        return _SEQUENCES[kind]([_decoded(each, memory, device) for each in value])
    return _SCALARS[kind](value)


_SEQUENCES: Dict[str, Callable[[List[Any]], Any]] = {
    "tuple": tuple,
    "Size": torch.Size,
    "set": set,
    "frozenset": frozenset,
}
_SCALARS: Dict[str, Callable[[str], Any]] = {
    "int": lambda text: int(text, 16),
    "bytes": base64.b64decode,
    "dtype": lambda name: _DTYPES[name],
}


def _restricted(name: str, content: bytes, device: Optional[torch.device]) -> Any:
    """Reads a pickled object with PyTorch's restricted unpickler."""
    try:
        return torch.load(io.BytesIO(content), map_location=device or "cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, RuntimeError or TypeError, by version
        lines = str(error).splitlines()
        reason = next((line.strip() for line in lines if "lobal" in line and "." in line), lines[0] if lines else "")
        raise ValueError(
            f"expected an object of tensors, numbers, strings and containers (got a {name}, which the restricted "
            f"unpickler refuses: {reason[:300]}); call torch.serialization.add_safe_globals([class]) on all ranks "
            "before, or broadcast its state_dict"
        ) from error
