"""Rows of a benchmark that would run in processes of their own, run in this one."""

import json
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


def run_here(monkeypatch: pytest.MonkeyPatch, module: ModuleType, note: Callable[[dict[str, Any]], object]) -> None:
    """Where `module` would start itself with --task, note the task and run it here; other commands run as they do."""
    real = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        if command[0] != sys.executable:
            return real(command, **options)  # a compiler
        assert command[:3] == [sys.executable, module.__file__, "--task"]
        note(json.loads(command[3]))
        module.run_task(command[3])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(module.subprocess, "run", run)
