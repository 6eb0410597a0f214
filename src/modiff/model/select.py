"""Choose the layers of a model: patterns, defaults, and a reason for each layer that is left."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from glob import escape
from typing import cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from modiff.config import LayerConfig, ModiffConfig, check
from modiff.core.granularity import granularity_named
from modiff.errors import ConfigError
from modiff.model.facts import ends_of, facts_of
from modiff.model.report import ADAPTER, PARAMETER, Entry, Report
from modiff.nn import Clock, ModulatedLayer, quantized_class
from modiff.nn.adapters import modules_of, walk

CANDIDATES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
END = "first or last layer"


def layer_names(models: Iterable[nn.Module]) -> set[str]:
    """Names of the Linear and Conv layers of some networks: what patterns may match."""
    return {name for model in models for name, m, _ in walk(model) if isinstance(m, CANDIDATES)}


def select_layers(
    model: nn.Module, config: ModiffConfig, *, splits: Mapping[str, int] | None = None, known: Collection[str] = ()
) -> Report:
    """Which layers of `model` the config takes, without changing anything, as `modiff.select`.

    known: layers of other networks that the config is for too; patterns may match those alone.
    Raises: ConfigError for a network that is a layer itself, a pattern that matches nothing, a damaged weight, or if
        nothing is taken.
    """
    if isinstance(model, CANDIDATES):
        raise ConfigError(
            f"apply: expected a network with layers inside, got a {type(model).__name__} itself. A layer is replaced "
            "in the module that holds it. Use nn.Sequential(layer)."
        )
    names: dict[nn.Module, list[str]] = {}  # a layer that stands in two places would be replaced in the first alone
    candidates = [(name, module, theirs) for name, module, theirs in walk(model) if isinstance(module, CANDIDATES)]
    for name, module, _ in candidates:
        check(name, type(module).__name__, not is_lazy(module.weight), "a layer with a weight",
              "It makes one from its first input. Evaluate the network once before modiff.apply.")  # fmt: skip
        names.setdefault(module, []).append(name)
    own, modules = [name for name, _, theirs in candidates if not theirs], modules_of(model)
    layers = {first: layer for layer, (first, *_) in names.items()}
    patterns = {"include": config.include, "exclude": config.exclude, "overrides": [p for p, _ in config.overrides]}
    check_patterns({f"ModiffConfig.{field}": patterns[field] for field in patterns}, [*layers, *known], "a layer")
    facts = facts_of(model)
    defaults = facts.default_exclude if config.default_exclude is None else config.default_exclude
    extended = dataclasses.replace(config, exclude=config.exclude + defaults)
    splits = splits or {}
    ends = ends_of(model, own)
    meant = [p for p in (*patterns["include"], *patterns["overrides"]) if not any(fnmatchcase(name, p) for name in own)]
    entries: list[Entry] = []
    for name, layer in layers.items():
        theirs = name not in own and not matches(name, meant)
        reason = ADAPTER if theirs else _reason_to_leave(name, layer, extended, ends.get(name, ""))
        reason = reason or ", ".join(f"is {other} too" for other in names[layer][1:])
        parent, _, leaf = name.rpartition(".")
        if not reason and leaf == "out_proj" and isinstance(modules.get(parent), nn.MultiheadAttention):
            reason = "MultiheadAttention reads its weight and never calls it"
        matching = [config.layer, *(its for pattern, its in config.overrides if fnmatchcase(name, pattern))]
        chosen = None if reason else matching[-1]
        notes = reason or _notes(layer, chosen, splits.get(name) if config.split_shortcuts == "auto" else None)
        entries.append(Entry(name, type(layer).__name__, layer.weight.numel(), chosen, notes))
    report = Report((*entries, *_other_matrices(model)))
    rules = Counter(entry.reason.partition(":")[0] for entry in entries)
    if rules["tiny"] and not report.taken and config.min_weights == ModiffConfig.min_weights:  # tiny network
        return select_layers(model, dataclasses.replace(config, min_weights=0), splits=splits, known=known)
    if not report.taken:
        why = "; ".join(f"{count} {rule}" for rule, count in rules.items()) or "it has no Linear or Conv layer"
        raise ConfigError(
            f"{type(model).__name__}: expected at least one layer to take, got none of {len(layers)}: {why}. Widen "
            f"include, narrow exclude or default_exclude, or lower min_weights.\n{report.table()}"
        )
    return report


def _other_matrices(model: nn.Module) -> list[Entry]:
    return [
        Entry(f"{prefix}.{name}".lstrip("."), PARAMETER + type(module).__name__, p.numel(), None, "no layer of its own")
        for prefix, module in model.named_modules()
        if not isinstance(module, (*CANDIDATES, nn.LayerNorm, parametrize.ParametrizationList))
        for name, p in module.named_parameters(recurse=False)
        if p.dim() > 1
    ]


def modulated_layer(
    layer: nn.Module, config: LayerConfig, name: str, clock: Clock, split: int | None = None
) -> ModulatedLayer:
    """The modulated layer that takes the place of one that `select_layers` takes."""
    kind = cast("type[ModulatedLayer]", quantized_class(layer))
    return kind.from_float(layer, config, name=name, clock=clock, split=split)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether any of the fnmatch patterns matches."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(patterns: Mapping[str, Iterable[str]], names: Sequence[str], what: str) -> None:
    """Raise the ConfigError of a field with a pattern that matches none of `names`: it was misspelled."""
    for field, its in patterns.items():
        for pattern in its:
            if names and not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"{field}: expected a pattern that matches {what}, got {pattern!r}. None has such a name. "
                    f"Known: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
                )


def _reason_to_leave(name: str, layer: nn.Module, config: ModiffConfig, end: str) -> str:
    weight = layer.weight
    if isinstance(layer, ModulatedLayer):
        return "taken by modiff already"
    if not matches(name, config.include):
        return "not included"
    for pattern in config.exclude:
        if fnmatchcase(name, pattern):
            return f"excluded by {pattern!r}"
    if quantized_class(layer) is None:
        return f"{type(layer).__name__} computes something else than its own linear map of its input"
    if "forward" in layer.__dict__:
        return "another library replaced its forward"
    named = {name, escape(name)} & {*config.include} or matches(name, (p for p, _ in config.overrides))
    if end and config.first_last == "full_precision" and not named:
        return f"{END} ({end})"
    if weight.numel() < config.min_weights and not named:
        return f"tiny: {weight.numel()} weights"
    if not torch.is_floating_point(weight):
        return f"weight is {weight.dtype}, not floating point"
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise ConfigError(
            f"{name}: expected finite weights, got NaN or infinity. The checkpoint is damaged, or float16 overflowed. "
            "Load it in float32, or exclude the layer."
        )
    return ""


def _notes(layer: nn.Module, config: LayerConfig | None, split: int | None) -> str:
    notes = [f"split at {split}"] if split else []
    granularity = "auto" if config is None or config.activation.bits is None else config.activation.granularity
    if granularity != "auto" and granularity_named(granularity).unsupported(tuple(getattr(layer, "kernel_size", ()))):
        notes.append(f"{granularity} scales: not executable on integers, for study only")
    return ", ".join(notes)


def group_of(name: str, layer: ModulatedLayer) -> tuple[object, ...] | None:
    """What layers that may share an input state have in common; None for a layer that shares none."""
    config = layer.config
    if layer.inputs is None or len(layer.spec.runs) > 1 or not config.activation.dynamic:
        return None
    return (name.rpartition(".")[0], type(layer), layer.spec.runs, config.activation, config.modulation,
            layer.spec.rotation, config.smoothing, layer.on_integers)  # fmt: skip


def share_inputs(layers: Mapping[str, ModulatedLayer]) -> dict[str, str]:
    """Group layers of one parent that could read one tensor (q, k, v; gate, up) with dynamic scales; notes by name."""
    leaders: dict[tuple[object, ...], ModulatedLayer] = {}
    notes: dict[str, str] = {}
    for name, layer in layers.items():
        key = group_of(name, layer)
        leader = layer if key is None else leaders.setdefault(key, layer)
        if leader is not layer:
            layer.share_with(leader)
            notes[name] = f"may share with {leader.name.rpartition('.')[2]}"
    return notes
