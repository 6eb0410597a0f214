"""The figures of a configuration, LPIPS and CLIP score among them: those of the metrics, honestly named."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from modiff.errors import ConfigError, FormatError
from modiff.evaluate.features.extractor import Features
from modiff.evaluate.features.inception import Inception
from modiff.evaluate.metrics.frechet import Moments, frechet_distance, frechet_interval
from modiff.evaluate.metrics.sets import kernel_distance, within_manifold
from modiff.evaluate.pipelines import DrawnImages
from modiff.evaluate.suite import extras as extras
from modiff.evaluate.suite import judge as module
from modiff.evaluate.suite.extras import Clip, Lpips, load_extras
from modiff.evaluate.suite.judge import ImageSet, Judge, Measurement, gather, gather_real
from modiff.evaluate.suite.plans import Preset
from modiff.evaluate.suite.run import run_suite
from modiff.generate.job import Conditions
from tests.evaluate.fakes import FakeExtractor, FakeSource, noise
from tests.hosts.tiny import TEXT_LENGTH, clip_tokenizer

N, RESAMPLES = 24, 20
EXTRACTOR = FakeExtractor()


def batches(seed: int, *, noise: float = 0.0, broken: int = 0) -> list[tuple[DrawnImages, Features]]:
    """Images of one seed, with as much noise added; in batches of 10, 10 and 4."""
    images = np.random.default_rng(seed).integers(30, 220, (N, 12, 12, 1)).astype(np.float64)
    images = (images + noise * np.random.default_rng(99).standard_normal(images.shape)).clip(0, 255).astype(np.uint8)
    return [
        (DrawnImages(batch, 0.5 * len(batch), 2**20 * len(batch), broken, 42.0), EXTRACTOR(torch.from_numpy(batch)))
        for batch in np.split(images, [10, 20])
    ]


FULL = gather(batches(0))
DRAWN = gather(batches(0, noise=12.0))
REAL = gather_real([drawn.images for drawn, _ in batches(5)], EXTRACTOR)
ROWS = Judge(EXTRACTOR, FULL, REAL, RESAMPLES).measure(DRAWN)


def row(name: str, rows: list[Measurement] = ROWS) -> Measurement:
    return next(r for r in rows if r["name"] == name)


def test_distances_of_sets_are_those_of_the_metrics_and_an_infinite_psnr_is_said_not_shown() -> None:
    same = row("psnr_db", Judge(EXTRACTOR, FULL, None, RESAMPLES).measure(gather(batches(0))))
    assert (same["value"], same["note"].partition(":")[0]) == (None, "Infinite")
    for name, other in (("full_precision", FULL), ("reference", REAL)):
        expected = frechet_distance(Moments.of(DRAWN.pooled), Moments.of(other.pooled))
        assert row(f"fd_to_{name}")["value"] == pytest.approx(expected)
        spatial = other.spatial if other is REAL else Moments.of(other.spatial)
        expected = frechet_distance(Moments.of(DRAWN.spatial), spatial)
        assert row(f"spatial_fd_to_{name}")["value"] == pytest.approx(expected)
        kernel = kernel_distance(DRAWN.pooled, other.pooled, subsets=100, subset_size=N // 2)
        assert row(f"kernel_distance_to_{name}")["value"] == pytest.approx(kernel[0])
        assert row(f"precision_to_{name}")["value"] == within_manifold(DRAWN.pooled, other.pooled).double().mean()
        assert row(f"recall_to_{name}")["value"] == within_manifold(other.pooled, DRAWN.pooled).double().mean()


def test_every_interval_holds_its_figure_and_has_a_width() -> None:
    with_interval = [r for r in ROWS if r["low"] is not None]
    assert {r["name"] for r in with_interval} == {
        "score", "relative_l2", "psnr_db", "ssim",
        *(f"{m}_to_{a}" for m in ("fd", "spatial_fd", "kernel_distance", "precision", "recall")
          for a in ("full_precision", "reference")),
    }  # fmt: skip
    for r in with_interval:
        assert r["low"] <= r["value"] <= r["high"], r
    assert row("fd_to_reference")["low"] < row("fd_to_reference")["high"]


def test_the_kernel_distances_interval_is_as_wide_as_the_spread_of_independent_sets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The delete-d jackknife against the truth: the spread of the distance over many sets of 40."""
    monkeypatch.setattr(module, "SUBSET_SIZE", 10)
    rng = np.random.default_rng(0)
    draws = [[torch.from_numpy(rng.standard_normal((40, 2)) + shift) for shift in (0, 1)] for _ in range(200)]
    truth = np.std([kernel_distance(a, b, subsets=1, subset_size=40)[0] for a, b in draws])
    widths = []
    for a, b in draws[:12]:
        sets = [ImageSet(x.float(), images=np.zeros((40, 1, 1, 1), np.uint8)) for x in (a, b)]
        figure = row("kernel_distance_to_reference", Judge(EXTRACTOR, sets[0], sets[1], 1).measure(sets[0]))
        widths.append((figure["high"] - figure["low"]) / (2 * 1.96))
    assert np.mean(widths) == pytest.approx(truth, rel=0.35)


def test_labels_carry_the_extractors_name_and_say_fid_and_which_weights_only_with_inception() -> None:
    labels = {r["name"]: r["label"] for r in ROWS}
    assert labels["fd_to_full_precision"] == "FD2FP32(quadrants)"
    assert labels["fd_to_reference"] == "FD(quadrants) to reference"
    assert labels["kernel_distance_to_full_precision"] == "KD(quadrants) to full precision"
    assert labels["score"] == "score(quadrants)"
    assert not any(word in label.lower() for label in labels.values() for word in ("fid", "kid", "inception"))
    assert row("relative_l2")["extractor"] is None
    extractor = Inception.__new__(Inception)  # its name and note alone: the features are others'
    extractor.note, extractor.name = "Other weights.", "inception-v3:01234567:tensorflow"
    rows = Judge(extractor, FULL, REAL, 3).measure(DRAWN)
    labels = {r["name"]: r["label"] for r in rows}
    assert (labels["fd_to_reference"], labels["fd_to_full_precision"]) == ("FID to reference", "FID2FP32")
    assert (labels["kernel_distance_to_reference"], labels["score"]) == ("KID to reference", "IS")
    assert labels["spatial_fd_to_reference"] == "sFID to reference"
    assert labels["precision_to_reference"] == "precision(inception-v3:01234567:tensorflow) to reference"
    assert all(extractor.note in r["note"] for r in rows if r["extractor"] is not None)


def test_full_precision_is_not_compared_with_itself_but_its_halves_are() -> None:
    rows = Judge(EXTRACTOR, FULL, REAL, RESAMPLES).measure(FULL)
    names = {r["name"] for r in rows}
    assert {"fd_to_reference", "fd_between_halves", "gbops"} <= names
    assert not {n for n in names if "full_precision" in n} | (names & {"relative_l2", "psnr_db"})
    expected = frechet_distance(Moments.of(FULL.pooled[:12]), Moments.of(FULL.pooled[12:]))
    assert row("fd_between_halves", rows)["value"] == pytest.approx(expected)
    assert row("fd_between_halves", rows)["low"] < expected < row("fd_between_halves", rows)["high"]
    assert "12 images: the distance is biased" in row("fd_between_halves", rows)["note"]


def test_many_dimensions_have_an_interval_of_few_resamples_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_RESAMPLED", 3)
    monkeypatch.setattr(module, "FEW_RESAMPLES", 5)
    rows = Judge(EXTRACTOR, FULL, REAL, RESAMPLES).measure(DRAWN)
    spread = frechet_interval(DRAWN.pooled, Moments.of(REAL.pooled), resamples=5, kind="normal")
    assert (row("fd_to_reference", rows)["low"], row("fd_to_reference", rows)["high"]) == pytest.approx(
        (spread["low"], spread["high"])
    )
    for name in ("fd_to_full_precision", "fd_to_reference"):
        figure = row(name, rows)
        assert figure["high"] - figure["value"] == pytest.approx(figure["value"] - figure["low"])
        assert "1.96 standard deviations over 5 resamples" in figure["note"]
    assert "Same seeds" in row("fd_to_full_precision", rows)["note"]


def test_images_that_were_not_finite_are_told_with_every_figure() -> None:
    rows = Judge(EXTRACTOR, FULL, REAL, RESAMPLES).measure(gather(batches(0, noise=12.0, broken=2)))
    assert all(r["note"].startswith("6 of 24 images were not finite and count as black.") for r in rows)
    assert not any("not finite" in r["note"] for r in ROWS)


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
    monkeypatch.setattr(extras, "_BATCH", 4)  # so that batches do not coincide with the prompts
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
    monkeypatch.setattr(extras, "_BATCH", 4)
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
