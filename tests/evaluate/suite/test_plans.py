"""What the suite runs: the opponents always, and names and keys that tell configurations apart."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from modiff import presets
from modiff.config import ModiffConfig
from modiff.errors import ConfigError
from modiff.evaluate.suite.plans import Plan, Preset, plans_of, preset


def names(chosen: Preset) -> list[tuple[str, int, str]]:
    return [(plan.name, plan.steps, plan.family) for plan in plans_of(chosen)]


def test_quick_is_what_the_issue_asks_for() -> None:
    chosen = preset("quick")
    assert (chosen.num_images, chosen.steps) == (500, 50)
    assert names(chosen) == [
        ("full precision", 50, "steps"),
        ("half the steps", 25, "steps"),
        ("plain W8A4", 50, "plain"),
        ("modulated W8A4", 50, "modulated"),
    ]
    assert [plan.config for plan in plans_of(chosen)] == [None, None, presets.plain(8, 4), presets.modulated(8, 4)]


def test_a_file_is_named_after_itself(tmp_path: Path) -> None:
    config = dataclasses.replace(presets.w8a4(), min_weights=7)
    (tmp_path / "mine.json").write_text(config.to_json())
    plan = plans_of(Preset(num_images=8, steps=4, configs=(str(tmp_path / "mine.json"),)))[-1]
    assert (plan.name, plan.family, plan.config) == ("mine", "config", config)


@pytest.mark.parametrize("configs", [("w8a4", "modulated:8:4"), ("w8a4", "w8a4")])
def test_one_configuration_twice_is_an_error(configs: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="different configurations, got modulated W8A4 twice"):
        plans_of(Preset(num_images=8, steps=4, configs=configs))


def test_an_unknown_preset_and_too_few_steps_are_errors() -> None:
    with pytest.raises(ConfigError, match="preset: expected one of quick, full, got 'fast'"):
        preset("fast")
    with pytest.raises(ConfigError, match="--steps: expected 2 or more, got 1"):
        plans_of(preset("quick", steps=1))


def test_keys_differ_whenever_the_images_may() -> None:
    plans = [
        Plan(name="a", steps=4),
        Plan(name="a", steps=5),
        Plan(name="a", steps=4, config=ModiffConfig()),
        Plan(name="a", steps=4, config=dataclasses.replace(ModiffConfig(), min_weights=7)),
    ]
    assert len({plan.key for plan in plans}) == len(plans)
    assert plans[0].key == Plan(name="a", steps=4).key
    assert Plan(name="../A b/ü", steps=4).key.startswith("a-b-")


def test_a_row_on_integers_says_so_and_shares_the_colour_of_its_simulation() -> None:
    chosen = dataclasses.replace(preset("quick"), configs=("modulated:8:4", "modulated:8:4:integer"))
    assert names(chosen)[2:] == [("modulated W8A4", 50, "modulated"), ("modulated W8A4 on integers", 50, "modulated")]
