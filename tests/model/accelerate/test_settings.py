"""The front of settings: which ways to run a layer pay, which are chosen at a price, and where the walk ends."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modiff import LayerConfig, ModiffConfig, presets
from modiff.model.accelerate import settings
from modiff.model.accelerate.settings import (
    Option,
    Options,
    Tried,
    bytes_of_states,
    cheapest,
    config_of,
    fastest_within,
    options_of,
    prices,
    together,
)

W8A8, W8A4, PLAIN = presets.w8a8().layer, presets.w8a4().layer, presets.plain().layer
FLOATS = Option(10.0, 0.0, {}, None)
TOY: Options = {
    "a": [FLOATS, Option(6.0, 0.1, {"a": 100}, W8A8), Option(4.0, 0.3, {"a": 100}, W8A4)],
    "b": [FLOATS, Option(9.0, 0.2, {}, PLAIN), Option(2.0, 0.4, {"b": 300}, W8A4)],
}


def setting(options: Options, price: float, budget: int | None = None) -> list[str]:
    return [option.setting for option in cheapest(options, price, budget).values()]


def test_error_is_bought_where_it_costs_the_least_time() -> None:
    """The toy by hand: (10 - 4) / 0.09, (10 - 6) / 0.01, (6 - 4) / 0.08, and 8 / 0.16, 1 / 0.04, 7 / 0.12."""
    assert prices(TOY) == pytest.approx([0, 25, 25, 50, 7 / 0.12, 6 / 0.09, 400])
    assert setting(TOY, 0) == ["W8A4 modulated", "W8A4 modulated"]
    assert setting(TOY, 30) == ["W8A8 modulated", "W8A4 modulated"]
    assert setting(TOY, 55) == ["W8A8 modulated", "floats"]
    assert setting(TOY, prices(TOY)[-1]) == ["floats", "floats"]
    assert together(cheapest(TOY, 0)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [(400, ["W8A4 modulated", "W8A4 modulated"]), (399, ["W8A4 modulated", "W8A8 plain"]),
     (99, ["floats", "W8A8 plain"])],
)  # fmt: skip
def test_states_beyond_the_budget_go_where_a_byte_gains_least(budget: int, chosen: list[str]) -> None:
    """A byte of a gains 6 / 100, one of b 7 / 300."""
    assert setting(TOY, 0, budget) == chosen


@given(
    st.lists(st.lists(st.tuples(st.floats(0.1, 1), st.floats(0.01, 1)), max_size=4), min_size=1, max_size=4),
    st.floats(0.01, 3), st.floats(0.3, 3),
)  # fmt: skip
def test_the_walk_ends_at_the_fastest_point_of_the_front_within_the_error(ways, max_error, factor) -> None:
    """Where trajectories err by a multiple of what the layers do; unknown to the walk, which may run five of them."""
    options: Options = {}
    for number, steps in enumerate(ways):
        row = [FLOATS]
        for slower, worse in steps:
            row.append(Option(row[-1].seconds * slower * 0.9, row[-1].error + worse, {}, PLAIN))
        options[str(number)] = row
    tried: list[float] = []

    def attempt(choice: settings.Choice) -> Tried:
        tried.append(Tried(choice, factor * together(choice)))
        return tried[-1]

    within, beyond = fastest_within(max_error, options, attempt)
    points = [cheapest(options, price) for price in prices(options)]
    best = next(choice for choice in points if factor * together(choice) <= max_error)
    assert (points[-1] if within is None else within.choice) == best
    assert beyond is None or beyond.error > max_error
    assert len(tried) <= settings.TRIES


def test_integers_that_are_as_exact_as_floats_need_no_price() -> None:
    """Those of a layer that reads the same at each step, such as the keys of a prompt."""
    constant: Options = {"k": [FLOATS, Option(6.0, 0.0, {"k": 100}, W8A8)]}
    assert prices(constant) == [0.0]
    for options in (constant, constant | {"a": TOY["a"]}):
        within, _ = fastest_within(1e-6, options, lambda choice: Tried(choice, together(choice)))
        assert within is not None
        assert [option.setting for option in within.choice.values()] == ["W8A8 modulated", "floats"][: len(options)]


def test_a_diverged_trajectory_says_nothing_and_the_walk_goes_on_from_the_middle() -> None:
    within, beyond = fastest_within(0.02, TOY, lambda c: Tried(c, math.inf if together(c) > 0.2 else 0.01))
    assert within is not None
    assert beyond is not None
    assert [option.setting for option in within.choice.values()] == ["W8A8 modulated", "floats"]


def probe(errors: tuple[float, float] = (0.01, 0.14), unsupported: str = "") -> Any:
    spec = SimpleNamespace(split=None, runs=(8,))
    layer = SimpleNamespace(spec=spec, unsupported=unsupported, inputs=None, config=None)
    return SimpleNamespace(
        errors=lambda: errors, input=torch.zeros(2, 8), calls=6, clock=SimpleNamespace(tick=3), name="q",
        sizes={("cond", 0): (16, 4), ("uncond", 0): (8, 2)}, layers=[layer],
    )  # fmt: skip


def options(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], every: int = 0, int16: float = 1.0, **words: Any
) -> list[Option]:
    """Of a layer whose modulated integers take these seconds by bits; all others take one, or `int16`."""
    measured, base = list[object](), presets.w8a8().on_integers().layer

    def measure(layer: nn.Module, x: torch.Tensor, config: LayerConfig, split: int | None) -> dict[str, float]:
        bits = config.activation.bits or 0
        dtype = config.modulation.state_dtype if config.modulation else ""
        measured.append((dtype, bits))
        return {"float": 1.0, "plain": 1.0, "modulated": seconds[bits] if dtype == "float32" else int16}

    monkeypatch.setattr(settings, "measure_layer", measure)
    result = options_of(nn.Linear(8, 2), seen := probe(**words), base, times := {}, every)
    assert options_of(nn.Linear(8, 2), seen, base, times, every) == result
    assert len(measured) == len(set(measured)) == len(times)  # nothing is measured twice
    return result


def test_an_option_is_kept_only_where_it_is_faster_than_a_more_exact_one(monkeypatch) -> None:
    """0.14 at 4 bits is 0.14 * 7 / 127 at 8. Two calls an evaluation, in two contexts; four bytes a number."""
    rows = options(monkeypatch, {8: 0.4, 6: 0.6, 5: 0.3, 4: 0.295, 3: 0.2})
    assert [row.setting for row in rows] == ["floats", "W8A8 modulated", "W8A5 modulated", "W8A3 modulated"]
    assert [row.seconds for row in rows] == pytest.approx([2.0, 0.8, 0.6, 0.4])
    assert [row.error for row in rows] == pytest.approx([0, 0.14 * 7 / 127, 0.14 * 7 / 15, 0.14 * 7 / 3])
    assert [bytes_of_states([row]) for row in rows] == [0, *[4 * (16 + 8 + 4 + 2)] * 3]


def test_no_more_bits_are_timed_where_four_take_the_time_of_eight(monkeypatch) -> None:
    rows = options(monkeypatch, {8: 0.4, 4: 0.39})
    assert [row.setting for row in rows] == ["floats", "W8A8 modulated"]


def test_int16_states_are_kept_where_they_take_less_memory_and_floats_where_they_take_less_time(monkeypatch) -> None:
    rows = options(monkeypatch, {8: 0.4, 4: 0.39}, int16=0.5)
    assert [row.setting for row in rows[1:]] == ["W8A8 modulated", "W8A8 modulated, int16 states"]
    assert bytes_of_states([rows[1]]) == 2 * (bytes_of_states([rows[2]]) - 4 * 4)  # grids
    assert len(options(monkeypatch, {8: 0.4, 4: 0.39}, int16=0.3)) == 2


def test_an_anchor_costs_floats_at_one_step_of_n_and_its_layer_says_so(monkeypatch) -> None:
    rows = options(monkeypatch, {8: 0.4, 4: 0.39}, every=10)
    assert rows[1].seconds == pytest.approx(2 * (0.4 + 1.0 / 10))
    assert rows[1].setting == "W8A8 modulated, anchored every 10 steps"


def test_layers_that_no_kernel_runs_or_whose_error_is_unknown_keep_their_floats(monkeypatch) -> None:
    assert options(monkeypatch, {}, unsupported="no kernel is a transposed convolution") == [Option(0.0, 0.0, {}, None)]
    assert len(options(monkeypatch, {8: 0.1, 4: 0.1}, errors=(math.nan, math.nan))) == 1


def test_the_config_runs_each_layer_as_chosen_by_its_exact_name() -> None:
    choice = {"a[0].b": TOY["a"][2], "c*": FLOATS}
    config = config_of(ModiffConfig(exclude=("d",)), choice)
    assert config.overrides == (("a[[]0].b", W8A4),)
    assert config.exclude == ("d", "c[*]")
