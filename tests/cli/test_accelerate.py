"""`modiff accelerate` on a tiny folder: what it saves where integers pay, and what it leaves where they do not."""

import json
from pathlib import Path

import pytest

from modiff.model.accelerate import settings
from modiff.model.accelerate.loops import MODIFF, Race
from tests.cli.commands import assert_one_line, done, modiff


@pytest.mark.parametrize("pays", [True, False])
def test_the_faster_pipeline_is_saved_where_it_wins(pays: bool, model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("modiff.api.cache_folder", lambda: tmp_path)
    monkeypatch.setattr(settings, "measure_layer", lambda *_: {"float": 1.0, "plain": 0.8, "modulated": 0.5})
    monkeypatch.setattr(Race, "pace", lambda _, side: 2.0 if pays and side == MODIFF else 1.0)
    output = tmp_path / "fast"
    words = ("--no-compile", "--steps", 3, "--max-error", 0.2, "--json", "-", "-o", output)
    result = done(modiff("accelerate", model, *words))
    values = json.loads(result.stdout)
    assert (values["accelerated"], values["folder"]) == (pays, str(output) if pays else None)
    assert ("2.00x as fast as floats" in result.stderr) == ("saved: " in result.stderr) == pays
    assert output.exists() == pays
    if pays:
        assert done(modiff("sample", output, "-n", 1, "--steps", 2, "-o", tmp_path / "images"))
        assert_one_line(modiff("accelerate", model, *words), "expected a new or an empty folder, got files in it")
