"""Layers and the clock as torch.compile sees them: one operator each, so that a model is one graph at every step.

    modiff::begin    an evaluation of the network begins: the clock moves on
    modiff::layer    a layer's forward, states and all
    modiff::fused_layer    the same behind a norm and an activation, which `fusion` puts into a graph
    modiff::attend   quantized attention whose scales change from step to step
    modiff::end      the evaluation ended
    modiff::guard    a layer's output where a gradient is recorded, modiff::refuse its backward: it raises

What a layer remembers stays outside of the graph: no step, state or first use is a reason to compile again. All of them
write into the clock's `token`, which keeps their order. They run Python at every call, so no CUDA graph may hold them:
the tag says so. `torch.library.custom_op` would add 15 to 20 us a call.
"""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Never

import torch
from torch import Tensor
from torch.autograd import forward_ad

from modiff.errors import StateError
from modiff.kernels.input_fusion import InputFusion
from modiff.kernels.layout import empty_output, innermost
from modiff.nn.branches import inputs_of

_LIBRARY = torch.library.Library("modiff", "FRAGMENT")
_TAGS = (torch.Tag.cudagraph_unsafe,)
_NUMBERS = itertools.count()
_HOLDERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def holder_of(number: int) -> Any:
    """The layer or the attachment that a graph calls `number`."""
    return _HOLDERS[number]


def number_for(holder: object) -> int:
    """A number that a graph can hold for a layer or a clock, for as long as it lives."""
    number = next(_NUMBERS)
    _HOLDERS[number] = holder
    return number


def check_no_transform(name: str) -> None:
    """Raises: StateError in torch.func's transforms and forward-mode derivatives: no state may keep their tensors."""
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        refuse_transform(name)


def refuse_transform(name: str) -> Never:
    """Raises: StateError of an evaluation in a transform."""
    raise StateError(
        f"{name}: expected an evaluation of tensors, got one inside of a torch.func transform or a forward-mode "
        "derivative (vmap, grad, jvp, ...). The states keep values for the next step, which a transform takes back. "
        "Evaluate the model outside of it, or call modiff.remove(model) first."
    )


def _operator(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"modiff::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.modiff, name).default


def _layer(token: Tensor, x: Tensor, number: int, read: int = 0, fusion: InputFusion | None = None) -> Tensor:
    holder = holder_of(number)
    output = holder.run(x, fusion, read)
    return output.contiguous() if holder.channel_dim == -1 else innermost(output)


def _fused_layer(token: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    weight, bias, norm, groups, eps, activation, read, number = arguments
    return _layer(token, x, number, read, InputFusion(norm, groups, weight, bias, eps, activation))


def _fake_layer(token: Tensor, x: Tensor, number: int, read: int = 0) -> Tensor:
    holder = holder_of(number)
    shape = holder.spec.operate(x, x.new_empty(holder.weight_shape), None).shape
    return empty_output(x, shape, 0 if holder.channel_dim == -1 else x.dim() - 2, x.dtype)


def _attend(token: Tensor, *arguments: Any) -> Tensor:
    *operands, scale, grouped, number = arguments
    return holder_of(number).attend(*operands, scale=scale, enable_gqa=grouped).contiguous()


def _begin(
    _: Tensor, timestep: Tensor | None, sample: Tensor | None, tensors: Sequence[Tensor], names: Sequence[str],
    number: int,
) -> None:  # fmt: skip
    named = {"": sample, **dict(zip(names, tensors, strict=False))} | dict.fromkeys(names[len(tensors) :], True)
    holder_of(number).begin(timestep, inputs_of((), named, sample, None))


def _nothing(*_: object) -> None:
    return None


def _guard(x: Tensor, output: Tensor, number: int) -> Tensor:
    return output.clone()


def _refuse(gradient: Tensor, shape: Sequence[int], number: int) -> Tensor:
    raise StateError(
        f"{holder_of(number).name}: expected no gradient, got a backward pass. Rounded codes have no gradient, and the "
        "states hold earlier steps without one. Sample under torch.no_grad(), or call modiff.remove(model) first."
    )


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.shape, ctx.number = inputs[0].shape, inputs[2]


begin = _operator(
    "begin(Tensor(a!) token, Tensor? timestep, Tensor? sample, Tensor[] tensors, str[] names, int number) -> ()",
    _begin, _nothing,
)  # fmt: skip
end = _operator("end(Tensor(a!) token, int number) -> ()", lambda _, number: holder_of(number).end(), _nothing)
layer = _operator("layer(Tensor(a!) token, Tensor x, int number, int read=0) -> Tensor", _layer, _fake_layer)
fused_layer = _operator(
    "fused_layer(Tensor(a!) token, Tensor x, Tensor? weight, Tensor? bias, str norm, int groups, float eps, "
    "str activation, int read, int number) -> Tensor",
    _fused_layer, lambda token, x, *others: _fake_layer(token, x, others[-1]),
)  # fmt: skip
attend = _operator(
    "attend(Tensor(a!) token, Tensor query, Tensor key, Tensor value, Tensor? mask, float dropout, bool causal, "
    "float? scale, bool grouped, int number) -> Tensor",
    _attend, lambda _, query, key, value, *__: query.new_empty((*query.shape[:-1], value.shape[-1])),
)  # fmt: skip
guard = _operator("guard(Tensor x, Tensor output, int number) -> Tensor", _guard, lambda _x, output, _: output.clone())
refuse = _operator("refuse(Tensor gradient, SymInt[] shape, int number) -> Tensor", _refuse,
                   lambda gradient, shape, _: gradient.new_empty(shape))  # fmt: skip
for _name in ("layer", "fused_layer"):
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # `guard` says what their gradient is
torch.library.register_autograd(
    "modiff::guard",
    lambda ctx, gradient: (refuse(gradient, ctx.shape, ctx.number), None, None),
    setup_context=_remember,
    lib=_LIBRARY,
)
