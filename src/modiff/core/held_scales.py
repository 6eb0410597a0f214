"""Dynamic scales that are measured at every n-th step and held in between."""

from __future__ import annotations

from torch import Tensor

from modiff.core.affine import QParams
from modiff.core.quantizer import Code, Quantizer


class HeldScales:
    """A quantizer for one stream of residuals: s_t = clip * max|r_t| / qmax at steps 1, 1 + n, 1 + 2n, ...,
    else s_{t+1}.

    What outgrows an old scale is clipped and, as the loop is closed, sent later. Step 0 has no residual.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer, self.every = quantizer, quantizer.config.refresh_every
        self.qparams: tuple[QParams, ...] = ()
        self.age = 0

    def __call__(self, residual: Tensor) -> Code | None:
        """Codes of the next residual."""
        given = self.given()
        code = self.quantizer(residual) if given is None else self.quantizer.scaled(residual, given)
        if code is not None:
            self.hold(tuple(q for _, q in code.parts))
        return code

    def given(self) -> tuple[QParams, ...] | None:
        """The scales for the next residual; None if they are to be measured on it."""
        return None if self.age % self.every == 0 else self.qparams

    def hold(self, qparams: tuple[QParams, ...]) -> None:
        """A residual was coded with these."""
        self.qparams, self.age = qparams, self.age + 1

    def restart(self) -> None:
        """The states start again: the next residual is measured."""
        self.age = 0

    def fresh(self, residual: Tensor) -> Code | None:
        """As `Quantizer.fresh`; not counted, as it belongs to the start of the states."""
        return self.quantizer.fresh(residual)
