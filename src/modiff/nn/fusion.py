"""Norms and activations between layers, moved into them: computed in the pass over memory that makes the codes.

    y = layer(silu(group_norm(x)))   becomes   y = modiff::fused_layer(x, group norm, silu)

    torch.compile(model, backend="modiff", fullgraph=True)

is inductor behind this rewriting. A norm moves if all that read it are layers on integers that can compute it.
"""

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional

from modiff.kernels.input_fusion import Activation, Norm
from modiff.nn import traced
from modiff.private_names import COMPILER, check_private_names

_READS = itertools.count(1)
_VIEWS = ("transpose", "permute", "reshape", "view", "flatten")
_TURN: dict[Any, Any] = {"view": "reshape"}  # a norm gives what can be viewed so, its input may not
_NORMS: dict[Norm, tuple[Any, str]] = {
    "group": (functional.group_norm, "num_groups"),
    "layer": (functional.layer_norm, "normalized_shape"),
}
_CALLS = ("call_function", "call_method")
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem")


class _Match(NamedTuple):
    """The nodes of one match: y = activation(norm(x)), or x activation(weight) where norm is "gated".

    weight and bias: (C,), or (B, 1, C) where `each` is True. views: what stands between the norm and the layer.
    """

    x: Node
    norm: Norm = "none"
    groups: int = 1
    weight: Node | None = None
    bias: Node | None = None
    eps: float = 0.0
    activation: Activation = "none"
    each: bool = False
    views: tuple[Node, ...] = ()


def backend(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """What torch.compile calls for `backend="modiff"`."""
    check_private_names(COMPILER)
    from torch._dynamo import lookup_backend  # imported late: it takes seconds

    fuse(module)
    return lookup_backend("inductor")(module, list(inputs))


def fuse(module: GraphModule) -> int:
    """Rewrite a graph of torch.compile in place. Returns: how many layers took in the norm or activation they read.

    Layers that read one tensor get a number for it, as inductor keeps one tensor after the other in the same memory.
    """
    moved = 0
    for node in list(module.graph.nodes):
        if node.op in _CALLS and (match := _match(node)) and _readers(node, match):
            moved += len(node.users)
            _move(module, sorted(node.users), match)
            _erase(node)
    for node in module.graph.nodes:
        _number(node)
    module.graph.lint()
    module.recompile()
    return moved


def _readers(node: Node, match: _Match) -> bool:
    first = min(match.x, match.weight) if match.norm == "gated" and match.weight is not None else match.x
    return bool(node.users) and all(
        user.target is traced.layer
        and user.args[1] is node
        and _fuses(user.args[2], match)
        and not _written(first, user)  # maybe into what x is a view of
        for user in node.users
    )


def _written(first: Node, last: Node) -> bool:
    node = first.next
    while node is not last and not (node.op == "call_module" or (node.op in _CALLS and _in_place(node))):
        node = node.next
    return node is not last


def _number(node: Node) -> None:
    readers = sorted(user for user in node.users if user.target is traced.layer and user.args[1] is node)
    if len(readers) > 1 and not _written(readers[0], readers[-1]):
        for reader, read in zip(readers, _read_numbers(readers), strict=True):
            reader.args = (*reader.args[:3], read)


def _read_numbers(readers: list[Node]) -> list[int]:
    """A number for each group of layers that share, negative for the first of it: it begins in each run of a graph."""
    groups = [id(traced.holder_of(reader.args[2]).inputs) for reader in readers]
    numbers = {group: next(_READS) for group in dict.fromkeys(groups)}
    return [numbers[group] * (-1 if group not in groups[:i] else 1) for i, group in enumerate(groups)]


def _in_place(node: Node) -> bool:
    name = getattr(node.target, "__name__", str(node.target))
    if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("out") is not None:
        return True
    names = getattr(getattr(node.target, "__code__", None), "co_varnames", ())
    index = names.index("inplace") if "inplace" in names else len(node.args)
    return bool(_argument(node, index, "inplace")) or _mutates(node.target)


def _mutates(target: object) -> bool:
    """Whether an operator of another library may change what it is given; those of modiff change their states alone."""
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(_mutates(getattr(target, name)) for name in target.overloads())
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable and target.namespace != "modiff"


def _fuses(number: Any, match: _Match) -> bool:
    holder = traced.holder_of(number)
    axis, device = {"group": 1, "none": holder.channel_dim}.get(match.norm, -1), holder.operator.weight.device
    return holder.channel_dim == axis and holder.on_integers and holder.spec.fuses(match.norm, device)


def _move(module: GraphModule, readers: list[Node], match: _Match) -> None:
    graph, x, weight, bias = module.graph, match.x, match.weight, match.bias
    with graph.inserting_before(readers[0]):
        if match.each:
            weight, bias = (graph.call_method("flatten", (part, 1)) for part in (weight, bias))
        for view in match.views:
            x = graph.call_method(_TURN.get(view.target, view.target), (x, *view.args[1:]), view.kwargs)
    for reader, read in zip(readers, _read_numbers(readers), strict=True):
        token, _, number = reader.args
        arguments = (token, x, weight, bias, match.norm, match.groups, match.eps, match.activation, read, number)
        with graph.inserting_before(reader):
            after = graph.call_function(traced.fused_layer, arguments)
        after.meta.update(reader.meta)
        reader.replace_all_uses_with(after)
        graph.erase_node(reader)


def _erase(node: Node) -> None:
    if node.op == "placeholder" or node.users:
        return
    read = node.all_input_nodes
    node.graph.erase_node(node)
    for each in read:
        schema = each.target._schema if isinstance(each.target, torch._ops.OpOverload) else None
        if each.op in _CALLS and not (schema and schema.is_mutable):
            _erase(each)


def _match(node: Node) -> _Match | None:
    last = _without_dropout(node)
    if gated := _gated(last):
        return gated
    activation = _activation(last)
    if activation == "none":
        match = _norm(last)
    else:
        inner = _without_dropout(_argument(last, 0, "input"))
        match = (_norm(inner) if _only(inner, last) else None) or _Match(inner)
    if match is None or getattr(_example(match.x), "dtype", None) != getattr(_example(node), "dtype", None):
        return None
    return match._replace(activation=activation)


def _norm(node: Any) -> _Match | None:
    return _torch_norm(node, "group") or _torch_norm(node, "layer") or _modulated_norm(node) or _turned_norm(node)


def _activation(node: Node) -> Activation:
    if node.target is functional.silu and not _argument(node, 1, "inplace"):
        return "silu"
    if node.target is functional.gelu:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return "none"


def _gated(node: Node) -> _Match | None:
    if node.target is not operator.mul:
        return None
    for x, active in (node.args, node.args[::-1]):
        activation = _activation(active) if _only(active, node) else "none"
        if activation == "none":
            continue
        gate = _argument(active, 0, "input")
        like, other = _example(x), _example(gate)
        if like is None or other is None or like.dim() < 3 or like.dtype != other.dtype:
            continue
        if (like.shape, like.stride()) == (other.shape, other.stride()) and like.stride(-1) == 1:
            return _Match(x, "gated", weight=gate, activation=activation)
    return None


def _without_dropout(node: Node) -> Node:
    while node.target is functional.dropout and _argument(node, 2, "training") is False:
        node = _argument(node, 0, "input")
    return node


def _only(node: Any, reader: Node) -> bool:
    return isinstance(node, Node) and set(node.users) == {reader}


def _torch_norm(node: Node, norm: Norm) -> _Match | None:
    target, second = _NORMS[norm]
    if node.target is not target:
        return None
    names = ("input", second, "weight", "bias", "eps")
    x, size, weight, bias, eps = (_argument(node, i, name) for i, name in enumerate(names))
    if norm == "layer" and len(size) != 1:
        return None
    return _Match(x, norm, size if norm == "group" else 1, weight, bias, 1e-5 if eps is None else eps)


def _turned_norm(node: Node) -> _Match | None:
    """group_norm behind views that make tokens of pixels: (N, C, ...) -> (N, ..., C)."""
    views: list[Node] = []
    while node.op == "call_method" and node.target in _VIEWS and len(node.all_input_nodes) == 1:
        views.insert(0, node)
        node = node.all_input_nodes[0]
        if not _only(node, views[0]):
            return None
    norm = _torch_norm(node, "group") if views else None
    tokens = norm is not None and _make_tokens(views, _example(norm.x))
    return norm._replace(norm="group_last", views=tuple(views)) if tokens else None


def _make_tokens(views: Sequence[Node], like: Tensor | None) -> bool:
    """Whether the views keep samples and the order of pixels, and put the channels last; tried on numbers."""
    if like is None or like.dim() < 3 or not all(type(size) is int for size in like.shape):
        return False
    marks = torch.arange(like.numel(), dtype=torch.int32, device="cpu").reshape(like.shape)
    turned, expected = marks, marks.flatten(2).transpose(1, 2)
    for view in views:
        if any(isinstance(argument, torch.dtype) for argument in (*view.args, *view.kwargs.values())):
            return False
        turned = getattr(turned, _TURN.get(view.target, view.target))(*view.args[1:], **view.kwargs)
    kept = turned.dim() > 2 and (turned.shape[0], turned.shape[-1]) == (like.shape[0], like.shape[1])
    return kept and torch.equal(turned.flatten(1, -2), expected)


def _modulated_norm(node: Node) -> _Match | None:
    """layer_norm(x) * scale + shift with a scale and a shift for each sample: (B, 1, C)."""
    if node.target is not operator.add:
        return None
    for product, shift in (node.args, node.args[::-1]):
        if not _only(product, node) or product.target is not operator.mul:
            continue
        for inner, scale in (product.args, product.args[::-1]):
            norm = _torch_norm(inner, "layer") if _only(inner, product) else None
            like = None if norm is None else _example(norm.x)
            if norm is None or norm.weight is not None or norm.bias is not None or like is None or like.dim() != 3:
                continue
            values = [_example(each) for each in (scale, shift)]
            if all(v is not None and tuple(v.shape) == (len(like), 1, like.shape[2]) for v in values):
                return norm._replace(weight=scale, bias=shift, each=True)
    return None


def _argument(node: Node, index: int, name: str) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs.get(name)


def _example(node: Any) -> Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None
