"""`modiff ui` without Gradio; tests/web starts it with."""

import importlib.util
import sys

import pytest

from tests.cli.commands import modiff as command


def test_without_gradio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec
    module = sys.modules["modiff.cli.ui"]  # the package's `ui` is the command
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "gradio" else spec(name))
    result = command("ui")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "pip install 'modiff[web]'" in result.stderr
