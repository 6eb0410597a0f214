"""What a quantized checkpoint holds besides its tensors: format version, config, and layers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import nn

from modiff.config import VERSION, LayerConfig, ModiffConfig, PackedAnchors
from modiff.errors import ConfigError, FormatError
from modiff.model.attach import required_attachment
from modiff.model.calibrate import quantizers_of

METHOD = "modiff"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Layer:
    """One quantized layer: its config, the channel that its input is split at, and what it keeps for anchors."""

    config: LayerConfig
    split: int | None = None
    anchor_weights: PackedAnchors = "quantized"


@dataclass(frozen=True)
class Layout:
    """Everything about a quantized model but its tensors; plain JSON in and out.

    layers: by module name. scales: names of the measured activation scales, by quantizer.
    largest_step: between timesteps, that scales of residuals were measured with; None where that is not known.
    """

    config: ModiffConfig
    layers: dict[str, Layer] = field(default_factory=dict)
    scales: dict[str, tuple[str, ...]] = field(default_factory=dict)
    largest_step: float | None = None

    @classmethod
    def of(cls, model: nn.Module, anchor_weights: PackedAnchors = "quantized") -> Self:
        """Of a model as it is now, floats packed with `anchor_weights`. Raises: StateError if modiff is not applied."""
        attachment = required_attachment(model, "save")
        layers = {
            name: Layer(layer.config, layer.spec.split, "int8" if layer.keeps_error(anchor_weights) else "quantized")
            for name, layer in attachment.layers.items()
        }
        scales = {name: tuple(sorted(q.state_dict_tensors())) for name, q in quantizers_of(model).items()}
        measured = {name: names for name, names in scales.items() if names}
        return cls(attachment.config, layers, measured, attachment.step_sizes.largest)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists; a layer names its config by its index in the list of different ones."""
        configs = list(dict.fromkeys(layer.config for layer in self.layers.values()))
        layers = {
            name: {"config": configs.index(layer.config)}
            | ({} if layer.split is None else {"split": layer.split})
            | ({"anchor_weights": "int8"} if layer.anchor_weights == "int8" else {})
            for name, layer in self.layers.items()
        }
        return {
            "quant_method": METHOD,
            "version": FORMAT_VERSION,
            "written_by": f"modiff {VERSION}",
            "config": self.config.to_dict(),
            "layer_configs": [c.to_dict() for c in configs],
            "layers": layers,
            "scales": {name: list(names) for name, names in self.scales.items()},
            "largest_step": self.largest_step,
        }

    @classmethod
    def from_dict(cls, where: str, values: object) -> Self:
        """Read what `to_dict` wrote. Raises: FormatError that names `where`, also for another format version."""
        values = _object(where, "quantization_config", values)
        if values.get("quant_method") != METHOD:
            raise FormatError(f"{where}: expected quant_method '{METHOD}', got {values.get('quant_method')!r}. Another "
                              "library quantized this model. Load it with that one.")  # fmt: skip
        if repr(values.get("version")) != repr(FORMAT_VERSION):  # True == 1 == 1.0
            raise FormatError(
                f"{where}: expected format version {FORMAT_VERSION}, got {values.get('version')!r} written by "
                f"{values.get('written_by', 'an unknown program')!r}. Formats of other versions cannot be read. "
                "Quantize the model again with this version."
            )
        for name in ("config", "layer_configs", "layers", "scales"):
            if name not in values:
                raise misfit(where, "the field", f"no {name}")
        whole, kept = values["config"], values["layer_configs"]
        if isinstance(whole, dict) and "layer" in whole:
            whole = whole | {"layer": _with_anchors(whole["layer"])}
        try:
            config = ModiffConfig.from_dict(whole)
            configs = [LayerConfig.from_dict(_with_anchors(c)) for c in (kept if isinstance(kept, list) else [kept])]
        except (ConfigError, TypeError) as error:
            raise FormatError(f"{where}: expected the settings of modiff, got: {error}") from error
        entries = _object(where, "layers", values["layers"])
        layers = {name: _layer(where, name, entry, configs) for name, entry in entries.items()}
        if config.split_shortcuts == "off" and (cut := [name for name, layer in layers.items() if layer.split]):
            raise misfit(where, "layers that are not split, as split_shortcuts is off", f"{cut[0]} split")
        scales = _object(where, "scales", values["scales"])
        for name, names in scales.items():
            if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
                raise misfit(where, f"names of scales for {name}", names)
        largest = values.get("largest_step")
        if isinstance(largest, bool) or not isinstance(largest, int | float | None) or (largest or 0) < 0:
            raise misfit(where, "a difference of timesteps as largest_step", repr(largest))
        return cls(config, layers, {name: tuple(names) for name, names in scales.items()}, largest)


def _layer(where: str, name: str, entry: object, configs: list[LayerConfig]) -> Layer:
    values = _object(where, f"layers.{name}", entry)
    index, split = values.get("config"), values.get("split")
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(configs):
        raise misfit(where, f"the number of one of {len(configs)} layer configs for {name}", index)
    if split is not None and (isinstance(split, bool) or not isinstance(split, int)):
        raise misfit(where, f"a channel to split {name} at", split)
    anchor, config = values.get("anchor_weights", "quantized"), configs[index]
    loop = config.modulation
    exact = loop is not None and loop.anchor_weights == "exact" and loop.first_step == "full_precision"
    if anchor not in ("quantized", "int8"):
        raise misfit(where, f"'quantized' or 'int8' as anchor_weights of {name}", repr(anchor))
    if anchor == "int8" and (config.weight.bits is None or config.activation.bits is None or not exact):
        raise misfit(where, f"no anchor codes for {name}, as its config has no use for them", "int8")
    return Layer(config, split, anchor)


def _with_anchors(layer: Any) -> Any:
    loop = layer.get("modulation") if isinstance(layer, dict) else None
    if not isinstance(loop, dict):
        return layer
    return layer | {"modulation": {"anchor_weights": "quantized", "stagger": False} | loop}


def _object(where: str, name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise misfit(where, f"an object {name}", type(value).__name__)
    return value


def misfit(where: str | Path, expected: str, got: object) -> FormatError:
    """The error of a config and weights that contradict each other, or that mean nothing."""
    return FormatError(
        f"{where}: expected {expected}, got {got}. The config or the weights are damaged, or belong to another model. "
        "Copy the folder again."
    )
