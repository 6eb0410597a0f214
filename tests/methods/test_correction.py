"""A network that another library quantized is corrected by either table, with samplers of each kind."""

import dataclasses
from statistics import median

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

import modiff
from modiff import ConfigError
from modiff.generate.samplers import set_scheduler
from modiff.methods import PtqdConfig, TacConfig, quantize
from modiff.methods.correction import learn_correction
from modiff.sampling.corrected import Correction, corrected
from tests.helpers import relative_error
from tests.hosts.tiny import HOSTS
from tests.methods import small
from tests.pixels import pixel_pipeline

TINY = {"steps": 6, "samples": 4, "batch": 4, "groups": 3, "pairs": 8}
PTQD = PtqdConfig(**TINY, slope="any")
LEAST_SQUARES = TacConfig(**TINY, relative=0.0, ridge=0.0, bias="channel")


class OtherConv2d(nn.Conv2d):
    """Quantized without modiff: 8-bit codes, scales of two bits behind the point, floats when it runs."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scale = weight.abs().amax((1, 2, 3), keepdim=True) / 127
        kept = scale.to(torch.float8_e5m2).to(scale)
        return super()._conv_forward(input, (weight / scale).round() * kept, bias)


class Blockwise(nn.Module):
    """In place of a layer, no subclass of it: codes cut to 4 bits, a scale for 8 weights, buffers and no parameter."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        blocks = layer.weight.detach().reshape(-1, 8)
        scale = blocks.abs().amax(1, keepdim=True) / 7
        self.shape, self.how = layer.weight.shape, {}
        if isinstance(layer, nn.Conv2d):
            self.how = {"stride": layer.stride, "padding": layer.padding}
        self.register_buffer("codes", (blocks / scale).trunc().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        operator = nn.functional.conv2d if self.how else nn.functional.linear
        return operator(x, (self.codes * self.scale).reshape(self.shape), self.bias, **self.how)


def build(sampler: str, *, quantized: bool = False):
    pipe = set_scheduler(small.build(), sampler)
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.unet.modules() if quantized else ():
        if type(module) is nn.Conv2d:
            module.__class__ = OtherConv2d
    return pipe


def assert_shares_left_and_tables_saved(full, pipe, folder, shares):
    """`shares` of the error are the most that PTQD and TAC leave; where it is no multiple, PTQD adds a little."""
    exact, before = (small.call(p, steps=6, seed=50, batch=4) for p in (full, pipe))
    plain = pipe.scheduler
    for config, share in zip((PTQD, LEAST_SQUARES), shares, strict=True):
        table = learn_correction(full, pipe, config, progress=False)
        assert (table.noise is not None) == (config is PTQD and type(plain) is DDPMScheduler)
        pipe.scheduler = corrected(plain, table)
        after = small.call(pipe, steps=6, seed=50, batch=4)
        assert relative_error(after, exact) < share * relative_error(before, exact)
        pipe.scheduler.save_pretrained(folder)
        pipe.scheduler = type(plain).from_pretrained(folder)
        assert torch.equal(small.call(pipe, steps=6, seed=50, batch=4), after)


def test_tac_brings_images_nearer_where_another_library_replaced_modules_and_tables_are_saved(tmp_path):
    full, pipe = build("ddim"), build("ddim")
    layers = [name for name, module in pipe.unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for name in layers:
        parent, _, child = name.rpartition(".")
        setattr(pipe.unet.get_submodule(parent), child, Blockwise(pipe.unet.get_submodule(name)))
    assert sum(p.ndim > 1 for p in pipe.unet.parameters()) == 0, "no weight is left"
    assert_shares_left_and_tables_saved(full, pipe, tmp_path, (1.07, 0.99))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_tac_brings_images_nearer_where_torchao_quantized_and_tables_are_saved(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    full, pipe = build("ddim"), build("ddim")
    torchao.quantize_(pipe.unet, torchao.IntxWeightOnlyConfig(weight_dtype=torch.int3))
    assert_shares_left_and_tables_saved(full, pipe, tmp_path, (1.02, 1.0))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmsolver++", "dpmsolver++2s"])
def test_images_of_a_network_that_another_library_quantized_come_nearer(sampler, tmp_path):
    assert_shares_left_and_tables_saved(build(sampler), build(sampler, quantized=True), tmp_path, (0.97, 0.92))


@pytest.mark.parametrize(("settings", "name"), [(PTQD, "k"), (LEAST_SQUARES, "K")])
def test_tables_shrink_under_modulation_with_exact_anchors_and_not_with_quantized_ones(settings, name):
    sizes = []
    for anchors in (None, "quantized", "exact"):
        modulation = None if anchors is None else modiff.ModulationConfig(anchor_weights=anchors)
        config = dataclasses.replace(settings, weight_bits=4, modulation=modulation)
        values = dict(quantize(small.build(), config, progress=False).steps)[name]
        sizes.append(median(abs(value - (name == "K")) for value in values))
    assert sizes[2] < 0.6 * sizes[0] < 0.8 * sizes[1]


@pytest.mark.parametrize("modulated", [False, True])
def test_a_folder_keeps_the_steps_of_one_network_and_of_one_set_of_settings(modulated, tmp_path):
    full, nets = pixel_pipeline(), [pixel_pipeline(seed) for seed in (0, 0)]
    if modulated:  # both say the same at their first step, which has exact weights
        for pipe, bits in zip(nets, ("w8a8", "w4a4"), strict=True):
            modiff.apply(pipe, bits)
    else:
        nets = [pixel_pipeline(seed) for seed in (1, 2)]
    config = TacConfig(steps=3, pairs=1, batch=1, groups=1)
    table = learn_correction(full, nets[0], config, folder=tmp_path, progress=False)
    assert learn_correction(full, nets[0], config, folder=tmp_path, progress=False) == table
    for net, settings, other in (
        (nets[1], config, "network"),
        (nets[0], dataclasses.replace(config, ridge=0.7), "ridge"),
    ):
        with pytest.raises(ConfigError, match=f"got one with another .*{other}"):
            learn_correction(full, net, settings, folder=tmp_path, progress=False)


def test_a_corrected_sampler_teaches_nothing():
    full = pixel_pipeline()
    full.scheduler = corrected(full.scheduler, Correction.of([1.0], gain=torch.ones(1, 1)))
    with pytest.raises(ConfigError, match=r"expected a plain one, got 'one with a correction'.*corrected\(pipe"):
        learn_correction(full, pixel_pipeline(1), TacConfig(steps=3, pairs=1, batch=1, groups=1), progress=False)


def test_guidance_in_one_batch_is_corrected_after_it_was_combined():
    pipe = HOSTS["dit"].build()
    pipe.set_progress_bar_config(disable=True)
    config = TacConfig(**TINY | {"steps": 2, "groups": 1}, guidance_scale=4.0)
    with pytest.raises(ConfigError, match=r"expected x <- step\(network\(x\)\), got states that differ"):
        quantize(pipe, dataclasses.replace(config, guidance_scale=None), progress=False)
    quantize(pipe, config, progress=False)
    assert [len(row) for row in pipe.scheduler.correction.gain] == [4, 4]  # channels, without the learned variance
