"""The golden trajectories: the method does what it did."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.golden.trajectories import HERE, MODES, NETWORKS, STEPS, record


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_tiny_network_runs_the_trajectory_that_was_recorded(network: str, mode: str) -> None:
    golden = load_file(HERE / f"{network}_{mode}.safetensors")
    now = record(network, mode)
    assert now.keys() == golden.keys()
    for key, value in golden.items():
        # Outputs are float64 (sums of a few hundred products: 1e-12 relative); states are stored in float32 (6e-8).
        bound = (1e-9 if value.dtype == torch.float64 else 2e-7) * float(value.abs().max())
        assert float((now[key] - value).abs().max()) <= bound, key


@pytest.mark.parametrize("network", NETWORKS)
def test_the_recorded_trajectories_of_two_modes_differ(network: str) -> None:
    plain, published = (load_file(HERE / f"{network}_{mode}.safetensors") for mode in ("plain_a4", "published_a4"))
    last = f"{STEPS - 1}.output"
    assert float((plain[last] - published[last]).norm() / plain[last].norm()) > 1e-3
