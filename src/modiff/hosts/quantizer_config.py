"""The `quantization_config` of diffusers: what a user gives to `from_pretrained`, and what config.json keeps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from modiff.checkpoint.layout import METHOD, Layout
from modiff.config import ModiffConfig
from modiff.errors import ConfigError


class Method(StrEnum):
    """diffusers asks a quantization method for its `.value`."""

    MODIFF = METHOD


@dataclass(init=False, repr=False, eq=False)
class ModiffDiffusersConfig(QuantizationConfigMixin):
    """Quantize a model while diffusers loads it: `Model.from_pretrained(folder, quantization_config=...)`.

    For a pipeline, `PipelineQuantizationConfig(quant_mapping={"unet": ModiffDiffusersConfig(...)})`. Importing this
    class lets diffusers read folders that hold models of modiff, too.

    Args:
        config: layers, bits and modulation; W8A8 when None. A dictionary from `ModiffConfig.to_dict()` will do.
        modules_to_not_convert: parts of layer names that are left in full precision, added to `config.exclude`.
    Raises: ConfigError for settings that mean nothing.
    """

    def __init__(
        self, config: ModiffConfig | dict[str, Any] | None = None, modules_to_not_convert: list[str] | None = None
    ) -> None:
        config = ModiffConfig() if config is None else config
        config = ModiffConfig.from_dict(config) if isinstance(config, dict) else config
        if not isinstance(config, ModiffConfig):
            raise ConfigError(f"ModiffDiffusersConfig.config: expected a ModiffConfig, got {config!r}. It says which "
                              "layers get which bits. Use modiff.presets.w8a8().")  # fmt: skip
        self.quant_method: Any = Method.MODIFF
        self.config = config
        self.modules_to_not_convert = list(modules_to_not_convert or [])
        self.layout: Layout | None = None
        self._model: nn.Module | None = None

    @property
    def chosen(self) -> ModiffConfig:
        """The settings with `modules_to_not_convert` among the exclusions."""
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
        if set(config_dict) <= {"quant_method", "config", "modules_to_not_convert"}:  # of a user, not of a checkpoint
            config = cls(config_dict.get("config"), config_dict.get("modules_to_not_convert"))
        else:
            layout = Layout.from_dict("quantization_config", config_dict)
            config = cls(layout.config)
            config.layout = layout
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: the settings alone, or with the layers once a model is quantized."""
        layout = Layout.of(self._model) if self._model is not None else self.layout
        if layout is not None:
            return layout.to_dict()
        return {
            "quant_method": self.quant_method.value,
            "config": self.config.to_dict(),
            "modules_to_not_convert": list(self.modules_to_not_convert),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`, settings that are the default left out."""
        values, default = self.to_dict(), type(self)().to_dict()
        return {k: v for k, v in values.items() if k == "quant_method" or v != default.get(k)}

    def to_json_string(self, use_diff: bool = True) -> str:
        """The dictionary as indented JSON."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __iter__(self) -> Generator[tuple[str, Any], Any, None]:
        yield from self.to_dict().items()

    def __repr__(self) -> str:
        layers = "" if self._model is None and self.layout is None else f", {len(self.to_dict()['layers'])} layers"
        return f"{type(self).__name__}({self.config!r}{layers})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModiffDiffusersConfig) and self.to_dict() == other.to_dict()
