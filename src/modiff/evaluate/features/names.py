"""What a result may be called: FID and its kin only with the network that defines them."""

from __future__ import annotations

from typing import Literal

from modiff.errors import ConfigError
from modiff.evaluate.features.inception import Inception
from modiff.evaluate.features.protocol import FeatureExtractor
from modiff.evaluate.features.scripted_inception import ScriptedInception

Metric = Literal[
    "frechet_distance", "spatial_frechet_distance", "kernel_distance", "inception_score", "to_full_precision",
    "precision", "recall",
]  # fmt: skip

_NAMES: dict[str, tuple[str | None, str]] = {
    "frechet_distance": ("FID", "FD"),
    "spatial_frechet_distance": ("sFID", "sFD"),
    "kernel_distance": ("KID", "KD"),
    "inception_score": ("IS", "score"),
    "to_full_precision": ("FID2FP32", "FD2FP32"),
    "precision": (None, "precision"),
    "recall": (None, "recall"),
}
"""Name with Inception, and without. Precision and recall are published with several networks, so they always say it."""


def result_name(metric: Metric, extractor: FeatureExtractor) -> str:
    """The name of a metric's result with this extractor: "FID" with Inception, else "FD(<extractor's name>)".

    Raises: ConfigError for an unknown metric.
    """
    if metric not in _NAMES:
        raise ConfigError(
            f"result_name: expected one of {', '.join(_NAMES)}, got {metric!r}. Only these depend on an extractor. "
            "Use one of them."
        )
    published, general = _NAMES[metric]
    if published and isinstance(extractor, Inception | ScriptedInception):
        return published
    return f"{general}({extractor.name})"
