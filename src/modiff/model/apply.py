"""Put modulated quantized_layers in the place of a model's layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from torch import nn

from modiff.config import ModiffConfig
from modiff.errors import StateError
from modiff.model.attach import ATTRIBUTE, Attachment, attachment_of
from modiff.model.attention import apply_attention
from modiff.model.remove import uninstall
from modiff.model.report import Entry, Report
from modiff.model.select import select_layers
from modiff.nn import Clock, ModulatedLayer, quantized_class


def install(
    model: nn.Module, config: ModiffConfig, *, splits: Mapping[str, int] | None = None, known: Collection[str] = ()
) -> Report:
    """Replace the selected layers of `model` in place by modulated quantized_layers that share their parameters.

    Args:
        splits: channel index of the concatenation, for layers whose input is one.
        known: layers of other networks that the config is for too; patterns may match those alone.
    Returns: what was taken, what was left, and why.
    Raises: StateError if the model carries modiff already; ConfigError as `select` does, the model then unchanged.
    Cost: one pass over the weights at the first forward.
    """
    if attachment_of(model) is not None:
        raise StateError(
            f"apply: expected a plain model, got {type(model).__name__} with modulated layers. Applying twice would "
            "lose the originals. Call modiff.remove(model) first."
        )
    return replace_layers(model, config, select_layers(model, config, splits=splits, known=known), splits or {}).report


def replace_layers(model: nn.Module, config: ModiffConfig, report: Report, splits: Mapping[str, int]) -> Attachment:
    """Put quantized_layers of the layers that `report` takes in their places, and watch the model. Raises: as
    `apply`."""
    attachment = Attachment(Clock(type(model).__name__), report, config)
    for entry in report.taken:
        split = splits.get(entry.name) if config.split_shortcuts == "auto" else None
        _build(model, entry, attachment, split)
    for name, quantized in attachment.layers.items():  # only now, so that an error above leaves the model as it was
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, quantized)
    notes = _share(attachment) if config.share_residuals == "auto" else {}
    groups = dict.fromkeys(layer.inputs for layer in attachment.layers.values() if layer.inputs is not None)
    for turn, inputs in enumerate(groups):
        inputs.turn = turn
    entries = tuple(dataclasses.replace(e, reason=", ".join(filter(None, [e.reason, notes.get(e.name, "")])))
                    for e in report.entries)  # fmt: skip
    attachment.report = Report(entries)
    attachment.watch(model)
    model.__dict__[ATTRIBUTE] = attachment
    try:
        apply_attention(model, config.attention)
    except Exception:
        uninstall(model)
        raise
    return attachment


def _build(model: nn.Module, entry: Entry, attachment: Attachment, split: int | None) -> None:
    original = model.get_submodule(entry.name)
    kind = quantized_class(original)
    if kind is None or entry.config is None:
        raise StateError(f"{entry.name}: expected a layer that select took, got {type(original).__name__}. The model "
                         "changed while modiff was applied. Apply again.")  # fmt: skip
    quantized = kind.from_float(original, entry.config, name=entry.name, clock=attachment.clock, split=split)
    attachment.originals[entry.name] = original
    attachment.layers[entry.name] = quantized


def _share(attachment: Attachment) -> dict[str, str]:
    """Group layers beside each other that could read one tensor (q, k, v; gate, up); what they really read decides.

    Static scales belong to one layer, so only dynamic ones are shared.
    """
    leaders: dict[tuple[object, ...], ModulatedLayer] = {}
    notes: dict[str, str] = {}
    for name, quantized in attachment.layers.items():
        if quantized.inputs is None or quantized.split is not None or not quantized.config.activation.dynamic:
            continue
        shared = (
            quantized.config.activation,
            quantized.config.modulation,
            quantized.segments,
            quantized.integer is not None,
        )
        key = (
            name.rpartition(".")[0],
            type(quantized),
            quantized.quantizer.segments if quantized.quantizer else None,
            *shared,
        )
        if key in leaders:
            quantized.share_with(leaders[key])
            notes[name] = f"may share with {leaders[key].name.rpartition('.')[2]}"
        else:
            leaders[key] = quantized
    return notes
