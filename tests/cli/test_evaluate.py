"""`modiff evaluate` end to end on a tiny folder: table, JSON and report; resuming; one line for mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from modiff.evaluate.features.classifier import Classifier, save_classifier
from modiff.evaluate.suite import run as logic
from tests.cli.commands import assert_one_line, done, modiff
from tests.pixels import pixel_pipeline, saved_pipeline

NAMES = ["full precision", "half the steps", "plain W8A4", "modulated W8A4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_pipeline(tmp_path_factory.mktemp("model") / "pipeline")


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


def test_it_prints_the_table_and_writes_json_and_report(
    model: Path, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/modiff", "evaluate", "a model"])
    np.save(tmp_path / "real.npy", np.random.default_rng(0).integers(0, 255, (20, 8, 8, 1), np.uint8))
    result = invoke(
        model, judge, "--json", "out/found.json", "--report", "out/report", "--reference", "real.npy", "--seed", 7
    )
    done(result)
    found = json.loads(Path("out/found.json").read_text())
    assert [c["name"] for c in found["configurations"]] == NAMES
    assert found["command"] == "modiff evaluate 'a model'"
    assert (found["settings"]["seed"], found["settings"]["num_images"], found["settings"]["steps"]) == (7, 12, 4)
    figures = {m["name"]: m for m in found["configurations"][3]["metrics"]}
    assert {"fd_to_full_precision", "fd_to_reference", "psnr_db", "gbops", "seconds"} <= set(figures)
    assert figures["fd_to_reference"]["extractor"].startswith("tiny-")
    line = next(x for x in result.stdout.splitlines() if x.startswith("modulated W8A4"))
    assert f"{figures['relative_l2']['value']:.4f}" in line
    assert "report: out/report/report.html" in result.stdout
    page = Path("out/report/report.html").read_text()
    assert "Where the error arises" in page
    assert "modiff evaluate &#x27;a model&#x27;" in page
    assert sorted(p.name for p in tmp_path.iterdir()) == ["modiff-evaluation", "out", "real.npy"]


def test_it_goes_on_where_it_was_stopped(model: Path, judge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[tuple[str, range]] = []
    real = logic.Store.save

    def stopping(self: Any, plan: Any, indices: range, *batch: Any) -> None:
        if len(saved) == 5:
            raise KeyboardInterrupt
        real(self, plan, indices, *batch)
        saved.append((plan.name, indices))

    monkeypatch.setattr(logic.Store, "save", stopping)
    assert_one_line(invoke(model, judge), "interrupted", code=130)
    saved.append(("stop", range(0)))
    assert invoke(model, judge).exit_code == 0
    assert [s for s in saved if s[0] != "stop"] == [(name, span) for name in NAMES for span in (range(6), range(6, 12))]


def test_configs_take_the_place_of_the_presets(model: Path, judge: Path) -> None:
    Path("mine.json").write_text(json.dumps({"min_weights": 7}))
    result = invoke(model, judge, "--configs", "w8a3, mine.json", "--json", "found.json")
    done(result)
    names = [c["name"] for c in json.loads(Path("found.json").read_text())["configurations"]]
    assert names == ["full precision", "half the steps", "modulated W8A3", "mine"]


def test_a_report_without_configurations_to_watch_leaves_the_layers_out(
    model: Path, judge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modiff.evaluate.suite.run.watched_layers", lambda source, plans: None)
    monkeypatch.setattr("modiff.evaluate.report.charts.file_bytes", lambda draw, kind: b"<svg/>")
    assert invoke(model, judge, "--configs", "plain:8:4", "--report", "report").exit_code == 0
    assert "Where the error arises" not in Path("report/report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--configs", "w9a9"], "'w9a9'"),
        (["--configs", ""], "got ''"),
        (["--configs", "w8a4,modulated:8:4"], "got modulated W8A4 twice"),
        (["--preset", "fast"], "expected one of quick, full, got 'fast'"),
        (["--steps", "1"], "--steps: expected 2 or more"),
        (["--steps", "2000"], "--steps: expected at most 1000"),
        (["-n", "3"], "--num-images: expected 8 or more, got 3"),
        (["--batch-size", "0"], "--batch-size: expected 1 or more"),
        (["--scheduler", "nonsense"], "'nonsense'"),
        (["--reference", "absent.npz"], "absent.npz: expected a file or a folder of images"),
        (["--extractor", "absent"], "absent: expected 'classifier'"),
        (["--device", "tpu"], "device: expected"),
        (["--metrics", "fid"], "--metrics: expected lpips or clip"),
        (["--metrics", "clip"], "--metrics clip: expected --clip with the folder of a CLIP model, and prompts"),
        (["--labels", "0-9"], "expected no --label N, got 0"),
        (["--labels", "x"], "--labels: expected numbers and ranges"),
        (["--prompts", "absent.txt"], "absent.txt: expected a text file"),
    ],
)
def test_mistakes_are_one_line(model: Path, judge: Path, words: list[str], message: str) -> None:
    assert_one_line(invoke(model, judge, *words), message)


def test_a_conditional_pipeline_is_one_line(judge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Prompted(type(pixel_pipeline())):  # type: ignore[misc]
        def __call__(self, prompt: str, batch_size: int = 1) -> None:
            raise NotImplementedError

    pipe = pixel_pipeline()
    prompted = Prompted(unet=pipe.unet, scheduler=pipe.scheduler)
    monkeypatch.setattr("modiff.hosts.diffusers.load.load_pipeline", lambda model, device: prompted)
    assert_one_line(invoke("any", judge), "expected an unconditional pipeline, got Prompted")


@pytest.mark.parametrize("option", ["--json", "--report", "-o"])
def test_an_output_that_cannot_be_written_is_one_line(model: Path, judge: Path, tmp_path: Path, option: str) -> None:
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "below"
    result = invoke(model, judge, option, below)
    assert_one_line(result, f"{below}")
    assert "expected a file that can be written" in result.stderr
    assert not (tmp_path / "modiff-evaluation").exists()


def test_a_damaged_batch_is_one_line_that_says_what_to_do(model: Path, judge: Path) -> None:
    assert invoke(model, judge).exit_code == 0
    (batch, *_) = sorted(Path("modiff-evaluation").glob("plain*/*.safetensors"))
    batch.write_bytes(b"")
    assert_one_line(invoke(model, judge), f"{batch}: expected a batch of 6 images")
    batch.unlink()
    assert invoke(model, judge).exit_code == 0
