"""modiff as a quantization method of diffusers: `from_pretrained` quantizes or reads, `save_pretrained` writes."""

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from modiff.checkpoint.layout import METHOD, Layout
from modiff.checkpoint.tensors import (
    METADATA,
    check_bare,
    check_files,
    check_values,
    load_scales,
    quantized_state,
    read_headers,
    rebuild_from,
    scale_keys,
)
from modiff.config import ModiffConfig, PackedAnchors, check
from modiff.errors import ConfigError, FormatError, StateError
from modiff.hosts.diffusers.hooks import follow, guard_packed
from modiff.hosts.names import shortcut_splits
from modiff.model.apply import install
from modiff.model.attach import required_attachment
from modiff.model.pack import seal
from modiff.nn.weight import ERROR_SCALE, PACKED, SCALE
from modiff.presets import AnyConfig, as_config

WHERE = "quantization_config"
_ALIGNMENT = 64
_SETTINGS = {"quant_method", "config", "modules_to_not_convert", "anchor_weights"}
"""The entries of a config that a user gave, not a checkpoint."""


class _Method(StrEnum):
    """diffusers asks a quantization method for its `.value`."""

    MODIFF = METHOD


@dataclass(init=False, repr=False, eq=False)
class ModiffDiffusersConfig(QuantizationConfigMixin):
    """Quantize a model while diffusers loads it: `Model.from_pretrained(folder, quantization_config=...)`.

    For a pipeline, `PipelineQuantizationConfig(quant_mapping={"unet": ModiffDiffusersConfig(...)})`. Importing this
    class lets diffusers read folders that hold models of modiff, too.

    Args:
        config: as `modiff.apply` takes it.
        modules_to_not_convert: parts of layer names that are left in full precision, added to `config.exclude`.
        anchor_weights: what is kept of each weight for anchors, as `modiff.pack` has it.
    Raises: ConfigError for settings that mean nothing.
    """

    def __init__(
        self,
        config: AnyConfig | None = None,
        modules_to_not_convert: list[str] | None = None,
        anchor_weights: PackedAnchors = "quantized",
    ) -> None:
        check("ModiffDiffusersConfig.anchor_weights", anchor_weights, anchor_weights in ("quantized", "int8"),
              "'quantized' or 'int8'", "It says what is kept of a weight for anchors.")  # fmt: skip
        self.quant_method: Any = _Method.MODIFF
        self.anchor_weights: PackedAnchors = anchor_weights
        self.config = as_config(config)
        self.modules_to_not_convert = list(modules_to_not_convert or [])
        self.layout: Layout | None = None
        self._model: nn.Module | None = None

    @property
    def chosen(self) -> ModiffConfig:
        """The settings with `modules_to_not_convert` among the exclusions."""
        if not self.modules_to_not_convert:
            return self.config
        left = tuple(f"*{part}*" for part in self.modules_to_not_convert)
        return dataclasses.replace(self.config, exclude=self.config.exclude + left)

    @classmethod
    def of_model(cls, model: nn.Module) -> Self:
        """The config of a model with modulated layers; it follows what happens to the model later."""
        config = cls(Layout.of(model).config)
        config._model = model
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read the entry of a config.json. Raises: FormatError if this version of modiff cannot."""
        if set(config_dict) <= _SETTINGS:  # of a user, not of a checkpoint
            config = cls(**{key: value for key, value in config_dict.items() if key != "quant_method"})
        else:
            layout = Layout.from_dict("quantization_config", config_dict)
            config = cls(layout.config)
            config.layout = layout
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: the settings alone, or with the layers once a model is quantized."""
        layout = Layout.of(self._model, self.anchor_weights) if self._model is not None else self.layout
        if layout is not None:
            return layout.to_dict()
        return {
            "quant_method": self.quant_method.value,
            "config": self.config.to_dict(),
            "modules_to_not_convert": list(self.modules_to_not_convert),
            "anchor_weights": self.anchor_weights,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`, settings that are the default left out."""
        values, default = self.to_dict(), type(self)().to_dict()
        return {k: v for k, v in values.items() if k == "quant_method" or v != default.get(k)}

    def __iter__(self) -> Generator[tuple[str, Any], Any, None]:
        yield from self.to_dict().items()

    def __repr__(self) -> str:
        layers = "" if self._model is None and self.layout is None else f", {len(self.to_dict()['layers'])} layers"
        return f"{type(self).__name__}({self.config!r}{layers})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModiffDiffusersConfig) and self.to_dict() == other.to_dict()


class ModiffQuantizer(DiffusersQuantizer):
    """What diffusers calls while it loads or saves a model of modiff.

    On the fly, each weight is quantized and packed as it is read. From a quantized folder, packed layers are put into
    the empty model first. Either way the model begins trajectories by itself.
    """

    use_keep_in_fp32_modules = True
    quantization_config: ModiffDiffusersConfig

    def __init__(self, quantization_config: ModiffDiffusersConfig, *, pre_quantized: bool = True) -> None:
        super().__init__(quantization_config, pre_quantized=pre_quantized)
        self.modules_to_not_convert = quantization_config.modules_to_not_convert
        self.model: nn.Module | None = None
        self._files: list[str] = []
        self._exact: dict[str, Tensor] = {}

    is_serializable = property(lambda self: True)
    is_trainable = property(lambda self: False)
    is_compileable = property(lambda self: False)

    def validate_environment(
        self, torch_dtype: torch.dtype | None = None, device_map: object = None, **_: object
    ) -> None:
        """Refuse what would bypass the quantizer. Raises: ConfigError."""
        if torch_dtype not in (None, torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise ConfigError(f"from_pretrained: expected dtype float32, float16 or bfloat16, got {torch_dtype}. Norms "
                              "and biases are computed in it. Use torch.bfloat16.")  # fmt: skip
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ConfigError("from_pretrained: expected a device_map without 'disk', got one with it. Weights on disk "
                              "never meet the quantizer. Use enable_group_offload.")  # fmt: skip

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Note the files, to look at their headers; measured scales of activations are not the model's to load."""
        self._files = [str(file) for file in checkpoint_files]
        layout = self.quantization_config.layout
        if self.pre_quantized and layout is None:
            raise FormatError(f"{WHERE}: expected the layers of a quantized model, got settings alone. The config was "
                              "changed. Copy the folder again.")  # fmt: skip
        return loaded_keys if layout is None else [key for key in loaded_keys if key not in scale_keys(layout)]

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Keep what must not be cast to the model's dtype: scales are float32 whatever the model is in."""
        layout = self.quantization_config.layout
        if layout is None:
            return state_dict
        scales = scale_keys(layout)
        exact = {k: v for k, v in state_dict.items() if k in scales or k.rpartition(".")[2] in (SCALE, ERROR_SCALE)}
        self._exact |= exact
        return {k: v for k, v in state_dict.items() if k not in scales}

    def _process_model_before_weight_loading(self, model: ModelMixin, **_: object) -> None:
        if self.quantization_config.layout is None:
            install(model, self.quantization_config.chosen, splits=shortcut_splits(model))
            return
        pickled = [file for file in self._files if not file.endswith(".safetensors")]
        if pickled:
            raise FormatError(f"{pickled[0]}: expected safetensors, got another format. modiff writes no pickles. Copy "
                              "the folder again.")  # fmt: skip
        check_files(WHERE, read_headers(self._files), self.quantization_config.layout, model)
        rebuild_from(WHERE, model, self.quantization_config.layout)

    def check_if_quantized_param(
        self, model: ModelMixin, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **_: object
    ) -> bool:
        """Whether a tensor belongs to a weight that is, or is to be, packed."""
        name, _, leaf = param_name.rpartition(".")
        quantized = required_attachment(model, "from_pretrained").layers.get(name)
        return quantized is not None and quantized.config.weight.bits is not None and leaf in PACKED

    def create_quantized_param(
        self,
        model: ModelMixin,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **_: object,
    ) -> None:
        """Take one tensor of a packed weight, or quantize a float one; a copy, as the file may change later."""
        name, _, leaf = param_name.rpartition(".")
        quantized = required_attachment(model, "from_pretrained").layers[name]
        value = self._exact.pop(param_name, param_value).to(target_device, copy=True)
        if self.quantization_config.layout is None:
            quantized.weight = nn.Parameter(value, requires_grad=False)
            quantized.pack(self.quantization_config.anchor_weights)
        elif leaf == "weight":
            quantized.weight = nn.Parameter(value, requires_grad=False)
        else:
            setattr(quantized, leaf, value)

    def _process_model_after_weight_loading(self, model: ModelMixin, **_: object) -> ModelMixin:
        """Check what was read, give the quantizers their scales, and let the model live without verbs of modiff."""
        attachment, layout = required_attachment(model, "from_pretrained"), self.quantization_config.layout
        check_values(WHERE, attachment)
        if layout is not None:
            load_scales(WHERE, model, layout, {k: v.clone() for k, v in self._exact.items()})
        self._exact.clear()
        seal(attachment)
        align(model)
        follow(model)
        guard_packed(model)
        self.model, self.quantization_config = model, ModiffDiffusersConfig.of_model(model)
        model.register_to_config(quantization_config=self.quantization_config)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Packed weights instead of floats. Raises: ConfigError for pickles; StateError as `modiff.save`."""
        if not safe_serialization:
            raise ConfigError("save_pretrained: expected safe_serialization=True, got False. modiff writes safetensors "
                              "only, never pickles. Leave it out.")  # fmt: skip
        if self.model is None:
            return state_dict, {}
        return quantized_state(self.model, state_dict, self.quantization_config.anchor_weights), METADATA


@contextmanager
def saving_quantized(models: Sequence[nn.Module], anchor_weights: PackedAnchors) -> Iterator[None]:
    """Let `save_pretrained` of diffusers models with modulated layers keep these anchors while the body runs."""
    for model in models:
        check_bare(model)  # one that PEFT returned is saved by PEFT
        if not isinstance(getattr(model, "hf_quantizer", None), ModiffQuantizer):
            raise StateError(f"save: expected a model that modiff alone quantized, got {type(model).__name__} with "
                             "another method as well. Two formats do not mix. Load it without.")  # fmt: skip
    configs = [model.hf_quantizer.quantization_config for model in models]
    before = [config.anchor_weights for config in configs]
    try:
        for config in configs:
            config.anchor_weights = anchor_weights
        yield
    finally:
        for config, was in zip(configs, before, strict=True):
            config.anchor_weights = was


def offer_quantizer(model: nn.Module) -> None:
    """Let `save_pretrained` of a diffusers model write integers, unless another method quantized it."""
    if isinstance(model, ModelMixin) and getattr(model, "hf_quantizer", None) is None:
        _enter(model)


def withdraw_quantizer(model: nn.Module) -> None:
    """Undo `offer_quantizer`: the model saves its floats again. Nothing happens where there is nothing to undo."""
    if isinstance(getattr(model, "hf_quantizer", None), ModiffQuantizer):
        del model.hf_quantizer
        _configure(model, {key: value for key, value in model._internal_dict.items() if key != WHERE})


def attach_quantizer(model: nn.Module) -> None:
    """Tell diffusers that its model is packed: it refuses `.half()`, `.float()` and `.to(dtype)` from now on."""
    if isinstance(model, ModelMixin):
        _enter(model)
        model.is_quantized, model.quantization_method = True, _Method.MODIFF
        guard_packed(model)


def _enter(model: ModelMixin) -> None:
    quantizer = ModiffQuantizer(ModiffDiffusersConfig.of_model(model), pre_quantized=False)
    quantizer.model = model
    model.hf_quantizer = quantizer
    _configure(model, {**model._internal_dict, WHERE: quantizer.quantization_config})


def _configure(model: Any, entries: dict[str, Any]) -> None:
    old, new = model._internal_dict, FrozenDict(entries)
    vars(new).update({key: value for key, value in vars(old).items() if key in entries and value is not old[key]})
    model._internal_dict = new


def align(model: nn.Module) -> None:
    """Copy parameters that are views of a file: CPU kernels sum in another order where memory is not aligned."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()


def enter_tables() -> None:
    """Let `from_pretrained` read modiff's format: two entries in diffusers' tables of quantization methods.

    diffusers has no other way to add a method. It happens when modiff meets the first object of diffusers, or when
    `modiff.ModiffDiffusersConfig` is imported.
    """
    quantizers: dict[str, Any] = auto.AUTO_QUANTIZER_MAPPING
    configs: dict[str, Any] = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    quantizers[_Method.MODIFF.value], configs[_Method.MODIFF.value] = ModiffQuantizer, ModiffDiffusersConfig
