"""Pipelines and networks come back from a pickle, torch.save, a deep copy and a spawned process as they were."""

from __future__ import annotations

import copy
import dataclasses
import io
import multiprocessing
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import modiff
from modiff import AttentionConfig, presets
from tests.helpers import assert_same_bits
from tests.hosts.tiny import HOSTS
from tests.model.toys import toy

CONFIG = dataclasses.replace(presets.w8a4(), attention=AttentionConfig())


def stored(target: Any) -> Any:
    file = io.BytesIO()
    torch.save(target, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


WAYS = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "torch.save": stored, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("name", ["ddim", "wan"])  # wan guides in two calls, each in a cache context
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_of_a_pipeline_or_of_its_network_samples_what_the_original_does(tmp_path, way, name) -> None:
    host, copied, words = HOSTS[name], WAYS[way], {"steps": 4}
    pipe = host.build()
    plain = host.call(pipe, **words)
    modiff.apply(pipe, CONFIG)
    modiff.save(pipe, tmp_path / "saved")
    for original in (pipe, modiff.load(tmp_path / "saved")):
        expected = host.call(original, **words)
        assert_same_bits(host.call(copied(original), **words), expected)
        other = host.build()
        setattr(other, host.denoiser, copied(getattr(original, host.denoiser)))
        assert_same_bits(host.call(other, **words), expected)
    removed = copied(pipe)
    modiff.remove(removed)
    assert_same_bits(host.call(removed, **words), plain)
    assert modiff.report(pipe).taken


def _sampled(pipe: Any) -> Tensor:
    return HOSTS["ddim"].call(pipe, steps=2)


def test_a_spawned_process_samples_what_this_one_does() -> None:
    pipe = HOSTS["ddim"].build()
    modiff.apply(pipe, CONFIG)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert_same_bits(pool.apply(_sampled, (pipe,)), _sampled(pipe))


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_in_the_middle_of_a_trajectory_goes_on_where_it_was(way) -> None:
    model, x = toy(), torch.randn(2, 3, 4, 4)
    modiff.apply(model, presets.w8a4())
    with torch.no_grad(), modiff.trajectory(model):
        model(x, 1000.0)
        model(0.9 * x, 800.0)
        other = WAYS[way](model)
        assert_same_bits(other(0.8 * x, 600.0), model(0.8 * x, 600.0))
