"""Modulated denoisers inside real pipelines: every host, every sampler, guidance both ways, and the edges."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, WanPipeline
from torch import Tensor, nn

import modiff
from modiff import StateError
from modiff.hosts.diffusers.hooks import unfollow_cache_context
from modiff.model.apply import install
from modiff.model.attach import attachment_of
from modiff.model.tune import FINALISTS
from tests.hosts.tiny import HOSTS, SAMPLERS, TinyHost, make_scheduler

hosts = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)


def with_modulation(config: modiff.ModiffConfig, **changes: Any) -> modiff.ModiffConfig:
    modulation = dataclasses.replace(config.layer.modulation, **changes)
    return dataclasses.replace(config, layer=dataclasses.replace(config.layer, modulation=modulation))


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def denoiser_of(host: TinyHost, pipe: Any) -> nn.Module:
    return getattr(pipe, host.denoiser)


def layers_of(model: nn.Module) -> dict[str, Any]:
    attachment = attachment_of(model)
    assert attachment is not None
    return attachment.layers


def watch(model: nn.Module, look: Callable[[], object]) -> list[Any]:
    """What `look` returns after each evaluation of the network."""
    seen: list[Any] = []
    model.register_forward_hook(lambda *_: seen.append(look()))
    return seen


def worst_break_of_the_law(model: nn.Module) -> float:
    """max over layers and contexts of ||ô - (A(â) + bias)|| / ||ô||, in float64."""
    worst = 0.0
    for layer in layers_of(model).values():
        for memory in layer.loop.memories.values():
            state, output = memory.input.state.value.double(), memory.output
            weight = layer.quantized_weight.dense(layer.weight, torch.float64)
            bias = None if layer.bias is None else layer.bias.double()
            worst = max(worst, error(output.value, layer.spec.operate(state, weight, bias)))
    return worst


@hosts
def test_with_bits_off_the_images_equal_the_plain_pipelines(host: TinyHost) -> None:
    pipe = host.build()
    plain = host.call(pipe)
    modiff.apply(pipe, modiff.presets.modulated(None, None))
    assert error(host.call(pipe), plain) < 1e-5  # a few float32 roundings
    modiff.remove(pipe)
    assert torch.equal(host.call(pipe), plain)


@hosts
def test_the_law_holds_the_second_call_equals_the_first_and_states_are_freed(host: TinyHost) -> None:
    pipe = host.build()
    plain = host.call(pipe)
    modiff.apply(pipe, modiff.presets.tuned(None, 8))
    model = denoiser_of(host, pipe)
    broken = watch(model, lambda: worst_break_of_the_law(model))
    first = host.call(pipe)
    assert len(broken) == 4 * host.calls_per_step
    assert max(broken) < 1e-5  # float32 states: each step adds a rounding of 6e-8 times the growth of the sum
    assert all(not layer.loop.memories for layer in layers_of(model).values())
    assert torch.equal(host.call(pipe), first)
    assert 0 < error(first, plain) < 0.1  # four steps of a random network: far apart, and nothing damps an error
    host.call(pipe, batch=2, steps=2)  # another batch size in the next call
    assert torch.equal(host.call(pipe), first)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_runs_modulated_as_it_runs_plain(sampler: str) -> None:
    host = HOSTS["sd"]
    pipe = host.build()
    pipe.scheduler = make_scheduler(sampler)
    plain = host.call(pipe, steps=6)
    modiff.apply(pipe, modiff.presets.modulated(None, 8))
    model = denoiser_of(host, pipe)
    broken = watch(model, lambda: worst_break_of_the_law(model))
    first = host.call(pipe, steps=6)
    assert max(broken) < 1e-5
    assert len(broken) >= 6
    assert torch.equal(host.call(pipe, steps=6), first)
    assert 0 < error(first, plain) < 0.05  # fresh noise at each step (ddpm, sde) gives the largest residuals, .031


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_guidance_in_two_calls_needs_no_contexts_of_the_pipeline(name: str) -> None:
    """Many pipelines enter none; the second evaluation at a timestep is the other branch."""
    host = HOSTS[name]
    pipe = host.build()
    modiff.apply(pipe, modiff.presets.modulated(None, 4))
    with_contexts = host.call(pipe)
    unfollow_cache_context(denoiser_of(host, pipe))
    assert torch.equal(host.call(pipe), with_contexts)


@pytest.mark.parametrize("verb", [modiff.tune, lambda p, _, run: modiff.autotune(p, modiff.presets.w8a4(), run=run)])
def test_a_verb_that_is_refused_leaves_the_branches_of_guidance_their_states(verb: Callable[..., object]) -> None:
    host = HOSTS["flux"]
    pipe = host.build()
    modiff.apply(pipe, modiff.presets.w8a4())
    with pytest.raises(StateError):
        verb(pipe, 4, run=lambda: None)
    layer = next(iter(layers_of(denoiser_of(host, pipe)).values()))
    contexts = watch(denoiser_of(host, pipe), lambda: {context for context, _ in layer.loop.memories})
    host.call(pipe, steps=2)
    assert contexts[-1] == {"cond", "uncond"}


@pytest.mark.parametrize("name", ["ddim", "flux"])
def test_modiff_may_be_taken_off_the_network_and_put_on_the_pipeline_again(name: str) -> None:
    host = HOSTS[name]
    pipe, other = host.build(), host.build()
    expected = host.call(pipe)
    modiff.apply(other, modiff.presets.w8a4())
    modulated = host.call(other)
    modiff.apply(pipe, modiff.presets.w8a4())
    modiff.remove(denoiser_of(host, pipe))
    assert torch.equal(host.call(pipe), expected)
    modiff.apply(pipe, modiff.presets.w8a4())
    assert torch.equal(host.call(pipe), modulated)
    modiff.remove(pipe)
    assert type(pipe) is type(host.build())
    assert torch.equal(host.call(pipe), expected)


def test_guidance_batched_and_guidance_in_two_calls_agree() -> None:
    model = HOSTS["sd"].build().unet.double()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 5, 32, generator=generator, dtype=torch.float64)
    modiff.apply(model, with_modulation(modiff.presets.modulated(8, 4), state_dtype="float64"))

    def sample(predict: Callable[[Tensor, int], Tensor]) -> Tensor:
        x = start
        with torch.no_grad(), modiff.trajectory(model):
            for t in (900, 700, 500, 300, 100):
                uncond, cond = predict(x, t).chunk(2)
                x = x - 0.1 * (uncond + 3.0 * (cond - uncond))
        return x

    def in_two_calls(x: Tensor, t: int) -> Tensor:
        found = []
        for branch in range(2):
            with modiff.context(model, f"branch {branch}"):
                found.append(model(x, t, encoder_hidden_states=text[branch : branch + 1]).sample)
        return torch.cat(found)

    batched = sample(lambda x, t: model(torch.cat([x, x]), t, encoder_hidden_states=text).sample)
    assert error(sample(in_two_calls), batched) < 1e-9


def test_a_pipeline_that_raises_frees_its_states_and_runs_again() -> None:
    host = HOSTS["sd"]
    pipe = host.build()
    modiff.apply(pipe, modiff.presets.w8a4())
    first = host.call(pipe)
    layers = layers_of(pipe.unet).values()
    held: list[bool] = []

    def stop(_pipe: Any, step: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            held.append(any(layer.loop.memories for layer in layers))
            raise KeyboardInterrupt
        return values

    with pytest.raises(KeyboardInterrupt):
        host.call(pipe, callback_on_step_end=stop)
    assert held == [True]
    assert all(not layer.loop.memories for layer in layers)
    assert torch.equal(host.call(pipe), first)


def test_an_image_to_image_start_in_the_middle_of_the_schedule_is_right() -> None:
    parts = {**HOSTS["sd"].build().components, "requires_safety_checker": False}
    pipe = StableDiffusionImg2ImgPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)

    def call() -> Tensor:
        image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(2)
        return pipe("red fox", image=image, strength=0.6, num_inference_steps=10, generator=generator,
                    output_type="latent", return_dict=False)[0]  # fmt: skip

    plain = call()
    modiff.apply(pipe, modiff.presets.modulated(None, 8))
    assert error(call(), plain) < 0.02
    assert torch.equal(call(), call())


def test_a_denoiser_outside_of_its_pipeline_needs_a_trajectory() -> None:
    host = HOSTS["ddim"]
    pipe = host.build()
    modiff.apply(pipe, modiff.presets.w8a4())
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(modiff.StateError, match=r"with modiff.trajectory\(model\)"):
        pipe.unet(x, 5)
    with modiff.trajectory(pipe):
        assert torch.isfinite(pipe.unet(x, 5).sample).all()


@pytest.mark.parametrize("name", ["ddim", "sd", "flux"])
def test_an_applied_pipeline_is_saved_as_the_class_it_was_and_after_remove_with_its_weights(
    name: str, tmp_path: Path
) -> None:
    host = HOSTS[name]
    pipe = host.build()
    kind, plain = type(pipe), host.call(pipe)
    modiff.apply(pipe, modiff.presets.w8a4())
    pipe.save_pretrained(tmp_path / "applied")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "applied")
    assert type(loaded) is kind
    assert set(pipe.components) == set(loaded.components)
    modiff.remove(pipe)
    assert type(pipe) is kind
    pipe.save_pretrained(tmp_path / "removed")
    assert error(host.call(DiffusionPipeline.from_pretrained(tmp_path / "removed")), plain) < 1e-5
    assert "cache_context" not in denoiser_of(host, pipe).__dict__


def test_applying_twice_and_removing_twice_are_errors_that_change_nothing() -> None:
    host = HOSTS["ddim"]
    pipe = host.build()
    plain = host.call(pipe)
    modiff.apply(pipe, modiff.presets.w8a4())
    first = host.call(pipe)
    with pytest.raises(modiff.StateError, match="remove"):
        modiff.apply(pipe, modiff.presets.w8a8())
    assert torch.equal(host.call(pipe), first)
    modiff.remove(pipe)
    with pytest.raises(modiff.StateError, match="apply"):
        modiff.remove(pipe)
    assert torch.equal(host.call(pipe), plain)


def test_something_that_is_neither_pipeline_nor_module_is_named() -> None:
    with pytest.raises(modiff.ConfigError, match="expected a diffusers pipeline or a torch module, got str"):
        modiff.apply("stable-diffusion", modiff.presets.w8a8())


def test_the_split_of_a_unet_is_found_and_the_report_names_it() -> None:
    report = modiff.apply(HOSTS["sdxl"].build(), modiff.presets.w8a4())
    notes = {entry.name: entry.reason for entry in report.taken}
    # up block 0: 64 decoder channels beside skips of 64 and 32; up block 1: 64 and 32 beside 32 and 32
    assert notes["up_blocks.0.resnets.0.conv1"] == "split at 64"
    assert notes["up_blocks.0.resnets.1.conv_shortcut"] == "split at 64"
    assert notes["up_blocks.1.resnets.0.conv1"] == "split at 64"
    assert notes["up_blocks.1.resnets.1.conv1"] == "split at 32"
    assert notes["up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"] == "may share with to_q"


@pytest.mark.parametrize("name", ["ddim", "flux"])
def test_a_copy_of_a_modulated_pipeline_has_states_and_a_clock_of_its_own(name: str) -> None:
    host = HOSTS[name]
    pipe = host.build()
    plain = host.call(pipe)
    modiff.apply(pipe, modiff.presets.w8a4())
    first = host.call(pipe)
    quantized = copy.deepcopy(pipe)
    modiff.remove(pipe)
    assert torch.equal(host.call(quantized), first)
    assert torch.equal(host.call(pipe), plain)
    modiff.remove(quantized)
    assert torch.equal(host.call(quantized), plain)


@pytest.mark.parametrize(
    "verb", [lambda p: modiff.calibrate(p, lambda: None), lambda p: modiff.trajectory(p).__enter__()]
)
def test_a_verb_on_a_pipeline_without_modulated_layers_says_so(verb: Callable[[Any], object]) -> None:
    with pytest.raises(modiff.StateError, match=r"modiff\.apply"):
        verb(HOSTS["ddim"].build())


def test_a_pipeline_with_two_denoisers_is_tuned_as_one_and_takes_the_config() -> None:
    """Wan 2.2 samples high noise with `transformer` and low noise with `transformer_2`; guidance in two calls."""
    parts = HOSTS["wan"].build().components
    second = copy.deepcopy(parts["transformer"])
    pipe = WanPipeline(**parts | {"transformer_2": second, "boundary_ratio": 0.5})
    pipe.set_progress_bar_config(disable=True)
    evaluations: list[str] = []
    pipe.transformer.register_forward_hook(lambda *_: evaluations.append("first"))
    second.register_forward_hook(lambda *_: evaluations.append("second"))
    found = modiff.tune(pipe, 4, run=lambda: HOSTS["wan"].call(pipe, steps=8), granularity="layer")
    once = evaluations[: len(evaluations) // (1 + FINALISTS + 1)]
    assert evaluations == once * (1 + FINALISTS + 1)
    assert set(once) == {"first", "second"}
    only_second = "blocks.0.extra"
    second.blocks[0].extra = nn.Linear(32, 32)
    report = modiff.apply(pipe, dataclasses.replace(found, overrides=((only_second, found.layer),)))
    assert [e.name for e in report.taken].count(only_second) == 1
    assert len(report.taken) == 2 * len(modiff.apply(HOSTS["wan"].build(), found).taken) + 1


@pytest.mark.parametrize("at", ["second network", "attach"])
def test_an_interrupted_apply_leaves_nothing_on_a_pipeline_with_two_denoisers(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = HOSTS["wan"].build().components
    pipe = WanPipeline(**parts | {"transformer_2": copy.deepcopy(parts["transformer"]), "boundary_ratio": 0.5})
    kind = type(pipe)
    if at == "second network":
        replaced: list[object] = []

        def interrupt(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if replaced:
                raise KeyboardInterrupt
            replaced.append(module)
            return install(module, *args, **kwargs)

        monkeypatch.setattr("modiff.api.install", interrupt)
    else:
        monkeypatch.setattr("modiff.hosts.host.follow_generations", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        modiff.apply(pipe, modiff.presets.w8a8())
    assert type(pipe) is kind
    for network in (pipe.transformer, pipe.transformer_2):
        assert attachment_of(network) is None
        assert not hasattr(network, "hf_quantizer")
        assert "cache_context" not in network.__dict__


@pytest.mark.parametrize("name", ["w8a4", modiff.presets.w8a4, modiff.presets.w8a4().to_dict()])
def test_a_config_may_be_a_name_a_preset_or_a_dictionary(name: Any) -> None:
    pipe = HOSTS["ddim"].build()
    modiff.apply(pipe, name)
    attachment = attachment_of(pipe.unet)
    assert attachment is not None
    assert attachment.config == modiff.presets.w8a4()
