"""Operations of a traced graph that keep their order: in-place writes, random number generation and opaque steps."""

from __future__ import annotations

from typing import Any, Dict, List

from torch import fx, nn

from ..compat import aten_op_draws
from ..layer import SyncBatchNorm
from .module_state import attribute_of
from .proxies import IN_PLACE_OPERATORS
from .tracing import normalize_standalone

__all__ = ["DisjointSets", "dependencies"]

# Functions and methods that draw random numbers. PyTorch tags only some of their operators, none before torch 1.13.
_RANDOM_FUNCTIONS = frozenset(
    (
        *("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm", "random_", "uniform_"),
        *("bernoulli", "bernoulli_", "binomial", "cauchy_", "exponential_", "geometric_", "log_normal_"),
        *("multinomial", "normal", "normal_", "poisson", "gumbel_softmax", "rrelu", "rrelu_"),
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "dropout_"),
        *("feature_dropout", "native_dropout", "alpha_dropout_", "feature_dropout_", "feature_alpha_dropout_"),
        *("fractional_max_pool2d", "fractional_max_pool2d_with_indices"),
        *("fractional_max_pool3d", "fractional_max_pool3d_with_indices"),
        *("scaled_dot_product_attention", "multi_head_attention_forward", "lstm", "gru", "rnn_tanh", "rnn_relu"),
    )
)
_RANDOM_MODULES = (
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
    nn.RNNBase,
)
# Functions of torch and torch.nn.functional that are not ATen operators and have no side effects.
_COMPOSITE_FUNCTIONS = frozenset(
    (
        *("adaptive_max_pool1d_with_indices", "adaptive_max_pool2d_with_indices", "adaptive_max_pool3d_with_indices"),
        *("affine_grid", "cross_entropy", "fold", "gaussian_nll_loss", "grid_sample", "interpolate"),
        *("local_response_norm", "logsigmoid", "lp_pool1d", "lp_pool2d", "lp_pool3d", "max_unpool1d"),
        *("multilabel_soft_margin_loss", "normalize", "softmin", "softsign", "tanhshrink"),
        *("upsample", "upsample_bilinear", "upsample_nearest", "unique", "unravel_index", "is_tensor"),
    )
)
# Modules and functions that always return new memory. All others may return a view of an argument.
_FRESH_MODULES = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.SiLU,
    nn.GELU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Hardswish,
    nn.Hardsigmoid,
)
_FRESH_FUNCTIONS = (
    *("add", "sub", "mul", "truediv", "div", "pow", "neg", "cat", "stack", "matmul", "linear", "clone", "mean", "sum"),
    *("relu", "silu", "gelu", "sigmoid", "tanh", "softmax", "normalize_standalone", "conv1d", "conv2d", "conv3d"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
)


def dependencies(graph: fx.Graph, module: nn.Module) -> Dict[fx.Node, List[fx.Node]]:
    """Returns for each node the nodes that must run before it.

    These are the inputs of the node and, for a node with a side effect, the previous node with one. An in-place write
    runs after all earlier nodes that access its memory, and before all later ones.
    """
    before = {node: list(node.all_input_nodes) for node in graph.nodes}
    position = {node: index for index, node in enumerate(graph.nodes)}
    effects = [node for node in graph.nodes if _has_side_effect(node, module)]
    for earlier, later in zip(effects, effects[1:]):
        before[later].append(earlier)
    memory = _Memory(graph, module)
    for node in graph.nodes:
        target = _written_value(node, module)
        if target is None:
            continue
        for user in memory.users(target):
            if position[user] < position[node]:
                before[node].append(user)
            elif user is not node:
                before[user].append(node)
    return before


def _has_side_effect(node: fx.Node, module: nn.Module) -> bool:
    """Returns whether a node draws random numbers or may have a side effect that the graph does not represent.

    Unknown functions count as functions with a side effect.
    """
    if node.op == "call_module":
        part = module.get_submodule(str(node.target))
        if isinstance(part, SyncBatchNorm):
            return False
        own_class = not type(part).__module__.startswith("torch.nn.")
        return own_class or isinstance(part, _RANDOM_MODULES) or _has_children(part)
    name = str(getattr(node.target, "__name__", node.target))
    draws = name in _RANDOM_FUNCTIONS or aten_op_draws(name)
    if node.op == "call_method":
        return bool(draws)
    if node.op != "call_function" or node.target is normalize_standalone:
        return False
    package = str(getattr(node.target, "__module__", None) or "torch").split(".")[0]
    if package in ("_operator", "builtins", "math"):
        return False
    return package != "torch" or bool(draws) or (draws is None and name not in _COMPOSITE_FUNCTIONS)


def _has_children(part: nn.Module) -> bool:
    return next(part.children(), None) is not None


def _written_value(node: fx.Node, module: nn.Module) -> Any:
    """Returns the value that ``node`` modifies in place, or ``None``."""
    values = node.all_input_nodes
    if "out" in node.kwargs and isinstance(node.kwargs["out"], fx.Node):
        return node.kwargs["out"]
    if not values:
        return None
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else values[0]
    if node.op == "call_method":
        return first if str(node.target).endswith("_") and not str(node.target).endswith("__") else None
    if node.op == "call_module":
        return first if getattr(module.get_submodule(str(node.target)), "inplace", False) else None
    if node.op == "call_function":
        name = str(getattr(node.target, "__name__", ""))
        defined_in = str(getattr(node.target, "__module__", None) or "")
        in_place_operator = defined_in == "_operator" and name in IN_PLACE_OPERATORS
        in_place_name = name.endswith("_") and not name.endswith("__") and defined_in != "_operator"
        writes = in_place_operator or in_place_name or name == "setitem" or node.kwargs.get("inplace") is True
        return first if writes else None
    return None


class DisjointSets:
    """A union-find structure over arbitrary keys."""

    def __init__(self) -> None:
        self._parent: Dict[Any, Any] = {}

    def root(self, key: Any) -> Any:
        """Returns the representative of the set that contains ``key``."""
        self._parent.setdefault(key, key)
        while self._parent[key] is not key:
            self._parent[key] = self._parent[self._parent[key]]
            key = self._parent[key]
        return key

    def join(self, first: Any, second: Any) -> None:
        """Merges the sets of two keys."""
        self._parent[self.root(first)] = self.root(second)


class _Memory:
    """Sets of nodes whose values may share memory."""

    def __init__(self, graph: fx.Graph, module: nn.Module) -> None:
        self._sets = sets = DisjointSets()
        tensors: Dict[int, fx.Node] = {}  # by the id of a tensor: the get_attr node that reads it
        inputs: List[fx.Node] = []
        for node in graph.nodes:
            if node.op == "placeholder":
                inputs.append(node)
                sets.join(node, inputs[0])  # inputs may be views of one tensor
            elif node.op == "get_attr":
                sets.join(node, tensors.setdefault(id(attribute_of(module, str(node.target))), node))
            elif _written_value(node, module) is not None:
                sets.join(node, _written_value(node, module))
            elif not self._is_fresh(node, module):
                for value in node.all_input_nodes:
                    sets.join(node, value)
        self._users: Dict[Any, List[fx.Node]] = {}
        for node in graph.nodes:
            roots = {sets.root(value): None for value in node.all_input_nodes}
            if node.op == "call_module":
                part = module.get_submodule(str(node.target))
                for tensor in (*part.parameters(), *part.buffers()):
                    if id(tensor) in tensors:
                        roots[sets.root(tensors[id(tensor)])] = None
            for root in roots:
                self._users.setdefault(root, []).append(node)

    def users(self, node: fx.Node) -> List[fx.Node]:
        """Returns all nodes that read or write the memory of ``node``, in program order."""
        return self._users.get(self._sets.root(node), [])

    def _is_fresh(self, node: fx.Node, module: nn.Module) -> bool:
        if node.op == "call_module":
            return isinstance(module.get_submodule(str(node.target)), _FRESH_MODULES)
        name = str(getattr(node.target, "__name__", node.target))
        return node.op in ("call_function", "call_method") and name in _FRESH_FUNCTIONS
