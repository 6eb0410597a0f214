"""Replace a model's layers by modulated ones that share their parameters, and undo it."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from modiff.config import ModiffConfig
from modiff.errors import StateError
from modiff.model.attach import ATTRIBUTE, Attachment, check_plain, required_attachment
from modiff.model.attention import apply_attention, quantized_attention, remove_attention
from modiff.model.report import Report
from modiff.model.roles import Roles, warn_unfit
from modiff.model.select import modulated_layer, select_layers, share_inputs
from modiff.model.trajectory import expected_states
from modiff.nn import Clock
from modiff.nn.adapters import modules_of, replace_modules


def install(
    model: nn.Module,
    config: ModiffConfig,
    *,
    splits: Mapping[str, int] | None = None,
    known: Collection[str] = (),
    reasons: Mapping[str, str] | None = None,
    target: Any = None,
) -> Report:
    """Replace the layers that `select_layers` selects in place; they share the parameters of the originals.

    target: a pipeline of the model or the model itself, which tells how much memory its states will take.
    Raises: StateError if the model carries modiff already; ConfigError as `select_layers`. Whatever is raised, also
        KeyboardInterrupt, leaves the model as it was.
    """
    check_plain(model, "apply", "Applying twice would lose the originals. Call modiff.remove(model) first.")
    report = select_layers(model, config, splits=splits, known=known)
    if reasons:
        report = Report(tuple(dataclasses.replace(e, reason=reasons.get(e.name, e.reason)) for e in report.entries))
    return replace_layers(model, config, report, splits or {}, target).report


def replace_layers(
    model: nn.Module, config: ModiffConfig, report: Report, splits: Mapping[str, int], target: Any = None
) -> Attachment:
    """Replace the layers that `report` takes, and watch the model. Raises: as `install`."""
    attachment, modules = Attachment(Clock(type(model).__name__), report, config), modules_of(model)
    for entry in report.entries:
        if entry.config is not None:
            original = attachment.originals[entry.name] = modules[entry.name]
            split = splits.get(entry.name) if config.split_shortcuts == "auto" else None
            layer = modulated_layer(original, entry.config, entry.name, attachment.clock, split)
            attachment.layers[entry.name] = layer
    notes = share_inputs(attachment.layers) if config.share_residuals == "auto" else {}
    groups = dict.fromkeys(layer.inputs for layer in attachment.layers.values())
    for turn, inputs in enumerate(filter(None, groups)):
        inputs.turn = turn
    entries = tuple(dataclasses.replace(e, reason=", ".join(filter(None, [e.reason, notes.get(e.name, "")])))
                    for e in report.entries)  # fmt: skip
    attachment.selected = Report(entries)
    attachment.roles = Roles(config, attachment.selected)
    attachment.expected_states = expected_states(model, attachment.layers, target)
    try:  # only now is the model touched
        replace_modules(model, {attachment.originals[name]: layer for name, layer in attachment.layers.items()})
        attachment.watch(model)
        model.__dict__[ATTRIBUTE] = attachment
        apply_attention(model, config.attention)
    except BaseException:  # an interrupt too must not leave half of the layers replaced
        _undo(model, attachment)
        raise
    return attachment


def uninstall(model: nn.Module) -> None:
    """Put the original layers back, where no other stands now: the same modules and bits. Raises: `check_removable`."""
    check_removable(model)
    attachment = required_attachment(model, "remove")
    for name, original in attachment.originals.items():
        layer = attachment.layers[name]
        original.train(layer.training)
        if parametrize.is_parametrized(layer) and layer._modules is original._modules:  # since `apply`
            original.__class__ = type(type(layer).__name__, (type(original),), dict(vars(type(layer))))
    _undo(model, attachment)


def leave_unfit(model: nn.Module, verb: str) -> None:
    """Put back layers that the first trajectory showed to need their floats, unless that leaves none, and say so."""
    attachment = required_attachment(model, verb)
    unfit = {name: why for name, why in attachment.unfit.items() if name in attachment.originals}
    if unfit and len(unfit) < len(attachment.layers):
        news = {attachment.layers.pop(name): attachment.originals.pop(name) for name in unfit}
        replace_modules(model, news)
        entries = attachment.selected.entries
        left = (dataclasses.replace(e, config=None, reason=unfit[e.name]) if e.name in unfit else e for e in entries)
        attachment.selected, attachment.unfit = Report(tuple(left)), {}
        warn_unfit(verb, unfit, "They run in full precision now.")


def check_removable(model: nn.Module) -> None:
    """Raise the StateError of a model that is plain or packed, or whose layers another library wrapped since."""
    attachment = required_attachment(model, "remove")
    if attachment.packed:
        raise StateError(
            f"remove: expected float weights to put back, got {type(model).__name__} with packed ones. Packing keeps "
            "the integers alone. Load the full-precision model again."
        )
    modules = modules_of(model)
    wrapped = [name for name, layer in attachment.layers.items() if "forward" in vars(layer)]
    wrapped += [n for n, q in quantized_attention(model).items() if not q.attached(modules.get(n, model))]
    if wrapped:
        raise StateError(
            f"remove: expected {wrapped[0]} as modiff left it, got it wrapped by another library. Putting the original "
            "back would drop an offloading hook. Undo that first (remove_all_hooks)."
        )


def _undo(model: nn.Module, attachment: Attachment) -> None:
    remove_attention(model)
    for handle in attachment.handles:
        handle.remove()
    attachment.clock.stop()
    replace_modules(model, {attachment.layers[name]: original for name, original in attachment.originals.items()})
    model.__dict__.pop(ATTRIBUTE, None)
