"""The digest tells models apart by weights and settings, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from modiff.generate.digest import digest, settings
from modiff.hosts.diffusers.load import load_pipeline
from tests.pixels import pixel_pipeline


def test_the_same_model_from_a_folder_or_with_another_scheduler_has_the_same_digest(model: Path) -> None:
    sampled = pixel_pipeline()
    sampled.scheduler = DDIMScheduler(beta_schedule="scaled_linear")
    assert {digest(load_pipeline(model)), digest(sampled)} == {digest(pixel_pipeline())}


def last_bit(pipe: DiffusionPipeline) -> None:
    weight = pipe.unet.conv_out.weight.data.view(-1)
    weight[-1] = torch.nextafter(weight[-1], torch.tensor(torch.inf))


@pytest.mark.parametrize(
    "change",
    [
        last_bit,
        lambda pipe: pipe.unet.register_to_config(flip_sin_to_cos=False),
        lambda pipe: pipe.unet.register_buffer("table", torch.zeros(0)),
    ],
    ids=["last bit of a weight", "setting", "buffer"],
)
def test_every_weight_buffer_and_setting_counts(change: Callable[[DiffusionPipeline], object]) -> None:
    pipe = pixel_pipeline()
    change(pipe)
    assert digest(pipe) != digest(pixel_pipeline())


def test_settings_are_plain_values_without_versions() -> None:
    values = settings(DDIMScheduler(beta_end=0.5))
    assert values["beta_end"] == 0.5
    assert not [key for key in values if key.startswith("_")]
    assert settings(object()) == {}
