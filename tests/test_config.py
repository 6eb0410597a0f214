"""Configs: JSON round trips of everything valid, one clear line for everything else, and what stands for a config."""

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given, settings

from modiff import AttentionConfig, LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig, presets
from modiff.errors import ConfigError, FormatError, ModiffError
from modiff.presets import PRESETS, as_config
from tests.strategies import model_configs


@given(config=model_configs())
@settings(max_examples=40)
def test_a_config_survives_json_and_plain_dictionaries_with_every_field(config):
    assert ModiffConfig.from_json(config.to_json()) == config
    assert hash(ModiffConfig.from_json(config.to_json())) == hash(config)
    assert set(config.to_dict()["layer"]) == {f.name for f in dataclasses.fields(config.layer)}


ZERO = QuantizerConfig(symmetric=False, lowest="zero")
WIDE = dataclasses.replace(ZERO, bits=16)
INPUTS = dataclasses.replace(ZERO, granularity="input_channel")
CODED, LINEAR = ModulationConfig(first_step="coded"), ModulationConfig(predictor="linear")
TWO = QuantizerConfig(bits=2, clip=0.45)
SKIP = QuantizerConfig(bits=0)
VALUES: dict[type, dict[str, tuple[object, ...]]] = {
    WeightConfig: {"bits": (0, 1, 9), "search": ("best",)},
    QuantizerConfig: {"bits": (-4, 1, 9, 16, 4.0, True, "4"), "clip": (-0.5, 0.0, 1.5, float("nan"), "half"),
                      "symmetric": ("yes",), "granularity": ("channel",), "lowest": ("one", "zero"),
                      "step_groups": (-1, 0)},
    ModulationConfig: {"predictor": ("cubic",), "gain": (0.0, 1.1), "rounds": (0, 17, 2.5), "reanchor_every": (-1,),
                       "state_dtype": ("int8",), "first_step": ("skip",)},
    LayerConfig: {"rotation": ("fourier",), "rotation_block": (1, 48), "activation": ({"bits": 4},),
                  "weight": (None,)},
    ModiffConfig: {"include": ("down.*",), "exclude": (("a", 3),), "overrides": ((("a",),),),
                   "first_last": ("skip",), "share_residuals": (True,), "min_weights": (-5, 0.5, True)},
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [(kind, field, value) for kind, fields in VALUES.items() for field, values in fields.items() for value in values],
)
def test_a_wrong_value_is_one_clear_line_that_names_it(kind, field, value):
    got = re.escape(repr(value))
    with pytest.raises(ConfigError, match=rf"^{kind.__name__}\.{field}: expected [^\n]+, got {got}\. \S[^\n]+\.$"):
        kind(**{field: value})


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (QuantizerConfig, {"granularity": "token", "dynamic": False}, "granularity: expected 'tensor',"),
        (QuantizerConfig, {"step_groups": -1, "dynamic": False}, "step_groups: expected 0 or more groups, got -1"),
        (ModulationConfig, {"predictor": "linear", "error_compensation": "none"}, "predictor: expected 'hold' when"),
        (LayerConfig, {"activation": ZERO}, "activation.lowest: expected 'measured' with modulation, got 'zero'"),
        (
            LayerConfig,
            {"activation": TWO, "modulation": LINEAR},
            "modulation.predictor: expected 'hold' at 2 bits with",
        ),
        (LayerConfig, {"activation": SKIP, "modulation": None}, "activation.bits: expected 2 to 8 bits without modul"),
        (LayerConfig, {"activation": SKIP, "modulation": CODED}, "modulation.first_step: expected 'full_precision' at"),
        (LayerConfig, {"activation": WIDE, "modulation": None}, "activation.bits: expected None, 0 or 2 to 8, got 16"),
        (AttentionConfig, {"operands": SKIP}, "operands.bits: expected None or bits to code with"),
        (AttentionConfig, {"operands": QuantizerConfig(granularity="token")}, "operands.granularity: expected 'auto',"),
        (AttentionConfig, {"operands": ZERO}, "operands.lowest: expected 'measured', got 'zero'"),
        (AttentionConfig, {"softmax": QuantizerConfig()}, "softmax.lowest: expected 'zero', got 'measured'"),
        (AttentionConfig, {"softmax": INPUTS}, "softmax.granularity: expected 'auto', 'tensor', 'sample' or 'token'"),
    ],
)
def test_settings_that_do_not_go_together_are_one_clear_line(kind, fields, message):
    with pytest.raises(ConfigError, match=rf"^{kind.__name__}\.{re.escape(message)}[^\n]*$"):
        kind(**fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"layers": {}}', "ModiffConfig: expected a known field, got 'layers'. Known fields: layer, include"),
        ('{"layer": {"activation": {"bit": 4}}}', "QuantizerConfig: expected a known field, got 'bit'."),
        ('{"overrides": [["a"]]}', "ModiffConfig.overrides: expected a tuple of"),
        ('{"exclude": "body"}', "ModiffConfig.exclude: expected a tuple of strings, got 'body'"),
        ("{", "ModiffConfig: expected JSON, got Expecting "),
        ("[" * 100_000, "ModiffConfig: expected JSON, got maximum rec"),
        ('{"layer": null}', "LayerConfig: expected an object with named fields, got None."),
    ],
)
def test_wrong_json_is_one_clear_line(text, message):
    with pytest.raises(ConfigError, match=rf"^{re.escape(message)}[^\n]*$"):
        ModiffConfig.from_json(text)


def test_on_integers_reaches_the_overrides_and_changes_nothing_else():
    config = ModiffConfig(overrides=(("*.conv1", LayerConfig(modulation=None)),), exclude=("a",))
    integers = config.on_integers()
    assert [layer.execution for layer in (integers.layer, integers.overrides[0][1])] == ["integer", "integer"]
    assert ModiffConfig.from_json(integers.to_json().replace('"integer"', '"simulated"')) == config


@pytest.mark.parametrize(("exclude", "now"), [(None, ((), None)), (["a"], (("a",), ()))])
def test_a_config_written_when_exclude_replaced_the_defaults_keeps_its_meaning(exclude, now):
    values = ModiffConfig().to_dict() | {"exclude": exclude}
    del values["default_exclude"]
    config = ModiffConfig.from_dict(values)
    assert (config.exclude, config.default_exclude) == now
    assert ModiffConfig.from_dict(config.to_dict()) == config


SHORT = {"w8a8": (8, 8), "w8a7": (8, 7), "w8a4": (8, 4), "w8a3": (8, 3), "w4a8": (4, 8), "w4a4": (4, 4)}


def test_a_short_name_is_the_method_at_its_bits_and_there_are_no_others():
    named = {name: getattr(presets, name)() for name in vars(presets) if name[0] == "w" and name[1].isdigit()}
    assert named == {name: presets.modulated(*bits) for name, bits in SHORT.items()}
    assert {name: as_config(name) for name in PRESETS} == named


def test_tuned_is_rotated_and_holds_at_any_bits():
    tuned = [presets.tuned(None, bits).layer for bits in range(2, 9)]
    assert {(layer.rotation, layer.modulation.predictor) for layer in tuned} == {("hadamard", "hold")}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tuned:32:4", presets.tuned(None, 4)),
        ("plain:8:32", presets.plain(8, None)),
        ("modulated:8:0", presets.modulated(8, 0)),
        ("w8a8:integer", presets.w8a8().on_integers()),
        ("plain:4:8:integer", presets.plain(4, 8).on_integers()),
        ("W8A4", presets.modulated(8, 4)),
        ("w32a6:integer", presets.modulated(None, 6).on_integers()),
        (presets.w8a4, presets.modulated(8, 4)),
        (presets.tuned, presets.tuned(bits=4)),
        (presets.w4a8().to_dict(), presets.w4a8()),
        (None, presets.w8a8()),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_a_config_is_what_a_person_types_or_a_program_has(text: object, expected: ModiffConfig) -> None:
    assert as_config(text) == expected


def test_a_json_file_is_a_config_and_other_content_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(presets.tuned(8, 3).to_json())
    assert as_config(str(path)) == as_config(path) == presets.tuned(8, 3)
    for content, message in ((b"{", "JSON"), (b'{"bits": 4}', "'bits'"), (b"\xff\xfe", "expected")):
        path.write_bytes(content)
        with pytest.raises(ModiffError, match=message):
            as_config(str(path))


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("w8a5x", ConfigError, "expected bits such as .*w8a4.* got 'w8a5x'"),
        ("plain:8:1", ConfigError, "expected None, 0 or 2 to 8, got 1"),
        ("tuned:8:32", ConfigError, "tuned: expected 2 to 8 activation bits"),
        ("absent.json", FormatError, "absent.json: expected a JSON file of a ModiffConfig, got .*No such file"),
        (4, ConfigError, "expected a ModiffConfig, a name such as 'w8a4', or a dictionary, got 4"),
        (ModiffConfig, ConfigError, "expected a ModiffConfig, a name such as 'w8a4', or a dictionary, got <class"),
    ],
)
def test_what_is_no_config_is_refused_with_what_would_be(text: object, kind: type[ModiffError], message: str):
    with pytest.raises(kind, match=message):
        as_config(text)
