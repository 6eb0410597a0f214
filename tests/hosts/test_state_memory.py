"""The memory of states: known before the first run, warned of, and a budget for it."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import modiff
from modiff import ConfigError, ModiffWarning, presets
from modiff.hosts.host import Host, host_of
from modiff.hosts.names import example_inputs
from modiff.model import trajectory as module
from tests.hosts.tiny import HOSTS, embeddings, encoders, flow, network

SIZES = ("height", "width", "num_frames")
NETWORK = nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)])


@pytest.mark.parametrize(
    ("host", "modulation"),
    [("ddim", {}), ("ddim", {"predictor": "linear"}), ("ddpm", {"state_dtype": "float64"}), ("dit", {})],
)
def test_apply_tells_the_bytes_that_a_generation_then_takes(host: str, modulation: dict[str, str]) -> None:
    pipe, calls = HOSTS[host].build(), []
    handle = HOSTS[host].network(pipe).register_forward_pre_hook(lambda *_: calls.append(1))
    expected = modiff.apply(pipe, presets.as_config({"layer": {"modulation": modulation}})).memory.expected
    assert not calls  # hooks do not hear of the evaluation that tells the shapes
    handle.remove()
    HOSTS[host].call(pipe, steps=3)
    assert modiff.report(pipe).memory.states == expected > 0


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
    assert "states known after a trajectory" in str(modiff.apply(NETWORK, "w8a4").memory)
    modiff.remove(NETWORK)


def test_states_of_flux_and_of_videos_are_known_at_the_usual_size_of_their_pipelines() -> None:
    class Flux(diffusers.FluxPipeline):
        def __call__(self, height=8, width=8, true_cfg_scale=1.0, max_sequence_length=8, **words: Any) -> Any:
            return super().__call__(height=height, width=width, **words | {"true_cfg_scale": true_cfg_scale})

    class Wan(diffusers.WanPipeline):
        def __call__(
            self, height=32, width=32, num_frames=9, guidance_scale=3.0, max_sequence_length=8, **words
        ) -> Any:
            return super().__call__(height=height, width=width, num_frames=num_frames, **words)

    for host, kind in (("flux", Flux), ("wan", Wan)):
        pipe = HOSTS[host].build()
        pipe.__class__ = kind
        expected = modiff.apply(pipe, "w8a4").memory.expected
        HOSTS[host].call(pipe, steps=3, **{"true_cfg_scale": 1.0} if host == "flux" else {})
        assert modiff.report(pipe).memory.states == expected > 0


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


def animated() -> diffusers.DiffusionPipeline:
    """Reads the prompt once for each frame."""
    parts = HOSTS["sd"].build().components
    kept = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    motion = diffusers.MotionAdapter((32, 64), 1, motion_norm_num_groups=8, motion_num_attention_heads=2)
    return diffusers.AnimateDiffPipeline(**kept, motion_adapter=motion)


WORDS = embeddings(1, pooled=False)
MASKS = {f"{name}prompt_attention_mask": torch.ones(1, 8).bool() for name in ("", "negative_")}


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi asks for float32
@pytest.mark.parametrize(("build", "size", "words"), [(mochi, 64, WORDS | MASKS), (animated, 8, WORDS)])
def test_states_of_networks_that_read_their_prompt_in_ways_of_their_own_are_known(build, size, words) -> None:
    pipe, sizes = build(), {"height": size, "width": size, "num_frames": 7, "max_sequence_length": 8}
    call = inspect.signature(pipe.__call__).parameters.values()

    class Small(type(pipe)):
        def __call__(self, **words: Any) -> Any:
            return super().__call__(**{name: size for name, size in sizes.items() if name in names}, **words)

    names = [parameter.name for parameter in call]
    usual = [parameter.replace(default=sizes.get(parameter.name, parameter.default)) for parameter in call]
    Small.__call__.__signature__ = inspect.Signature([inspect.Parameter("self", 1), *usual])
    pipe.__class__ = Small
    expected = modiff.apply(pipe, "w8a4").memory.expected
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


@pytest.mark.parametrize("host", ["sd", "sdxl", "pixart", "sd3", "flux", "wan"])
def test_a_pipeline_tells_the_shapes_of_its_first_evaluation_before_it_runs(host: str) -> None:
    pipe, real = HOSTS[host].build(), dict[str, Any]()
    network = HOSTS[host].network(pipe)

    def stop(module: nn.Module, inputs: tuple[Any, ...], words: dict[str, Any]) -> None:
        real.update(zip(inspect.signature(module.forward).parameters, inputs, strict=False), **words)
        raise InterruptedError

    network.register_forward_pre_hook(stop, with_kwargs=True)
    sizes = {name: p.default for name, p in inspect.signature(pipe.__call__).parameters.items() if name in SIZES}
    with pytest.raises(InterruptedError):
        HOSTS[host].call(pipe, **sizes)
    told = host_of(pipe).example(network, pipe)
    for name in {"sample", "hidden_states", "encoder_hidden_states", "img_ids"} & set(real):
        first = 2 if name.startswith("encoder") else int(name != "img_ids")  # the number of tokens is the prompt's
        assert told[name].shape[first:] == real[name].shape[first:]


def test_states_beyond_what_is_free_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_free", lambda device: 1000)
    monkeypatch.setattr("modiff.errors._WARNED", set())
    with pytest.warns(ModiffWarning, match=r"got about 0\.0 GiB for one generation of UNet2DModel.*state_memory"):
        modiff.apply(HOSTS["ddim"].build(), "w8a4")


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
    assert not [e for e in modiff.apply(pipe, "w8a4", state_memory=10**9).taken if e.config.modulation is None]
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
