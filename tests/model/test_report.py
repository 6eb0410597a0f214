"""The report: taken and left, short settings, a table, JSON."""

from __future__ import annotations

import json

import pytest

import modiff
from modiff import LayerConfig, ModulationConfig, QuantizerConfig, Report, WeightConfig, presets
from modiff.model.report import Entry
from tests.model.toys import TAKEN, toy

TAKEN_CONFIG = LayerConfig()


def entry(name: str = "body", weights: int = 300, config: LayerConfig | None = TAKEN_CONFIG, reason: str = "") -> Entry:
    return Entry(name, "Linear", weights, config, reason)


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (None, "full precision"),
        (LayerConfig(), "W8A8 modulated"),
        (LayerConfig(modulation=None), "W8A8 plain"),
        (LayerConfig(weight=WeightConfig(bits=None), activation=QuantizerConfig(bits=4)), "W32A4 modulated"),
        (LayerConfig(activation=QuantizerConfig(bits=0)), "W8A0 modulated"),
        (LayerConfig(activation=QuantizerConfig(bits=None), modulation=ModulationConfig()), "W8A32"),
        (presets.tuned(4, 3).layer, "W4A3 modulated"),
    ],
)
def test_a_setting_in_short(config, setting):
    assert entry(config=config).setting == setting


def test_taken_and_left_part_the_entries():
    report = modiff.select(toy(), presets.w8a4())
    assert tuple(e.name for e in report.taken) == TAKEN
    assert set(report.taken) | set(report.left) == set(report.entries)
    assert not set(report.taken) & set(report.left)
    assert all(e.reason for e in report.left)


def test_the_table_counts_layers_and_weights_and_names_each_layer_with_its_reason():
    report = Report((entry("a"), entry("bb.c", 100, None, "tiny: 100 weights")))
    assert str(report).splitlines() == [
        "1 layers taken (75.0 % of the weights), 1 left",
        "  a     Linear   W8A8 modulated",
        "  bb.c  Linear   full precision   tiny: 100 weights",
    ]


def test_an_empty_report_prints():
    assert str(Report(())) == "0 layers taken (0.0 % of the weights), 0 left"


def test_json_has_every_layer_in_order():
    report = modiff.select(toy(), presets.w8a4())
    layers = json.loads(json.dumps(report.to_dict()))["layers"]
    assert [row["name"] for row in layers] == [e.name for e in report.entries]
    body = next(row for row in layers if row["name"] == "body")
    assert body == {"name": "body", "kind": "Conv2d", "weights": 2304, "setting": "W8A4 modulated", "reason": ""}


def test_reports_of_two_networks_add_up():
    one, two = Report((entry("a"),)), Report((entry("b", config=None, reason="not included"),))
    assert (one + two).entries == (*one.entries, *two.entries)
