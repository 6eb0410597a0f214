"""The rows of methods.py: recipes of published methods, at each pair of bits, plain and modulated."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from modiff.config import JsonConfig
from modiff.methods.registry import METHODS, method_config

MODES = ("plain", "modulated")
BITS = ((8, 8), (4, 8), (8, 4), (4, 4))
NEAREST = {"rounding": "nearest"}
MINMAX = {"search": "minmax"}
MEASURED = NEAREST | MINMAX | {"scales": "measured"}
EXACT: dict[str, Any] = {"kind": "dynamic", "modulation": {"anchor_weights": "exact"}}
AGAIN = {"modulation": EXACT["modulation"] | {"reanchor_every": 10}}


@dataclass(frozen=True)
class Recipe:
    """A row's method: a name of the registry, fields of its settings, what the page says of it, its pairs of bits."""

    method: str
    fields: dict[str, Any]
    about: str
    bits: tuple[tuple[int, int], ...] = BITS


RECIPES: dict[str, Recipe] = {
    "minmax": Recipe("q_diffusion", MEASURED, "round to nearest, static min-max ranges; layers as in Q-Diffusion"),
    "ptq4dm": Recipe("ptq4dm", {}, "NDTC states, searched ranges; first and last layer at 8 bits"),
    "q_diffusion": Recipe("q_diffusion", {}, "learned rounding and scales; attention products quantized too"),
    "tfmq_dm": Recipe("tfmq_dm", {}, "temporal block apart, with scales per step; first and last layer 8 bits"),
    "accuquant": Recipe("accuquant", {}, "scales of groups of 4 steps learned on the quantized trajectory"),
    "ptqd": Recipe("ptqd", {}, "as minmax, then slope, mean and noise of the error corrected in the sampler"),
    "ptqd_mixed": Recipe("ptqd", {"step_bits": [4, 8]}, "ptqd, 4 or 8 bits of activations by step", ((8, 8), (4, 8))),
    "tac": Recipe("tac", {}, "as minmax, then a factor and a shift for each step in the sampler"),
    "modiff_dynamic": Recipe("modiff", {"kind": "dynamic"}, "learned rounding, dynamic scales per token or sample"),
    "modiff_static_minmax": Recipe("modiff", {"kind": "static_minmax"}, "learned rounding, static residual ranges"),
    "modiff_static_steps": Recipe("modiff", {"kind": "static_steps"}, "learned rounding, ranges of 10 groups of steps"),
    "modiff_static_learned": Recipe("modiff", {"kind": "static_learned"}, "learned rounding and residual scales"),
    "eda_dm": Recipe("eda_dm", {}, "TDAC states, losses of layers, QDrop; first and last layer 8 bits"),
    "gradient_aligned": Recipe("gradient_aligned", {}, "as tfmq_dm, with samples weighed for gradients that agree"),
    "qncd": Recipe("qncd", {}, "smoothed convolutions, learned rounding, bias taken off in the sampler"),
    "nearest_exact": Recipe("modiff", EXACT | NEAREST, "round to nearest, dynamic scales, exact anchors"),
    "nearest_minmax": Recipe("modiff", EXACT | NEAREST | MINMAX, "round to nearest, min-max ranges; no calibration"),
    "minmax_again": Recipe("modiff", EXACT | NEAREST | MINMAX | AGAIN, "the same, anchored again every 10 steps"),
    "nearest_again": Recipe("modiff", EXACT | NEAREST | AGAIN, "the same, layers anchored again every 10 steps"),
    "learned_minmax": Recipe("modiff", EXACT | MINMAX, "learned rounding from min-max ranges, dynamic scales"),
    "learned_exact": Recipe("modiff", EXACT, "learned rounding, dynamic scales, exact anchors"),
}


@dataclass(frozen=True)
class Row:
    """A row to be run."""

    recipe: str
    weight_bits: int
    activation_bits: int
    modulated: bool

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.recipe}-w{self.weight_bits}a{self.activation_bits}-{self.mode}"

    @property
    def mode(self) -> str:
        """One of MODES."""
        return MODES[self.modulated]

    def config(self, calibration: str, steps: int) -> JsonConfig:
        """The method's settings. Raises: ConfigError for a combination that is refused."""
        recipe = RECIPES[self.recipe]
        changes = {"weight_bits": self.weight_bits, "activation_bits": self.activation_bits, "steps": steps}
        return method_config(recipe.method, quick=calibration == "quick", values=recipe.fields,
                             modulated=self.modulated, changes=changes)  # fmt: skip


def rows(
    recipes: Iterable[str], bits: Iterable[tuple[int, int]], modes: Iterable[str] = MODES
) -> tuple[list[Row], dict[str, str]]:
    """The rows that mean something, and why the others are refused."""
    bits, modes, kept, refused = list(bits), list(modes), [], {}
    for recipe in recipes:
        method = METHODS[RECIPES[recipe].method]
        for mode in modes:
            modulated = mode == "modulated"
            reason = method.modulated if modulated else method.plain
            if reason:
                refused[f"{recipe}, {mode}"] = reason
            else:
                kept += [Row(recipe, w, a, modulated) for w, a in bits if (w, a) in RECIPES[recipe].bits]
    return kept, refused
