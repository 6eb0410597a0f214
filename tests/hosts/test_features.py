"""What diffusers, torch and Python offer around a network works as without modiff: features, attention, copies."""

import copy
import dataclasses
import io
import multiprocessing
import pickle
from contextlib import nullcontext

import diffusers
import pytest
import torch
from diffusers.hooks import SeaCacheConfig

import modiff
from modiff import AttentionConfig, QuantizerConfig, StateError, presets
from modiff.model.attention import apply_attention, attention_quantizers, remove_attention
from tests.helpers import assert_same_bits, relative_error
from tests.hosts.tiny import HOSTS
from tests.model.toys import toy


def cache(kind, **settings):
    return lambda pipe: pipe.transformer.enable_cache(getattr(diffusers, f"{kind}CacheConfig")(**settings))


def skipping(kind, **settings):
    """Attention blocks repeat their last output every other time."""

    def enable(pipe):
        pipe.transformer.enable_cache(getattr(diffusers, f"{kind}Config")(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1000),
            current_timestep_callback=lambda: pipe._current_timestep, **settings,
        ))  # fmt: skip

    return enable


FEATURES = {
    "inference mode": ("sd", lambda _: None, torch.inference_mode),
    "autocast": ("sd", lambda _: None, lambda: torch.autocast("cpu", torch.bfloat16)),
    "freeu": ("sd", lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4), nullcontext),
    "fused qkv": ("flux", lambda pipe: pipe.transformer.fuse_qkv_projections(), nullcontext),
    "attention slicing": ("sd", lambda pipe: pipe.enable_attention_slicing(), nullcontext),
    "channels last": ("sd", lambda pipe: pipe.unet.to(memory_format=torch.channels_last), nullcontext),
    "attention backend": ("flux", lambda pipe: pipe.transformer.set_attention_backend("_native_math"), nullcontext),
    "vae in tiles": ("sd", lambda pipe: (pipe.vae.enable_tiling(), pipe.vae.enable_slicing()), nullcontext),
    "first block cache": ("flux", cache("FirstBlock", threshold=0.3), nullcontext),
    "sea cache": ("flux", lambda pipe: pipe.transformer.enable_cache(SeaCacheConfig()), nullcontext),
    "taylor cache": ("flux", cache("TaylorSeer", cache_interval=2, disable_cache_before_step=1), nullcontext),
    "mag cache": ("flux", cache("Mag", threshold=0.5, num_inference_steps=4, mag_ratios=torch.ones(4)), nullcontext),
    "attention broadcast": ("flux", skipping("PyramidAttentionBroadcast"), nullcontext),
    "faster cache": ("flux", skipping("FasterCache", is_guidance_distilled=True), nullcontext),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_it_gives_the_images_that_it_gives_without_modiff(feature):
    name, enable, context = FEATURES[feature]
    host, results = HOSTS[name], []
    for config, order in ((None, "e"), (presets.modulated(None, None), "ea"), (presets.published(8, 8), "ea"),
                          (presets.published(8, 8), "aep")):  # fmt: skip
        pipe = host.build()
        verbs = {"e": enable, "a": lambda pipe, c=config: modiff.apply(pipe, c), "p": modiff.pack}
        for verb in order:
            verbs[verb](pipe)
        with context():
            results.append(host.call(pipe))
    expected, off, *quantized = results
    assert relative_error(off, expected) < (0.02 if feature == "autocast" else 1e-5)  # layers are exact under autocast
    assert all(0 < relative_error(each, expected) < 0.04 for each in quantized)


def attention(bits):
    return AttentionConfig(
        operands=QuantizerConfig(bits=bits), softmax=QuantizerConfig(bits=bits, symmetric=False, lowest="zero")
    )


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "wan"])
def test_a_host_runs_with_quantized_attention_beneath_modulated_layers_and_comes_back_to_the_bit(name):
    host = HOSTS[name]
    pipe = host.build()
    model = host.network(pipe)
    plain = host.call(pipe, steps=2)
    apply_attention(model, attention(None))
    assert_same_bits(host.call(pipe, steps=2), plain)
    remove_attention(model)
    modiff.apply(pipe, modiff.presets.modulated(None, 8))
    modulated = host.call(pipe, steps=2)
    errors = []
    for bits in (8, 2):
        taken = apply_attention(model, attention(bits))
        assert len(attention_quantizers(model)) == 4 * len(taken) > 0
        errors.append(relative_error(host.call(pipe, steps=2), modulated))
        remove_attention(model)
    assert 0 < errors[0] < 0.03
    assert errors[1] > 5 * errors[0]
    assert_same_bits(host.call(pipe, steps=2), modulated)


def test_a_processor_that_computes_attention_by_itself_is_an_relative_error():
    from diffusers.models.attention_processor import AttnProcessor

    pipe = HOSTS["sd"].build()
    pipe.unet.set_attn_processor(AttnProcessor())
    apply_attention(pipe.unet, attention(8))
    with pytest.raises(StateError, match="expected a call of torch's scaled_dot_product_attention, got none"):
        HOSTS["sd"].call(pipe, steps=1)


COPIED = dataclasses.replace(presets.w8a4(), attention=AttentionConfig())


def stored(target):
    file = io.BytesIO()
    torch.save(target, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


WAYS = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "torch.save": stored, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("name", ["ddim", "wan"])  # wan guides in two calls, each in a cache context
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_of_a_pipeline_or_of_its_network_samples_what_the_original_does(tmp_path, way, name):
    host, copied, words = HOSTS[name], WAYS[way], {"steps": 4}
    pipe = host.build()
    plain = host.call(pipe, **words)
    modiff.apply(pipe, COPIED)
    modiff.save(pipe, tmp_path / "saved")
    for original in (pipe, modiff.load(tmp_path / "saved")):
        expected = host.call(original, **words)
        assert_same_bits(host.call(copied(original), **words), expected)
        other = host.build()
        setattr(other, host.denoiser, copied(getattr(original, host.denoiser)))
        assert_same_bits(host.call(other, **words), expected)
    removed = copied(pipe)
    modiff.remove(removed)
    assert_same_bits(host.call(removed, **words), plain)
    assert modiff.report(pipe).taken


def _sampled(pipe):
    return HOSTS["ddim"].call(pipe, steps=2)


def test_a_spawned_process_samples_what_this_one_does():
    pipe = HOSTS["ddim"].build()
    modiff.apply(pipe, COPIED)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert_same_bits(pool.apply(_sampled, (pipe,)), _sampled(pipe))


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_in_the_middle_of_a_trajectory_goes_on_where_it_was(way):
    model, x = toy(), torch.randn(2, 3, 4, 4)
    modiff.apply(model, presets.w8a4())
    with torch.no_grad(), modiff.trajectory(model):
        model(x, 1000.0)
        model(0.9 * x, 800.0)
        other = WAYS[way](model)
        assert_same_bits(other(0.8 * x, 600.0), model(0.8 * x, 600.0))
