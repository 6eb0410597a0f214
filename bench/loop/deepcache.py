"""DeepCache (Ma et al. 2023), the part that matters: deep levels of a U-Net change slowly, so reuse them.

On every n-th step the whole U-Net runs, and the feature that enters its last up block is kept. On the others only the
shallowest level runs: conv_in, the first down block without its downsampler, the last up block on the kept feature,
and the output layers. Written again for UNet2DModel and UNet2DConditionModel because the published package cannot be
compiled, and an opponent that is not compiled would be slower than it need be.
"""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from modiff.errors import ConfigError

Call = Callable[..., Tensor]


class Slot:
    """Where the last up block leaves its input, or finds it."""

    feature: Tensor | None = None


class LastUpBlock(nn.Module):
    """The last up block with a slot at its entry."""

    def __init__(self, block: Any, slot: Slot, reuse: bool) -> None:
        super().__init__()
        self.block, self.resnets, self.slot, self.reuse = block, block.resnets, slot, reuse
        self.has_cross_attention = getattr(block, "has_cross_attention", False)

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        upsample_size: int | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The block on what enters it, which is kept; or on what was kept, when the deep levels were skipped."""
        if self.reuse:
            if self.slot.feature is None:
                raise ConfigError("DeepCache: expected a whole step first, got none. There is nothing to reuse yet.")
            hidden_states = self.slot.feature
        else:
            self.slot.feature = hidden_states
        if not self.has_cross_attention:
            return self.block(hidden_states, res_hidden_states_tuple, temb)
        return self.block(hidden_states, res_hidden_states_tuple, temb, encoder_hidden_states, cross_attention_kwargs,
                          upsample_size, attention_mask, encoder_attention_mask)  # fmt: skip


def changed(module: nn.Module, **parts: nn.Module | None) -> Any:
    """A copy that shares all parameters, with other children."""
    quantized = copy.copy(module)
    quantized.__dict__["_modules"] = {**quantized.__dict__["_modules"], **parts}
    return quantized


class DeepCache:
    """Denoise with a U-Net whose deep levels run every `interval` steps.

    model: called as model(x, t, **inputs, return_dict=False). compiler: applied to both of its functions. keep:
    applied to the feature that later steps reuse.
    """

    def __init__(
        self,
        model: Any,
        interval: int,
        compiler: Callable[[Call], Call] = lambda call: call,
        keep: Callable[[Tensor], Tensor] = lambda feature: feature,
    ) -> None:
        for part in ("conv_in", "down_blocks", "up_blocks", "mid_block", "conv_out"):
            if not hasattr(model, part):
                raise ConfigError(f"DeepCache: expected a U-Net, got {type(model).__name__} without {part}. It has no "
                                  "levels to skip. Leave this variant out.")  # fmt: skip
        self.interval, self.count, self.slot, self.keep = interval, 0, Slot(), keep
        *ups, last = model.up_blocks
        whole = changed(model, up_blocks=nn.ModuleList([*ups, LastUpBlock(last, self.slot, reuse=False)]))
        first = changed(model.down_blocks[0], downsamplers=None)
        shallow = changed(
            model,
            down_blocks=nn.ModuleList([first]),
            mid_block=None,
            up_blocks=nn.ModuleList([LastUpBlock(last, self.slot, reuse=True)]),
        )
        slot = self.slot

        def run_whole(x: Tensor, t: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
            out = whole(x, t, **inputs, return_dict=False)[0]
            kept, slot.feature = slot.feature, None
            return out, kept  # type: ignore[return-value]

        def run_shallow(x: Tensor, t: Tensor, inputs: dict[str, Any], feature: Tensor) -> Tensor:
            slot.feature = feature
            out = shallow(x, t, **inputs, return_dict=False)[0]
            slot.feature = None
            return out

        self.whole: Any = compiler(run_whole)  # type: ignore[arg-type]
        self.shallow: Any = compiler(run_shallow)
        self.feature: Tensor | None = None

    def reset(self) -> None:
        """A loop begins: its first step is whole."""
        self.count, self.feature = 0, None

    def __call__(self, x: Tensor, t: Tensor, inputs: dict[str, Any]) -> Tensor:
        """One step."""
        whole = self.count % self.interval == 0
        self.count += 1
        if whole or self.feature is None:
            out, feature = self.whole(x, t, inputs)
            self.feature = self.keep(feature)
            return out
        return self.shallow(x, t, inputs, self.feature)

    def state_bytes(self) -> int:
        """Of the kept feature."""
        return 0 if self.feature is None else self.feature.untyped_storage().nbytes()
