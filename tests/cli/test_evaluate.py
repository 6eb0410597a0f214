"""`modiff evaluate` end to end on a tiny folder: table, JSON and report; resuming; a damaged batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from modiff.evaluate.features.classifier import Classifier, save_classifier
from modiff.evaluate.suite import run as logic
from tests.cli.commands import assert_one_line, done, modiff

NAMES = ["full precision", "half the steps", "plain W8A4", "modulated W8A4"]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge") / "tiny"
    save_classifier(Classifier(channels=(4, 8), classes=3), folder)
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(logic.run_suite.__kwdefaults__, "resamples", 10)


def invoke(model: object, judge: object, *arguments: object) -> Result:
    return modiff("evaluate", model, "--extractor", judge, "--steps", 4, "-n", 12, "--batch-size", 6, *arguments)


def test_it_prints_the_table_and_writes_json_and_report(model: Path, judge: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/modiff", "evaluate", "a model"])
    np.save(tmp_path / "real.npy", np.random.default_rng(0).integers(0, 255, (20, 8, 8, 1), np.uint8))
    words = ["--json", "out/a.json", "--report", "out/report", "--reference", "real.npy", "--seed", 7]
    result = done(invoke(model, judge, *words))
    written = json.loads(Path("out/a.json").read_text())
    assert [c["name"] for c in written["configurations"]] == NAMES
    assert written["command"] == "modiff evaluate 'a model'"
    assert written["settings"].items() >= {"seed": 7, "num_images": 12, "steps": 4}.items()
    figures = {m["name"]: m for m in written["configurations"][3]["metrics"]}
    assert {"fd_to_full_precision", "fd_to_reference", "psnr_db", "gbops", "seconds"} <= set(figures)
    assert figures["fd_to_reference"]["extractor"].startswith("tiny-")
    line = next(x for x in result.stdout.splitlines() if x.startswith("modulated W8A4"))
    assert f"{figures['relative_l2']['value']:.4f}" in line
    assert "report: out/report/report.html" in result.stdout
    assert "modiff evaluate &#x27;a model&#x27;" in Path("out/report/report.html").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["modiff-evaluation", "out", "real.npy"]


def test_rows_are_those_of_the_options_and_a_damaged_batch_is_named(model: Path, judge: Path) -> None:
    words = ["--configs", "plain:8:3, mine.json", "--json", "a.json"]
    Path("mine.json").write_text(json.dumps({"min_weights": 7}))
    done(invoke(model, judge, *words))
    names = [c["name"] for c in json.loads(Path("a.json").read_text())["configurations"]]
    assert names == ["full precision", "half the steps", "plain W8A3", "mine"]
    (batch, *_) = sorted(Path("modiff-evaluation").glob("plain*/*.safetensors"))
    batch.write_bytes(b"")
    assert_one_line(invoke(model, judge, *words), f"{batch}: expected a batch of 6 images")
