"""The tiny hosts themselves: equal calls give equal results, also after save and load, and every layer has a say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hosts.tiny import HOSTS, TinyHost, reload

LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
# The last block of SD3 drops its text output, and with it what its text queries attend to.
IDLE = {("sd3", "transformer_blocks.1.attn.add_q_proj")}

hosts = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
SAMPLERS = [(host, name) for host in HOSTS.values() for name in host.schedulers]
samplers = pytest.mark.parametrize(
    ("host", "scheduler"), SAMPLERS, ids=[f"{host.name}-{name}" for host, name in SAMPLERS]
)


def denoiser_calls(host: TinyHost, pipe: Any, steps: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the denoiser was called with, call by call."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    denoiser = getattr(pipe, host.denoiser)
    hook = denoiser.register_forward_pre_hook(lambda _, args, words: calls.append((args, words)), with_kwargs=True)
    host.call(pipe, steps=steps)
    hook.remove()
    return calls


@hosts
def test_a_host_gives_the_same_result_twice_and_after_save_and_load(host: TinyHost, tmp_path: Path) -> None:
    pipe = host.build()
    first = host.call(pipe)
    assert first.dtype == torch.float32
    assert torch.isfinite(first).all()
    assert torch.equal(host.call(pipe), first)
    assert torch.equal(host.call(host.build()), first)
    loaded = reload(pipe, tmp_path)
    assert type(loaded) is type(pipe)
    assert torch.equal(host.call(loaded), first)


@hosts
def test_every_layer_of_the_denoiser_has_a_say(host: TinyHost) -> None:
    pipe = host.build()
    calls = denoiser_calls(host, pipe, steps=2)
    assert len(calls) == 2 * host.calls_per_step
    denoiser = getattr(pipe, host.denoiser)
    args, words = calls[-1]
    output = denoiser(*args, **words | {"return_dict": False})[0]
    output.mul(torch.randn(output.shape)).sum().backward()
    layers = {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, LAYERS)}
    # |dy| for a change of the weight by its own size, against |y|.
    share = {name: layer.weight.grad.norm() * layer.weight.norm() / output.norm() for name, layer in layers.items()}
    assert {(host.name, name) for name, value in share.items() if value < 1e-3} == {
        (name, layer) for name, layer in IDLE if name == host.name
    }
