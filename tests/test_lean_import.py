"""`import modiff` costs what torch costs: hosts, kernels, servers and plots load when they are used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"diffusers", "transformers", "accelerate", "triton", "ray", "gradio", "fastapi", "uvicorn", "matplotlib"}
PROBE = """
import json, sys
import torch
before = set(sys.modules)
import {module}
print(json.dumps(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})))
"""


@pytest.mark.parametrize(("module", "heavy"), [("modiff", set()), ("matplotlib", {"matplotlib"})])
def test_an_import_in_a_fresh_interpreter_loads_what_it_must(module: str, heavy: set[str]) -> None:
    probe = [sys.executable, "-c", PROBE.format(module=module)]
    loaded = set(json.loads(subprocess.run(probe, capture_output=True, text=True, check=True, timeout=120).stdout))
    assert module in loaded
    assert loaded & HEAVY == heavy
