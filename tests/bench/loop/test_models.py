"""The models of the loop benchmark: sizes as published, the pipeline's loop, a row of conditions for each row of x."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from loop import models as loop_models
from loop.models import HIDDEN, MODELS, Loop
from modiff.generate.samplers import UnconditionalPipeline

TINY = HIDDEN["tiny"]


def test_a_loop_is_the_pipelines_loop_and_stops_where_it_is_told():
    net, _, _ = TINY.build(torch.device("cpu"))
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    pipe = UnconditionalPipeline(net, scheduler)
    pipe.set_progress_bar_config(disable=True)
    noise = [torch.Generator().manual_seed(5 + i) for i in range(2)]
    images = pipe(batch_size=2, generator=noise, num_inference_steps=10, output_type="np").images
    loop = Loop(TINY, scheduler, 10, 10, torch.device("cpu"))
    seen: list[Tensor] = []

    def step(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return net(x, t).sample

    with torch.inference_mode():
        np.testing.assert_allclose(loop.run(step, 5).permute(0, 2, 3, 1).numpy(), images, atol=1e-6)
        assert len(loop.seconds) == len(seen) == 10
        loop.run(step, 5, timed=3)
    assert len(loop.seconds) == 3
    assert [t.tolist() for t in seen[10:]] == [[t, t] for t in scheduler.timesteps[:3].tolist()]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("ddpm-cifar10", 35_746_307), ("sd15", 859_520_964), ("sdxl", 2_567_463_684), ("dit-xl", 749_826_464)],
)
def test_the_models_have_the_published_sizes(name, parameters, monkeypatch):
    def on_meta(kind: Any, config: dict[str, Any], _: torch.device) -> Any:
        with torch.device("meta"):
            return kind(**config)

    monkeypatch.setattr(loop_models, "drawn", on_meta)
    net, _, _ = MODELS[name].build(torch.device("cpu"))
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert MODELS[name].size[1:] == (net.config.in_channels, net.config.sample_size, net.config.sample_size)
