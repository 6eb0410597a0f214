"""The lab: rows equal runs by hand, nothing is sampled twice, and the pipeline is as before."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

import modiff
from experiments.configs import coded, looped
from experiments.lab import Lab, skipping_gbops
from experiments.runs import Run
from experiments.settings import settings_for
from experiments.skipping import SkipRule, Tally
from experiments.store import Store
from modiff import presets
from modiff.errors import ConfigError
from modiff.evaluate.cost import LayerCost, ModelCost
from modiff.evaluate.metrics.paired import relative_l2
from modiff.generate.samplers import UnconditionalPipeline, set_scheduler
from modiff.hosts.diffusers.runs import noise_generators
from modiff.hosts.host import is_attached
from modiff.model.report import Entry, Report
from tests.pixels import pixel_pipeline

STEPS, SEED = 4, 3
SILENT = looped(coded(presets.modulated(None, 8), bits=0))


def lab_at(folder: Path, pipe: DiffusionPipeline | None = None, num_images: int = 3) -> Lab:
    settings = settings_for("quick", num_images=num_images, steps=10, seed=SEED)
    object.__setattr__(settings, "batch_size", 2)
    return Lab(pipe or pixel_pipeline(), settings, Store(folder, {}), progress=False)


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


def test_rows_equal_runs_by_hand_image_by_image(tmp_path: Path) -> None:
    config = presets.modulated(8, 4)
    plan = [
        ({"name": "ddim"}, Run(steps=STEPS, config=config)),
        ({"name": "other"}, Run(steps=STEPS, sampler="ddpm", config=config)),
        ({"name": "trailing"}, Run(steps=STEPS, spacing="trailing", config=config)),
        ({"name": "fewer"}, Run(steps=2)),
    ]
    rows = lab_at(tmp_path).rows(plan[:3])
    cases = [("ddim", {}), ("ddpm", {}), ("ddim", {"timestep_spacing": "trailing"})]
    for row, (sampler, spacing) in zip(rows, cases, strict=True):
        wanted = relative_l2(by_hand(sampler, STEPS, config, **spacing), by_hand(sampler, STEPS, **spacing))
        assert row["relative_l2"] == pytest.approx(wanted, rel=2e-2)
    assert [row["name"] for row in rows] == ["ddim", "other", "trailing"]
    (fewer,) = lab_at(tmp_path).rows(plan[3:], reference=Run(steps=STEPS), limit=Run(steps=8))
    two, four, eight = (by_hand("ddim", n) for n in (2, STEPS, 8))
    assert fewer["relative_l2"] == pytest.approx(relative_l2(two, four), rel=1e-4)
    each = [relative_l2(a, b) for a, b in zip(two, eight, strict=True)]
    assert fewer["to_limit"] == pytest.approx(float(np.median(each)), rel=1e-4)


def counting(pipe: DiffusionPipeline) -> Callable[[], int]:
    calls: list[int] = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    return lambda: len(calls)


def test_a_run_is_sampled_once_whoever_asks(tmp_path: Path) -> None:
    pipe = pixel_pipeline()
    lab, config = lab_at(tmp_path, pipe), presets.plain(8, 4)
    count = counting(pipe)
    plan = [({"a": 1}, Run(steps=2, config=config)), ({"a": 2}, Run(steps=2, config=config)), ({"a": 3}, Run(steps=2))]
    first = lab.rows(plan)
    assert count() == 2 * 2 * 2  # the run and its reference, two steps, two batches
    assert lab.rows(plan) == first
    assert count() == 8
    assert [row["a"] for row in first] == [1, 2, 3]
    assert {k: v for k, v in first[0].items() if k != "a"} == {k: v for k, v in first[1].items() if k != "a"}
    assert (first[2]["relative_l2"], first[2]["psnr_db"]) == (0.0, None)
    assert lab_at(tmp_path, pipe).rows(plan) == first  # one evaluation to count operations, no sampling
    assert count() == 9
    lab.rows(plan[:1], limit=Run(steps=3))
    assert count() == 9 + 4 + 6


def test_evaluations_and_operations_are_those_of_one_image(tmp_path: Path) -> None:
    lab = lab_at(tmp_path)
    full, pndm, coded_row, warm = lab.rows(
        [
            ({}, Run(steps=4)),
            ({}, Run(steps=4, sampler="pndm")),
            ({}, Run(steps=4, config=presets.plain(8, 8))),
            ({}, Run(steps=4, config=presets.plain(8, 8), exact_first=True)),
        ]
    )
    assert (full["evaluations"], pndm["evaluations"]) == (4, 5)
    assert full["gbops"] == pytest.approx(4 * lab.cost.macs * 1024 / 1e9)
    assert pndm["gbops"] == pytest.approx(full["gbops"] * 5 / 4)
    assert full["gbops"] / 16 < coded_row["gbops"] < full["gbops"]
    assert warm["gbops"] is None
    assert warm["relative_l2"] != coded_row["relative_l2"]


def test_silence_costs_what_ran(tmp_path: Path) -> None:
    lab = lab_at(tmp_path)
    none, some, never = lab.rows(
        [({}, Run(steps=4, config=SILENT, skip=SkipRule(unit="sample", threshold=t))) for t in (0.0, 0.2, 1e6)],
        reference=Run(steps=4),
    )
    whole = 4 * lab.cost.macs * 1024 / 1e9
    assert none["gbops"] == pytest.approx(whole)
    assert none["relative_l2"] < 1e-5
    assert none["gbops"] > some["gbops"] > never["gbops"] > whole / 4
    assert 1e-4 < some["relative_l2"] < never["relative_l2"]


def test_operations_of_a_silent_layer_by_hand() -> None:
    def layer(name: str) -> LayerCost:
        return LayerCost(name=name, kind="linear", macs=10**9, calls=1, weight_elements=1, input_elements=1,
                         output_elements=1)  # fmt: skip

    tally = Tally()
    for step in range(4):
        tally.add("b", 2, 1.0 if step == 0 else 0.25, step == 0)
    floats, fours = SILENT.layer, presets.modulated(8, 4).layer
    cost = ModelCost((layer("a"), layer("b")))
    for config, weight, activation in ((floats, 32, 32), (fours, 8, 4)):
        report = Report((Entry("a", "Linear", 1, None, "left"), Entry("b", "Linear", 1, config, "")))
        expected = 4 * 32 * 32 + weight * 32 + 3 * 0.25 * weight * activation
        assert skipping_gbops(cost, report, tally, 4) == pytest.approx(expected)


def test_the_pipeline_is_as_before_also_after_an_error(tmp_path: Path) -> None:
    pipe = pixel_pipeline()
    scheduler, state = pipe.scheduler, {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    lab = lab_at(tmp_path, pipe)
    lab.rows([({}, Run(steps=2, sampler="dpmsolver++", config=presets.modulated(8, 4)))])
    with pytest.raises(ConfigError, match="expected one of"):
        lab.rows([({}, Run(steps=2, sampler="nosuch", config=presets.modulated(8, 4)))])
    with pytest.raises(ConfigError, match="expected a modulated layer"):
        lab.rows([({}, Run(steps=2, config=presets.plain(8, 4), skip=SkipRule(unit="layer", threshold=0.1)))])
    with pytest.raises(ConfigError, match="at most 1000 steps, got 1001"):
        lab.rows([({}, Run(steps=1001))])
    assert pipe.scheduler is scheduler
    assert isinstance(scheduler, DDIMScheduler)
    assert not is_attached(pipe)
    assert all(torch.equal(v, state[k]) for k, v in pipe.unet.state_dict().items())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules()) == 0


class OwnPipeline(DiffusionPipeline):
    """A pipeline that diffusers does not know: another sampler is put into it, not into a copy."""

    def __init__(self, unet: object, scheduler: object) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(
        self, batch_size: int = 1, generator: object = None, num_inference_steps: int = 5, output_type: str = "np"
    ) -> object:
        return UnconditionalPipeline.__call__(self, batch_size, generator, num_inference_steps, output_type)


def test_a_pipeline_of_an_own_class_gets_its_sampler_back(tmp_path: Path) -> None:
    known = pixel_pipeline()
    pipe = OwnPipeline(unet=known.unet, scheduler=known.scheduler)
    scheduler = pipe.scheduler
    (row,) = lab_at(tmp_path, pipe).rows([({}, Run(steps=3, sampler="dpmsolver++", config=presets.plain(8, 4)))])
    assert pipe.scheduler is scheduler
    (wanted,) = lab_at(tmp_path / "b").rows([({}, Run(steps=3, sampler="dpmsolver++", config=presets.plain(8, 4)))])
    assert row["relative_l2"] == pytest.approx(wanted["relative_l2"], rel=1e-6)


def test_a_diverged_run_is_a_row_without_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = lab_at(tmp_path)
    sample = Lab.sample
    lab.rows([({}, Run(steps=2))])
    monkeypatch.setattr(Lab, "sample", lambda self, *a: sample(self, *a) * np.float32("nan"))
    (row,) = lab.rows([({}, Run(steps=2, config=presets.plain(8, 4)))])
    assert (row["relative_l2"], row["psnr_db"], row["evaluations"]) == (None, None, 2)
