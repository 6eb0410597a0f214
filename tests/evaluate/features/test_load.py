"""Extractors by name, and names of results: FID only with Inception."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from modiff.errors import FormatError
from modiff.evaluate.features.classifier import Classifier, ClassifierFeatures, save_classifier
from modiff.evaluate.features.load import Metric, load_extractor, result_name


def test_the_packages_own_and_a_folder_of_ones_own(tmp_path: Path) -> None:
    assert load_extractor("classifier").name == "fashion-mnist-classifier"
    save_classifier(Classifier(channels=(4, 8), classes=3), tmp_path / "mine")
    found = load_extractor(str(tmp_path / "mine"))
    assert (found.name.rpartition("-")[0], found.dimension) == ("mine", 8)


def test_anything_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="inception: expected 'classifier', a classifier's folder"):
        load_extractor("inception")
    with pytest.raises(FormatError, match=r"config\.json"):
        load_extractor(str(tmp_path))


PUBLISHED = ["FID", "FID2FP32", "sFID", "KID", "IS"]


def test_other_extractors_never_lend_the_published_names() -> None:
    names = [result_name(metric, ClassifierFeatures.embedded()) for metric in get_args(Metric)]
    heads = ["FD", "FD2FP32", "sFD", "KD", "score", "precision", "recall"]
    assert names == [f"{head}(fashion-mnist-classifier)" for head in heads]
    assert not set(names) & set(PUBLISHED)


def test_inception_gives_the_published_names(inception_file: Path) -> None:
    extractor = load_extractor(str(inception_file))
    names = [result_name(metric, extractor) for metric in get_args(Metric)]
    assert names == [*PUBLISHED, f"precision({extractor.name})", f"recall({extractor.name})"]
