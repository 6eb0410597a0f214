"""The digest tells models apart by weights and settings, and by nothing else."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler

from modiff.generate.digest import digest, settings
from modiff.hosts.diffusers.load import load_pipeline
from tests.pixels import pixel_pipeline, saved_pipeline


def test_the_same_model_elsewhere_has_the_same_digest(tmp_path: Path) -> None:
    found = {digest(load_pipeline(saved_pipeline(tmp_path / name))) for name in "ab"}
    assert found == {digest(pixel_pipeline())}


def test_the_last_bit_of_a_weight_counts() -> None:
    pipe = pixel_pipeline()
    weight = pipe.unet.conv_out.weight.data.view(-1)
    weight[-1] = torch.nextafter(weight[-1], torch.tensor(torch.inf))
    assert digest(pipe) != digest(pixel_pipeline())


def test_a_setting_of_the_network_counts_and_the_scheduler_does_not() -> None:
    other, sampled = pixel_pipeline(), pixel_pipeline()
    other.unet.register_to_config(flip_sin_to_cos=False)
    sampled.scheduler = DDIMScheduler(beta_schedule="scaled_linear")
    assert digest(other) != digest(pixel_pipeline())
    assert digest(sampled) == digest(pixel_pipeline())


def test_a_buffer_counts() -> None:
    pipe = pixel_pipeline()
    pipe.unet.register_buffer("table", torch.zeros(0))
    assert digest(pipe) != digest(pixel_pipeline())


def test_settings_are_plain_values_without_versions() -> None:
    found = settings(DDIMScheduler(beta_end=0.5))
    assert found["beta_end"] == 0.5
    assert not [key for key in found if key.startswith("_")]
    assert settings(object()) == {}
