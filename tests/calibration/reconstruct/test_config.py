"""Settings and reports of reconstruction."""

import json

import pytest

from modiff import ConfigError
from modiff.calibration.reconstruct.config import ReconstructConfig, ReconstructionReport, UnitReport


def test_the_defaults_are_the_papers():
    weights = ReconstructConfig.weights()
    assert (weights.iterations, weights.batch, weights.learning_rate, weights.schedule) == (20000, 32, 1e-3, "constant")
    scales = ReconstructConfig.activation_scales()
    for learned in (scales, scales.for_residuals()):
        assert (learned.iterations, learned.batch, learned.learning_rate) == (5000, 32, 4e-4)
        assert (learned.schedule, learned.p) == ("cosine", 2.4)
        assert ReconstructConfig.from_json(learned.to_json()) == learned
    assert (scales.for_residuals().learn, scales.for_residuals().unit) == ("residual_scales", "layer")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "iterations: expected 1 or more, got 0"),
        ({"held_out": 1.0}, "held_out: expected a share in (0, 1), got 1.0"),
        ({"learn": "residual_scales"}, "unit: expected 'layer' for residual_scales, got 'block'"),
        ({"learn": "codes"}, "learn: expected one of 'weights', 'activation_scales'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ConfigError) as error:
        ReconstructConfig(**settings)
    assert f"ReconstructConfig.{message}" in str(error.value)


def test_a_report_prints_one_line_a_unit_and_turns_into_json():
    down = UnitReport("down", "Block", ("down.conv1", "down.conv2"), 0.5, 0.125, True, 300, "done")
    report = ReconstructionReport((down, UnitReport("up", "Block", (), 0, 0, False, 300, "done")))
    lines = str(report).splitlines()
    assert lines[0] == "1 of 2 units learned (loss on held-out rows, before and after)"
    assert lines[1].split() == ["down", "5.000e-01", "->", "1.250e-01", "0.250", "learned", "300", "iterations", "done"]
    assert lines[2].split()[:6] == ["up", "0.000e+00", "->", "0.000e+00", "1.000", "kept"]
    assert [u.name for u in report.learned] == ["down"]
    values = json.loads(json.dumps(report.to_dict()))["units"][0]
    assert (values["name"], values["layers"], values["after"]) == ("down", ["down.conv1", "down.conv2"], 0.125)
