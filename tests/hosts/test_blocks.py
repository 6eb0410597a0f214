"""The reconstruction blocks of every hosted network, in the order in which it runs them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import modiff
from modiff import presets
from modiff.calibration.blocks import blocks_of
from modiff.calibration.reconstruct.layers import full_precision
from modiff.hosts.names import BLOCK_CLASSES
from modiff.model.attach import attachment_of
from tests.hosts.tiny import HOSTS

BLOCKS = {
    "ddpm": {"ResnetBlock2D": 8, "Attention": 4, "ModulatedConv2d": 2},
    "sdxl": {"ResnetBlock2D": 8, "BasicTransformerBlock": 8, "ModulatedLinear": 8, "ModulatedConv2d": 2},
    "pixart": {"BasicTransformerBlock": 2},
    "sd3": {"JointTransformerBlock": 2},
    "flux": {"FluxTransformerBlock": 1, "FluxSingleTransformerBlock": 1},
    "wan": {"WanTransformerBlock": 2},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_cover_every_modulated_layer_once_and_run_in_their_order(name):
    host = HOSTS[name]
    pipe = host.build()
    model = host.network(pipe)
    call = modiff.collect(pipe, lambda _: host.call(pipe, steps=2), progress=False)[0]
    modiff.apply(pipe, presets.w4a8())
    seen: list[str] = []
    with full_precision(model), torch.no_grad():
        blocks = blocks_of(model, kinds=BLOCK_CLASSES, run=lambda: call.evaluate(model))
        for block in blocks:
            model.get_submodule(block.name).register_forward_pre_hook(lambda *_, n=block.name: seen.append(n))
        call.evaluate(model)
    assert Counter(block.kind for block in blocks) == BLOCKS[name]
    assert sorted(n for block in blocks for n in block.layers) == sorted(attachment_of(model).layers)
    assert seen == [block.name for block in blocks]
    assert {block.calls for block in blocks} == {1}
