"""Private names of other libraries: those that are used are listed, those that are missing are named."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import modiff
from modiff.errors import KernelError
from modiff.private_names import COMPILER, DIFFUSERS, TORCH, check_private_names


@pytest.mark.parametrize("names", [TORCH, DIFFUSERS, COMPILER])
def test_this_torch_and_this_diffusers_have_them_all(names):
    check_private_names(names)


def test_a_missing_name_is_one_clear_error():
    with pytest.raises(KernelError, match=r"torch .*: expected torch\.Tensor\._gone, which modiff uses, got none"):
        check_private_names(("torch:Tensor._gone",))


def test_the_private_attributes_of_tensors_storages_and_layers_in_use_are_listed():
    private = {"_version", "_cdata", "_conv_forward"}
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in Path(modiff.__file__).parent.rglob("*.py"))
    used = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & private
    assert used <= {word for name in TORCH + DIFFUSERS for word in name.partition(":")[2].split(".")}
