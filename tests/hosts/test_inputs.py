"""What a pipeline must be told, and one clear line when it is not."""

from __future__ import annotations

import pytest
from diffusers import DDPMPipeline

from modiff.errors import ConfigError
from modiff.hosts.diffusers.runs import call_inputs
from tests.hosts.tiny import HOSTS
from tests.pixels import pixel_pipeline


class NeedsImage(DDPMPipeline):
    """A pipeline with an input that modiff cannot make up."""

    def __call__(self, image: object, batch_size: int = 1) -> None:
        raise NotImplementedError


def test_each_kind_gets_what_it_takes() -> None:
    assert call_inputs(pixel_pipeline(), 3, prompt=None, label=None) == {"batch_size": 3}
    assert call_inputs(HOSTS["sd"].build(), 2, prompt="red fox", label=None) == {"prompt": ["red fox"] * 2}
    assert call_inputs(HOSTS["dit"].build(), 2, prompt=None, label=7) == {"class_labels": [7, 7]}


def test_each_image_gets_its_own() -> None:
    assert call_inputs(HOSTS["sd"].build(), 2, prompt=("fox", "cat"), label=None) == {"prompt": ["fox", "cat"]}
    dit = HOSTS["dit"].build()
    assert call_inputs(dit, 3, prompt=None, label=[2, 0, 1]) == {"class_labels": [2, 0, 1]}
    with pytest.raises(ConfigError, match="expected 0 to 999, got 1000"):
        call_inputs(dit, 3, prompt=None, label=[2, 1000, 1])
    with pytest.raises(ConfigError, match="expected no --prompt TEXT, got 'fox'"):
        call_inputs(dit, 2, prompt=["fox", "cat"], label=1)


@pytest.mark.parametrize(
    ("host", "prompt", "label", "message"),
    [
        ("sd", None, None, "expected --prompt TEXT, got none"),
        ("dit", None, None, "expected --label N, got none"),
        ("dit", "fox", 1, "expected no --prompt TEXT"),
        ("sd", "fox", 1, "expected no --label N"),
        ("ddim", "fox", None, "expected no --prompt TEXT"),
        ("dit", None, 1000, "expected 0 to 999, got 1000"),
        ("dit", None, -1, "expected 0 to 999, got -1"),
        ("wan", "fox", None, "one that makes videos"),
    ],
)
def test_what_is_missing_or_too_much_is_said(host: str, prompt: str | None, label: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call_inputs(HOSTS[host].build(), 1, prompt=prompt, label=label)


def test_inputs_that_modiff_cannot_invent_are_named() -> None:
    pipe = pixel_pipeline()
    with pytest.raises(ConfigError, match="one that needs image"):
        call_inputs(NeedsImage(unet=pipe.unet, scheduler=pipe.scheduler), 1, prompt=None, label=None)
