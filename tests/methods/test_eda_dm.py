"""EDA-DM: states by density and variety, counted by hand; without layer losses it is plain block reconstruction."""

import dataclasses

import pytest
import torch

import modiff
from modiff import CalibrationError, ConfigError, ModulationConfig
from modiff.calibration.timesteps import CountedSteps
from modiff.hosts.diffusers.runs import calibration_run
from modiff.methods import EdaDmConfig, MethodJob, boundary_overrides, every_layer, quantize
from modiff.methods.eda_dm import _PUBLISHED, _counts, allocate, density, unit_range, variety
from modiff.model.attach import attachment_of
from modiff.model.calibrate import quantizers_of
from tests.methods import small

STEPS = 4
QUICK = dataclasses.replace(_PUBLISHED, iterations=8, batch=4, checks=2, patience=0)
SMALL = EdaDmConfig(steps=STEPS, samples=8, batch=4, reconstruction=QUICK)


def two_clusters():
    """Five steps at (1, 0), two at (0, 1); one trajectory, two channels, one pixel."""
    return torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 2, dtype=torch.float64).view(7, 1, 2, 1)


def test_two_clusters_of_steps_have_the_density_variety_and_counts_of_hand():
    """11 of the 21 distances are 0, so the median is 0; each step is unlike those of the other cluster alone."""
    features = two_clusters()
    assert density(features).tolist() == [4.0] * 5 + [1.0] * 2
    assert density(features, radius=1.0).tolist() == [6.0] * 7
    assert variety(features).tolist() == [2.0] * 5 + [5.0] * 2
    scores = unit_range(density(features)) + 1.2 * unit_range(variety(features))
    assert scores.tolist() == [1.0] * 5 + [1.2] * 2  # 7.4 in all
    assert allocate(scores, 37) == (5, 5, 5, 5, 5, 6, 6)
    assert allocate(scores, 20) == (3, 3, 3, 3, 3, 3, 2)  # 2.70 and 3.24 round to 21: one off at the end
    assert allocate(scores, 18) == (2, 2, 2, 2, 2, 4, 4)  # 2.43 and 2.92 round to 16: one more for the largest


def test_scores_do_not_depend_on_the_unit_of_the_features_and_equal_ones_are_uniform():
    features = torch.randn(6, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for measure in (density, variety):
        assert torch.allclose(measure(1000 * features), measure(features))
    pairs = torch.cdist(features.flatten(1), features.flatten(1)).square() / features[0].numel()
    median = torch.tensor([pairs[i, j] for i in range(6) for j in range(i)]).median()
    assert density(features).tolist() == [(row <= median + 1e-12).sum() - 1 for row in pairs]
    cosine = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=3)
    assert torch.allclose(variety(features), (1 - cosine).sum((1, 2, 3)))
    equal = unit_range(density(torch.ones(4, 1, 2, 1)))
    assert equal.tolist() == [0.0] * 4
    assert allocate(equal, 6) == (2, 2, 1, 1)


@pytest.mark.parametrize("total", [1, 7, 64, 1023])
def test_counts_sum_to_the_samples_and_none_is_negative(total):
    for seed in range(20):
        scores = torch.rand(50, generator=torch.Generator().manual_seed(seed))
        counts = allocate(scores, total)
        assert sum(counts) == total
        assert min(counts) >= 0


def test_each_sample_gives_the_state_of_the_step_that_it_was_counted_for():
    kept = CountedSteps(counts=(0, 2, 1)).draw(3, 3, torch.Generator())
    assert kept.tolist() == [[False, False, False], [True, True, False], [False, False, True]]
    for counts, steps in (((1, 1), 3), ((1, 1, 2), 3)):
        with pytest.raises(ConfigError, match="counts: expected 3 numbers that sum to 3"):
            CountedSteps(counts=counts).draw(steps, 3, torch.Generator())
    with pytest.raises(ConfigError, match=r"CountedSteps\.counts: expected a number of samples for each step"):
        CountedSteps(counts=(2, -1))


def test_the_counts_are_those_of_what_the_middle_attention_reads():
    pipe, features = small.build(), []
    attention = pipe.unet.mid_block.attentions[0]
    hook = attention.register_forward_pre_hook(lambda _m, args: features.append(args[0].flatten(2).clone()))
    calibration_run(pipe, steps=STEPS, batch=SMALL.batch, seed=0)(0)
    hook.remove()
    stacked = torch.stack(features)
    scores = unit_range(density(stacked)) + 1.2 * unit_range(variety(stacked))
    job = MethodJob(pipe, SMALL, None, None, None, False)
    assert _counts(job, SMALL) == allocate(scores, 8)
    changes = _counts(job, dataclasses.replace(SMALL, modulation=ModulationConfig()))
    moved = stacked[1:] - stacked[:-1]
    assert changes == (0, *allocate(unit_range(density(moved)) + 1.2 * unit_range(variety(moved)), 8))


def test_blocks_report_how_undecided_their_weights_were_and_the_loss_before_they_were_cut():
    report = quantize(small.build(), SMALL, progress=False)
    assert report.weights.learned
    assert all(0 <= u.figures["undecided"] <= 1 and u.figures["soft"] > 0 for u in report.weights.learned)
    assert "undecided" in str(report)


def test_without_layer_losses_qdrop_and_density_it_is_plain_block_reconstruction_to_the_bit():
    plain = dataclasses.replace(QUICK, layer_weight=0.0, qdrop=0.0)
    config = dataclasses.replace(SMALL, sampling="uniform", reconstruction=plain)
    ours, theirs = small.build(), small.build()
    report = quantize(ours, config, progress=False)
    run = calibration_run(theirs, steps=STEPS, batch=4, seed=0)
    sampler = CountedSteps(counts=(2, 2, 2, 2))
    calls = modiff.collect(theirs, run, trajectories=2, batch=4, steps=STEPS, sampler=sampler, progress=False)
    layer = config.static_layer()
    modiff.apply(theirs, every_layer(layer, overrides=boundary_overrides(theirs.unet, layer)))
    modiff.calibrate(theirs, lambda: modiff.replay(theirs.unet, calls))
    assert modiff.reconstruct(theirs, calls, plain, progress=False) == report.weights
    for name, quantized in attachment_of(ours.unet).layers.items():
        other = attachment_of(theirs.unet).layers[name]
        pairs = zip(quantized.quantized_weight.codes(quantized.weight), other.quantized_weight.codes(other.weight),
                    strict=True)  # fmt: skip
        assert all(torch.equal(a, b) for (a, _), (b, _) in pairs)
        assert all(torch.equal(a.scale, b.scale) for a, b in zip(quantizers_of(ours.unet)[name].static,
                   quantizers_of(theirs.unet)[name].static, strict=True))  # fmt: skip
    assert torch.equal(small.call(ours, steps=STEPS), small.call(theirs, steps=STEPS))


def test_with_modulation_pairs_are_chosen_by_their_change_and_residual_scales_follow_the_rounding():
    pipe = small.build()
    config = dataclasses.replace(SMALL, modulation=ModulationConfig())
    report = quantize(pipe, config, progress=False)
    assert {e.setting for e in report.taken} == {"W4A8 modulated", "W8A8 modulated"}
    assert all(unit.after <= unit.before for unit in (*report.weights.units, *report.scales.units))
    assert torch.isfinite(small.call(pipe, steps=STEPS)).all()


@pytest.mark.parametrize(
    ("feature", "evaluations", "error", "message"),
    [
        ("middle", None, ConfigError, "feature: expected the name of a module, got 'middle', which UNet2DModel"),
        (SMALL.feature, 3, CalibrationError, "to run at each of 3 evaluations, got 4 runs"),
    ],
)
def test_a_feature_that_is_not_read_once_a_step_is_refused(feature, evaluations, error, message):
    pipe, config = small.build(), dataclasses.replace(SMALL, feature=feature)
    with pytest.raises(error, match=message):
        quantize(pipe, config, evaluations_per_run=evaluations, progress=False)
    assert attachment_of(pipe.unet) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_bits": None}, "weight_bits: expected 2 to 8, got None"),
        ({"radius": 0.0}, "radius: expected None or more than 0"),
        ({"reconstruction": modiff.ReconstructConfig()}, "reconstruction.learn: expected 'weights_and_scales'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SMALL, **changes)
