"""Names of results: FID only with Inception."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from modiff.errors import ConfigError
from modiff.evaluate.features.classifier import ClassifierFeatures
from modiff.evaluate.features.inception import Inception
from modiff.evaluate.features.names import Metric, result_name
from modiff.evaluate.features.scripted_inception import ScriptedInception
from tests.evaluate.features.test_scripted_inception import Public, scripted

PUBLISHED = ["FID", "sFID", "KID", "IS", "FID2FP32"]


def test_other_extractors_never_lend_the_published_names() -> None:
    names = [result_name(metric, ClassifierFeatures.embedded()) for metric in get_args(Metric)]
    heads = ["FD", "sFD", "KD", "score", "FD2FP32", "precision", "recall"]
    assert names == [f"{head}(fashion-mnist-classifier)" for head in heads]
    assert not set(names) & set(PUBLISHED)


def test_both_forms_of_inception_give_the_published_names(tmp_path: Path, inception_file: Path) -> None:
    for extractor in (Inception(inception_file), ScriptedInception(scripted(Public(), tmp_path / "net.pt"))):
        names = [result_name(metric, extractor) for metric in get_args(Metric)]
        assert names == [*PUBLISHED, f"precision({extractor.name})", f"recall({extractor.name})"]


def test_an_extractor_that_calls_itself_inception_is_not_believed() -> None:
    class Impostor(ClassifierFeatures):
        pass

    impostor = Impostor(ClassifierFeatures.embedded()._model, "inception-v3")
    assert result_name("frechet_distance", impostor) == "FD(inception-v3)"
    assert torch.is_tensor(impostor(torch.zeros(1, 28, 28, 1, dtype=torch.uint8)).pooled)


def test_an_unknown_metric_is_an_error() -> None:
    with pytest.raises(ConfigError, match="got 'FID'"):
        result_name("FID", ClassifierFeatures.embedded())  # type: ignore[arg-type]
