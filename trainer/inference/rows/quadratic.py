"""Whether a row's density is Gaussian in its own numbers, read off the operations that compute it.

A log density that is a polynomial of degree two at most has its integral in closed form, whatever the data: linear
mixed models, factor analysis, a normal effect measured with noise. The proof goes through the graph of the density as a
function of these numbers, operation by operation, so no row and no parameter can make it wrong.
"""

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

_MOST = 2
Degrees = list[float]
"""Of an operation's arguments, in their order."""


def _largest(degrees: Degrees) -> float:
    return max(degrees)


def _of_first(degrees: Degrees) -> float:
    return math.inf if any(degrees[1:]) else degrees[0]


def _past_first(degrees: Degrees) -> float:
    return math.inf if degrees[0] else max(degrees)


def _past_second(degrees: Degrees) -> float:
    return math.inf if degrees[1] else max(degrees)


def _added_product(degrees: Degrees) -> float:
    return max(degrees[0], degrees[1] + degrees[2])


_LINEAR = """add sub rsub neg clone detach alias view reshape _unsafe_view expand permute transpose t unsqueeze squeeze
select slice stack cat sum mean _to_copy split split_with_sizes unbind constant_pad_nd diagonal flip lift_fresh_copy
lift_fresh cumsum getitem"""
_RULES: dict[str, Callable[[Degrees], float]] = {
    **dict.fromkeys(_LINEAR.split(), _largest),
    **dict.fromkeys(("mul", "mm", "bmm", "mv", "dot"), sum),
    **dict.fromkeys(("div", "gather", "index", "index_select"), _of_first),
    **dict.fromkeys(("where", "linalg_solve_triangular"), _past_first),
    **dict.fromkeys(("addmm", "baddbmm"), _added_product),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"), lambda _: 0.0),
    "masked_fill": _past_second,
}
"""The degree of what an operation makes; of any other it is not known."""


def is_quadratic(f: Callable[[Tensor], Tensor], u: Tensor) -> bool:
    """Whether every entry of f(u) is a polynomial of degree two at most in the entries of u, for any u."""
    try:
        with pyro.validation_enabled(False), torch.no_grad():
            graph = make_fx(f)(u)
    except Exception:  # what cannot be traced is not known
        return False
    return _degree(graph) <= _MOST


def _degree(graph: GraphModule) -> float:
    """Of the result, in the inputs; inf where it is no polynomial, or not known to be one."""
    degrees: dict[Node, float] = {}

    def of(value: Any) -> float:
        if isinstance(value, Node):
            return degrees[value]
        return max(map(of, value), default=0.0) if isinstance(value, list | tuple) else 0.0

    for node in graph.graph.nodes:
        if node.op == "placeholder":
            degrees[node] = 1.0
        elif node.op == "get_attr":
            degrees[node] = 0.0
        elif node.op == "output":
            return of(node.args[0])
        else:
            degrees[node] = _of_operation(node, of)
            if degrees[node] and _name(node).endswith("_"):  # what it changes may be used under its own name
                return math.inf
    return math.inf


def _name(node: Node) -> str:
    """As `add`, for aten.add.Tensor."""
    target: Any = node.target
    return str(getattr(target, "overloadpacket", getattr(target, "__name__", target))).rpartition(".")[2]


def _of_operation(node: Node, of: Callable[[Any], float]) -> float:
    name, degrees = _name(node), [of(value) for value in (*node.args, *node.kwargs.values())]
    if not any(degrees):
        return 0.0
    if name == "pow" and node.args[1] in (1, 2):
        return degrees[0] * float(node.args[1])  # type: ignore[arg-type]
    return _RULES[name](degrees) if name in _RULES else math.inf
