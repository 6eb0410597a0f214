"""The tiny hosts themselves: equal calls give equal results, and every layer has a say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.hosts.tiny import HOSTS, TinyHost

LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
# The last block of SD3 drops its text output, and with it what its text queries attend to.
IDLE = {"sd3": {"transformer_blocks.1.attn.add_q_proj"}}


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_calls_of_equal_pipelines_are_equal_and_every_layer_of_the_denoiser_has_a_say(host: TinyHost) -> None:
    pipe = host.build()
    denoiser = host.network(pipe)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = denoiser.register_forward_pre_hook(lambda _, args, words: calls.append((args, words)), with_kwargs=True)
    first = host.call(pipe, steps=2)
    hook.remove()
    assert len(calls) == 2 * host.calls_per_step
    assert torch.isfinite(first).all()
    assert torch.equal(host.call(host.build(), steps=2), first)
    args, words = calls[-1]
    output = denoiser(*args, **words | {"return_dict": False})[0]
    output.mul(torch.randn(output.shape)).sum().backward()
    layers = {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, LAYERS)}
    # |dy| for a change of the weight by its own size, against |y|.
    share = {name: layer.weight.grad.norm() * layer.weight.norm() / output.norm() for name, layer in layers.items()}
    assert {name for name, value in share.items() if value < 1e-3} == IDLE.get(host.name, set())
