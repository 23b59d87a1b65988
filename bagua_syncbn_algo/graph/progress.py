"""The state of a trace before a submodule, which is restored if the submodule cannot be traced."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Dict, Optional

from torch import fx

__all__ = ["TraceProgress"]


class TraceProgress:
    """The state of a tracer before it traces a submodule, restored if the submodule cannot be traced."""

    def __init__(self, tracer: Any) -> None:
        self._tracer = tracer
        self._last = self._last_node()
        self._stack = dict(self._module_stack())
        self._calls = dict(getattr(tracer, "num_calls", {}))
        self.refusals = len(tracer.refusals)
        self._reads = len(tracer.reads)

    def restore(self) -> None:
        """Erases the nodes, module stack entries, call counts, refusals and reads that were added since then."""
        tracer = self._tracer
        node = self._last_node()
        while node is not None and node is not self._last:
            tracer.graph.erase_node(node)
            node = self._last_node()
        stack = self._module_stack()
        stack.clear()
        stack.update(self._stack)
        if hasattr(tracer, "num_calls"):
            tracer.num_calls = self._calls
        del tracer.refusals[self.refusals :]
        del tracer.reads[self._reads :]

    def _last_node(self) -> Optional[fx.Node]:
        return next(iter(reversed(self._tracer.graph.nodes)), None)

    def _module_stack(self) -> Dict[str, Any]:
        stack: Dict[str, Any] = self._tracer.__dict__.setdefault("module_stack", OrderedDict())
        return stack
