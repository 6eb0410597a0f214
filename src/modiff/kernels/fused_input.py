"""The input side of a layer that a norm or an activation feeds, without a pass over memory for either.

    y = activation(norm(x)),   then p_t, s, q_t and â_t of y as in `prologue`

The compiled path computes statistics in one pass and y, once, in a buffer that stays in the cache while it is coded.
Norms and exponentials are not torch's bit for bit: y differs by float error, so a code may differ by one where y lies
between two. The law holds all the same, as the state takes what was sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modiff.config import Granularity
from modiff.errors import KernelError
from modiff.kernels.fixed_point import FixedState
from modiff.kernels.fused_input_ops import (
    Activation,
    Norm,
    before,
    code_after,
    code_after_now,
    group_norm_as_affine,
)

_BESIDE: dict[str, tuple[set[str], ...]] = {
    "no": (set(), {"scale"}),
    "a float": (set(), {"scale"}, {"gain", "move"}, {"gain", "move", "scale"}),
    "an integer": ({"clipped"},),
}
"""What is given beside each form of state."""


class Before(NamedTuple):
    """What stands between a tensor x and the layer that reads it: y = activation(norm(x)).

    Args:
        norm: "group": x is (N, C, ...), in either memory layout; "group_last": the same of x (N, ..., C);
            "layer": x is (..., C), over its last axis;
            "affine": weight x + bias, (N, C) each, of a part of the channels of (N, C, ...); "gated": no norm, but
            y = x activation(weight), with a gate shaped as x (..., C) for weight: GEGLU, SwiGLU.
        weight, bias: of the norm, (C,) or None; for "layer" also (B, C): the modulation of a sample, 1 + scale, shift.
        groups, eps: of the norm. activation: behind it.
    """

    norm: Norm = "none"
    groups: int = 1
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0
    activation: Activation = "none"

    def parts(self, x: Tensor, segments: tuple[int, ...]) -> list[tuple[Tensor, Before]] | None:
        """(part of x, what it passes through) for each run of channels; None where no kernel reads such parts."""
        if len(segments) == 1:
            return [(x, self)]
        if self.norm != "group":
            return None
        found = group_norm_as_affine(x.detach(), _held(self.weight), _held(self.bias), self.groups, self.eps)
        if found is None:
            return None
        cut = zip(x.detach().split(list(segments), 1), *(c.split(list(segments), 1) for c in found), strict=True)
        return [(part, Before("affine", 1, a, b, 0.0, self.activation)) for part, a, b in cut]

    def of(self, x: Tensor) -> Tensor:
        """y by torch's operators, in float32 at least."""
        if self.norm == "group_last":
            return self._replace(norm="group").of(x.movedim(-1, 1)).movedim(1, -1)
        return before(
            x.detach(), _held(self.weight), _held(self.bias), self.norm, self.groups, self.eps, self.activation
        )

    def code(
        self,
        x: Tensor,
        state: Tensor | FixedState | None,
        scale: Tensor | None,
        bits: int,
        clip: float = 1.0,
        granularity: Granularity = "tensor",
        *,
        channel_dim: int = -1,
        move: Tensor | None = None,
        gain: Tensor | None = None,
        clipped: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Codes of y against its state, which becomes the next one in place.

        Args:
            state: â of y, shaped as x; integers as `prologue_fixed` has them, with `clipped` and no given scale; None
                for plain codes.
            scale, bits, clip, granularity, channel_dim, move, gain: as `prologue` has them.
            clipped: as `prologue_fixed` has it.
        Returns: uint8 codes in the layout of x, and the scales, float32.
        Raises: KernelError for a state of another shape, or a norm or an activation that nothing fuses.
        """
        n, grid = (state.n, state.grid) if isinstance(state, FixedState) else (state, None)
        _check(x, n, grid, {"scale": scale, "move": move, "gain": gain, "clipped": clipped})
        if self.norm == "group_last":  # tokens of channels are pixels with channels innermost
            turned, (x, n, move) = self._replace(norm="group"), (_turned(x), _turned(n), _turned(move))
            held = n if n is None or grid is None else FixedState(n, grid)
            codes, used = turned.code(
                x, held, scale, bits, clip, granularity, channel_dim=1, move=move, gain=gain, clipped=clipped
            )
            return codes.movedim(1, -1), used if scale is not None else used.movedim(1, -1)
        code = code_after if torch.compiler.is_compiling() else code_after_now
        return code(
            x.detach(), n, move, gain, grid, clipped, scale, _held(self.weight), _held(self.bias), self.norm,
            self.groups, self.eps, self.activation, bits, clip, granularity, channel_dim,
        )  # fmt: skip


def _check(x: Tensor, state: Tensor | None, grid: Tensor | None, beside: dict[str, Tensor | None]) -> None:
    for name, value in (("state", state), ("move", beside["move"])):
        if value is not None and value.shape != x.shape:
            raise KernelError(
                f"Before.code: expected a {name} of shape {tuple(x.shape)}, got {tuple(value.shape)}. The {name} "
                "belongs to another input. Start the trajectory again."
            )
    form = "no" if state is None else "a float" if grid is None else "an integer"
    given = {name for name, value in beside.items() if value is not None}
    if given not in _BESIDE[form]:
        raise KernelError(
            f"Before.code: expected {_named(_BESIDE[form])} with {form} state, got {_named([given])}. Each form of "
            "state has arguments of its own. Leave out, or add, what differs."
        )


def _named(sets: Iterable[set[str]]) -> str:
    return ", or ".join(" and ".join(sorted(names)) or "nothing" for names in sets)


def _turned(x: Any) -> Any:
    """Channels from the last axis to axis 1; None stays."""
    return None if x is None else x.movedim(-1, 1)


def _held(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
