"""A pipeline under configs: its images, and the demo with its rows."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import modiff
from modiff import presets
from modiff.config import ModiffConfig
from modiff.errors import ConfigError
from modiff.evaluate.demo import Demo, run_demo
from modiff.evaluate.pipelines import PipelineSource
from modiff.evaluate.report.charts import GAIN
from modiff.generate.job import Conditions
from modiff.hosts.diffusers.runs import noise_generators
from modiff.model.trajectory import state_bytes
from modiff.model.tune import candidates
from tests.hosts.tiny import HOSTS
from tests.pixels import pixel_pipeline

STEPS = 3
W8A4 = presets.modulated(8, 4)


def drawn(source: PipelineSource, config: ModiffConfig | None, *batches: range) -> np.ndarray:
    with source.open(config, STEPS) as draw:
        return np.concatenate([draw(batch).images for batch in batches])


@pytest.mark.parametrize("config", [None, W8A4], ids=["full", "modulated"])
def test_images_are_those_of_diffusers_in_any_batch_and_the_model_is_left_alone(config: ModiffConfig | None) -> None:
    pipe = pixel_pipeline()
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    source = PipelineSource(pipe, seed=7)
    with pytest.raises(RuntimeError, match="in the body"), source.open(config, STEPS):
        raise RuntimeError("in the body")
    together, apart = drawn(source, config, range(4)), drawn(source, config, range(1), range(1, 4))
    # float rounding may tip single codes of a layer, never a whole image
    assert (np.abs(together - apart) > 1 / 255).mean() < 0.02
    noise = [torch.Generator().manual_seed(7 + i) for i in range(4)]
    if config is not None:
        modiff.apply(pipe, config)  # raises if modiff were still on it
    images = pipe(batch_size=4, num_inference_steps=STEPS, generator=noise, output_type="np").images
    if config is not None:
        modiff.remove(pipe)
    assert np.array_equal(images, together)
    assert not pipe.unet._forward_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())


def test_states_are_measured_at_the_end_of_the_trajectory_and_every_evaluation_is_counted(monkeypatch) -> None:
    source, sizes, steps = PipelineSource(pixel_pipeline()), [], []
    with source.bar([("a", 1, STEPS)], shown=False) as bar, source.open(W8A4, STEPS) as draw:
        monkeypatch.setattr(bar, "step", lambda: steps.append(1))
        handle = source.pipe.unet.register_forward_hook(lambda model, *_: sizes.append(state_bytes(model)))
        images = draw(range(2))
        handle.remove()
        assert len(steps) == STEPS
    assert images.state_bytes == sizes[-1] > 0
    with source.open(None, STEPS) as draw:
        assert draw(range(2)).state_bytes == 0


def test_static_scales_are_measured_on_other_noise_first() -> None:
    activation = dataclasses.replace(W8A4.layer.activation, bits=8, dynamic=False, granularity="tensor")
    config = dataclasses.replace(W8A4, layer=dataclasses.replace(W8A4.layer, activation=activation))
    source = PipelineSource(pixel_pipeline())
    images, full = drawn(source, config, range(2)), drawn(source, None, range(2))
    assert np.linalg.norm(images - full) < 0.2 * np.linalg.norm(full)


@pytest.mark.parametrize(
    ("name", "kind", "argument", "values", "other"),
    [
        ("dit", "labels", "class_labels", (3, 999, 0), 7),
        ("sd", "prompts", "prompt", ("a fox", "a cat", "two words more"), "a fox jumps"),
    ],
)
def test_a_conditional_pipeline_draws_each_image_of_its_own_class_or_prompt(
    name: str, kind: str, argument: str, values: tuple[Any, ...], other: Any
) -> None:
    pipe = HOSTS[name].build()
    source = PipelineSource(pipe, conditions=Conditions(**{kind: values}))
    images = drawn(source, None, range(1), range(1, 4))
    taken = {argument: [*values, values[0]]}
    expected = pipe(
        **taken, num_inference_steps=STEPS, generator=noise_generators(0, range(4)), output_type="np"
    ).images
    assert np.abs(images - expected).max() <= 0.01  # another batch: rounding
    changed = drawn(PipelineSource(pipe, conditions=Conditions(**{kind: (other,)})), None, range(2))
    assert np.abs(changed - images[:2]).max() > 0.01
    assert drawn(source, W8A4, range(2)).shape == (2, *source.shape)
    assert source.settings[kind] == ", ".join(map(str, values))


IMAGES, SEED = 2, 3
FIELDS = [
    "name", "weight_bits", "activation_bits", "modulated", "compensated", "anchor_weights",
    "reanchor_every", "tuned", "steps",
    "relative_l2", "psnr_db", "gbops", "state_mib", "seconds",
]  # fmt: skip


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    with pytest.MonkeyPatch.context() as patch:
        # a few candidates only: what is tested here is the demo
        patch.setattr("modiff.model.tune.candidates", lambda base: candidates(base)[::4])
        yield run_demo(pixel_pipeline(), steps=4, num_images=IMAGES, seed=SEED, progress=False)


def test_the_rows_are_those_of_the_issue_in_order_and_run_what_their_names_say(demo: Demo) -> None:
    assert [r["name"].replace("modulated", "m").replace("plain", "p") for r in demo.rows] == [
        "full precision", "half the steps", "a quarter of the steps", "p W8A8", "p W8A4", "p W8A3", "m W8A8",
        "m W8A4", "m W8A3", "m W8A2", "m W4A8", "m W8A8, quantized anchor", "m W8A8, anchored every 10",
        "m W4A8, quantized anchor", "m W4A8, anchored every 10", "m W8A4, no compensation", "p W32A4", "m W32A4",
        "m W32A3", "tuned W32A4", "tuned W32A3", "tuned W32A2",
    ]  # fmt: skip
    assert [r["steps"] for r in demo.rows] == [4, 2, 1, *[4] * 19]
    for r in demo.rows[3:]:
        name, modulated = r["name"], not r["name"].startswith("plain")
        assert f" W{r['weight_bits']}A{r['activation_bits']}" in name
        assert (r["modulated"], r["tuned"]) == (modulated, name.startswith("tuned"))
        assert r["compensated"] == (("no compensation" not in name) if modulated else None)
        exact = "quantized" not in name and "no compensation" not in name
        assert r["anchor_weights"] == (("exact" if exact else "quantized") if modulated else None)
        assert r["reanchor_every"] == (10 * name.endswith("every 10") if modulated else None)


def test_the_json_has_exactly_the_fields_agreed_on_and_no_infinity(demo: Demo) -> None:
    values = json.loads(json.dumps(demo.to_dict(), allow_nan=False))
    assert [list(r) for r in values["rows"]] == [FIELDS] * len(demo.rows)
    assert values["environment"]["modiff"] == modiff.__version__
    assert values["settings"]["seed"] == SEED


def test_the_picture_is_four_rows_with_their_errors_and_differences_of_one_gain(demo: Demo, monkeypatch) -> None:
    seen: list[tuple[str, np.ndarray]] = []
    monkeypatch.setattr("modiff.evaluate.demo.grid", seen.extend)
    demo.picture()
    first = [label.splitlines()[0] for label, _ in seen]
    assert first == ["full precision, 4 steps", "half the steps", "plain W8A4", "modulated W8A4"]
    assert f"difference to it,\n{GAIN} times as strong" in seen[0][0]
    rows = {r["name"]: (r, images) for r, images in zip(demo.rows, demo.images, strict=True)}
    reference = demo.images[0].astype(np.float64)
    for label, shown in seen:
        row, images = rows[label.splitlines()[0].partition(",")[0]]
        assert np.array_equal(shown[:IMAGES], np.broadcast_to(images, shown[:IMAGES].shape))
        # red less blue is the difference times the gain, clipped
        change = (GAIN * (images - reference).mean(-1)).clip(-1, 1)
        assert shown[IMAGES:, ..., 0] - shown[IMAGES:, ..., 2] == pytest.approx(change, abs=1e-6)
        figures = f"{row['steps']} steps\nrelative L2 {row['relative_l2']:.4f}\nPSNR {row['psnr_db'] or 0:.1f} dB"
        assert row is demo.rows[0] or label.partition("\n")[2] == figures


def test_errors_are_those_of_the_images_against_diffusers_alone(demo: Demo) -> None:
    noise = [torch.Generator().manual_seed(SEED + i) for i in range(IMAGES)]
    reference = pixel_pipeline()(batch_size=IMAGES, num_inference_steps=4, generator=noise, output_type="np").images
    for r, images in zip(demo.rows[1:], demo.images[1:], strict=True):
        difference = images.astype(np.float64) - reference
        # two float64 sums of 128 terms
        expected = np.linalg.norm(difference) / np.linalg.norm(reference.astype(np.float64))
        assert r["relative_l2"] == pytest.approx(expected, rel=1e-12)
        assert r["psnr_db"] == pytest.approx(-10 * np.log10(np.mean(difference**2)), rel=1e-12)
    assert (demo.rows[0]["relative_l2"], demo.rows[0]["psnr_db"]) == (0.0, None)


def test_modulation_and_tuning_pay_also_on_random_weights(demo: Demo) -> None:
    error = {r["name"]: r["relative_l2"] or 0.0 for r in demo.rows}
    assert error["modulated W32A4"] < 0.6 * error["plain W32A4"]
    assert error["tuned W32A4"] < error["modulated W32A4"]
    assert error["modulated W4A8"] < 0.5 * error["modulated W4A8, quantized anchor"]
    assert error["modulated W8A8"] < error["modulated W8A4"] < error["modulated W8A3"] < error["modulated W8A2"]


def test_a_demo_that_cannot_run_says_so_at_once() -> None:
    for name, value, message in (("steps", 3, "4 or more, got 3"), ("steps", 1001, "at most 1000, got 1001"),
                                 ("num_images", 0, "at least 1 image, got 0")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            run_demo(pixel_pipeline(), **{name: value})
