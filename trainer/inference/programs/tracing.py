"""A pure function of tensors as one graph of aten operations. Pyro's handlers run while it is traced and leave nothing.

A trace freezes what Python decides: branches on values, Python's and NumPy's random numbers. So the function is traced
on two different batches, and two graphs that differ are refused.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.errors import UserError, first_line

_aten = torch.ops.aten
_CHECKS = (_aten._linalg_check_errors.default,)
_FILLS = {
    _aten.index_put_.default: _aten.masked_fill_.Scalar,
    _aten.index_put.default: _aten.masked_fill.Scalar,
}


class Untraceable(Exception):
    """The function cannot become a graph; the message names the operation and the site."""


class Traced(NamedTuple):
    """``graph(*inputs, *constants)``: what the function computes."""

    graph: GraphModule
    constants: tuple[Tensor, ...]
    """Tensors that the model holds besides its parameters, in the order of the last placeholders."""


def trace(function: Callable[..., Any], inputs: Sequence[Tensor], others: Sequence[Tensor]) -> Traced:
    """The graph of ``function(*inputs)``, a flat sequence of tensors in and out; ``others``: inputs with other values.

    Raises Untraceable, or UserError where the two graphs differ.
    """
    graph, again = _graph(function, inputs), _graph(function, others)
    _refuse_difference(graph, again)
    for node in list(graph.graph.nodes):
        if node.target in _CHECKS:  # finiteness is checked after every chunk
            graph.graph.erase_node(node)
        elif node.target in _FILLS:
            _fill_by_mask(graph, node)
    graph.graph.eliminate_dead_code()
    constants = _lift_constants(graph)
    graph.recompile()
    return Traced(graph, constants)


def _graph(function: Callable[..., Any], inputs: Sequence[Tensor]) -> GraphModule:
    """All nodes take their shapes from one fake mode: to make one for each takes more than half of the time."""
    watch, reached = _Watch(), _LastSite()

    def watched(*args: Tensor) -> Any:
        with watch, reached:
            return function(*args)

    try:
        with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
            return make_fx(watched)(*inputs)
    except UserError:
        raise
    except Exception as error:
        where = f' after site "{reached.name}"' if reached.name else ""
        raise Untraceable(f"{watch.operation}{where}: {first_line(error)}") from error


class _Watch(TorchDispatchMode):
    """Remembers the last operation, and stops at random ones: their numbers would be drawn by the compiler's rules."""

    operation = "nothing"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operation = f"{func}"
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotImplementedError("a random draw that is no transformation of the given noise")
        return func(*args, **(kwargs or {}))


class _LastSite(Messenger):
    """Remembers the last sample site that the model or guide reached."""

    name = ""

    def _pyro_post_sample(self, msg: Message[..., Any]) -> None:
        if not isinstance(msg["fn"], _Subsample):
            self.name = str(msg["name"])


def _refuse_difference(graph: GraphModule, again: GraphModule) -> None:
    one, two = list(graph.graph.nodes), list(again.graph.nodes)
    for a, b in zip(one, two):
        if str(a.target) != str(b.target) or _text(a) != _text(b) or not _same_constant(graph, a, again, b):
            raise UserError(
                f"two traces of the model on different rows differ ({_describe(graph, a)}, then "
                f"{_describe(again, b)}), so a compiled step would freeze what Python decides: use torch operations "
                "in place of Python branches and of Python's or NumPy's random numbers, or train with program=eager."
            )
    if len(one) != len(two):
        raise UserError(
            f"two traces of the model on different rows have {len(one)} and {len(two)} operations: "
            "use torch operations in place of Python branches, or train with program=eager."
        )


def _fill_by_mask(graph: GraphModule, node: Any) -> None:
    """A number put where a mask holds (`x[mask] = 0`, as in Multinomial), as what `torch.vmap` knows it by."""
    into, places, value = node.args[:3]
    if len(places) != 1 or len(node.args) > 3 or str(value.target) != str(_aten.lift_fresh_copy.default):
        return
    mask, constant = places[0].meta["val"], getattr(graph, str(value.args[0].target), None)
    if mask.dtype == torch.bool and mask.shape == into.meta["val"].shape and constant is not None:
        with graph.graph.inserting_before(node):
            new = graph.graph.call_function(_FILLS[node.target], (into, places[0], constant.item()))
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)


def _text(node: Node) -> str:
    return f"{node.args} {node.kwargs}"


def _same_constant(one: GraphModule, a: Node, two: GraphModule, b: Node) -> bool:
    if a.op != "get_attr":
        return True
    left, right = getattr(one, str(a.target)), getattr(two, str(b.target))
    return left.shape == right.shape and torch.equal(torch.nan_to_num(left), torch.nan_to_num(right))


def _describe(graph: GraphModule, node: Node) -> str:
    if node.op == "get_attr":
        return f"the constant {getattr(graph, str(node.target)).flatten()[:3].tolist()}"
    return f"{node.target}{node.args}"


def _lift_constants(graph: GraphModule) -> tuple[Tensor, ...]:
    """Turns tensors that the graph holds into inputs, and scalars into operations."""
    placeholders: dict[str, Node] = {}
    constants: list[Tensor] = []
    last_input = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        name, value = str(node.target), getattr(graph, str(node.target))
        if value.dim() == 0:
            with graph.graph.inserting_before(node):
                options = {"dtype": value.dtype, "device": value.device}
                new = graph.graph.call_function(_aten.full.default, ([], value.item()), options)
        elif name in placeholders:
            new = placeholders[name]
        else:
            with graph.graph.inserting_after(last_input):
                new = last_input = graph.graph.placeholder(name)
            placeholders[name] = new
            constants.append(value)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    return tuple(constants)
