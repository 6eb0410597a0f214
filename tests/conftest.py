"""What holds for every test: seeded, repeatable, at most two threads, no network, GPU tests only where there is one."""

import ipaddress
import os
import random
import sys
from pathlib import Path
from typing import Any

# Read once, at import, by the libraries that the tests import later; also by the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import numpy as np
import pytest
import torch

hypothesis.settings.register_profile(
    "modiff",
    derandomize=True,  # the same examples in every run
    database=None,
    deadline=None,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # a busy machine is not a defect
)
hypothesis.settings.load_profile("modiff")
torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests without a CUDA device."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline that tests only read."""
    from tests.pixels import saved_pipeline  # imported late, as diffusers

    return saved_pipeline(tmp_path_factory.mktemp("models") / "pipeline")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _refuse_remote(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook. Not an OSError: code that retries or falls back on network errors must not swallow it."""
    if event not in ("socket.connect", "socket.getaddrinfo"):
        return
    address = args[1] if event == "socket.connect" else args
    host = address[0] if isinstance(address, tuple) else None  # a path is a socket of this machine
    host = host.decode() if isinstance(host, bytes) else host
    try:
        local = host in (None, "", "localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise RuntimeError(f"tests: expected no network, got a call to {host!r}. Tests run offline. Build it locally.")


sys.addaudithook(_refuse_remote)
