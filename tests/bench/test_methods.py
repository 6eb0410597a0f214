"""The table of the methods: which rows there are, figures that are what they say, each row run once and kept."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import methods
from modiff.errors import FormatError
from modiff.evaluate.features.classifier import Classifier, save_classifier
from modiff.hosts.diffusers.load import load_pipeline
from modiff.methods.registry import METHODS, name_of, quantize
from tests.bench.in_process import run_here
from tests.pixels import saved_pipeline

STEPS, IMAGES = 10, 5


def test_every_row_is_a_method_with_settings_that_exist_and_every_method_has_a_row():
    rows, refused = methods.rows(methods.RECIPES, methods.BITS)
    assert {methods.RECIPES[row.recipe].method for row in rows} == set(METHODS)
    assert len({row.name for row in rows}) == len(rows) == 4 * 30 + 4, "ptqd_mixed has no 4-bit activations"
    assert set(refused) == {
        "accuquant, modulated",
        *(f"{n}, plain" for n, r in methods.RECIPES.items() if r.method == "modiff"),
    }
    for row in rows:
        for calibration in ("quick", "published"):
            config: Any = row.config(calibration, 50)
            bits = (config.weight_bits, config.activation_bits, config.steps)
            assert bits == (row.weight_bits, row.activation_bits, 50)
            assert (getattr(config, "modulation", None) is not None) == row.modulated
            assert name_of(config) == methods.RECIPES[row.recipe].method


def test_rows_hold_what_the_method_gives_and_are_run_once(tmp_path, monkeypatch):
    model, tasks = saved_pipeline(tmp_path / "pipeline"), []
    run_here(monkeypatch, methods, lambda task: tasks.append(Path(task["out"]).stem))
    np.save(tmp_path / "real.npy", np.random.default_rng(0).integers(0, 256, (40, 6, 6), dtype=np.uint8))
    save_classifier(Classifier(channels=(4, 8), classes=3), tmp_path / "classifier")
    places = {"--model": "pipeline", "--reference": "real.npy", "--work": "work", "--json": "rows.json",
              "--page": "docs/methods.md", "--extractor": "classifier"}  # fmt: skip
    arguments = [text for option, name in places.items() for text in (option, str(tmp_path / name))]
    arguments += ["--num-images", str(IMAGES), "--steps", str(STEPS), "--batch", "4", "--bits", "4:8"]

    def start(*more: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["methods.py", *arguments, *more])
        methods.main()
        return json.loads((tmp_path / "rows.json").read_text())

    def sampled(pipe: Any) -> torch.Tensor:
        noise = [torch.Generator().manual_seed(methods.FIRST_NOISE + i) for i in range(IMAGES)]
        runs = [pipe(batch_size=len(part), generator=part, num_inference_steps=STEPS, output_type="np").images
                for part in (noise[:4], noise[4:])]  # fmt: skip
        return torch.from_numpy(np.concatenate(runs)).double()

    full, plain = start("--methods", "minmax", "--modes", "plain")
    assert (full["method"], full["images"], full["relative_l2"]) == ("full_precision", IMAGES, 0)
    assert tasks == ["full_precision", "minmax-w4a8-plain"]
    assert (plain["method"], plain["weight_bits"], plain["activation_bits"]) == ("minmax", 4, 8)
    exact, pipe = sampled(load_pipeline(model)), load_pipeline(model)
    quantize(pipe, methods.Row("minmax", 4, 8, False).config("quick", STEPS), progress=False)
    error = sampled(pipe) - exact
    assert plain["relative_l2"] == pytest.approx(float(error.norm() / exact.norm()), rel=1e-3)
    assert plain["psnr_db"] == pytest.approx(-10 * float(error.square().mean().log10()), rel=1e-3)
    assert plain["fd_data"] > plain["fd_full_precision"] > 0
    weights = sum(p.numel() for p in pipe.unet.parameters() if p.ndim > 1)
    assert weights / 2 < plain["checkpoint_bytes"] < 4 * weights
    assert plain["peak_mib"] > 50

    page = tmp_path / "docs" / "methods.md"
    page.write_text("Written by hand.\n" + page.read_text() + "This too.\n")
    *others, both = start("--methods", "minmax,accuquant", "--modes", "modulated")
    assert others == [full, plain], "rows that were not run again stay"
    assert (plain["anchors"], both["anchors"]) == (None, "exact")
    assert tasks[2:] == ["minmax-w4a8-modulated"], "accuquant has no such row, full precision is kept"
    assert both["modulated"] is True
    text = page.read_text()
    assert text.startswith("Written by hand.")
    assert text.endswith("This too.\n")
    for row in ("plain | -", "modulated | exact"):
        assert text.count(f"| minmax | W4A8 | {row} | 5 | ") == 1
    assert str(tmp_path) not in text
    (images,) = tmp_path.rglob("full_precision.npz")
    images.unlink()
    start("--methods", "minmax", "--modes", "plain")
    for name in ("accuquant, modulated. It learns scales", "modiff_dynamic, plain. MoDiff is modulation"):
        assert page.read_text().count(f"Refused: {name}") == 1, "of a method that was not run, too"
    assert tasks[3:] == ["full_precision"], "its images are made again where they are missing"


def test_a_row_stays_next_to_one_of_more_images_and_is_replaced_by_one_of_as_many():
    identity = dict(zip(methods.IDENTITY, ("minmax", 4, 8, True, "exact"), strict=True))
    few, many, again = ({**identity, "images": n, "relative_l2": e} for n, e in ((64, 0.1), (256, 0.2), (64, 0.3)))
    assert methods.merged([few], [many]) == [few, many]
    assert methods.merged([few, many], [again]) == [again, many]


def test_a_page_without_marks_is_refused_and_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("By hand.\n")
    with pytest.raises(FormatError, match=r"--page: expected the lines .* got none in page\.md"):
        methods.between_marks(page, "table")
