"""A config by name: presets, families with bits, files; and one clear line for anything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from modiff import presets
from modiff.checkpoint.named_config import named_config, preset_names
from modiff.errors import ConfigError, FormatError, ModiffError


def test_every_preset_without_arguments_goes_by_its_name() -> None:
    assert {"w8a8", "w8a4", "w8a3", "w4a8", "w4a4"} <= set(preset_names())
    for name in preset_names():
        assert named_config(name) == getattr(presets, name)()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain:8:4", presets.plain(8, 4)),
        ("modulated:4:3", presets.modulated(4, 3)),
        ("uncompensated:8:4", presets.uncompensated(8, 4)),
        ("tuned:32:4", presets.tuned(None, 4)),
        ("plain:8:32", presets.plain(8, None)),
        ("modulated:8:0", presets.modulated(8, 0)),
    ],
)
def test_a_family_takes_weight_bits_then_activation_bits_and_32_is_full_precision(text: str, expected: object) -> None:
    assert named_config(text) == expected


def test_a_json_file_is_a_config(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(presets.tuned(8, 3).to_json())
    assert named_config(str(path)) == presets.tuned(8, 3)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("w8a5x", ConfigError, "expected a preset .*w8a4.* got 'w8a5x'"),
        ("modulated:8", ConfigError, "modulated:8:4"),
        ("modulated:8:four", ConfigError, "expected a preset"),
        ("plain:8:1", ConfigError, "expected None, 0 or 2 to 8, got 1"),
        ("plain:9:4", ConfigError, "expected None or 2 to 8, got 9"),
        ("tuned:8:32", ConfigError, "2 to 8 activation bits for tuned"),
        ("plain", ConfigError, "expected a preset"),
        ("absent.json", FormatError, "absent.json: expected a JSON file of a ModiffConfig, got No such file"),
    ],
)
def test_what_names_no_config_says_what_would(text: str, kind: type[ModiffError], message: str) -> None:
    with pytest.raises(kind, match=message):
        named_config(text)


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "JSON"), (b'{"bits": 4}', "'bits'"), (b"\xff\xfe", "expected")]
)
def test_a_file_that_is_no_config_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    with pytest.raises(ModiffError, match=message):
        named_config(str(path))


@pytest.mark.parametrize("text", ["w8a8", "modulated:8:4", "plain:4:8"])
def test_integer_behind_a_name_executes_on_integers(text):
    config = named_config(f"{text}:integer")
    assert config == named_config(text).on_integers()
    assert config.layer.execution == "integer"
    assert named_config(text).layer.execution == "simulated"
