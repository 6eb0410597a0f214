"""The comparisons fail where they must: on a wrong scale, a permutation, a NaN, another shape or dtype."""

import random
import socket

import hypothesis
import numpy as np
import pytest
import torch

from tests.helpers import assert_float_error, assert_same_bits, assert_within

EXACT = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.25, -4.0]])
WRONG = {
    "scale": EXACT * 1.01,
    "permutation": EXACT.flip(1),
    "NaN": EXACT.clone().index_put_((torch.tensor(1), torch.tensor(2)), torch.tensor(torch.nan)),
    "sign of one element": EXACT * torch.tensor([1.0, 1.0, -1.0]),
    "shape that broadcasts": EXACT[None],
}
CHECKS = {
    "assert_within": lambda x: assert_within(x, EXACT, 1e-3),
    "assert_within, each element": lambda x: assert_within(x, EXACT, torch.full_like(EXACT, 1e-3)),
    "assert_float_error": lambda x: assert_float_error(x, EXACT + 1e-4, EXACT),
    "assert_same_bits": lambda x: assert_same_bits(x, EXACT),
}
NOBODY = ("192.0.2.1", 80)  # RFC 5737


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_passes_what_is_right_and_nothing_else(check: str) -> None:
    CHECKS[check](EXACT.clone())
    for wrong in WRONG.values():
        with pytest.raises(AssertionError):
            CHECKS[check](wrong)


def test_values_of_another_dtype_and_more_than_twice_the_error_of_torch_do_not_pass() -> None:
    zeros = torch.zeros(3)
    assert_float_error(zeros + 2.0, zeros + 1.0, zeros)
    for check in (
        lambda: assert_float_error(zeros + 2.5, zeros + 1.0, zeros),
        lambda: assert_float_error(zeros.half(), zeros, zeros),
        lambda: assert_same_bits(zeros.double(), zeros),
    ):
        with pytest.raises(AssertionError):
            check()


@pytest.mark.parametrize("call", ["connect", "connect_ex", "getaddrinfo"])
def test_another_machine_is_neither_looked_up_nor_connected_to_and_this_one_is(call: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        with pytest.raises(RuntimeError, match=r"expected no network, got a call to '192\.0\.2\.1'"):
            socket.getaddrinfo(*NOBODY) if call == "getaddrinfo" else getattr(client, call)(NOBODY)
        client.connect(server.getsockname())


@pytest.mark.parametrize("order", ["first", "second"])
def test_every_test_starts_from_the_same_seeds_and_examples(order: str) -> None:
    drawn = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert drawn == (random.random(), np.random.rand(), torch.rand(()).item())
    assert hypothesis.settings().derandomize
