"""The public face: what `modiff` exports is in `__all__`, documented, once, loaded when used; and private names."""

import ast
import inspect
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType

import pytest

import modiff
from modiff import errors
from modiff.errors import KernelError
from modiff.private_names import COMPILER, DIFFUSERS, TORCH, check_private_names

PACKAGE = Path(modiff.__file__).parent
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
HEAVY = {"diffusers", "transformers", "accelerate", "triton", "ray", "gradio", "fastapi", "uvicorn", "matplotlib"}
PROBE = """
import json, sys
import torch
before = set(sys.modules)
import {module}
print(json.dumps(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})))
"""


def test_all_is_sorted_and_exactly_what_a_user_sees() -> None:
    listed = list(modiff.__all__)
    assert listed == sorted(set(listed))
    values = {name: getattr(modiff, name) for name in dir(modiff) if not name.startswith("_")}
    seen = {name for name, value in values.items() if name in listed or not isinstance(value, ModuleType)}
    assert {name for name in listed if not name.startswith("__")} == seen - {"annotations"}


@pytest.mark.parametrize("name", modiff.__all__)
def test_a_public_name_has_a_docstring_of_its_own(name: str) -> None:
    value = getattr(modiff, name)
    if isinstance(value, type):  # neither inherited nor the signature that a dataclass generates
        text = vars(value).get("__doc__") or ""
        assert text
        assert not text.startswith(f"{name}(")
    else:
        assert isinstance(value, str) or inspect.getdoc(value)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_what_there_is(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"(?<![\w./-])modiff(?:\.[A-Za-z_]\w*)+", text)):
        resolve_name(name)
    files = set(re.findall(r"`((?:src|tests|bench|experiments|training|tools|docs|examples)/[\w/]+\.\w+)[` ]", text))
    assert [file for file in files if not (ROOT / file).exists() and "/results/" not in file] == []


@pytest.mark.parametrize(("module", "heavy"), [("modiff", set()), ("matplotlib", {"matplotlib"})])
def test_an_import_in_a_fresh_interpreter_loads_what_it_must(module: str, heavy: set[str]) -> None:
    probe = [sys.executable, "-c", PROBE.format(module=module)]
    loaded = set(json.loads(subprocess.run(probe, capture_output=True, text=True, check=True, timeout=120).stdout))
    assert module in loaded
    assert loaded & HEAVY == heavy


def test_each_error_is_public_has_the_root_and_one_built_in_kin_and_no_sibling() -> None:
    kin = {"ConfigError": ValueError, "StateError": RuntimeError, "CalibrationError": RuntimeError,
           "KernelError": RuntimeError, "FormatError": ValueError, "PathError": OSError}  # fmt: skip
    classes = {n: value for n, value in vars(errors).items() if isinstance(value, type)}
    defined = {n: value for n, value in classes.items() if issubclass(value, Exception)}
    assert set(defined) == {*kin, "ModiffError", "ModiffWarning"}
    assert all(getattr(modiff, name) is error for name, error in defined.items())
    assert {n: defined[n].__bases__ for n in kin} == {n: (errors.ModiffError, base) for n, base in kin.items()}


def names_twice(files: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Public top-level functions and classes that several of the (path, source) define.

    A command carries the name of its verb.
    """
    places: defaultdict[str, list[str]] = defaultdict(list)
    for path, source in files:
        for node in () if path.startswith("cli/") else ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(path)
    return {name: paths for name, paths in places.items() if len(paths) > 1}


def test_no_public_name_stands_in_two_modules() -> None:
    files = [(p.relative_to(PACKAGE).as_posix(), p.read_text(encoding="utf-8")) for p in sorted(PACKAGE.rglob("*.py"))]
    assert names_twice(files) == {}
    files = [("a.py", "def f(): ..."), ("b.py", "class f: ..."), ("cli/f.py", "def g(): ..."), ("c.py", "def g(): ...")]
    assert names_twice(files) == {"f": ["a.py", "b.py"]}


@pytest.mark.parametrize("names", [TORCH, DIFFUSERS, COMPILER])
def test_this_torch_and_this_diffusers_have_them_all(names):
    check_private_names(names)


def test_a_missing_name_is_one_clear_error():
    with pytest.raises(KernelError, match=r"torch .*: expected torch\.Tensor\._gone, which modiff uses, got none"):
        check_private_names(("torch:Tensor._gone",))


def test_the_private_attributes_of_tensors_storages_and_layers_in_use_are_listed():
    private = {"_version", "_cdata", "_conv_forward"}
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py"))
    used = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & private
    assert used <= {word for name in TORCH + DIFFUSERS for word in name.partition(":")[2].split(".")}
