"""What holds for every method: it resumes to the same bits, comes off to the bit, and refuses what cannot be."""

import dataclasses
from typing import Any

import pytest

import modiff
from modiff import ConfigError, ModulationConfig, ReconstructConfig, StateError, methods
from modiff.calibration.reconstruct import job as reconstruct_job
from modiff.calibration.reconstruct.config import AlignmentConfig
from modiff.methods import METHODS, MethodConfig, Ptq4dmConfig, accuquant, method_config, quantize, recipe
from modiff.methods.registry import name_of
from modiff.model.attach import attachment_of
from tests.helpers import assert_same_bits
from tests.methods import small

STEPS = 3
WEIGHTS = ReconstructConfig(iterations=3, batch=2, learning_rate=0.1, checks=1, patience=0)
SCALES = dataclasses.replace(ReconstructConfig.activation_scales(), iterations=3, batch=2, checks=1)
TINY: dict[str, Any] = {"steps": STEPS, "samples": 2, "batch": 2}
SMALL: dict[str, MethodConfig] = {
    "q_diffusion": methods.QDiffusionConfig(**TINY, groups=2, reconstruction=WEIGHTS, learning=SCALES),
    "ptq4dm": methods.Ptq4dmConfig(**TINY, trials=3, weight_bits=3),
    "tfmq_dm": methods.TfmqDmConfig(**TINY, groups=2, reconstruction=WEIGHTS, temporal=WEIGHTS),
    "accuquant": methods.AccuquantConfig(**TINY, group_size=2, iterations=2),
    "ptqd": methods.PtqdConfig(**TINY, groups=2, pairs=2),
    "tac": methods.TacConfig(**TINY, groups=2, pairs=2),
    "eda_dm": methods.EdaDmConfig(
        **TINY,
        reconstruction=dataclasses.replace(
            SCALES, learn="weights_and_scales", learning_rate=0.1, layer_weight=0.8, qdrop=0.5
        ),
    ),
    "gradient_aligned": methods.GradientAlignedConfig(
        **TINY,
        groups=3,
        reconstruction=dataclasses.replace(WEIGHTS, held_out=0.5),
        temporal=WEIGHTS,
        alignment=AlignmentConfig(outer_steps=2),
    ),
    "qncd": methods.QncdConfig(**TINY, groups=2, pairs=2, bias="none", reconstruction=WEIGHTS, learning=SCALES),
    "modiff": methods.ModiffMethodConfig(
        **TINY, groups=2, kind="static_learned", reconstruction=WEIGHTS, learning=SCALES
    ),
}


def never(index: int) -> object:
    raise AssertionError(f"trajectory {index} was run again")


STAGES = ((reconstruct_job.ReconstructionJob, "learn"), (accuquant, "_learn_group"), (recipe, "calibrate"))


def interrupt_after(patch: pytest.MonkeyPatch, stages: int) -> None:
    """Let a job be killed when it begins another stage after this many."""
    left = iter(range(stages))

    def counted(original: Any) -> Any:
        def run(*args: Any, **settings: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return original(*args, **settings)

        return run

    for owner, name in STAGES:
        patch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("q_diffusion", 1),
        ("ptq4dm", 0),
        ("tfmq_dm", 1),
        ("accuquant", 2),
        ("modiff", 1),
        ("eda_dm", 1),
        ("gradient_aligned", 1),
        ("qncd", 1),
        ("ptqd", 0),
        ("tac", 0),
    ],
)
def test_a_killed_job_resumes_to_the_same_bits_and_comes_off_to_the_bit(name, stages, tmp_path, monkeypatch):
    whole, killed, plain = small.build(), small.build(), small.call(small.build(), steps=STEPS)
    report = quantize(whole, SMALL[name], progress=False)
    expected = small.call(whole, steps=STEPS)
    assert 0 < float((expected - plain).norm() / plain.norm()) < 0.5
    with monkeypatch.context() as patch:
        interrupt_after(patch, stages)
        with pytest.raises(KeyboardInterrupt):
            quantize(killed, SMALL[name], folder=tmp_path, progress=False)
    assert attachment_of(killed.unet) is None
    assert quantize(killed, SMALL[name], run=never, folder=tmp_path, progress=False) == report
    assert_same_bits(small.call(killed, steps=STEPS), expected)
    modiff.remove(killed)
    assert_same_bits(small.call(killed, steps=STEPS), plain)
    for owner, stage in STAGES[:2]:
        monkeypatch.setattr(owner, stage, None)
    quantize(killed, SMALL[name], run=never, folder=tmp_path, progress=False)
    assert_same_bits(small.call(killed, steps=STEPS), expected)


def test_work_of_another_job_is_never_mixed_in(tmp_path):
    pipe, config, folder = small.build(), SMALL["ptq4dm"], tmp_path / "work"
    quantize(pipe, config, folder=folder, progress=False)
    modiff.remove(pipe)
    with pytest.raises(ConfigError, match=r"got one with another settings\.seed\."):
        quantize(pipe, dataclasses.replace(config, seed=1), folder=folder)
    with pytest.raises(ConfigError, match="got one with another method and settings"):
        quantize(pipe, SMALL["tfmq_dm"], folder=folder)
    pipe.unet.conv_in.weight.data[0, 0, 0, 0] += 1e-3
    with pytest.raises(ConfigError, match="got one with another model"):
        quantize(pipe, config, folder=folder)
    assert attachment_of(pipe.unet) is None


def test_what_cannot_be_calibrated_is_refused_and_stays_as_it_was():
    pipe, config = small.build(), SMALL["q_diffusion"]
    with pytest.raises(ConfigError, match=r"expected evaluations_per_run=, got none\. A module alone"):
        quantize(pipe.unet, methods.QDiffusionConfig)
    with pytest.raises(modiff.CalibrationError, match="expected 3 evaluations"):
        quantize(pipe, config, run=lambda i: small.call(pipe, steps=2, batch=2), progress=False)
    with pytest.raises(modiff.CalibrationError, match="expected calls with the one before each, got none among 1"):
        quantize(pipe, dataclasses.replace(SMALL["modiff"], rounding="nearest", steps=1, groups=1), progress=False)
    with pytest.raises(ConfigError, match=r"expected one of .*QDiffusionConfig.*, got a ModulationConfig"):
        quantize(pipe, ModulationConfig())
    assert attachment_of(pipe.unet) is None
    modiff.apply(pipe, modiff.presets.w8a8())
    with pytest.raises(StateError, match="QDiffusionConfig: expected a full-precision model"):
        quantize(pipe, config)


@pytest.mark.parametrize("name", METHODS)
def test_settings_survive_json_and_those_that_mean_nothing_are_refused(name):
    for config in (SMALL[name], METHODS[name].config(), METHODS[name].config.quick()):
        assert type(config).from_json(config.to_json()) == config
    where = METHODS[name].config.__name__
    for changes, message in (
        ({"weight_bits": 1}, f"{where}.weight_bits: expected None or 2 to 8, got 1"),
        ({"samples": 3}, f"{where}.samples: expected a multiple of batch=2, got 3"),
        ({"steps": 0}, f"{where}.steps: expected 1 or more, got 0"),
        ({"groups": 4}, f"{where}.groups: expected 1 to 3, got 4"),
    ):
        if next(iter(changes)) in {field.name for field in dataclasses.fields(SMALL[name])}:
            with pytest.raises(ConfigError, match=message):
                dataclasses.replace(SMALL[name], **changes)


def test_settings_come_from_the_paper_or_are_quick_then_from_the_file_then_from_the_options():
    config = method_config("ptq4dm", values={"samples": 64, "mean": 0.5}, changes={"samples": 32, "weight_bits": 4})
    assert config == Ptq4dmConfig(samples=32, mean=0.5, weight_bits=4)
    quick = methods.QDiffusionConfig.quick()
    learning = dataclasses.replace(quick.learning, iterations=7)  # the other settings inside stay as they are
    assert method_config("q-diffusion", quick=True, values={"learning": {"iterations": 7}}) == dataclasses.replace(
        quick, learning=learning
    )


def test_modulation_is_switched_on_once_and_a_setting_of_it_stays():
    assert method_config("tfmq_dm", modulated=True).modulation == ModulationConfig()
    own = {"modulation": {"reanchor_every": 7}}
    for modulated in (True, None):
        assert method_config("ptq4dm", values=own, modulated=modulated).modulation == ModulationConfig(reanchor_every=7)
    assert method_config("ptq4dm", values=own, modulated=False).modulation is None
    assert method_config("modiff", modulated=True) == methods.ModiffMethodConfig()
    assert method_config("accuquant", modulated=False) == methods.AccuquantConfig()


def test_each_method_has_the_name_of_its_function_and_its_settings_name_it():
    assert set(METHODS) == set(SMALL)
    for name, method in METHODS.items():
        assert method.recipe.__name__ == name == name_of(method.config.quick())
        assert getattr(methods, method.config.__name__) is method.config


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"name": "brecq"}, "method: expected one of .*, got 'brecq'"),
        ({"name": "accuquant", "modulated": True}, "accuquant: expected no modulation, got it. It learns scales of wh"),
        ({"name": "modiff", "modulated": False}, "modiff: expected modulation, got none. MoDiff is modulation"),
        ({"name": "ptq4dm", "values": {"sample": 3}}, "Ptq4dmConfig: expected a known field, got 'sample'"),
        ({"name": "ptq4dm", "changes": {"groups": 3}}, "Ptq4dmConfig: expected a known field, got 'groups'"),
        ({"name": "ptq4dm", "changes": {"weight_bits": 9}}, r"Ptq4dmConfig\.weight_bits: expected None or 2 to 8"),
    ],
)
def test_what_does_not_exist_or_means_nothing_is_refused_with_the_reason(call, message):
    with pytest.raises(ConfigError, match=message):
        method_config(**call)
