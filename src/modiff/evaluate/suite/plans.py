"""Which configurations the evaluation suite runs: full precision, fewer steps, and what was named."""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modiff.config import ModiffConfig, check
from modiff.presets import FAMILIES, as_config

STEPS = "steps"
"""The family of the plans that quantize nothing and take fewer sampler steps."""
SHARES = {2: "half the steps", 4: "a quarter of the steps", 5: "a fifth of the steps", 10: "a tenth of the steps"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One configuration: a name, the sampler's steps, and what modiff applies (None: nothing).

    family: what a chart gives one colour: STEPS for those without a config, "plain", "modulated", ...
    """

    name: str
    steps: int
    config: ModiffConfig | None = None
    family: str = STEPS

    @property
    def key(self) -> str:
        """A folder name for all that shapes the images of this plan: equal plans have equal ones, others do not."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:40] or "config"
        values = {"steps": self.steps, "config": None if self.config is None else self.config.to_dict()}
        return f"{slug}-{hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]}"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How much is run. fewer: full precision is run with steps // each of them, too."""

    num_images: int
    steps: int
    configs: tuple[str, ...]
    fewer: tuple[int, ...] = (2,)


PRESETS = {
    "quick": Preset(num_images=500, steps=50, configs=("plain:8:4", "modulated:8:4")),
    "full": Preset(
        num_images=10_000,
        steps=50,
        configs=(
            "plain:8:8", "plain:8:6", "plain:8:4", "plain:8:3", "modulated:8:8", "modulated:8:6", "modulated:8:4",
            "modulated:8:3", "modulated:8:2", "uncompensated:8:4", "tuned:8:4", "tuned:8:3", "tuned:8:2",
            "modulated:4:4",
        ),
        fewer=(2, 4, 5, 10),
    ),
}  # fmt: skip


def preset(name: str, *, num_images: int | None = None, steps: int | None = None,
           configs: Sequence[str] = ()) -> Preset:  # fmt: skip
    """A preset by name, with the arguments instead of its own. Raises: ConfigError for an unknown name."""
    check("preset", name, name in PRESETS, f"one of {', '.join(PRESETS)}", "Use preset='quick'.")
    changes = {"num_images": num_images, "steps": steps, "configs": tuple(configs) or None}
    return dataclasses.replace(PRESETS[name], **{key: value for key, value in changes.items() if value is not None})


def plans_of(chosen: Preset) -> list[Plan]:
    """Full precision first, then with fewer steps (half of them always), then each config.

    Raises: ConfigError for a config that does not exist or is named twice, or fewer than 2 steps.
    """
    why = "Half of them are run as well, and what changes between steps is coded. Use steps=50."
    check("steps", chosen.steps, chosen.steps >= 2, "2 or more", why)
    plans = [Plan(name="full precision", steps=chosen.steps)]
    plans += [Plan(name=SHARES.get(n, f"1/{n} of the steps"), steps=chosen.steps // n)
              for n in sorted({2, *chosen.fewer}) if chosen.steps // n]  # fmt: skip
    plans += [_named_plan(text, chosen.steps) for text in chosen.configs]
    why = "Their rows would be equal or could not be told apart. Leave one out, or rename its file."
    for one, other in itertools.combinations(plans, 2):
        same = one.name == other.name or (one.config is not None and one.config == other.config)
        check("configs", f"{one.name} twice", not same, "different configurations", why)
    return plans


def _named_plan(text: str, steps: int) -> Plan:
    """Named by its family and bits, a file after itself; its family is that of presets with exactly this config."""
    config = as_config(text)
    bits = config.layer.weight.bits, config.layer.activation.bits
    made = {name: make(*bits) for name, make in FAMILIES.items() if name != "tuned" or bits[1] is not None}
    family = next((name for name, same in made.items() if config in (same, same.on_integers())), None)
    name = f"{family} W{bits[0] or 32}A{bits[1] or 32}"
    if family is None or text.endswith(".json"):
        name = Path(text).stem
    if family is not None and config.layer.execution == "integer":
        name += " on integers"
    return Plan(name=name, steps=steps, config=config, family=family or "config")
