"""What evaluations tell of layers: which run first and last, read one row a sample or outliers, or never run."""

import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modiff.config import ModiffConfig
from modiff.errors import warn_once
from modiff.model.observe import observe
from modiff.model.report import Report
from modiff.model.select import END, matches

RATIO = 254.0
"""Of the largest channel to the median one, above which a layer is named: at 8 bits the median one rounds to zero."""
LARGE = 16.0
"""Times the median channel, above which channels of such a layer are split off: the others keep most of their codes."""
NEVER = "never called: it does not run, or other code reads its weight"


class Roles:
    """Of the layers of one network. The first is the first that reads the sample itself, or else more than one row.

    unseen: layers that nothing is known of, as they are compiled or no evaluation began. evaluated: whether one ended.
    """

    def __init__(self, config: ModiffConfig, report: Report) -> None:
        by_name = [*config.include, *(pattern for pattern, _ in config.overrides)]
        self.named = [pattern for pattern in by_name if pattern != "*"]
        self.judged = config.default_exclude is None  # otherwise the config has decided
        self.first_last, self.ends_matter = config.first_last, False
        self.names = [entry.name for entry in report.entries if entry.is_layer]
        self.taken = {entry.name for entry in report.taken}
        self.supposed = [e.name for e in report.left if e.reason.startswith(END) and e.weights >= config.min_weights]
        self.sample: Tensor | None = None
        self.first = self.last = self.reads_sample = ""
        self.rows: dict[str, bool] = {}
        self.unseen, self.evaluated = {*self.names}, False
        self.maxima = ChannelMaxima()
        self._stack = ExitStack()

    def begin(self, model: nn.Module, sample: Tensor | None) -> None:
        """An evaluation begins; watch it until `close`. Inside of compiled modules nothing would be seen."""
        compiled = tuple(f"{name}." * bool(name) for name, module in model.named_modules()
                         if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"))  # fmt: skip
        self.unseen = {name for name in self.names if f"{name}.".startswith(compiled)}
        self.sample = sample
        self.ends_matter = self.judged and self.first_last == "full_precision" and sample is not None and not compiled
        self._stack.enter_context(observe(model, self.see, layers=[n for n in self.names if n not in self.unseen]))

    def close(self) -> None:
        """The evaluation ended or failed."""
        self._stack.close()
        self.sample, self.evaluated = None, True

    def see(self, name: str, layer: nn.Module, inputs: tuple[Any, ...], _output: object) -> None:
        """A layer ran. Cost: a pass over its input."""
        x, sample = inputs[0], self.sample
        if name in self.taken and x.numel():
            self.maxima.see(name, layer, x)
        row = sample is not None and sample.dim() > 2 >= x.dim() and x.numel() <= len(sample) * x.shape[-1]
        self.rows[name] = row and self.rows.get(name, True)
        self.first = self.first or ("" if row else name)
        self.reads_sample = self.reads_sample or (name if x is sample else "")
        self.last = name

    def no_ends(self) -> list[str]:
        """Layers that were left for being first or last, and run elsewhere."""
        ends = {self.last, self.reads_sample or self.first or self.last} if self.ends_matter else self.rows.keys()
        return [name for name in self.supposed if name in self.rows.keys() - ends and not self.rows[name]]

    def unfit(self) -> dict[str, str]:
        """Taken layers that should keep their floats, and why; those that the config names stay."""
        rows = [name for name, row in self.rows.items() if row and self.judged]
        reasons = dict.fromkeys(rows, "reads one row a sample: an embedding")
        if self.ends_matter and self.last:
            reasons |= {self.last: "runs last", self.reads_sample or self.first or self.last: "runs first"}
        outliers = {outlier.name: outlier.why for outlier in self.maxima.outliers()}
        reasons = {name: why for name, why in (reasons | outliers).items() if not matches(name, self.named)}
        reasons |= {name: NEVER for name in self.names if name not in self.rows.keys() | self.unseen}
        return {name: why for name, why in reasons.items() if name in self.taken}


def warn_unfit(where: str, unfit: Mapping[str, str], what: str) -> None:
    """Warn once of layers that should keep their floats; `what` is done about it."""
    groups = {why: [name for name in unfit if unfit[name] == why] for why in dict.fromkeys(unfit.values())}
    listed = "; ".join(f"{', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)} ({why})"
                       for why, names in groups.items())  # fmt: skip
    if unfit:
        warn_once(f"{where}: {listed}", f"{where}: expected layers that quantizing suits, got {listed}. {what}")


class Outlier(NamedTuple):
    """A layer, its largest |x|, the median of the largest |x| of channels that are dwarfed, and how many dwarf that.

    large: channels to split off, and the largest |x| of each.
    """

    name: str
    largest: float
    median: float
    channels: int
    large: Mapping[int, float]

    @property
    def why(self) -> str:
        """Why one scale does not fit it."""
        return f"channels reach {self.largest:.2g}, the median of the others {self.median:.2g}"

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.channels} input channels reach {self.largest:.2g}, the median of the others "
            f"{self.median:.2g}: one scale for both rounds the others to zero. Leave the layer, "
            f"exclude=({self.name!r},), or let apply(..., run=) give these channels a scale of their own."
        )


class ChannelMaxima:
    """The largest magnitude of each input channel of each layer, over all inputs that were seen."""

    def __init__(self) -> None:
        self._maxima: dict[str, Tensor] = {}

    def see(self, name: str, layer: nn.Module, x: Tensor) -> None:
        """The Linear or Conv layer of that name read x. Cost: one pass over it."""
        channels = x.detach().abs().movedim(x.dim() - 1 - len(getattr(layer, "kernel_size", ())), 0)
        largest = channels.reshape(len(channels), -1).amax(1).float()
        self._maxima[name] = torch.maximum(largest, self._maxima.get(name, largest))

    def outliers(self) -> list[Outlier]:
        """Layers with channels `RATIO` times as large as their others, unless those are dead, and as the median layer.

        The others may be the fewer ones: their median counts where one in `LARGE` channels is dwarfed.
        """
        typical = statistics.median_low(float(each.median()) for each in self._maxima.values()) if self._maxima else 0.0
        outliers: list[Outlier] = []
        for name, maxima in self._maxima.items():
            largest = float(maxima.max())
            dwarfed = maxima[(maxima > typical / RATIO) & (maxima < largest / RATIO)]
            median = float((dwarfed if LARGE * len(dwarfed) >= len(maxima) else maxima).median())
            if count := int((maxima > RATIO * max(median, typical)).sum()):
                large = {i: float(x) for i, x in enumerate(maxima) if x > LARGE * median}
                outliers.append(Outlier(name, largest, median, count, large))
        return sorted(outliers, key=lambda outlier: -outlier.largest)
