"""The guards of conftest.py guard."""

from __future__ import annotations

import random
import socket

import hypothesis
import numpy as np
import pytest
import torch

NOBODY = ("192.0.2.1", 80)  # RFC 5737


@pytest.mark.parametrize("call", ["connect", "connect_ex", "getaddrinfo"])
def test_another_machine_is_neither_looked_up_nor_connected_to_and_this_one_is(call: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        with pytest.raises(RuntimeError, match=r"expected no network, got a call to '192\.0\.2\.1'"):
            socket.getaddrinfo(*NOBODY) if call == "getaddrinfo" else getattr(client, call)(NOBODY)
        client.connect(server.getsockname())


@pytest.mark.parametrize("order", ["first", "second"])
def test_every_test_starts_from_the_same_seeds(order: str) -> None:
    drawn = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert drawn == (random.random(), np.random.rand(), torch.rand(()).item())


def test_examples_are_the_same_in_every_run_and_no_clock_fails_them() -> None:
    assert hypothesis.settings().derandomize
    assert hypothesis.settings().deadline is None
    assert torch.get_num_threads() <= 2
