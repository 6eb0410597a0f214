"""The life of the states: one generation, first step to last; the memory they take; copies that share all but them."""

import copy
import logging
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from modiff.config import LayerConfig, check
from modiff.core.jumps import thinned
from modiff.core.predictors import predictor_named
from modiff.errors import ConfigError, StateError, warn_once
from modiff.model.attach import ATTRIBUTE, attachment_of, required_attachment
from modiff.model.facts import facts_of
from modiff.model.observe import observe
from modiff.model.probe import plain_layer
from modiff.model.report import Report
from modiff.model.select import modulated_layer, share_inputs
from modiff.nn import Clock, ModulatedLayer
from modiff.nn.adapters import modules_of, torch_layer
from modiff.nn.loop.integer import IntegerLoop
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


Shapes = dict[str, tuple[list[Tensor], int]]
"""Of layers by name: what each reads in one step, without values, and how many numbers it writes."""


def shapes_of(model: nn.Module, names: Collection[str], target: Any) -> Shapes:
    """Of the first step of one generation: as `NetworkFacts.rehearsals` have it, or an evaluation of its `example`.

    {} where neither is known, or shapes depend on values.
    Cost: a copy of the modules without their tensors, and the Python of one step.
    """
    shapes: Shapes = {}

    def see(name: str, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        reads, writes = shapes.get(name, ([], 0))
        shapes[name] = [*reads, inputs[0]], writes + output.numel()

    def example() -> Iterator[tuple[nn.Module, Callable[[], object]]]:
        words = facts_of(model).example(model, target)
        if words is not None:
            blank, like, _ = without_values(model, [model])
            yield blank, partial(blank, **tree_map_only(Tensor, like, words))

    for rehearsals in (partial(facts_of(model).rehearsals, model, target), example):
        with suppress(Exception), torch.no_grad(), torch.random.fork_rng([]), _silence():
            for blank, run in rehearsals():
                shapes.clear()
                with suppress(Exception), _Selecting(), observe(blank, see, layers=names):
                    run()
                    if shapes:
                        return shapes
    return {}


@contextmanager
def _silence() -> Iterator[None]:
    """Neither warnings nor messages in the body: what fails there is told by its result."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)


def without_values(target: Any, roots: Iterable[nn.Module], shared: Iterable[object] = ()) -> Any:
    """A copy whose modules have neither values nor hooks, what makes a tensor alike, and the copies by id.

    roots: all modules of the target. shared: what the copy has in common with it.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # tensors outside of the modules have values

    def like(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype)

    modules, over = [module for root in roots for module in root.modules()], list[tuple[int, str]]()
    copies: dict[int, Any] = {id(value): value for value in shared}
    copies |= {id(t): like(t) for module in modules for t in _tensors(vars(module))}
    for module in modules:
        copies |= {id(p): nn.Parameter(like(p), False) for p in module._parameters.values() if p is not None}
        for name, value in vars(module).items():
            if name in ("_forward_hooks", "_forward_pre_hooks"):
                copies[id(value)] = OrderedDict()
            elif name in _ATTACHED or (callable(value) and hasattr(type(module), name)):  # put over a method
                copies[id(value)] = None
                over.append((id(module), name))
        if isinstance(module, ModulatedLayer):
            copies[id(module)] = _as_torch_has_it(module, like)
    copied = copy.deepcopy(target, copies)
    for number, name in over:
        vars(copies[number]).pop(name, None)
    return copied, like, copies


def _as_torch_has_it(layer: ModulatedLayer, like: Callable[[Tensor], Tensor]) -> nn.Module:
    """The torch layer of a modulated one, packed or not, with parameters whose values mean nothing."""
    quantized, bias = layer.quantized_weight, layer.bias
    empty = partial(torch.empty, dtype=getattr(quantized, "dtype", layer.operator.weight.dtype), device="meta")
    tensors = {"weight": turned(like(empty(layer.weight_shape)), quantized.transposed),
               "bias": None if bias is None else like(empty(bias.shape))}  # fmt: skip
    return torch_layer(layer, tensors)


_ATTACHED = (ATTRIBUTE, "_hf_hook", "_diffusers_hook")
"""What hangs on modules: of modiff, of offloading and of guiders."""


class _Selecting(TorchFunctionMode):
    """Where tensors have no values, masks select all, as those of the words of a prompt, and conditions hold."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x, at = (*args, None, None)[:2]
        if not isinstance(x, FakeTensor):
            return func(*args, **kwargs or {})
        if func in _ONE:
            return _ONE[func]
        if func in (torch.nonzero, Tensor.nonzero) and not kwargs:
            return x.new_empty(x.numel(), x.dim(), dtype=torch.long)
        if func is Tensor.__getitem__ and isinstance(at, Tensor) and at.dtype == torch.bool:
            known = not isinstance(at, FakeTensor)
            return x[at.nonzero(as_tuple=True)] if known else x.new_empty(at.numel(), *x.shape[at.dim() :])
        return func(*args, **kwargs or {})


_ONE = {Tensor.__bool__: True, Tensor.item: 1, Tensor.__int__: 1, Tensor.__float__: 1.0}


def _bytes(layer: ModulatedLayer, reads: Iterable[Tensor], writes: int) -> int:
    """Of the states of these inputs and outputs, and of what is kept of anchors."""
    if layer.inputs is None:
        return 0
    states, numbers = predictor_named(layer.loop.modulation.predictor).past_states, sum(x.numel() for x in reads)
    anchors = sum(thinned(x, layer.spec.channel_dim).numel() for x in reads) if layer.spec.watches_anchor else 0
    return getattr(torch, layer.loop.state_dtype).itemsize * states * (numbers + writes) + 8 * anchors


def _uncounted(
    layer: ModulatedLayer, reads: Iterable[Tensor], counted: Collection[Any]
) -> dict[tuple[int, int], Tensor]:
    """The inputs whose states are not counted yet, each once."""
    inputs = {(id(layer.inputs), id(x)): x for x in reads}
    return {key: x for key, x in inputs.items() if key not in counted}


def expected_states(model: nn.Module, layers: Mapping[str, ModulatedLayer], target: Any) -> int | None:
    """Bytes of all states of one trajectory before it runs, shared ones once; None where they are not known."""
    if all(layer.inputs is None for layer in layers.values()):
        return 0
    shapes, total, counted = shapes_of(model, layers, target), 0, set[tuple[int, int]]()
    for name, (reads, writes) in shapes.items():
        inputs = _uncounted(layers[name], reads, counted)
        total, counted = total + _bytes(layers[name], inputs.values(), writes), counted | inputs.keys()
    return total if shapes else None


def plain_to_fit(
    models: Mapping[nn.Module, Report], budget: int, target: Any, errors: Mapping[str, float], *, share: bool
) -> dict[str, LayerConfig]:
    """Layers to run plain so that the states of the others fit into `budget` bytes, with the configs to run them with.

    Those keep states that would cost most error without, a byte. errors: of each layer (`errors_if_plain`); the same
    for all where there are none, so that the smallest states stay. share: layers that read one tensor have one state.
    Raises: ConfigError for a network whose sizes are not known before it runs.
    """
    costs, kept = list[tuple[int, ModulatedLayer, tuple[list[Tensor], int]]](), set[tuple[int, int]]()
    for model, report in models.items():
        configs = {entry.name: entry.config for entry in report.taken if entry.config is not None}
        shapes = shapes_of(model, configs, target)
        why = "Its inputs are not known before it runs. Choose layers with exclude=, or give it a Host with `example`."
        check("state_memory", type(model).__name__, bool(shapes), "networks of known input sizes", why)
        modules, clock = modules_of(model), Clock("apply")
        layers = {name: modulated_layer(modules[name], configs[name], name, clock) for name in shapes}
        if share:
            share_inputs(layers)
        costs += [(_bytes(layer, *shapes[name]), layer, shapes[name]) for name, layer in layers.items()]
    plain: dict[str, LayerConfig] = {}
    for _, layer, (reads, writes) in sorted(costs, key=lambda cost: -_saved(*cost[:2], errors)):
        inputs = _uncounted(layer, reads, kept)
        if (size := _bytes(layer, inputs.values(), writes)) <= budget:
            budget, kept = budget - size, kept | inputs.keys()
        else:
            plain[layer.name] = plain_layer(layer.config)
    return plain


def _saved(size: int, layer: ModulatedLayer, errors: Mapping[str, float]) -> float:
    return math.inf if size == 0 else (errors.get(layer.name, 0.0) if errors else 1.0) / size


def warn_of_states(models: Sequence[nn.Module], report: Report) -> None:
    """Warn where the states that the report expects exceed the memory that is free."""
    expected = (report.memory.expected if report.memory else None) or 0
    free = _free(next(models[0].parameters()).device) if expected else None
    if free is not None and expected > free:
        about = "at least" if report.memory and report.memory.at_least else "about"
        name, sizes = type(models[0]).__name__, [f"{size / 2**30:.1f} GiB" for size in (expected, free)]
        warn_once(
            f"states of {name}: {expected}",
            f"apply: expected states that fit into {sizes[1]}, which are free, got {about} {sizes[0]} for one "
            f"generation of {name}. Give apply(..., state_memory='4GiB'), or run on integers, whose states take 2 "
            "bytes a number.",
        )


def _free(device: torch.device) -> int | None:
    """Bytes; on CPUs the least of what the machine and the control groups of this process have, None where unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = list[int]()
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        for folder in _control_groups():
            with suppress(OSError, ValueError):  # "max": there is no limit
                numbers = dict(map(str.split, (folder / "memory.stat").read_text(encoding="ascii").splitlines()))
                cached = int(numbers.get("total_inactive_file", numbers.get("inactive_file", 0)))
                bounds = [int((folder / name).read_text(encoding="ascii")) for name in (limit, used)]
                free.append(max(0, bounds[0] - bounds[1] + cached))
    return min(free, default=None)


def _control_groups() -> Iterator[Path]:
    """Folders that may tell the limits of this process, of both versions; a container sees its own as the root."""
    root = Path("/sys/fs/cgroup")
    yield from (root, root / "memory")
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
            _, kind, path = line.split(":", 2)
            if kind in ("", "memory"):
                yield root / kind / path.lstrip("/")


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
            for shared in _made(layer):
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


def _made(layer: ModulatedLayer) -> Iterator[object]:
    """What a layer makes of its weight, now if it did not yet, so that no copy makes its own."""
    weight = layer.operator.parameters.get("weight")
    if weight is not None and not weight.is_meta:
        _ = layer.quantized_weight.refresh(weight), layer.loop.kernels if isinstance(layer.loop, IntegerLoop) else ()
    made = vars(layer.loop)
    yield from (*_tensors(vars(layer.quantized_weight)), *_tensors(made.get("_codes")), *made.get("_kernels", ()))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)
