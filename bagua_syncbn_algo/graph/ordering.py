"""What must keep its order in a traced graph: values, in-place writes to shared memory, random draws, opaque steps."""

from __future__ import annotations

from typing import Any, Dict, List

from torch import fx, nn

from ..compat import aten_op_draws
from ..layer import SyncBatchNorm
from .tracing import IN_PLACE_OPERATORS, normalize_standalone

__all__ = ["Groups", "attribute_of", "dependencies"]

# Functions and methods that draw random numbers, where PyTorch does not tag an operator of the name so.
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
# Functions of torch.nn.functional and torch that are no ATen operator and have no effect besides their value.
_COMPOSITE_FUNCTIONS = frozenset(
    (
        *("adaptive_max_pool1d_with_indices", "adaptive_max_pool2d_with_indices", "adaptive_max_pool3d_with_indices"),
        *("affine_grid", "cross_entropy", "fold", "gaussian_nll_loss", "grid_sample", "interpolate"),
        *("local_response_norm", "logsigmoid", "lp_pool1d", "lp_pool2d", "lp_pool3d", "max_unpool1d"),
        *("multilabel_soft_margin_loss", "normalize", "softmin", "softsign", "tanhshrink"),
        *("upsample", "upsample_bilinear", "upsample_nearest", "unique", "unravel_index", "is_tensor"),
    )
)
# Operators that always return memory of their own; whatever is not here may return a view of what it is given.
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
    """Returns for each node those that must run before it, by value or by order."""
    before = {node: list(node.all_input_nodes) for node in graph.nodes}
    position = {node: index for index, node in enumerate(graph.nodes)}
    chain = [node for node in graph.nodes if _is_effect(node, module)]
    for earlier, later in zip(chain, chain[1:]):
        before[later].append(earlier)
    memory = _Memory(graph, module)
    for node in graph.nodes:
        target = _written(node, module)
        if target is None:
            continue
        for user in memory.users(target):
            if position[user] < position[node]:
                before[node].append(user)
            elif user is not node:
                before[user].append(node)
    return before


def _is_effect(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node draws random numbers or may have an effect that the graph does not show.

    Such nodes keep their order. A function that is not known to be free of effects is taken to have one.
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
    home = str(getattr(node.target, "__module__", None) or "torch").split(".")[0]
    if home in ("_operator", "builtins", "math"):
        return False
    return home != "torch" or bool(draws) or (draws is None and name not in _COMPOSITE_FUNCTIONS)


def _has_children(part: nn.Module) -> bool:
    return next(part.children(), None) is not None


def _written(node: fx.Node, module: nn.Module) -> Any:
    """Returns the value that ``node`` changes in place, or ``None``."""
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
        home = str(getattr(node.target, "__module__", None) or "")
        in_operator = home == "_operator" and name in IN_PLACE_OPERATORS
        method = name.endswith("_") and not name.endswith("__") and home != "_operator"
        return first if in_operator or method or name == "setitem" or node.kwargs.get("inplace") is True else None
    return None


class Groups:
    """Keys that belong together (a union-find structure)."""

    def __init__(self) -> None:
        self._parent: Dict[Any, Any] = {}

    def root(self, key: Any) -> Any:
        """Returns the same key for all that belong together."""
        self._parent.setdefault(key, key)
        while self._parent[key] is not key:
            self._parent[key] = self._parent[self._parent[key]]
            key = self._parent[key]
        return key

    def join(self, first: Any, second: Any) -> None:
        """Lets two keys, and all that belong to them, belong together."""
        self._parent[self.root(first)] = self.root(second)


class _Memory:
    """Which nodes may hold the same memory."""

    def __init__(self, graph: fx.Graph, module: nn.Module) -> None:
        self._groups = groups = Groups()
        tensors: Dict[int, fx.Node] = {}  # those read by name: a module reads its own without a node
        inputs: List[fx.Node] = []
        for node in graph.nodes:
            if node.op == "placeholder":
                inputs.append(node)
                groups.join(node, inputs[0])  # the caller may have given views of one tensor
            elif node.op == "get_attr":
                groups.join(node, tensors.setdefault(id(attribute_of(module, str(node.target))), node))
            elif _written(node, module) is not None:
                groups.join(node, _written(node, module))
            elif not self._is_fresh(node, module):
                for value in node.all_input_nodes:
                    groups.join(node, value)
        self._users: Dict[Any, List[fx.Node]] = {}
        for node in graph.nodes:
            roots = {groups.root(value): None for value in node.all_input_nodes}
            if node.op == "call_module":
                part = module.get_submodule(str(node.target))
                for tensor in (*part.parameters(), *part.buffers()):
                    if id(tensor) in tensors:
                        roots[groups.root(tensors[id(tensor)])] = None
            for root in roots:
                self._users.setdefault(root, []).append(node)

    def users(self, node: fx.Node) -> List[fx.Node]:
        """Returns all nodes that read or write the memory of ``node``, in program order."""
        return self._users.get(self._groups.root(node), [])

    def _is_fresh(self, node: fx.Node, module: nn.Module) -> bool:
        if node.op == "call_module":
            return isinstance(module.get_submodule(str(node.target)), _FRESH_MODULES)
        name = str(getattr(node.target, "__name__", node.target))
        return node.op in ("call_function", "call_method") and name in _FRESH_FUNCTIONS


def attribute_of(module: nn.Module, path: str) -> Any:
    """Returns what a path of attributes leads to, as a graph's ``get_attr`` nodes have it."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value
