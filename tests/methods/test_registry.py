"""Methods by name: which settings a name stands for, what is refused with which reason, and whose folder it is."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest

from modiff import ConfigError, FormatError, ModulationConfig
from modiff import methods as package
from modiff.methods import Ptq4dmConfig, registry
from modiff.methods.registry import METHODS, method_config, method_named, name_of, quantize
from modiff.methods.work import claim_work
from modiff.model.attach import attachment_of
from tests.helpers import assert_same_bits
from tests.methods import small

TINY = Ptq4dmConfig(samples=4, batch=4, steps=3, trials=3)


def test_each_method_of_the_package_has_its_name():
    for name, method in METHODS.items():
        assert getattr(package, f"apply_{name}") is method.apply
        assert method.config.__name__ in package.__all__
        assert name_of(method.quick()) == name
        assert {"folder", "evaluations_per_run"} <= inspect.signature(method.apply).parameters.keys()
    assert {f"apply_{name}" for name in METHODS} == {n for n in package.__all__ if n.startswith("apply_")}


def test_settings_come_from_the_paper_then_the_file_then_the_options():
    config = method_config("ptq4dm", values={"samples": 64, "mean": 0.5}, changes={"samples": 32, "weight_bits": 4})
    assert config == Ptq4dmConfig(samples=32, mean=0.5, weight_bits=4)
    quick = method_config("q-diffusion", quick=True, values={"samples": 32})
    assert quick == dataclasses.replace(METHODS["q_diffusion"].quick(), samples=32)
    assert method_config("modiff") == package.ModiffMethodConfig()


def test_a_file_with_some_settings_of_a_part_leaves_the_others_of_that_part():
    quick = METHODS["q_diffusion"].quick()
    found = method_config("q_diffusion", quick=True, values={"reconstruction": {"iterations": 7}})
    assert found.reconstruction == dataclasses.replace(quick.reconstruction, iterations=7)
    learned = method_config("q_diffusion", quick=True, values={"learning": {"iterations": 7}})
    assert learned.learning == dataclasses.replace(quick.learning, iterations=7)


def test_modulation_is_switched_on_once_and_a_setting_of_it_stays():
    config = method_config("tfmq_dm", modulated=True)
    assert config.modulation == ModulationConfig()
    own = {"modulation": {"reanchor_every": 7}}
    assert method_config("ptq4dm", values=own, modulated=True).modulation == ModulationConfig(reanchor_every=7)
    assert method_config("ptq4dm", values=own, modulated=False).modulation is None
    assert method_config("ptq4dm", values=own).modulation is not None
    assert method_config("modiff", modulated=True) == package.ModiffMethodConfig()
    assert method_config("accuquant", modulated=False) == package.AccuquantConfig()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"name": "brecq"}, "method: expected one of q_diffusion, .*, got 'brecq'"),
        ({"name": "accuquant", "modulated": True}, "accuquant: expected no modulation, got it. It learns scales of wh"),
        ({"name": "modiff", "modulated": False}, "modiff: expected modulation, got none. MoDiff is modulation"),
        ({"name": "ptq4dm", "values": {"sample": 3}}, "Ptq4dmConfig: expected a known field, got 'sample'"),
        ({"name": "ptq4dm", "values": [3]}, r"Ptq4dmConfig: expected an object with named fields, got \[3\]"),
        ({"name": "ptq4dm", "changes": {"groups": 3}}, "ptq4dm: expected one of weight_bits, .*, got 'groups'"),
        ({"name": "ptq4dm", "changes": {"weight_bits": 9}}, r"Ptq4dmConfig\.weight_bits: expected None or 2 to 8"),
        ({"name": "accuquant", "changes": {"activation_bits": None}}, r"AccuquantConfig\.activation_bits"),
    ],
)
def test_what_does_not_exist_or_means_nothing_is_refused_with_the_reason(call, message):
    with pytest.raises(ConfigError, match=message):
        method_config(**call)


def test_the_type_of_the_settings_says_which_method_runs():
    pipe = small.build()
    assert {e.setting for e in quantize(pipe, TINY, progress=False).taken} == {"W8A8 plain"}
    with pytest.raises(ConfigError, match=r"expected one of QDiffusionConfig, .*, got a ModulationConfig"):
        quantize(pipe, ModulationConfig())
    assert method_named("q-diffusion") is METHODS["q_diffusion"]


def test_a_folder_serves_one_job_and_the_same_job_goes_on(tmp_path, monkeypatch):
    first, again = small.build(), small.build()
    quantize(first, TINY, folder=tmp_path / "work", progress=False)

    def never(index: int) -> object:
        raise AssertionError(f"trajectory {index} was run again")

    parts = {"run": never, "evaluations_per_run": 3}
    changed = dataclasses.replace(METHODS["ptq4dm"], apply=lambda *a, **k: package.apply_ptq4dm(*a, **{**k, **parts}))
    monkeypatch.setitem(registry.METHODS, "ptq4dm", changed)
    quantize(again, TINY, folder=tmp_path / "work", progress=False)
    assert_same_bits(small.call(again, steps=3), small.call(first, steps=3))


def test_parts_of_another_job_are_never_mixed_in(tmp_path):
    pipe, folder = small.build(), tmp_path / "work"
    claim_work(folder, pipe, "ptq4dm", TINY)
    claim_work(folder, small.build(), "ptq4dm", TINY)
    with pytest.raises(ConfigError, match="got one with another settings"):
        claim_work(folder, pipe, "ptq4dm", dataclasses.replace(TINY, seed=1))
    with pytest.raises(ConfigError, match="got one with another method"):
        claim_work(folder, pipe, "tfmq_dm", TINY)
    pipe.scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(ConfigError, match="got one with another sampler"):
        quantize(pipe, TINY, folder=folder, progress=False)
    assert attachment_of(pipe.unet) is None
    other = small.build()
    other.unet.conv_in.weight.data[0, 0, 0, 0] += 1e-3
    with pytest.raises(ConfigError, match="got one with another model"):
        claim_work(folder, other, "ptq4dm", TINY)
    for text in ("{", "[" * 100_000):
        (folder / "job.json").write_text(text)
        with pytest.raises(FormatError, match=r"job\.json: expected the settings of a job"):
            claim_work(folder, other, "ptq4dm", TINY)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"expected a new folder or one with job\.json, got other files"):
        claim_work(tmp_path / "mine", other, "ptq4dm", TINY)


def test_a_folder_given_to_a_method_itself_serves_one_job_too(tmp_path):
    package.apply_ptq4dm(small.build(), TINY, folder=tmp_path, progress=False)
    other = small.build()
    other.unet.conv_in.weight.data[0, 0, 0, 0] += 1e-3
    with pytest.raises(ConfigError, match="got one with another model"):
        package.apply_ptq4dm(other, TINY, folder=tmp_path, progress=False)
    assert attachment_of(other.unet) is None


@pytest.mark.parametrize("name", METHODS)
def test_every_method_claims_its_folder(name, tmp_path):
    (tmp_path / "thesis.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"expected a new folder or one with job\.json, got other files"):
        METHODS[name].apply(small.build(), METHODS[name].quick(), folder=tmp_path, progress=False)


def test_a_job_file_is_plain_json(tmp_path):
    claim_work(tmp_path / "work", small.build(), "ptq4dm", TINY)
    job = json.loads((tmp_path / "work" / "job.json").read_text())
    assert job["settings"] == TINY.to_dict()
    assert len(job["model"]) == 64
