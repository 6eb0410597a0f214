"""`import modiff` costs what torch costs: hosts, kernels, servers and plots load when they are used."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = {"diffusers", "transformers", "accelerate", "triton", "ray", "gradio", "fastapi", "uvicorn", "matplotlib"}

PROBE = """
import json, sys
import torch
before = set(sys.modules)
{statement}
print(json.dumps(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})))
"""


def packages_loaded_by(statement: str) -> set[str]:
    """Top-level packages that `statement` loads in a fresh interpreter beyond what `import torch` loads."""
    probe = [sys.executable, "-c", PROBE.format(statement=statement)]
    done = subprocess.run(probe, capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout))


def test_importing_modiff_loads_no_host_no_kernel_compiler_no_server_and_no_plots() -> None:
    loaded = packages_loaded_by("import modiff")
    assert "modiff" in loaded
    assert loaded & HEAVY == set()


def test_the_probe_sees_a_heavy_import() -> None:
    assert packages_loaded_by("import matplotlib") & HEAVY == {"matplotlib"}
