"""Warn where the layers that run first and last are not those that were left in full precision."""

from __future__ import annotations

from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from modiff.config import ModiffConfig
from modiff.errors import warn_once
from modiff.model.observe import observe
from modiff.model.report import Report
from modiff.nn.adapters import modules_of


class Ends:
    """Watches one evaluation. `select_layers` goes by the order of registration, which a network need not run in.

    The first layer is the first that reads the sample itself (an embedding of time may run before it); where none
    does, the first of all.
    """

    def __init__(self, config: ModiffConfig, report: Report) -> None:
        by_name = [*config.include, *(pattern for pattern, _ in config.overrides)]
        meant = [p for p in by_name if p != "*"]
        self.quantized = {e.name for e in report.taken if not any(fnmatchcase(e.name, p) for p in meant)}
        self.names = [entry.name for entry in report.entries]
        self.ran: list[str] = []
        self.reads_sample = ""
        self._stack = ExitStack()

    def begin(self, model: nn.Module, sample: Tensor | None) -> None:
        """An evaluation begins. Inside compiled modules nothing would be seen: then nothing is watched."""
        self.ran, self.reads_sample = [], ""
        if sample is None or any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules()):
            return

        def on_layer(name: str, _layer: nn.Module, inputs: tuple[Any, ...], _output: object) -> None:
            if inputs[0] is sample:
                self.reads_sample = self.reads_sample or name
            self.ran.append(name)

        known = modules_of(model)  # adapters may be gone
        self._stack.enter_context(observe(model, on_layer, layers=[name for name in self.names if name in known]))

    def close(self) -> None:
        """The evaluation ended, or not."""
        self._stack.close()

    def warn(self, model: str) -> None:
        """Say which layers run first and last, if they are quantized without having been named."""
        ends = dict.fromkeys((self.reads_sample or self.ran[0], self.ran[-1])) if self.ran else ()
        wrong = tuple(name for name in ends if name in self.quantized)
        if wrong:
            named = " and ".join(wrong)
            warn_once(
                f"ends of {model}: {named}",
                f"{model}: expected the layers that run first and last in full precision, got {named} quantized. "
                "They are chosen by the order in which modules are registered, and this network runs in another. "
                f"Add exclude={wrong} to ModiffConfig, or set first_last='quantize' if that is meant.",
            )
