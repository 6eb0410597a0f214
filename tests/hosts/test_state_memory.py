"""The memory of states: known before the first run, warned of, and a budget for it."""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn
from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

import modiff
from modiff import ConfigError, ModiffWarning, presets
from modiff.hosts.host import Host
from modiff.hosts.names import example_inputs
from modiff.model import trajectory as module
from tests.hosts.tiny import HOSTS, clip_tokenizer, embeddings, encoders, flow, image_vae, network

NETWORK = nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)])


@pytest.mark.parametrize(
    ("host", "layer"),
    [
        ("ddim", {}), ("ddim", {"modulation": {"predictor": "linear"}}), ("ddim", {"modulation": None}), ("dit", {}),
        ("ddpm", {"modulation": {"state_dtype": "float64"}}), ("ddim", {"weight": {"bits": 4}}),
    ],
)  # fmt: skip
def test_apply_tells_the_bytes_that_a_generation_then_takes(host: str, layer: dict[str, Any]) -> None:
    pipe, calls = HOSTS[host].build(), []
    handle = HOSTS[host].network(pipe).register_forward_pre_hook(lambda *_: calls.append(1))
    expected = modiff.apply(pipe, presets.as_config({"layer": layer})).memory.expected
    assert not calls  # hooks do not hear of the evaluation that tells the shapes
    handle.remove()
    HOSTS[host].call(pipe, steps=3)
    assert modiff.report(pipe).memory.states == expected
    assert (expected > 0) == (layer.get("modulation", {}) is not None)


@pytest.mark.parametrize("host", ["sd", "sdxl", "pixart", "sd3"])
def test_models_that_read_text_are_known_too_also_loaded_and_others_after_a_trajectory(
    host: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipe = HOSTS[host].build()
    memory = modiff.apply(pipe, "w8a4").memory
    assert memory.expected > 10**5
    modiff.save(pipe, tmp_path / "packed")
    assert modiff.report(modiff.load(tmp_path / "packed")).memory.expected == memory.expected
    assert "for one generation" in str(memory)
    monkeypatch.setattr(Host, "example", lambda *_: torch.zeros(-1))  # whatever it raises, a model is applied to
    assert "states unknown before the first run" in str(modiff.apply(NETWORK, "w8a4").memory)
    modiff.remove(NETWORK)


def mochi() -> diffusers.DiffusionPipeline:
    """Selects the words of its prompt by a mask, and asks for autocast."""
    transformer = network(
        diffusers.MochiTransformer3DModel, 3, num_attention_heads=2, attention_head_dim=8, num_layers=2, in_channels=12,
        pooled_projection_dim=16, text_embed_dim=32, time_embed_dim=4, max_sequence_length=8,
    )  # fmt: skip
    blocks, layers = (32,) * 4, (1,) * 5
    vae = diffusers.AutoencoderKLMochi(encoder_block_out_channels=blocks, decoder_block_out_channels=blocks,
                                       layers_per_block=layers)  # fmt: skip
    return diffusers.MochiPipeline(transformer=transformer, scheduler=flow(), vae=vae, **encoders(1))


def of_components(kind: type[diffusers.DiffusionPipeline], host: str, **parts: Any) -> diffusers.DiffusionPipeline:
    """A pipeline of another kind that reads what a tiny host has."""
    known = HOSTS[host].build().components | parts
    return kind(**{name: known.get(name) for name in inspect.signature(kind.__init__).parameters if name in known})


def animated() -> diffusers.DiffusionPipeline:
    """Reads the prompt once for each frame."""
    motion = diffusers.MotionAdapter((32, 64), 1, motion_norm_num_groups=8, motion_num_attention_heads=2)
    return of_components(diffusers.AnimateDiffPipeline, "sd", motion_adapter=motion)


def of_words(kind: type[diffusers.DiffusionPipeline], transformer: nn.Module, **parts: Any) -> Any:
    """A pipeline that has a language model read its prompt."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
    }
    tokenizer, config = clip_tokenizer(), Qwen3VLTextConfig(vocab_size=64, num_hidden_layers=2, **sizes)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    parts = {"vae": image_vae(), "scheduler": flow(), "text_encoder": Qwen3VLTextModel(config)} | parts
    return kind(transformer=transformer, tokenizer=tokenizer, **parts)


def krea() -> diffusers.DiffusionPipeline:
    """Reads several layers of its text encoder; guidance in two calls without contexts."""
    transformer = network(
        diffusers.Krea2Transformer2DModel, 3, in_channels=16, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, intermediate_size=64, timestep_embed_dim=16, text_hidden_dim=32,
        num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=64,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = HOSTS["wan"].build().vae
    return of_words(diffusers.Krea2Pipeline, transformer, vae=vae, text_encoder_select_layers=(0, 1))


def z_image() -> diffusers.DiffusionPipeline:
    """Reads the words of a prompt that a mask selects, both branches of guidance in one list."""
    sizes = {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    axes = {"axes_dims": [4, 6, 6], "axes_lens": [256, 32, 32]}
    return of_words(
        diffusers.ZImagePipeline, network(diffusers.ZImageTransformer2DModel, 3, cap_feat_dim=32, **sizes, **axes)
    )


def edits() -> diffusers.DiffusionPipeline:
    """Three branches, of eight channels."""
    config = HOSTS["sd"].build().unet.config
    unet = network(diffusers.UNet2DConditionModel, 12, **{k: v for k, v in config.items() if k[0] != "_"}
                   | {"in_channels": 8})  # fmt: skip
    return of_components(diffusers.StableDiffusionInstructPix2PixPipeline, "sd", unet=unet)


IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
PROMPT = {"prompt": "a red fox"}
WORDS = embeddings(1, pooled=False)
POOLED = embeddings(1, guidance="true_cfg_scale", true_cfg_scale=1.0)
MASKS = {f"{name}prompt_attention_mask": torch.ones(1, 8).bool() for name in ("", "negative_")}
WAYS: dict[str, tuple[Callable[[], diffusers.DiffusionPipeline], int, dict[str, Any]]] = {
    "flux": (HOSTS["flux"].build, 16, POOLED),
    "flux of images": (partial(of_components, diffusers.FluxImg2ImgPipeline, "flux"), 16, POOLED | {"image": IMAGE}),
    "flux kontext": (partial(of_components, diffusers.FluxKontextPipeline, "flux"), 16, POOLED | {"image": IMAGE}),
    "wan": (HOSTS["wan"].build, 32, WORDS),
    "mochi": (mochi, 64, WORDS | MASKS),
    "animatediff": (animated, 8, WORDS),
    "krea": (krea, 32, PROMPT),
    "z-image": (z_image, 32, PROMPT),
    "pix2pix": (edits, 8, PROMPT | {"image": IMAGE[..., :8, :8]}),
    "pag": (partial(of_components, diffusers.StableDiffusionPAGPipeline, "sd"), 8, PROMPT),
}
SIZES = {"num_frames": 9, "max_sequence_length": 8, "max_area": 256, "_auto_resize": False}


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi asks for float32
@pytest.mark.parametrize("way", WAYS)
def test_apply_tells_the_states_of_pipelines_at_their_usual_size_however_they_guide_and_read_prompts(way) -> None:
    build, size, words = WAYS[way]
    pipe, sizes = build(), {"height": size, "width": size} | SIZES
    call = inspect.signature(pipe.__call__).parameters.values()

    class Small(type(pipe)):
        def __call__(self, **words: Any) -> Any:
            return super().__call__(**{name: size for name, size in sizes.items() if name in names} | words)

    names = [parameter.name for parameter in call]
    usual = [parameter.replace(default=sizes.get(parameter.name, parameter.default)) for parameter in call]
    Small.__call__.__signature__ = inspect.Signature([inspect.Parameter("self", 1), *usual])
    pipe.__class__ = Small
    drawn = torch.get_rng_state()
    expected = modiff.apply(pipe, "w8a4").memory.expected
    assert torch.equal(torch.get_rng_state(), drawn)
    pipe.set_progress_bar_config(disable=True)
    pipe(**words, num_inference_steps=2, output_type="latent")
    assert modiff.report(pipe).memory.states == expected > 0


def test_states_are_known_of_a_model_that_keeps_its_first_parameters_in_float32(tmp_path) -> None:
    HOSTS["wan"].build().transformer.save_pretrained(tmp_path)
    network = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert next(network.parameters()).dtype == torch.float32
    inputs = example_inputs(network, torch.empty(1, 4, 3, 4, 4))
    assert inputs is not None
    network(**{name: torch.ones_like(value, device="cpu") for name, value in inputs.items()})


def test_a_video_model_of_a_billion_weights_is_told_of_without_its_weights() -> None:
    sizes = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
    with torch.device("meta"):
        transformer = diffusers.WanTransformer3DModel(**sizes).eval()
    parts = HOSTS["wan"].build().components | {"vae": None, "transformer": transformer}
    with pytest.warns(ModiffWarning, match=r"got about 266\.7 GiB for one generation of WanTransformer3DModel"):
        modiff.apply(diffusers.WanPipeline(**parts), "w8a8")


def test_states_beyond_what_is_free_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_free", lambda device: 1000)
    monkeypatch.setattr("modiff.errors._WARNED", set())
    with pytest.warns(ModiffWarning, match=r"got about 0\.0 GiB for one generation of UNet2DModel.*state_memory"):
        modiff.apply(HOSTS["ddim"].build(), "w8a4")


@pytest.mark.parametrize(("version", "limit", "free"), [(2, "6000", 5500), (1, "6000", 5500), (2, "max", None)])
def test_limits_of_a_container_bound_what_is_free(tmp_path, monkeypatch, version: int, limit: str, free: int | None):
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, text in zip((*names, "memory.stat"), (limit, "1000", "anon 200\ninactive_file 500"), strict=True):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(module, "_control_groups", lambda: [tmp_path])
    told = module._free(torch.device("cpu"))
    assert told == free if free else told > 10**6


@pytest.mark.parametrize("config", ["w8a4", "w8a4:integer"])
def test_a_budget_keeps_the_smallest_states_and_the_report_says_which_layers_run_plain(config: str) -> None:
    pipe = HOSTS["ddim"].build()
    report = modiff.apply(pipe, config, state_memory="100KiB")
    plain = {e.setting: e.reason for e in report.taken if e.config.modulation is None}
    assert plain == {"W8A8 plain": "plain: its states do not fit into state_memory='100KiB'"}
    HOSTS["ddim"].call(pipe, steps=3)
    assert 50 * 1024 < report.memory.expected <= 100 * 1024
    assert 0 <= modiff.report(pipe).memory.states - report.memory.expected <= 8 * len(report.taken)  # grids
    dtypes = {e.states for e in report.taken if e.config.modulation is not None}
    assert dtypes == {"int16" if "integer" in config else "float32"}
    modiff.remove(pipe)
    whole = modiff.apply(pipe, config).memory.expected
    modiff.remove(pipe)
    kept = modiff.apply(pipe, config, state_memory=whole)  # states that layers share count once
    assert not [e for e in kept.taken if e.config.modulation is None]
    with pytest.raises(ConfigError, match="state_memory: expected networks of known input sizes, got 'Sequential'"):
        modiff.apply(NETWORK, "w8a4", state_memory="1GiB")


class WideAndNarrow(nn.Module):
    """Its output is that of the wide layer, and next to nothing of the narrow one."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(96, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide, narrow = x.split([96, 32], -1)
        return torch.cat([self.wide(wide), 0.01 * self.narrow(input=narrow)], -1)


def test_a_budget_goes_where_it_takes_most_error_away_where_a_run_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Host, "example", lambda *_: {"x": torch.zeros(1, 4, 128, device="meta")})
    model = WideAndNarrow().eval()

    def run() -> None:
        model(torch.randn(1, 4, 128))

    def plain(**words: Any) -> list[str]:
        config = presets.modulated(8, 8).to_dict() | {"first_last": "quantize"}
        report = modiff.apply(model, config, state_memory=4 * 2 * 96 * 4, **words)
        modiff.remove(model)
        return [entry.name for entry in report.taken if entry.config and entry.config.modulation is None]

    assert plain() == ["wide"]  # the smallest states stay
    assert plain(run=run) == ["narrow"]


def test_layers_that_run_plain_clip_nothing() -> None:
    report = modiff.apply(HOSTS["ddim"].build(), "tuned:8:4", state_memory=1)
    assert {(entry.setting, entry.config.activation.clip) for entry in report.taken if entry.config} == {
        ("W8A8 plain", 1)
    }
