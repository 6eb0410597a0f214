"""The guards of conftest.py guard."""

from __future__ import annotations

import random
import socket

import hypothesis
import numpy as np
import pytest
import torch

DOCUMENTATION_ADDRESS = "192.0.2.1"  # RFC 5737: belongs to nobody


def test_a_connection_to_another_machine_is_refused() -> None:
    with socket.socket() as client:
        with pytest.raises(RuntimeError, match=r"expected no network, got a call to '192\.0\.2\.1'"):
            client.connect((DOCUMENTATION_ADDRESS, 80))
        with pytest.raises(RuntimeError, match="expected no network"):
            client.connect_ex((DOCUMENTATION_ADDRESS, 80))


def test_a_name_of_another_machine_is_not_looked_up() -> None:
    with pytest.raises(RuntimeError, match=r"expected no network, got a call to 'example\.org'"):
        socket.getaddrinfo("example.org", 443)


def test_a_connection_to_this_machine_works() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, address = server.accept()
        accepted.close()
        assert address == client.getsockname()


@pytest.mark.parametrize("order", ["first", "second"])
def test_every_test_starts_from_the_same_seeds(order: str) -> None:
    drawn = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    assert drawn == (random.random(), np.random.rand(), torch.rand(()).item())


def test_examples_are_the_same_in_every_run_and_no_clock_fails_them() -> None:
    settings = hypothesis.settings()
    assert settings.derandomize
    assert settings.deadline is None
    assert torch.get_num_threads() <= 2


@pytest.mark.gpu
def test_a_gpu_test_runs_only_where_there_is_one() -> None:
    assert torch.cuda.is_available()
