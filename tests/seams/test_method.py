"""The method of docs/extending.md, run as printed: one function and one registration, from outside of the package."""

import re
from pathlib import Path

import pytest
import torch

import modiff
from modiff.methods import METHODS, method_config, quantize
from modiff.model.calibrate import quantizers_of
from tests.helpers import assert_same_bits
from tests.methods import small

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr("modiff.methods.registry.METHODS", dict(METHODS))
    section = PAGE.read_text(encoding="utf-8").partition("## Method")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    exec(compile(code[1], str(PAGE), "exec"), {"__name__": __name__})
    return method_config("percentile", changes={"steps": 4, "groups": 2, "samples": 2, "batch": 2, "weight_bits": 4})


def test_it_measures_what_it_says_and_resumes_to_the_same_bits(config, tmp_path):
    pipe, states = small.build(), []
    handle = pipe.unet.register_forward_pre_hook(lambda _, args: states.append(args[0].clone()))
    small.call(pipe, steps=4, batch=2)
    handle.remove()
    report = quantize(pipe, config, folder=tmp_path, progress=False)
    assert {entry.setting for entry in report.entries} == {"W4A8 plain"}
    kept = torch.cat([states[0], states[2]])
    ((scale, _),) = quantizers_of(pipe.unet)["conv_in"].static
    assert 0 < float(scale) < float(kept.max() - kept.min()) / 255, "the largest values are cut"
    images = small.call(pipe, steps=4)
    modiff.remove(pipe)

    def never(index: int) -> object:
        raise AssertionError(f"trajectory {index} was run again")

    quantize(pipe, config, run=never, folder=tmp_path, progress=False)
    assert_same_bits(small.call(pipe, steps=4), images)
