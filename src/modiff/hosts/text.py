"""Text models as hosts: networks that read tokens and return an object with `.logits`."""

import inspect
from typing import Any

import torch
from torch import nn

from modiff.hosts.host import Host
from modiff.model.attach import eager


def text_network(target: Any) -> nn.Module | None:
    """The network of a target that reads tokens: itself, or the `model` of a pipeline; None for other targets.

    It is known by its forward: `input_ids` come first, and no time steps.
    """
    network = target if isinstance(target, nn.Module) else getattr(target, "model", None)
    if not isinstance(network, nn.Module):
        return None
    network = eager(network)
    names = [*inspect.signature(network.forward).parameters]
    return network if names[:1] == ["input_ids"] and not any("timesteps" in name for name in names) else None


class TextHost(Host):
    """Every evaluation is a step, as there are no time steps; the layers after the table of tokens are quantized."""

    default_exclude = ("*head", "*head.*", "*pooler*")
    block_classes = ("*Block", "*Layer")
    reads_tokens = True

    def is_attention(self, module: nn.Module) -> bool:
        """The innermost modules of that name, as transformers has them."""
        named = [type(inner).__name__.endswith("Attention") for inner in module.modules()]
        return named[0] and sum(named) == 1

    def splits(self, network: nn.Module) -> dict[str, int]:
        """None: no U-Net."""
        return {}

    def example(self, network: nn.Module, target: Any = None) -> dict[str, Any] | None:
        """128 tokens, or as many as there are positions."""
        positions = getattr(getattr(network, "config", None), "max_position_embeddings", None) or 128
        return {"input_ids": torch.zeros(1, min(positions, 128), dtype=torch.long, device="meta")}
