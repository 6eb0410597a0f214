"""Modulated denoisers inside real pipelines: every host, every sampler, guidance both ways, and the edges."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.hooks import LayerSkipConfig
from torch import Tensor, nn

import modiff
from modiff import ConfigError, StateError, presets
from modiff.model.apply import install
from modiff.model.attach import attachment_of
from modiff.model.tune import FINALISTS
from tests.helpers import assert_within, relative_error
from tests.hosts.test_state_memory import animated
from tests.hosts.tiny import (
    HOSTS,
    SAMPLERS,
    TinyHost,
    build_wan_of_two,
    embeddings,
    encoders,
    flow,
    image_vae,
    make_scheduler,
    masked_embeddings,
    network,
)


def watch(model: nn.Module, look: Callable[[], object]) -> list[Any]:
    """What `look` returns after each evaluation of the network."""
    seen: list[Any] = []
    model.register_forward_hook(lambda *_: seen.append(look()))
    return seen


def worst_break_of_the_law(model: nn.Module) -> float:
    """max over layers and contexts of ||ô - (A(â) + bias)|| / ||ô||, in float64."""
    worst = 0.0
    for layer in attachment_of(model).layers.values():
        for memory in layer.loop.memories.values():
            state, output = memory.input.state.value.double(), memory.output
            weight = layer.quantized_weight.dense(layer.weight, torch.float64)
            bias = None if layer.bias is None else layer.bias.double()
            worst = max(worst, relative_error(output.value, layer.spec.operate(state, weight, bias)))
    return worst


@pytest.mark.parametrize(
    ("kind", "first"), [("Kandinsky3UNet", "conv_in"), ("StableAudioDiTModel", "preprocess_conv"),
                        ("StableCascadeUNet", "embedding.1"), ("UNet2DConditionModel", "conv_in")],
)  # fmt: skip
def test_the_first_layer_is_what_reads_the_sample_whatever_is_registered_first(kind, first):
    with torch.device("meta"):
        left = modiff.select(getattr(diffusers, kind)(**{"conditioning_dim": 8} if "Cas" in kind else {}), "w4a4").left
    assert first in {entry.name for entry in left if entry.reason.startswith("first or last layer")}


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_the_law_holds_generations_repeat_their_states_are_freed_and_remove_gives_back_the_bits(host):
    pipe = host.build()
    plain, kind = host.call(pipe), type(pipe)
    modiff.apply(pipe, presets.modulated(None, None))
    assert relative_error(host.call(pipe), plain) < 1e-5  # a few float32 roundings
    modiff.remove(pipe)
    assert type(pipe) is kind
    assert "cache_context" not in host.network(pipe).__dict__
    assert torch.equal(host.call(pipe), plain)
    modiff.apply(pipe, presets.tuned(None, 8))
    model = host.network(pipe)
    breaks = watch(model, lambda: worst_break_of_the_law(model))
    first = host.call(pipe)
    assert len(breaks) == 4 * host.calls_per_step
    assert max(breaks) < 1e-5  # float32 states: each step adds a rounding of 6e-8 times the growth of the sum
    assert all(not layer.loop.memories for layer in attachment_of(model).layers.values())
    assert 0 < relative_error(first, plain) < 0.1  # steps far apart, and nothing damps an error
    host.call(pipe, batch=2, steps=2)  # another batch size in the next call
    assert torch.equal(host.call(pipe), first)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_runs_modulated_as_it_runs_plain(sampler):
    host = HOSTS["sd"]
    pipe = host.build()
    pipe.scheduler = make_scheduler(sampler)
    plain = host.call(pipe, steps=6)
    modiff.apply(pipe, presets.modulated(None, 8))
    breaks = watch(pipe.unet, lambda: worst_break_of_the_law(pipe.unet))
    first = host.call(pipe, steps=6)
    assert len(breaks) >= 6
    assert max(breaks) < 1e-5
    assert 0 < relative_error(first, plain) < 0.05  # fresh noise at each step (ddpm, sde) gives .031
    alone = host.build()
    alone.scheduler = make_scheduler(sampler)
    modiff.apply(alone.unet, presets.modulated(None, 8))
    for _ in range(2):  # it finds by itself where trajectories begin and end
        assert torch.equal(host.call(alone, steps=6), first)
        assert not any(layer.loop.memories for layer in attachment_of(alone.unet).layers.values())


SD, SD3 = HOSTS["sd"], HOSTS["sd3"]


def lumina() -> DiffusionPipeline:
    """Guides in two calls, without contexts, with prompts of two lengths."""
    transformer = network(
        diffusers.Lumina2Transformer2DModel, 5, sample_size=4, in_channels=4, hidden_size=32, num_layers=2,
        num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 4, 8),
        axes_lens=(128, 128, 128), cap_feat_dim=32,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=transformer, scheduler=flow(), vae=image_vae(), text_encoder=None, tokenizer=None
    )


def two_lengths(batch: int) -> dict[str, Any]:
    settings = masked_embeddings(batch) | {"height": 16, "width": 16}
    return {name: value for name, value in settings.items() if name != "use_resolution_binning"}


def cascade() -> DiffusionPipeline:
    """Its denoiser is a `decoder`, its time a `timestep_ratio`."""
    decoder = network(
        diffusers.StableCascadeUNet, 3, in_channels=4, out_channels=4, timestep_ratio_embedding_dim=16, patch_size=1,
        conditioning_dim=32, block_out_channels=(32,), num_attention_heads=(2,), down_num_layers_per_block=(1,),
        up_num_layers_per_block=(1,), down_blocks_repeat_mappers=(1,), up_blocks_repeat_mappers=(1,), dropout=0.0,
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),),
        clip_text_pooled_in_channels=32, clip_seq=2, effnet_in_channels=4, switch_level=(False,),
    )  # fmt: skip
    return diffusers.StableCascadeDecoderPipeline(
        decoder=decoder, scheduler=diffusers.DDPMWuerstchenScheduler(), vqgan=None, latent_dim_scale=4.0, **encoders(1)
    )


def image_embeddings(batch: int) -> dict[str, Any]:
    image = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3)).repeat(batch, 1, 1, 1)
    text = embeddings(batch, pooled=False, guidance="guidance_scale") | {"guidance_scale": 2.0}
    pooled = {f"{name}_pooled": text[name][:, :1] for name in ("prompt_embeds", "negative_prompt_embeds")}
    return {"image_embeddings": image, **text, **pooled}


def modular(start: float) -> diffusers.ModularPipeline:
    """Of Stable Diffusion 3, without its text encoders; the guider evaluates a third branch that skips a layer."""
    skips = LayerSkipConfig(indices=[0], fqn="transformer_blocks", skip_attention=False, skip_ff=True)
    guider = diffusers.SkipLayerGuidance(
        3.0, 1.0, skip_layer_guidance_start=start, skip_layer_guidance_stop=0.8, skip_layer_config=skips
    )
    pipe = diffusers.StableDiffusion3AutoBlocks().sub_blocks["denoise"].init_pipeline()
    parts = {name: part for name, part in SD3.build().components.items() if name in pipe.component_names}
    pipe.update_components(**parts, guider=guider)
    return pipe


def of_latents(pipe: diffusers.ModularPipeline) -> Tensor:
    text = {name: value for name, value in embeddings(1).items() if name != "guidance_scale"}
    noise = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 10}
    return pipe(**text, **noise, height=64, width=64, output="latents")


CASCADE = TinyHost(name="cascade", build=cascade, settings=image_embeddings, denoiser="decoder")
LUMINA = TinyHost(name="lumina", build=lumina, settings=two_lengths)
CUTOFF = {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.4)}
SKIPS = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.5, "skip_layer_guidance_start": 0.0}


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    ("host", "settings", "contexts"),
    [
        (LUMINA, {}, 2),
        (LUMINA, {"cfg_trunc_ratio": 0.4}, 2),  # then without guidance
        (SD, CUTOFF, 2),
        (SD3, SKIPS, 2),  # a third branch in a call of its own
        (CASCADE, {}, 1),
    ],
)
def test_branches_that_come_and_go_have_states_of_their_own(host, settings, contexts, alone):
    pipe = host.build()
    plain = host.call(pipe, steps=10, **settings)
    modiff.apply(host.network(pipe) if alone else pipe, presets.w8a4())
    layer = next(iter(attachment_of(host.network(pipe)).layers.values()))
    seen = watch(host.network(pipe), lambda: len({context for context, _ in layer.loop.memories}))
    first = host.call(pipe, steps=10, **settings)
    assert 0 < relative_error(first, plain) < 0.03
    assert max(seen) == contexts
    assert torch.equal(host.call(pipe, steps=10, **settings), first)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("start", [0.0, 0.3])
def test_a_modular_pipeline_runs_and_a_branch_that_its_guider_tells_by_hooks_has_states(start, alone, tmp_path):
    pipe = modular(start)
    plain = of_latents(pipe)
    modiff.apply(pipe.transformer if alone else pipe, presets.w8a4())
    layer = next(iter(attachment_of(pipe.transformer).layers.values()))
    contexts = watch(pipe.transformer, lambda: {context for context, _ in layer.loop.memories})
    first = of_latents(pipe)
    assert max(map(len, contexts)) == 3
    assert 0 < relative_error(first, plain) < 0.02
    assert torch.equal(of_latents(pipe), first)
    modiff.save(pipe.transformer, tmp_path / "network")
    if not alone:
        with pytest.raises(ConfigError, match=r"components, and holds none. Use modiff.save\(pipe.transformer"):
            modiff.save(pipe, tmp_path / "pipe")
        modiff.remove(pipe)
        assert torch.equal(of_latents(pipe), plain)


@pytest.mark.parametrize("alone", [False, True])
def test_generations_of_one_call_begin_with_states_of_their_own(alone):
    """As Marigold's: one after the other in batches, the last one smaller."""
    parts = SD.build().components
    unet = network(diffusers.UNet2DConditionModel, 12, **dict(parts["unet"].config) | {"in_channels": 8})
    pipe = diffusers.MarigoldNormalsPipeline(
        unet=unet, vae=parts["vae"], text_encoder=parts["text_encoder"], tokenizer=parts["tokenizer"],
        scheduler=make_scheduler("ddim"), default_processing_resolution=0, use_full_z_range=True,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))

    def members(batch: int) -> Tensor:
        noise = [torch.Generator().manual_seed(i) for i in range(4)]
        options = {"processing_resolution": 0, "match_input_resolution": False, "output_type": "pt", "generator": noise}
        return pipe(image, 4, ensemble_size=4, batch_size=batch, output_latent=True, return_dict=False, **options)[2]

    plain = members(4)
    modiff.apply(
        unet if alone else pipe, presets.modulated(None, 0)
    )  # what the first step of each says is all there is
    together = members(4)
    assert 0 < relative_error(together, plain)
    for batch in (1, 3):
        assert_within(members(batch), together, 1e-4)


def test_generations_of_more_and_more_steps_begin_with_states_of_their_own():
    pipe = animated()
    pipe.enable_free_init(num_iters=3, use_fast_sampling=True)
    modiff.apply(pipe, presets.w8a4())
    steps = watch(pipe.unet, lambda: attachment_of(pipe.unet).clock.step)
    pipe.set_progress_bar_config(disable=True)
    pipe("a b", num_frames=2, height=16, width=16, num_inference_steps=6, output_type="latent")
    assert steps == [*range(2), *range(4), *range(6)]


@pytest.mark.parametrize("verb", [modiff.tune, lambda p, _, run: modiff.autotune(p, presets.w8a4(), run=run)])
def test_a_verb_that_is_refused_leaves_the_branches_of_guidance_their_states(verb):
    host = HOSTS["flux"]
    pipe = host.build()
    modiff.apply(pipe, presets.w8a4())
    with pytest.raises(StateError):
        verb(pipe, 4, run=lambda: None)
    layer = next(iter(attachment_of(pipe.transformer).layers.values()))
    contexts = watch(pipe.transformer, lambda: {context for context, _ in layer.loop.memories})
    host.call(pipe, steps=2)
    assert contexts[-1] == {"cond", "uncond"}


def test_a_pipeline_with_two_denoisers_is_tuned_as_one_and_takes_the_config():
    pipe, evaluations = build_wan_of_two(), []
    for each in (pipe.transformer, pipe.transformer_2):
        each.register_forward_hook(lambda module, *_: evaluations.append(module is pipe.transformer))
    tuned = modiff.tune(pipe, 4, run=lambda: HOSTS["wan"].call(pipe, steps=8))
    once = evaluations[: len(evaluations) // (1 + FINALISTS)]
    assert evaluations == once * (1 + FINALISTS)
    assert set(once) == {True, False}
    pipe.transformer_2.blocks[0].extra = nn.Linear(32, 32)
    report = modiff.apply(pipe, dataclasses.replace(tuned, overrides=(("blocks.0.extra", tuned.layer),)))
    assert len(report.taken) == 2 * len(modiff.apply(HOSTS["wan"].build(), tuned).taken) + 1


@pytest.mark.parametrize("late", [False, True])
def test_an_interrupted_apply_leaves_nothing_on_a_pipeline_with_two_denoisers(late, monkeypatch):
    pipe = build_wan_of_two()
    kind = type(pipe)

    def interrupt(module: Any, *args: Any, **settings: Any) -> Any:
        if module is pipe.transformer:
            return install(module, *args, **settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("modiff.hosts.host.follow_generations" if late else "modiff.api.install", interrupt)
    with pytest.raises(KeyboardInterrupt):
        modiff.apply(pipe, presets.w8a8())
    assert type(pipe) is kind
    for each in (pipe.transformer, pipe.transformer_2):
        assert attachment_of(each) is None
        assert not hasattr(each, "hf_quantizer")
        assert "cache_context" not in each.__dict__


def image_to_image(pipe: DiffusionPipeline, **more: Any) -> Tensor:
    image, noise = torch.full((1, 3, 8, 8), 0.3), torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    return pipe("fox", image, 0.8, num_inference_steps=5, generator=noise, output_type="latent", **more).images


@pytest.mark.parametrize("packed", [False, True])
def test_a_network_begins_trajectories_in_every_pipeline_that_runs_it(packed):
    host, config = HOSTS["sd"], presets.published(8, 4)  # packing changes no bit
    pipe, alone = host.build(), host.build()
    plain = host.call(pipe)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    modiff.apply(other, config)
    expected = image_to_image(other)
    modiff.remove(other)
    modiff.apply(pipe, config)
    modiff.apply(alone.unet, config)
    for target in (pipe, alone.unet) if packed else ():
        modiff.pack(target)
    first = host.call(pipe)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    again = type(pipe)(**pipe.components, requires_safety_checker=False)
    for _ in range(2):
        for run in (pipe, again, alone):
            assert torch.equal(host.call(run), first)
        assert torch.equal(image_to_image(other), expected)
    for target in () if packed else (pipe, alone.unet):
        modiff.remove(target)
    for run in () if packed else (pipe, again, alone):
        assert torch.equal(host.call(run), plain)


def test_clones_of_a_pipeline_serve_requests_at_the_same_time_with_one_set_of_weights():
    host = HOSTS["flux"]
    pipe = host.build()
    modiff.apply(pipe, presets.w8a4())
    expected = [host.call(pipe, seed=seed) for seed in (0, 1)]
    clones = [modiff.clone(pipe) for _ in expected]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda clone, seed: host.call(clone, seed=seed), clones, (0, 1)))
    for clone, image, same in zip(clones, found, expected, strict=True):
        assert torch.equal(image, same)
        assert clone.scheduler is not pipe.scheduler
        assert next(clone.vae.parameters()) is next(pipe.vae.parameters())


_TINY = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
OWN_NAMES: list[tuple[str, dict[str, Any], str]] = [
    (
        "PRXTransformer2DModel",
        {"in_channels": 4, "context_in_dim": 32, "hidden_size": 32, "num_heads": 2, "depth": 2, "axes_dim": [8, 8]},
        "time_in.in_layer time_in.out_layer final_layer.linear",
    ),
    (
        "Ideogram4Transformer2DModel",
        _TINY | {"in_channels": 16, "intermediate_size": 64, "adaln_dim": 32, "llm_features_dim": 32},
        "t_embedding.mlp_in t_embedding.mlp_out final_layer.linear",
    ),
    (
        "Kandinsky3UNet",
        {"time_embedding_dim": 16, "groups": 2, "attention_head_dim": 4, "layers_per_block": 2, "encoder_hid_dim": 32,
         "block_out_channels": (32, 64), "cross_attention_dim": 4},
        "down_blocks.0.resnets_in.0.resnet_blocks.0.group_norm.context_mlp.1",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings", "left"), OWN_NAMES)
def test_embeddings_and_ends_of_families_with_names_of_their_own_keep_their_floats(kind, settings, left):
    with torch.device("meta"):
        report = modiff.select(getattr(diffusers, kind)(**settings), "w8a8")
    assert set(left.split()) <= {entry.name for entry in report.left}
    assert len(report.taken) > 10
