"""The report: taken and left, how each layer runs and why, memory in full, a table, JSON."""

import dataclasses
import json

import pytest

import modiff
from modiff import LayerConfig, Report, WeightConfig, presets
from modiff.errors import ModiffWarning
from modiff.kernels.dispatch import Choice
from modiff.model.report import Entry, MemoryUse
from modiff.model.trajectory import state_bytes, warn_of_states
from tests.model.toys import TAKEN, applied, generate, sample, toy, toy_unet

W8A8 = LayerConfig()


def entry(name: str = "body", weights: int = 300, config: LayerConfig | None = W8A8, reason: str = "") -> Entry:
    return Entry(name, "Linear", weights, config, reason)


def test_the_summary_has_a_row_for_each_group_and_the_table_one_for_what_is_alike():
    alike = [entry(f"blocks.{i}.b2.to_q") for i in range(3)]
    others = entry("blocks.3.b2.to_q", reason="split at 8"), entry("c", 500, None, "tiny: 500 weights")
    report = Report((entry("a"), *alike, *others, entry("d", 500, None, "tiny: 500 weights")))
    assert str(report).splitlines() == [
        "5 layers taken (60.0 % of the weights), 2 left",
        "  5 Linear  W8A8 modulated  60.0 %  a, ...",
        "  2 Linear  full precision  40.0 %  tiny",
    ]
    assert report.table().splitlines() == [
        "  a                     Linear  W8A8 modulated",
        "  blocks.*.b2.to_q (3)  Linear  W8A8 modulated",
        "  blocks.3.b2.to_q      Linear  W8A8 modulated  split at 8",
        "  c                     Linear  full precision  tiny: 500 weights",
        "  d                     Linear  full precision  tiny: 500 weights",
    ]
    assert str(Report(())) == "0 layers taken (0.0 % of the weights), 0 left"
    one, two = Report((entry("a"),), MemoryUse(1, 2, 3, 4)), Report((entry("b"),), MemoryUse(10, 20, 30, 40))
    assert (one + two + Report(())) == Report((*one.entries, *two.entries), MemoryUse(11, 22, 33, 44))


def test_a_plain_layer_has_no_states_and_a_layer_shows_its_bits():
    model = toy()
    assert "; states" not in str(modiff.apply(model, presets.plain(8, 4)))
    assert "padding=(1, 1), W8A4 plain)" in repr(model.body)
    assert repr(applied(presets.w4a8().on_integers()).body).endswith("W4A8 modulated on integers, int16 states)")


def test_json_has_every_layer_in_order_and_those_left_have_a_reason():
    report = modiff.select(toy(), presets.w8a4())
    assert tuple(e.name for e in report.taken) == TAKEN
    assert all(e.reason for e in report.left)
    layers = json.loads(json.dumps(report.to_dict()))["layers"]
    assert [row["name"] for row in layers] == [e.name for e in report.entries]
    body = {"name": "body", "kind": "Conv2d", "weights": 2304, "setting": "W8A4 modulated"}
    assert layers[2] == body | dict.fromkeys(("reason", "execution", "why", "anchor", "states"), "")


def test_the_report_of_apply_says_how_each_layer_runs_and_why_not_on_integers(monkeypatch):
    monkeypatch.setattr("modiff.nn.loop.integer.plan", lambda problem: Choice("fast", f"{problem.bits} bits fit"))
    floats = LayerConfig(weight=WeightConfig(bits=None))
    config = dataclasses.replace(presets.w8a8(), overrides=(("*to_v", floats),)).on_integers()
    report = modiff.apply(toy(), config)
    runs = {e.name: (e.execution, e.why) for e in report.entries}
    assert runs["body"] == runs["attention.to_q"] == ("integers on fast", "8 bits fit")
    assert runs["attention.to_v"] == ("simulated", "its weight keeps floats")
    assert runs["conv_in"] == ("", "")
    lines = str(report).splitlines()
    assert lines[1:3] == ["  4 integers on fast: 8 bits fit", "  1 simulated: its weight keeps floats"]
    assert {e.execution for e in modiff.apply(toy()).taken} == {"simulated"}


def test_a_network_of_unknown_size_does_not_hide_the_states_of_others(monkeypatch):
    known, unknown = Report((), MemoryUse(expected=2**30)), Report((), MemoryUse(expected=None))
    report = known + unknown + known
    assert str(report.memory).endswith("; states at least 2.0 GiB for one generation")
    assert str((unknown + unknown).memory).endswith("; states unknown before the first run")
    monkeypatch.setattr("modiff.model.trajectory._free", lambda _: 2**29)
    with pytest.warns(ModiffWarning, match="got at least 2.0 GiB for one generation of Toy"):
        warn_of_states([toy()], report)


@pytest.mark.parametrize("packed", [False, True])
def test_memory_is_told_in_full(packed):
    model = applied(presets.w8a8().on_integers())
    biases, weights = 4 * 5 * 16, 2304 + 4 * 256
    assert modiff.report(model).memory == MemoryUse(floats=4 * weights + biases, expected=None)
    assert "codes and backends from step 1 on; states unknown before the first run" in str(modiff.report(model))
    if packed:
        modiff.pack(model)
    with modiff.trajectory(model):
        sample(model, steps=2)
        states = state_bytes(model)
    memory = modiff.report(model).memory
    assert memory.floats == biases + (0 if packed else 4 * weights)
    assert memory.codes == weights + 4 * 5 * 16, "a byte a weight, a float32 scale a channel"
    assert memory.backends == sum(model.get_submodule(name).loop.bytes_of_backends() for name in TAKEN)
    assert memory.states == states > state_bytes(model) == 0


@pytest.mark.parametrize(
    ("kept", "anchor"), [("quantized", "quantized weights"), ("int8", "int8 anchor codes (2 bytes a weight)")]
)
def test_what_was_planned_is_what_runs_and_a_packed_model_says_it_too(kept, anchor):
    model = toy_unet()
    planned = modiff.apply(model, presets.w8a8().on_integers())
    assert "anchor with exact weights, states" in str(planned)
    fewer = modiff.apply(toy_unet(), presets.w4a8())
    assert "anchor with exact weights until it is nearer to zero, states" in str(fewer)
    generate(model, steps=2)
    assert all(e.execution.startswith("integers on ") for e in planned.taken)
    assert modiff.report(model).entries == planned.entries
    packed = [dataclasses.replace(e, anchor=anchor if e.config else "") for e in planned.entries]
    assert modiff.pack(model, anchor_weights=kept).entries == modiff.report(model).entries == tuple(packed)
