"""The family of errors: one root, and the built-in kin that callers may catch instead."""

from __future__ import annotations

import pytest

import modiff
from modiff import errors

KIN = {
    "ConfigError": ValueError,
    "StateError": RuntimeError,
    "CalibrationError": RuntimeError,
    "KernelError": RuntimeError,
    "FormatError": ValueError,
}


@pytest.mark.parametrize("name", KIN)
def test_each_error_is_caught_by_the_root_and_by_its_built_in_kin(name):
    kind = getattr(errors, name)
    for catcher in (errors.ModiffError, KIN[name]):
        with pytest.raises(catcher, match="a message"):
            raise kind("a message")


@pytest.mark.parametrize("name", KIN)
def test_siblings_do_not_catch_each_other(name):
    others = tuple(getattr(errors, other) for other in KIN if other != name)
    assert not issubclass(getattr(errors, name), others)


def test_every_error_is_listed_here_and_public():
    defined = {n for n, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert defined == {*KIN, "ModiffError", "ModiffWarning"}
    assert all(getattr(modiff, name) is getattr(errors, name) for name in defined)
