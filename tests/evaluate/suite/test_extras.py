"""LPIPS and CLIP score: the networks' inputs, means and intervals, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from modiff.errors import ConfigError, FormatError
from modiff.evaluate.suite import extras as module
from modiff.evaluate.suite.extras import Clip, Lpips, load_extras
from modiff.evaluate.suite.judge import ImageSet
from modiff.evaluate.suite.plans import Preset
from modiff.evaluate.suite.run import run_suite
from modiff.generate.job import Conditions
from tests.evaluate.features.images import noise
from tests.evaluate.suite.fakes import FakeExtractor, FakeSource
from tests.hosts.tiny import TEXT_LENGTH, clip_tokenizer

SIDE = 16


def tiny_clip() -> CLIPModel:
    tokenizer = clip_tokenizer()
    small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("eos", "bos", "pad")}
    text = CLIPTextConfig(**small, **ids, vocab_size=len(tokenizer), max_position_embeddings=TEXT_LENGTH)
    vision = CLIPVisionConfig(**small, image_size=SIDE, patch_size=8)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=6)
    torch.manual_seed(3)
    model = CLIPModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "tiny"
    tiny_clip().save_pretrained(path)
    clip_tokenizer().save_pretrained(path)
    return path


MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
PROMPTS = ("a cat", "dog", "a long prompt with many more letters")
CONDITIONS = Conditions(prompts=PROMPTS)


def images_of(pixels: Tensor) -> ImageSet:
    return ImageSet(torch.zeros(len(pixels), 1), images=pixels.numpy())


def test_clip_scores_are_100_times_the_cosine_of_each_image_and_the_prompt_of_its_index(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH", 4)  # so that batches do not coincide with the prompts
    clip, images = Clip(folder, CONDITIONS), noise(0, 10, SIDE, SIDE, 3)
    prompts = [PROMPTS[i % 3] for i in range(10)]
    tokens = clip_tokenizer()(prompts, padding=True, truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
    with torch.no_grad():
        output = tiny_clip()(pixel_values=(images.permute(0, 3, 1, 2) / 255 - MEAN) / STD, **tokens)
    image, text = (rows / rows.norm(dim=1, keepdim=True) for rows in (output.image_embeds, output.text_embeds))
    expected = 100 * (image * text).sum(1)
    assert float(expected.min()) > 0
    full = images_of(images)
    (row,) = clip.measure(full, full, 10)  # for full precision too
    assert row["value"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert (row["name"], row["label"], row["n"]) == ("clip_score", "CLIP score(tiny)", 10)


def test_images_are_scaled_to_the_shorter_side_and_cut_to_the_middle(folder: Path) -> None:
    clip = Clip(folder, CONDITIONS)
    wide = noise(1, 2, SIDE, SIDE + 10, 1)
    cut = wide[:, :, 5 : 5 + SIDE].permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1) / 255
    torch.testing.assert_close(clip._pixels(wide), (cut - MEAN) / STD, rtol=0, atol=1e-5)
    stripes = torch.zeros(1, 3 * SIDE, 3 * SIDE, 1, dtype=torch.uint8)
    stripes[:, :, 1::3] = 255  # finer than the target: antialiasing turns them grey, without it all would be white
    middle = (clip._pixels(stripes) * STD + MEAN)[:, :, 4:-4, 4:-4]
    assert float((middle - 1 / 3).abs().max()) < 0.05


def test_a_folder_without_a_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="Nothing is downloaded"):
        Clip(tmp_path / "none", CONDITIONS)
    tiny_clip().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text("damaged")
    with pytest.raises(FormatError, match="expected a CLIP model and its tokenizer") as caught:
        Clip(tmp_path, CONDITIONS)
    assert "\n" not in str(caught.value)


class StandIn(nn.Module):
    """The interface of `lpips.LPIPS`: images (N, 3, H, W) in [-1, 1], distances (N, 1, 1, 1)."""

    def __init__(self, net: str, version: str, verbose: bool) -> None:
        super().__init__()
        self.settings = (net, version, verbose)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        assert first.shape[1] == 3
        assert -1 <= float(first.min()) <= float(first.max()) <= 1
        return (first - second).abs().mean(dim=(1, 2, 3), keepdim=True)


@pytest.fixture
def lpips(monkeypatch: pytest.MonkeyPatch) -> Lpips:
    package = ModuleType("lpips")
    package.LPIPS = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", package)
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    return Lpips()


def test_lpips_is_the_mean_over_scaled_pairs_of_one_seed_with_interval_and_network(
    lpips: Lpips, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH", 4)
    assert lpips._model.settings == ("alex", "0.1", False)
    a, b = noise(0, 10, 32, 32, 3), noise(1, 10, 32, 32, 3)
    full = images_of(b)
    (row,) = lpips.measure(images_of(a), full, 10)
    assert row["value"] == pytest.approx(float((a.double() - b.double()).abs().mean()) / 127.5, rel=1e-5)
    assert (row["extractor"], row["label"], row["n"]) == ("LPIPS(alex)", "LPIPS(alex)", 10)
    assert row["low"] < row["value"] < row["high"]
    assert "10 images: a bootstrap interval of fewer than 30 is too narrow" in row["note"]
    assert lpips.measure(full, full, 10) == []


def test_they_are_added_to_a_finished_run_without_drawing_again(lpips: Lpips, tmp_path: Path) -> None:
    lpips.check = lambda shape: None  # the images of the fake are too small for the network
    chosen = Preset(num_images=10, steps=4, configs=("plain:8:4",))
    options = {"batch_size": 5, "resamples": 5, "progress": False}
    first, source = FakeSource(broken=True), FakeSource()
    assert run_suite(first, FakeExtractor(), chosen, tmp_path, **options).rows[1].metric("lpips") is None
    suite = run_suite(source, FakeExtractor(), chosen, tmp_path, extras=[lpips], **options)
    assert source.drawn == []
    assert suite.rows[2].metric("lpips")["note"].startswith("10 of 10 images were not finite")
    assert suite.settings["metrics"] == ["LPIPS(alex)"]


def test_names_that_mean_nothing_are_one_line() -> None:
    for text, clip, prompts, message in (
        ("fid", None, PROMPTS, "metrics: expected lpips or clip, or both between commas, got 'fid'"),
        ("lpips,lpips", None, PROMPTS, "metrics: expected lpips or clip"),
        ("lpips,clip", Path("tiny"), (), "metrics: expected .* and 0 prompts.*prompts=FILE"),
        ("clip", None, PROMPTS, "got 'metrics=clip, clip=None and 3 prompts"),
        ("lpips", Path("tiny"), PROMPTS, "got 'metrics=lpips, clip=tiny and"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_extras(text, clip=clip, conditions=Conditions(prompts=prompts))


def test_without_the_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"expected .*torchvision.*Get torchvision in one command with torch"):
        load_extras("lpips", clip=None, conditions=Conditions())
    with pytest.raises(ConfigError, match=r"expected .*transformers.* pip install 'modiff\[eval\]'"):
        load_extras("clip", clip=Path("tiny"), conditions=Conditions(prompts=PROMPTS))
