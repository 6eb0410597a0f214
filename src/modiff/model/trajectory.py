"""The life of the states: one generation, first step to last; the memory they take; copies that share all but them."""

import copy
import math
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from modiff.config import LayerConfig, check
from modiff.core.predictors import predictor_named
from modiff.errors import ConfigError, StateError, warn_once
from modiff.model.attach import attachment_of, required_attachment
from modiff.model.facts import facts_of
from modiff.model.observe import observe
from modiff.model.probe import plain_layer
from modiff.model.report import Report
from modiff.model.select import modulated_layer
from modiff.nn import Clock, ModulatedLayer
from modiff.nn.adapters import modules_of
from modiff.nn.weight import turned


@contextmanager
def model_trajectory(model: nn.Module) -> Iterator[None]:
    """Run one generation: states start empty and are freed at the end, as `modiff.trajectory`."""
    attachment = required_attachment(model, "trajectory")
    if attachment.automatic is not None:
        attachment.automatic.end()  # one that began by itself gives way
    clock = attachment.clock
    clock.start()
    try:
        yield
    finally:
        clock.stop()


@contextmanager
def model_context(model: nn.Module, name: str, *, names_tell: bool = False) -> Iterator[None]:
    """Evaluations in the body use states of their own, as `modiff.context`; within, their conditions tell branches.

    names_tell: the name alone does, as in a loop of the user's.
    """
    clock = required_attachment(model, "context").clock
    before = clock.context, clock.names_tell
    clock.context, clock.names_tell = name, names_tell
    try:
        yield
    finally:
        clock.context, clock.names_tell = before


def reorder(model: nn.Module, index: Tensor) -> None:
    """Row i of the batch goes on from the states of row index[i]: what a particle filter calls resampling.

    All layers and contexts, states, moves and scales. The next evaluation gives what it would have given if the rows
    had been these from the start.

    Args:
        index: (rows,) integers in [0, rows), where `rows` is the batch of the network.
    Raises: StateError outside a trajectory, within an evaluation, or where rows share scales, so that each depends on
        all; ConfigError for another index.
    Cost: a copy of all states.
    """
    attachment = required_attachment(model, "reorder")
    clock, layers = attachment.clock, attachment.layers.values()
    if not clock.active or clock.inside:
        raise StateError("reorder: expected a trajectory between two evaluations, got none. States live for one. Call "
                         "it inside `with modiff.trajectory(model):`, after an evaluation.")  # fmt: skip
    fits = index.dim() == 1 and not index.is_floating_point() and index.dtype != torch.bool
    if not fits or not all(0 <= row < len(index) for row in index.tolist()):
        raise ConfigError(f"reorder.index: expected a row of the batch for each of its rows, from 0, got {index.dtype} "
                          f"{index.tolist()}. Row i goes on from row index[i]. Give torch.tensor([...]).")  # fmt: skip
    groups = {id(layer.inputs): layer.inputs for layer in layers if layer.inputs is not None}
    with torch.inference_mode(mode=False), torch.no_grad():
        index, clock.failed = index.clone(), True  # until all of them went on
        for holder in (*(s for group in groups.values() for s in group.states), *(x.loop for x in layers), clock):
            holder.reorder(index)
        clock.failed = False


def state_bytes(model: nn.Module) -> int:
    """Measured bytes of all states and their moves, of all contexts, shared ones once; 0 between trajectories."""
    return required_attachment(model, "state_bytes").state_bytes()


def state_elements(model: nn.Module, names: Collection[str], target: Any) -> dict[str, tuple[int, int, Tensor]]:
    """How many numbers each layer reads and writes in one evaluation of `NetworkFacts.example`, and its first input.

    From shapes alone; {} where the host knows no example, or shapes depend on values.
    Cost: a copy of the modules without their tensors, and an evaluation on the meta device.
    """
    sizes: dict[str, tuple[int, int, Tensor]] = {}

    def see(name: str, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        reads, writes, source = sizes.get(name, (0, 0, inputs[0]))
        sizes[name] = reads + inputs[0].numel(), writes + output.numel(), source

    def evaluate(example: dict[str, Any], device: str) -> None:
        def like(tensor: Tensor) -> Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

        sizes.clear()
        memo: dict[int, Any] = {id(t): like(t) for module in model.modules() for t in _tensors(vars(module))}
        memo |= {id(p): nn.Parameter(like(p), False) for p in model.parameters()}
        for module in model.modules():  # neither hooks nor wrappers meet tensors without values
            hooks = ("_forward_hooks", "_forward_pre_hooks", "forward")
            memo |= {id(vars(module)[name]): OrderedDict() for name in hooks if name in vars(module)}
            if isinstance(module, ModulatedLayer):
                memo[id(module)] = _as_torch_has_it(module, device)
        memo[id(attachment_of(model))] = None
        blank = copy.deepcopy(model, memo)
        for module in blank.modules():
            vars(module).pop("forward", None)
        with observe(blank, see, layers=names):
            blank(**tree_map_only(Tensor, like, example))

    example: dict[str, Any] | None = None
    with suppress(Exception), torch.no_grad(), torch.device("meta"), _Selecting():
        if (example := facts_of(model).example(model, target)) is not None:
            evaluate(example, "meta")
        return sizes
    with suppress(Exception), torch.no_grad():  # no autocast knows "meta", which Mochi asks for
        from torch._subclasses.fake_tensor import FakeTensorMode  # loads slowly

        with FakeTensorMode(), _Selecting():
            evaluate(example or {}, "cpu")
        return sizes
    return {}


def _as_torch_has_it(layer: ModulatedLayer, device: str) -> nn.Module:
    """The torch layer of a modulated one, packed or not, with parameters whose values mean nothing."""
    kind = next(kind for kind in type(layer).__mro__ if not issubclass(kind, ModulatedLayer))
    quantized, bias = layer.quantized_weight, layer.bias
    empty = partial(torch.empty, dtype=getattr(quantized, "dtype", layer.operator.weight.dtype), device=device)
    tensors = {"weight": turned(empty(layer.weight_shape), quantized.transposed),
               "bias": None if bias is None else empty(bias.shape)}  # fmt: skip
    parameters = {name: None if x is None else nn.Parameter(x, False) for name, x in tensors.items()}
    plain: Any = kind.__new__(kind)
    vars(plain).update(vars(layer) | {"_parameters": parameters, "_buffers": {}, "_modules": {}})
    return plain


class _Selecting(TorchFunctionMode):
    """Masks without values select all: what Mochi does with the words of a prompt."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nonzero:
            return args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.long)
        return func(*args, **kwargs or {})


def _bytes(layer: ModulatedLayer, numbers: int) -> int:
    if layer.inputs is None:
        return 0
    states = predictor_named(layer.loop.modulation.predictor).past_states
    return getattr(torch, layer.loop.state_dtype).itemsize * states * numbers


def expected_states(model: nn.Module, layers: Mapping[str, ModulatedLayer], target: Any) -> int:
    """Bytes of all states of one trajectory, before it runs; 0 where they are not known. Shared states count once."""
    total, counted = 0, set[tuple[int, int]]()
    for name, (reads, writes, source) in state_elements(model, layers, target).items():
        key = id(layers[name].inputs), id(source)
        total += _bytes(layers[name], writes + (0 if key in counted else reads))
        counted.add(key)
    return total


def plain_to_fit(
    models: Mapping[nn.Module, Report], budget: int, target: Any, errors: Mapping[str, float]
) -> dict[str, LayerConfig]:
    """Layers to run plain so that the states of the others fit into `budget` bytes, with the configs to run them with.

    Those keep states that would cost most error without, a byte. errors: of each layer (`errors_if_plain`); the same
    for all where there are none, so that the smallest states stay. States that layers may share count for each.
    Raises: ConfigError for a network whose sizes are not known before it runs.
    """
    costs: list[tuple[int, str, LayerConfig]] = []
    for model, report in models.items():
        configs = {entry.name: entry.config for entry in report.taken if entry.config is not None}
        elements = state_elements(model, configs, target)
        why = "Its inputs are not known before it runs. Choose layers with exclude=, or give it a Host with `example`."
        check("state_memory", type(model).__name__, bool(elements), "networks of known input sizes", why)
        modules, clock = modules_of(model), Clock("apply")
        layers = {name: modulated_layer(modules[name], configs[name], name, clock) for name in elements}
        costs += [(_bytes(layer, sum(elements[n][:2])), n, configs[n]) for n, layer in layers.items()]
    plain: dict[str, LayerConfig] = {}
    for size, name, config in sorted(costs, key=lambda cost: -_saved(cost, errors)):
        if size <= budget:
            budget -= size
        else:
            plain[name] = plain_layer(config)
    return plain


def _saved(cost: tuple[int, str, LayerConfig], errors: Mapping[str, float]) -> float:
    size, name, _ = cost
    return math.inf if size == 0 else (errors.get(name, 0.0) if errors else 1.0) / size


def warn_of_states(models: Sequence[nn.Module], report: Report) -> None:
    """Warn where the states that the report expects exceed the memory that is free."""
    expected = report.memory.expected if report.memory else 0
    free = _free(next(models[0].parameters()).device) if expected else None
    if free is not None and expected > free:
        name, sizes = type(models[0]).__name__, [f"{size / 2**30:.1f} GiB" for size in (expected, free)]
        warn_once(
            f"states of {name}: {expected}",
            f"apply: expected states that fit into {sizes[1]}, which are free, got about {sizes[0]} for one generation "
            f"of {name}. Give apply(..., state_memory='4GiB'), or run on integers, whose states take 2 bytes a number.",
        )


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return None


def clone(target: Any) -> Any:
    """A copy that shares all weights and has states of its own: one for each request that runs at the same time.

    Of a pipeline or a module, with modiff on it or without. Cost: no weight is copied; each running copy has states.
    """
    holders = [target] if isinstance(target, nn.Module) else vars(target).values()
    memo: dict[int, Any] = {}
    networks = [module for module in holders if isinstance(module, nn.Module)]
    for network in networks:
        for tensor in (*network.parameters(), *network.buffers()):
            memo[id(tensor)] = tensor
        attachment = attachment_of(network)
        for layer in () if attachment is None else attachment.layers.values():
            for shared in (*_tensors(vars(layer.quantized_weight)), *vars(layer.loop).get("_kernels", ())):
                memo[id(shared)] = shared
            memo[id(layer.loop.memories)] = {}
            if layer.inputs is not None:
                memo[id(layer.inputs.states)] = []
    copied = copy.deepcopy(target, memo)
    for module in [copied] if isinstance(copied, nn.Module) else vars(copied).values():
        attachment = attachment_of(module) if isinstance(module, nn.Module) else None
        if attachment is not None:
            attachment.clock.stop()
            if attachment.automatic is not None:
                attachment.automatic.end()
    return copied


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)
