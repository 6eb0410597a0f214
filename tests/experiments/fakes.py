"""A lab that samples nothing: every run's error follows from its settings alone, so that figures can be checked."""

from collections.abc import Callable

from experiments.lab import Depth, Plan, Row, StudySettings
from experiments.runs import Run

Error = Callable[[Run], float | None]
GBOPS = 1000.0


def halving(run: Run) -> float:
    """0.8 / 2^bits plain, a quarter of it modulated, half of it without compensation; 1 / steps in full precision."""
    if run.config is None:
        return 1 / run.steps
    layer = run.config.layer
    bits = layer.activation.bits
    if bits is None:
        return 0.001
    base = 0.8 / 2**bits
    if layer.modulation is None:
        return base * (0.5 if run.exact_first else 1.0)
    start = 1 + (0.5**layer.modulation.rounds if layer.modulation.first_step == "coded" else 0.0)
    return base * start * (0.25 if layer.modulation.error_compensation == "closed_loop" else 0.5)


class FakeLab:
    """Answers as Lab does; `plan` holds every run. share: of the operations that a silent run does."""

    most_steps = 1000

    def __init__(
        self, error: Error = halving, *, depth: Depth = "quick", share: Callable[[Run], float] | None = None
    ) -> None:
        self.settings = StudySettings(depth=depth, steps=20)
        self.error, self.share = error, share or (lambda run: 1 - (run.skip.threshold if run.skip else 0.0))
        self.plan: list[tuple[Row, Run]] = []

    def rows(self, plan: Plan, *, reference: Run | None = None, limit: Run | None = None) -> list[Row]:
        """A row for each run."""
        self.plan += plan
        return [self._row(labels, run, reference or run.reference, limit) for labels, run in plan]

    def _row(self, labels: Row, run: Run, reference: Run, limit: Run | None) -> Row:
        value = 0.0 if run == reference else self.error(run)
        low, high = (None, None) if value is None else (0.9 * value, 1.1 * value)
        row = {**labels, "relative_l2": value, "low": low, "high": high, "median": value,
               "psnr_db": 30.0 if value else None, "steps": run.steps, "evaluations": run.steps,
               "gbops": None if run.exact_first else GBOPS * run.steps * self.share(run)}  # fmt: skip
        return row if limit is None else {**row, "to_limit": None if value is None else value + 0.5}
