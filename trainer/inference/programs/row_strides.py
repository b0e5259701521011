"""Rows of several numbers, in a compiled step: stored number by number.

Where the ratings of a row are neighbors in memory, Inductor sums them across the lanes of a vector, for each row anew;
where those of a rating are, whole vectors of rows are added. A step that evaluates rows twenty times takes a quarter of
the time so. Inductor keeps the strides that it is given, so columns and products are copied once.

Shapes: B rows, w numbers of each.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.mv.default, _aten.addmm.default, _aten.addmv.default, _aten.bmm.default)
_VIEWS = (
    *(_aten.view.default, _aten._unsafe_view.default, _aten.select.int, _aten.slice.Tensor, _aten.alias.default),
    *(_aten.squeeze.default, _aten.squeeze.dim, _aten.unsqueeze.default, _aten.detach.default),
)
_MOST = 64  # numbers of a row: of more, a row fills vectors of its own


def stored_by_number(graph: GraphModule, rows: int) -> None:
    """Has element-wise operations of ``graph`` take [B, w] columns and products, B = ``rows``, by number."""
    import torch._inductor.inductor_prims  # takes a second

    by_number = torch.ops.prims.inductor_force_stride_order.default
    for node in list(graph.graph.nodes):
        users = [user for user in node.users if _is_pointwise(user)]
        if users and _is_of_rows(node, rows) and _is_given(node):
            with graph.graph.inserting_after(node):
                new = graph.graph.call_function(by_number, (node, (1, rows)))
            new.meta["val"] = node.meta["val"].t().contiguous().t()
            for user in users:
                user.replace_input_with(node, new)
    for node in graph.graph.nodes:  # a view of what is stored otherwise may have to be a copy
        if node.target in (_aten.view.default, _aten._unsafe_view.default):
            node.target = _aten.reshape.default
    graph.recompile()


def _is_of_rows(node: Node, rows: int) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] == rows and 2 <= value.shape[1] <= _MOST


def _is_given(node: Any) -> bool:
    """Whether it is a column, or a product, seen in another shape."""
    while node.target in _VIEWS:
        node = node.args[0]
    return node.op == "placeholder" or node.target in _PRODUCTS


def _is_pointwise(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
