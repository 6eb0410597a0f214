"""The temporal block of a U-Net: what depends on the time step alone (TFMQ-DM, section 5.5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modiff.errors import ConfigError

PROJECTION = "time_emb_proj"


class TemporalBlock:
    """The time MLP and the projection of its output in each residual block, as one function of the time step.

    Raises: ConfigError if the network is no U-Net of diffusers, or its embedding depends on more than the time step.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.projections = tuple(n for n, _ in model.named_modules() if n.rpartition(".")[2] == PROJECTION)
        known = all(isinstance(getattr(model, part, None), nn.Module) for part in ("time_proj", "time_embedding"))
        if not known or not self.projections:
            raise ConfigError(
                f"{type(model).__name__}: expected a U-Net with time_embedding and {PROJECTION} layers, got none. "
                "TFMQ-DM reconstructs the layers that read the time step alone. Use another method for transformers."
            )
        for part in ("class_embedding", "add_embedding"):
            if getattr(model, part, None) is not None:
                raise ConfigError(
                    f"{type(model).__name__}: expected an embedding of the time step alone, got one with {part}. Its "
                    "temporal features are no finite set. Use another method for this network."
                )

    @property
    def mlp(self) -> tuple[str, ...]:
        """Names of the linear layers of the time MLP."""
        inside = self.model.time_embedding.named_modules(prefix="time_embedding")
        return tuple(name for name, module in inside if isinstance(module, nn.Linear))

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all layers of the block, in the order they run."""
        return self.mlp + self.projections

    def __call__(self, timesteps: Tensor) -> tuple[Tensor, ...]:
        """The projected temporal features (n, C_i) of each residual block, for time steps (n,)."""
        weight = self.model.get_submodule(self.projections[0]).weight
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        embedded = self.model.time_embedding(self.model.time_proj(timesteps).to(dtype))
        if getattr(self.model, "time_embed_act", None) is not None:
            embedded = self.model.time_embed_act(embedded)
        return tuple(self._project(name, embedded) for name in self.projections)

    def _project(self, name: str, embedded: Tensor) -> Tensor:
        resnet = self.model.get_submodule(name.rpartition(".")[0])
        return getattr(resnet, PROJECTION)(embedded if resnet.skip_time_act else resnet.nonlinearity(embedded))
