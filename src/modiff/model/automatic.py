"""Trajectories that begin and end by themselves, for models that no verb of modiff was called on."""

from __future__ import annotations

from torch import Tensor

from modiff.nn import Clock
from modiff.nn.clock import middle


class Automatic:
    """Tells where one trajectory ends and the next begins, from the time steps alone.

    A model that diffusers loads from a quantized folder meets modiff nowhere else: its pipeline calls it, and no more.
    Time steps run one way through a trajectory. So the next one began where they turn round, or where the second is
    the first again (one-step trajectories). A trajectory that someone else began is left alone.

    A network without a time step keeps asking for `modiff.trajectory`. Cost: one host sync an evaluation.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.mine = False
        self._seen: dict[str, list[float]] = {}

    def before(self, timestep: Tensor | float | None) -> None:
        """An evaluation begins: start a trajectory if this is its first."""
        if timestep is None or (self.clock.active and not self.mine):
            return
        now = float(middle(timestep))
        if not self.mine or self._turned(self._seen.get(self.clock.context, []), now):
            context = self.clock.context
            self.end()
            self.clock.start()
            self.clock.context, self.mine = context, True
        seen = self._seen.setdefault(self.clock.context, [])
        if not seen or seen[-1] != now:
            seen.append(now)
        del seen[:-2]

    def end(self) -> None:
        """The trajectory ended: free the states. Nothing happens where it is someone else's."""
        if self.mine:
            self.clock.stop()
        self.mine = False
        self._seen.clear()

    @staticmethod
    def _turned(seen: list[float], now: float) -> bool:
        if len(seen) == 1:
            return now == seen[0]
        return len(seen) == 2 and (now - seen[1]) * (seen[1] - seen[0]) < 0
