"""CLIP score on a tiny CLIP with drawn weights: the cosine, the pixels, and wrong folders."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from modiff.errors import ConfigError, FormatError
from modiff.evaluate.features.clip_score import ClipScore
from tests.evaluate.features.images import noise
from tests.hosts.parts import TEXT_LENGTH, clip_tokenizer

SIDE = 16


def tiny_clip() -> CLIPModel:
    tokenizer = clip_tokenizer()
    small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(
        **small,
        vocab_size=len(tokenizer),
        max_position_embeddings=TEXT_LENGTH,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
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
PROMPTS = ["a cat", "dog", "a long prompt with many more letters"]


def by_hand(pixels: Tensor, prompts: list[str]) -> Tensor:
    model, tokenizer = tiny_clip(), clip_tokenizer()
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
    with torch.no_grad():
        found = model(pixel_values=(pixels - MEAN) / STD, **tokens)
    image, text = (rows / rows.norm(dim=1, keepdim=True) for rows in (found.image_embeds, found.text_embeds))
    return (image * text).sum(1)


def test_a_score_is_100_times_the_cosine_of_an_image_and_its_own_prompt(folder: Path) -> None:
    score = ClipScore(folder)
    images = noise(0, 3, SIDE, SIDE, 3)
    assert score.name == "CLIP score(tiny)"
    expected = 100 * by_hand(images.permute(0, 3, 1, 2).float() / 255, PROMPTS)
    assert float(expected.min()) > 1
    torch.testing.assert_close(score(images, PROMPTS), expected, rtol=1e-4, atol=1e-3)
    turned = score(images, PROMPTS[1:] + PROMPTS[:1])
    assert not torch.allclose(turned, score(images, PROMPTS), rtol=1e-2)


@torch.no_grad()
def test_an_image_that_points_away_from_its_prompt_scores_0(folder: Path) -> None:
    score = ClipScore(folder)
    score._model.visual_projection.weight.neg_()
    assert score(noise(0, 3, SIDE, SIDE, 3), PROMPTS).tolist() == [0, 0, 0]


def test_images_are_scaled_to_the_shorter_side_and_cut_to_the_middle(folder: Path) -> None:
    score = ClipScore(folder)
    wide = noise(1, 2, SIDE, SIDE + 10, 1)
    cut = wide[:, :, 5 : 5 + SIDE].permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1) / 255
    torch.testing.assert_close(score._pixels(wide), (cut - MEAN) / STD, rtol=0, atol=1e-5)
    flat = torch.full((1, 3 * SIDE, 2 * SIDE, 3), 77, dtype=torch.uint8)
    expected = ((77 / 255 - MEAN) / STD).expand(1, 3, SIDE, SIDE)
    torch.testing.assert_close(score._pixels(flat), expected, rtol=0, atol=1e-5)
    stripes = torch.zeros(1, 3 * SIDE, 3 * SIDE, 1, dtype=torch.uint8)
    stripes[:, :, 1::3] = 255  # finer than the target: antialiasing turns them grey, without it all would be white
    middle = (score._pixels(stripes) * STD + MEAN)[:, :, 4:-4, 4:-4]
    assert float((middle - 1 / 3).abs().max()) < 0.05


def test_what_does_not_match_is_refused(folder: Path) -> None:
    score = ClipScore(folder)
    with pytest.raises(ConfigError, match="a prompt for each of 3 images, got 2"):
        score(noise(0, 3, SIDE, SIDE, 3), PROMPTS[:2])
    with pytest.raises(ConfigError, match="ClipScore: expected uint8 images"):
        score(torch.zeros(1, SIDE, SIDE, 3), PROMPTS[:1])


def test_a_folder_without_a_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="Nothing is downloaded"):
        ClipScore(tmp_path / "none")
    tiny_clip().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text("damaged")
    with pytest.raises(FormatError, match="expected a CLIP model and its tokenizer") as caught:
        ClipScore(tmp_path)
    assert "\n" not in str(caught.value)


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"ClipScore: expected .*transformers.* pip install 'modiff\[eval\]'"):
        ClipScore(tmp_path)
