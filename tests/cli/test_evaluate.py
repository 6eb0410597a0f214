"""`modiff evaluate` end to end on a tiny folder: table, JSON and report; resuming; a damaged batch."""

import json
from pathlib import Path

import numpy as np

from modiff.evaluate.features.classifier import Classifier, save_classifier
from modiff.evaluate.suite import run as logic
from tests.cli.commands import done, modiff

NAMES = ["full precision", "half the steps", "plain W8A4", "modulated W8A4"]


def test_it_prints_the_table_and_writes_json_and_report(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(logic.run_suite.__kwdefaults__, "resamples", 10)
    save_classifier(Classifier(channels=(4, 8), classes=3), tmp_path / "tiny")
    monkeypatch.setattr("sys.argv", ["/usr/bin/modiff", "evaluate", "a model"])
    np.save(tmp_path / "real.npy", np.random.default_rng(0).integers(0, 255, (20, 8, 8, 1), np.uint8))
    words = ["--json", "out/a.json", "--report", "out/report", "--reference", "real.npy", "--seed", 7]
    words += ["--configs", "plain:8:4, modulated:8:4"]
    words += ["--extractor", "tiny", "--steps", 4, "-n", 12, "--batch-size", 6]
    result = done(modiff("evaluate", model, *words))
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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["modiff-evaluation", "out", "real.npy", "tiny"]
