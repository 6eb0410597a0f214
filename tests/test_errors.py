"""The family of errors: one root, and the built-in kin that callers may catch instead."""

from __future__ import annotations

import modiff
from modiff import errors

KIN = {
    "ConfigError": ValueError,
    "StateError": RuntimeError,
    "CalibrationError": RuntimeError,
    "KernelError": RuntimeError,
    "FormatError": ValueError,
}


def test_each_error_is_public_has_the_root_and_one_built_in_kin_and_no_sibling():
    defined = {n for n, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert defined == {*KIN, "ModiffError", "ModiffWarning"}
    assert all(getattr(modiff, name) is getattr(errors, name) for name in defined)
    assert {name: getattr(errors, name).__bases__ for name in KIN} == {
        name: (errors.ModiffError, kin) for name, kin in KIN.items()
    }
