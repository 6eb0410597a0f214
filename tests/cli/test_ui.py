"""`modiff ui` where it cannot start; tests/web starts it."""

import importlib.util
import socket
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


def test_a_port_that_is_taken_and_a_root_that_is_missing_are_one_line() -> None:
    pytest.importorskip("gradio", reason="needs modiff[web]")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for options, words in (
            (("--port", port), f"modiff: --port: expected one that is free on 127.0.0.1, got {port}"),
            (("--port", "99999"), "modiff: --port: expected 0 to 65535"),
            (("--host", "no.such.host.invalid"), "modiff: --port: expected one that is free on no.such"),
            (("--root", "no/such/folder"), "modiff: --root: expected a folder"),
        ):
            result = command("ui", *options)
            assert result.exit_code == 2
            assert result.stderr.startswith(words)
            assert result.stderr.count("\n") == 1
