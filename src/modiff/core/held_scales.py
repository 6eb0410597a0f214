"""Dynamic scales that are measured at every n-th step and held in between."""

from __future__ import annotations

from torch import Tensor

from modiff.core.affine import QParams
from modiff.core.coder import Code, Coder


class HeldScales:
    """A coder for one stream of residuals: s_t = clip * max|r_t| / qmax at steps 1, 1 + n, 1 + 2n, ..., else s_{t+1}.

    What outgrows an old scale is clipped and, as the loop is closed, sent later. Step 0 has no residual.
    """

    def __init__(self, coder: Coder) -> None:
        self.coder, self.every = coder, coder.config.refresh_every
        self.qparams: tuple[QParams, ...] = ()
        self.age = 0

    def __call__(self, residual: Tensor) -> Code | None:
        """Codes of the next residual."""
        given = self.given()
        code = self.coder(residual) if given is None else self.coder.scaled(residual, given)
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
        """As `Coder.fresh`; not counted, as it belongs to the start of the states."""
        return self.coder.fresh(residual)
