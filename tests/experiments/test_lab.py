"""The lab: rows equal runs by hand, nothing is sampled twice, and the pipeline is left as it was."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import modiff
from experiments.lab import Lab, StudySettings
from experiments.runs import PAPER, Run, compare, errors_of, looped, quantized_with
from experiments.skipping import SkipRule, Tally
from modiff import presets
from modiff.errors import ConfigError
from modiff.evaluate.cost import LayerCost
from modiff.evaluate.metrics.paired import psnr, relative_l2
from modiff.generate.samplers import set_scheduler
from modiff.hosts.diffusers.runs import noise_generators
from modiff.hosts.host import is_attached
from modiff.model.report import Entry, Report
from tests.pixels import pixel_pipeline

STEPS, SEED = 4, 3
SILENT = looped(quantized_with(presets.published(None, 8), bits=0), PAPER)


def lab_at(folder: Path, pipe: DiffusionPipeline | None = None) -> Lab:
    settings = StudySettings(num_images=3, batch_size=2, steps=10, seed=SEED)
    return Lab(pipe or pixel_pipeline(), settings, folder, progress=False)


def by_hand(sampler: str, steps: int, config: modiff.ModiffConfig | None = None, **scheduler: object) -> np.ndarray:
    pipe = set_scheduler(pixel_pipeline(), sampler)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **scheduler)
    pipe.set_progress_bar_config(disable=True)
    if config is not None:
        modiff.apply(pipe, config)
    images = [
        pipe(batch_size=1, num_inference_steps=steps, generator=noise_generators(SEED, [i]), output_type="np").images
        for i in range(3)
    ]
    return np.concatenate(images)


@pytest.mark.parametrize(("sampler", "spacing"), [("ddpm", None), ("ddim", "trailing")])
def test_a_row_equals_runs_by_hand_image_by_image(tmp_path, sampler, spacing):
    config, scheduler = presets.published(8, 4), {"timestep_spacing": spacing} if spacing else {}
    run = Run(steps=STEPS, sampler=sampler, spacing=spacing, config=config)
    (row,) = lab_at(tmp_path).rows([({"name": 1}, run)])
    expected = relative_l2(by_hand(sampler, STEPS, config, **scheduler), by_hand(sampler, STEPS, **scheduler))
    assert row["relative_l2"] == pytest.approx(expected, rel=2e-2)
    assert row["name"] == 1


def test_a_run_is_sampled_once(tmp_path):
    pipe, calls = pixel_pipeline(), []
    lab, config = lab_at(tmp_path, pipe), presets.plain(8, 4)
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    plan = [({}, Run(steps=2, config=config)), ({}, Run(steps=2, config=config)), ({}, Run(steps=2))]
    first = lab.rows(plan)
    assert len(calls) == 2 * 2 * 2  # the run and its reference, two steps, two batches
    assert lab.rows(plan) == first
    assert len(calls) == 8
    assert first[0] == first[1]
    assert (first[2]["relative_l2"], first[2]["psnr_db"]) == (0.0, None)
    assert lab_at(tmp_path, pipe).rows(plan) == first  # one evaluation to count operations, no sampling
    assert len(calls) == 9


def test_evaluations_and_operations_are_those_of_one_image(tmp_path):
    lab, skip = lab_at(tmp_path), SkipRule(unit="sample", threshold=1e6)
    runs = [Run(steps=4), Run(steps=4, sampler="pndm"), Run(steps=4, config=presets.plain(8, 8)),
            Run(steps=4, config=presets.plain(8, 8), exact_first=True),
            Run(steps=4, config=SILENT, skip=skip),
            Run(steps=4, sampler="parallel ddim")]  # fmt: skip
    full, pndm, plain, warm, never, parallel = lab.rows([({}, run) for run in runs])
    whole = 4 * sum(layer.macs for layer in lab.cost) * 1024 / 1e9
    assert (full["evaluations"], pndm["evaluations"]) == (4, 5)
    assert full["gbops"] == pytest.approx(whole)
    assert pndm["gbops"] == pytest.approx(whole * 5 / 4)
    assert whole / 16 < plain["gbops"] < whole
    assert warm["gbops"] is None
    assert warm["relative_l2"] != plain["relative_l2"]
    assert whole / 4 < never["gbops"] < whole
    assert 4 < parallel["evaluations"] <= 4 + 3 + 2 + 1
    assert (parallel["gbops"], parallel["relative_l2"] > 0) == (None, True)


@pytest.mark.parametrize(
    ("config", "weight", "activation"), [(SILENT.layer, 32, 32), (presets.published(8, 4).layer, 8, 4)]
)
def test_operations_of_a_silent_layer_by_hand(config, weight, activation):
    tally = Tally()
    for step in range(4):
        tally.add("b", 2, 1.0 if step == 0 else 0.25, step == 0)
    report = Report((Entry("a", "Linear", 1, None, "left"), Entry("b", "Linear", 1, config, "")))
    expected = 4 * 32 * 32 + weight * 32 + 3 * 0.25 * weight * activation
    assert tally.gbops([LayerCost(name=name, macs=10**9) for name in "ab"], report, 4) == pytest.approx(expected)


def test_the_pipeline_is_left_as_it_was_also_after_an_error(tmp_path):
    pipe = pixel_pipeline()
    scheduler, state = pipe.scheduler, {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    lab = lab_at(tmp_path, pipe)
    lab.rows([({}, Run(steps=2, sampler="dpmsolver++", config=presets.published(8, 4)))])
    for message, run in {
        "expected one of": Run(steps=2, sampler="nosuch"),
        "expected a modulated layer": Run(steps=2, config=presets.plain(), skip=SkipRule(unit="layer", threshold=0.1)),
        "at most 1000 steps, got 1001": Run(steps=1001),
    }.items():
        with pytest.raises(ConfigError, match=message):
            lab.rows([({}, run)])
    assert pipe.scheduler is scheduler
    assert not is_attached(pipe)
    assert all(torch.equal(v, state[k]) for k, v in pipe.unet.state_dict().items())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules()) == 0


def pictures(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((4, 4, 4, 3)).astype(np.float32)


def test_errors_are_those_of_all_pixels_together_with_the_median_over_images():
    images, reference = pictures(0), pictures(1)
    outcome = compare(images, reference, 5, 2.5)
    assert json.loads(json.dumps(outcome, allow_nan=False)) == outcome
    errors = errors_of(outcome)
    assert errors["relative_l2"] == pytest.approx(relative_l2(images, reference), rel=1e-9)
    assert errors["psnr_db"] == pytest.approx(psnr(images, reference), rel=1e-9)
    each = [relative_l2(a, b) for a, b in zip(images, reference, strict=True)]
    assert errors["median"] == pytest.approx(float(np.median(each)), rel=1e-9)
    assert min(each) <= errors["low"] < errors["relative_l2"] < errors["high"] <= max(each)
    images[2, 0, 0, 0] = np.inf
    assert set(errors_of(compare(images, reference, 1, None)).values()) == {None}
