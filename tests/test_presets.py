"""Presets hold what their names say; a config by name is a preset, a family with bits, or a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from modiff import LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig, presets
from modiff.errors import ConfigError, FormatError, ModiffError
from modiff.presets import PRESETS, as_config

SHORT = {"w8a8": (8, 8), "w8a7": (8, 7), "w8a4": (8, 4), "w8a3": (8, 3), "w4a8": (4, 8), "w4a4": (4, 4)}


def test_a_short_name_is_the_method_at_its_bits_and_there_are_no_others():
    named = {name: getattr(presets, name)() for name in vars(presets) if name[0] == "w" and name[1].isdigit()}
    assert named == {name: presets.modulated(*bits) for name, bits in SHORT.items()}
    assert {name: as_config(name) for name in PRESETS} == named


def test_the_families_differ_in_their_loop_and_tuned_is_stable_at_any_bits():
    weight, activation, paper = WeightConfig(bits=4), QuantizerConfig(bits=None), {"anchor_weights": "quantized"}
    for preset, loop in (
        (presets.modulated, ModulationConfig()),
        (presets.plain, None),
        (presets.published, ModulationConfig(**paper)),
        (presets.uncompensated, ModulationConfig(**paper, error_compensation="none")),
    ):
        assert preset(4, None).layer == LayerConfig(weight=weight, activation=activation, modulation=loop)
    tuned = [presets.tuned(None, bits).layer for bits in range(2, 9)]
    assert {(layer.rotation, layer.modulation.predictor) for layer in tuned} == {("hadamard", "hold")}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain:8:4", presets.plain(8, 4)),
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
        (presets.w4a8(), presets.w4a8()),
        (None, presets.w8a8()),
    ],
    ids=str,
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
        ("w16a16", ConfigError, "bits: expected None, 0 or 2 to 8, got 16"),
        ("modulated:8", ConfigError, "modulated:8:4"),
        ("modulated:8:four", ConfigError, "expected bits such as"),
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
