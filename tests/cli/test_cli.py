"""What every command has, and that help and version are there at once."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

import modiff
from modiff.cli import app

COMMANDS = sorted(command.callback.__name__ for command in app.registered_commands if command.callback)
NOTHING_DRAWN = ("explain", "export")
"""They draw no images, so they have no seed and no steps of their own."""


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"modiff {modiff.__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_json_and_seed(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example:\n      modiff {command} " in result.stdout
    for option in ("--json",) if command in NOTHING_DRAWN else ("--json", "--seed", "--steps"):
        assert option in result.stdout


def test_the_commands_of_readme_are_there() -> None:
    assert {"analyze", "demo", "evaluate", "export", "generate", "quantize", "sample"} <= set(COMMANDS)


def test_no_command_shows_the_commands() -> None:
    result = CliRunner().invoke(app, [])
    for command in COMMANDS:
        assert f"\n  {command} " in result.output


def test_help_does_not_wait_for_diffusers() -> None:
    probe = "import sys, modiff.cli; print('diffusers' in sys.modules, 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["False", "False"]
