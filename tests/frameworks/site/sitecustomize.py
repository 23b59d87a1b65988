"""Makes a torchvision for CUDA importable beside a CPU build of PyTorch, where its operators do not load.

Most frameworks import torchvision. Its import needs the schemas of two operators, which no training forward calls.
Python imports this file at its start if its folder is in PYTHONPATH, in the processes that a framework starts as well.
"""

import importlib.util
from pathlib import Path

found = importlib.util.find_spec("torchvision")
if found is not None and found.origin is not None and "+cu" in (Path(found.origin).parent / "version.py").read_text():
    import torch

    if torch.version.cuda is None:
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
