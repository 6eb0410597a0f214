"""The models of the loop benchmark: sizes as published, and a row of conditions for each row of x."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loop import models as loop_models
from loop import variants as loop_variants
from loop.models import MODELS
from loop.variants import Task, parts_of


@pytest.mark.parametrize(
    ("name", "parameters", "further"),
    [
        ("ddpm-cifar10", 35_746_307, {}),
        ("sd15", 859_520_964, {"encoder_hidden_states": (2, 77, 768)}),
        ("sdxl", 2_567_463_684, {"encoder_hidden_states": (2, 77, 2048)}),
        ("dit-xl", 749_826_464, {"class_labels": (2,)}),
    ],
)
def test_the_models_have_the_published_sizes(
    name: str, parameters: int, further: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_meta(kind: Any, config: dict[str, Any], _: torch.device) -> Any:
        with torch.device("meta"):
            return kind(**config)

    monkeypatch.setattr(loop_models, "drawn", on_meta)
    net, inputs, _ = MODELS[name].build(torch.device("cpu"))
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert {k: tuple(v.shape) for k, v in inputs.items() if isinstance(v, Tensor)} == further
    assert MODELS[name].size[1:] == (net.config.in_channels, net.config.sample_size, net.config.sample_size)


def test_conditions_repeat_in_turn_to_the_rows_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_models, "drawn", lambda *_: torch.nn.Identity())
    text, added = parts_of(Task(MODELS["sdxl"], "bf16-eager", timed=1)).inputs.values()
    assert text.shape == (4, 77, 2048)
    assert torch.equal(text[:2], text[2:])
    assert not torch.equal(text[0], text[1])
    assert {name: tuple(value.shape) for name, value in added.items()} == {"text_embeds": (4, 1280), "time_ids": (4, 6)}
    halves = loop_variants.in_dtype({"text": text, "added": added, "labels": torch.tensor([1])}, torch.bfloat16)
    assert [halves["text"].dtype, halves["added"]["time_ids"].dtype] == [torch.bfloat16] * 2
    assert halves["labels"].dtype == torch.int64
    labels = parts_of(Task(MODELS["dit-xl"].on("cuda"), "bf16-eager", timed=1)).inputs["class_labels"]
    assert labels.tolist() == [1, 2] * 16
