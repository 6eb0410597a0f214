"""LPIPS and CLIP score in the suite, with stand-ins for the packages: names, means, intervals, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modiff.errors import ConfigError
from modiff.evaluate import suite_extras as module
from modiff.evaluate.suite import Suite, run_suite
from modiff.evaluate.suite_extras import load_extras
from modiff.evaluate.suite_metrics import Measurement
from modiff.evaluate.suite_plans import Preset, plans_of
from modiff.generate.conditions import Conditions
from tests.evaluate.suite_fakes import SHAPE, FakeExtractor, FakeSource

N = 10
CHOSEN = Preset(num_images=N, steps=4, configs=("plain:8:4",))
PROMPTS = ("a fox", "a cat", "two words more")


class FakePerceptual:
    """The mean absolute difference of a pair."""

    def __init__(self, network: str, *, device: str) -> None:
        self.name = f"LPIPS({network})"

    def __call__(self, images: Tensor, reference: Tensor) -> Tensor:
        return (images.float() - reference.float()).abs().mean(dim=(1, 2, 3))


class FakeClip:
    """The length of the prompt, and a little of the image."""

    def __init__(self, folder: Path, *, device: str) -> None:
        self.name = f"CLIP score({folder.name})"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        assert len(images) == len(prompts)
        return torch.tensor([float(len(prompt)) for prompt in prompts]) + images.float().mean(dim=(1, 2, 3)) / 1e3


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PerceptualDistance", FakePerceptual)
    monkeypatch.setattr(module, "ClipScore", FakeClip)
    monkeypatch.setattr(module, "BATCH", 4)  # so that the parts do not coincide with the prompts


def run(folder: Path, text: str | None, source: FakeSource | None = None) -> Suite:
    clip = Path("tiny") if text and "clip" in text else None
    extras = load_extras(text, clip=clip, conditions=Conditions(prompts=PROMPTS))
    return run_suite(
        source or FakeSource(), FakeExtractor(), CHOSEN, folder, extras=extras, batch_size=5, resamples=10,
        progress=False,
    )  # fmt: skip


def figure(suite: Suite, row: int, name: str) -> Measurement:
    (found,) = [m for m in suite.rows[row].metrics if m["name"] == name]
    return found


def test_lpips_is_the_mean_over_pairs_of_one_seed_with_interval_and_network(tmp_path: Path) -> None:
    suite = run(tmp_path, "lpips")
    full, _, plain = plans_of(CHOSEN)
    a, b = (FakeSource().images(plan, range(N)).astype(float) for plan in (plain, full))
    found = figure(suite, 2, "lpips")
    assert found["value"] == pytest.approx(np.abs(a - b).mean())
    assert (found["extractor"], found["label"], found["n"]) == ("LPIPS(alex)", "LPIPS(alex)", N)
    assert found["low"] is not None
    assert found["high"] is not None
    assert found["low"] < np.abs(a - b).mean() < found["high"]
    assert "10 images: a bootstrap interval of fewer than 30 is too narrow" in found["note"]
    assert suite.rows[0].metric("lpips") is None
    assert suite.settings["metrics"] == ["LPIPS(alex)"]


def test_clip_compares_each_image_with_the_prompt_of_its_index_also_for_full_precision(tmp_path: Path) -> None:
    suite = run(tmp_path, "clip")
    lengths = [len(PROMPTS[i % 3]) for i in range(N)]
    for row, plan in enumerate(plans_of(CHOSEN)):
        images = FakeSource().images(plan, range(N)).astype(float)
        found = figure(suite, row, "clip_score")
        assert found["value"] == pytest.approx(np.mean(lengths) + images.mean() / 1e3, rel=1e-6)
        assert (found["extractor"], found["n"]) == ("CLIP score(tiny)", N)


def test_they_are_added_to_a_finished_run_without_drawing_again(tmp_path: Path) -> None:
    run(tmp_path, None)
    source = FakeSource()
    assert figure(run(tmp_path, "lpips, clip", source), 1, "lpips")["value"]
    assert source.drawn == []
    assert run(tmp_path, None, source).rows[1].metric("lpips") is None


def test_images_that_were_not_finite_are_told_here_too(tmp_path: Path) -> None:
    suite = run(tmp_path, "lpips", FakeSource(broken=["plain W8A4"]))
    assert figure(suite, 2, "lpips")["note"].startswith("10 of 10 images were not finite")


def test_what_cannot_be_judged_is_said_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, images: Tensor, reference: Tensor) -> Tensor:
        assert tuple(images.shape) == (1, *SHAPE)
        raise ConfigError("too small")

    monkeypatch.setattr(FakePerceptual, "__call__", refuse)
    source = FakeSource()
    with pytest.raises(ConfigError, match="too small"):
        run(tmp_path, "lpips", source)
    assert source.drawn == []


@pytest.mark.parametrize(
    ("text", "clip", "prompts", "message"),
    [
        ("fid", None, PROMPTS, "--metrics: expected lpips or clip, or both between commas, got 'fid'"),
        ("lpips,lpips", None, PROMPTS, "--metrics: expected lpips or clip"),
        ("", None, PROMPTS, "--metrics: expected lpips or clip"),
        ("lpips,clip", Path("tiny"), (), "--metrics clip: expected prompts, got none.*Give --prompts FILE"),
        ("clip", None, PROMPTS, "together with --metrics clip, got --metrics clip alone"),
        ("lpips", Path("tiny"), PROMPTS, "together with --metrics clip, got tiny without it"),
    ],
)
def test_names_that_mean_nothing_are_one_line(
    text: str, clip: Path | None, prompts: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_extras(text, clip=clip, conditions=Conditions(prompts=prompts))


def test_without_the_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real classes
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"expected .*torchvision.*Install torchvision of torch's own build"):
        load_extras("lpips", clip=None, conditions=Conditions())
    with pytest.raises(ConfigError, match=r"expected .*transformers.* pip install 'modiff\[eval\]'"):
        load_extras("clip", clip=Path("tiny"), conditions=Conditions(prompts=PROMPTS))
