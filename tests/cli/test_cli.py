"""What every command has: help and version at once, and one line with an exit code for a mistake."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from click.testing import Result
from filelock import FileLock
from typer.testing import CliRunner

import modiff
from modiff import presets
from modiff.cli import Commands, app, in_flags, main
from modiff.cli.options import SAMPLERS, Quiet
from modiff.cli.quantize import METHODS
from modiff.errors import FormatError, ModiffWarning
from modiff.files import LOCK
from modiff.generate import samplers
from modiff.methods import registry
from tests.cli.commands import assert_one_line
from tests.cli.commands import modiff as command

NAMES = ["accelerate", "analyze", "demo", "evaluate", "explain", "export", "generate", "quantize", "sample", "ui"]


def test_version_and_every_command_has_help_with_an_example_and_json() -> None:
    assert command("--version").stdout == f"modiff {modiff.__version__}\n"
    assert [call.callback.__name__ for call in app.registered_commands if call.callback] == NAMES
    for name in NAMES:
        result = command(name, "--help")
        assert f"Example:\n      modiff {name} " in result.stdout
        assert "--json" in result.stdout or name == "ui"
        assert ("--seed" in result.stdout and "--steps" in result.stdout) or name in ("export", "ui")


AT_ONCE = ["", "-h", "--version", "sample --help", "smaple", "sample", "demo --steps x", "explain m --config w9", "-x"]
MISTAKES = """sample embeded -o o
sample embedded -o o --scheduler x
sample embedded -o o --device x
demo --model embeded
explain embedded --tolerance -1
accelerate embedded -o o --max-error 2
accelerate embedded -o o --state-memory much
evaluate embedded --preset x
evaluate embedded --configs w9
quantize embedded -o o --method x
quantize embedded -o o --method ptqd --weight-bits 1
quantize embedded -o o --method ptqd --settings no
generate embedded -o o -n 9 --batch-size 2 --shard-size 3"""


def test_help_version_and_usage_errors_do_not_wait_for_torch() -> None:
    probe = (
        "import sys; from typer.testing import CliRunner; from modiff.cli import app\n"
        "for words in sys.argv[1:]: print(CliRunner().invoke(app, words.split()).exit_code)\n"
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", probe, *AT_ONCE, *MISTAKES.splitlines()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["2", "0", "0", "0", *"2" * (len(AT_ONCE) - 4 + MISTAKES.count("\n") + 1), "False"]
    module = [sys.executable, "-m", "modiff", "--version"]
    assert subprocess.check_output(module, text=True, timeout=120) == f"modiff {modiff.__version__}\n"


def test_what_is_known_without_torch_is_what_there_is() -> None:
    assert list(SAMPLERS) == list(samplers.SAMPLERS)
    assert set(METHODS) == set(registry.METHODS)


def test_a_shell_completes_commands() -> None:
    shell = {**os.environ, "_MODIFF_COMPLETE": "complete_bash", "COMP_WORDS": "modiff de", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-m", "modiff"], env=shell, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["demo"]


def test_results_go_to_standard_output_and_text_for_people_beside_them(model: Path, tmp_path: Path) -> None:
    result = command("sample", model, "-o", tmp_path / "out", "-n", 1, "--steps", 2, "--json", "-")
    assert json.loads(result.stdout)["files"] == ["00000.png"]
    assert result.stderr == f"1 written, 0 kept: {tmp_path / 'out'}\n"


@pytest.mark.parametrize("words", ["sample", "generate -n 2", "evaluate -n 8", "quantize --method ptq4dm --work a"])
def test_a_folder_is_of_one_process(model: Path, tmp_path: Path, monkeypatch, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    with FileLock(Path("a") / LOCK):
        result = command(*words.split(), model, "-o", "b" if "--work" in words else "a", "--steps", 2)
    assert_one_line(result, "a: expected a folder that no other process writes to, got one in use")


def test_libraries_do_not_log_what_the_one_line_says(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "broken")
    next(folder.glob("unet/*.safetensors")).unlink()
    assert_one_line(
        command("sample", folder, "-o", tmp_path / "out"), "broken/unet: expected part of a diffusers pipeline"
    )
    assert not logging.getLogger("diffusers").isEnabledFor(logging.ERROR)


def run(body: Callable[[], object], *words: str) -> Result:
    """A command that does `body`."""
    app = typer.Typer(cls=Commands)
    app.callback()(main)

    @app.command()
    def work(quiet: Quiet = False) -> None:
        body()

    return CliRunner().invoke(app, words or ["work"])


def test_remarks_are_one_line_and_none_when_it_is_to_be_quiet() -> None:
    def body() -> None:
        warnings.warn("slow", ModiffWarning, stacklevel=1)
        warnings.warn("of a library", UserWarning, stacklevel=1)

    assert [run(body, *words).stderr for words in (("--quiet", "work"), ("work", "--quiet"))] == ["", ""]
    assert run(body).stderr == "modiff: slow\n"


FLAGS = {"steps": "--steps", "prompt": "--prompt", "json_file": "--json", "settings": "--settings"}


def test_messages_speak_of_flags() -> None:
    for message, line in {
        "steps: expected 2, got 1. Use steps=50.": "--steps: expected 2, got 1. Use --steps 50.",
        "a: got b. Add prompt='a fox'. Leave `json_file` out.": "a: got b. Add --prompt 'a fox'. Leave --json out.",
        "Ptq4dmConfig.steps: use out=steps or substeps=3.": "--steps: use out=steps or substeps=3.",
        "XConfig.groups: expected 1.": "--settings: groups: expected 1.",
        "w9a8: WeightConfig.bits: expected None or 2.": "w9a8: WeightConfig.bits: expected 32 or 2.",
        "config: config='w8', steps=0-9,11 or prompt=a.b.": "config: config='w8', --steps 0-9,11 or --prompt a.b.",
    }.items():
        assert in_flags(message, FLAGS) == line


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (FormatError("a: expected b.\nmore\ndetail"), 2, "modiff: a: expected b.\n"),
        (OSError(errno.ENOSPC, "No space left", "a"), 2, "modiff: a: expected a file that can be written, got No s"),
        (
            OSError(errno.EISDIR, "Is a", "b"),
            2,
            "modiff: b: expected a file that can be written, got Is a. Nothing was left half done. Give",
        ),
        (KeyboardInterrupt(), 130, "modiff: interrupted. Files that were finished are kept.\n"),
        (ZeroDivisionError(), 1, ""),
    ],
)
def test_an_error_becomes_one_line_and_a_code_and_a_bug_goes_through(error: Exception, code: int, line: str) -> None:
    def body() -> None:
        raise error

    result = run(body)
    assert (result.exit_code, result.stdout, result.stderr[: len(line)]) == (code, "", line)
    assert result.stderr.count("\n") == (code != 1)
    assert code != 1 or result.exception is error


STATIC = presets.w8a8().to_dict() | {"layer": {"activation": {"dynamic": False}}}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "sample {model} --output=",
            "--output: expected a path, got ''. An empty one names nothing. Use --output out.",
        ),
        ("quantize {model} --method ptqd --output=", "--output: expected a path, got ''"),
        ("evaluate {model} --report=", "--report: expected a path, got ''"),
        ("sample {model} -o {out} --steps 2.5", "--steps: expected a whole number, got '2.5'. It cannot be read"),
        ("generate {model} -o {out} -n 1e3", "--num-images: expected a whole number, got '1e3'"),
        ("explain {model} --tolerance x", "--tolerance: expected a number, got 'x'"),
        ("quantize {model} --method ptqd -o /proc/x", "/proc/x: expected a file that can be written, got No such file"),
        ("demo -o -", "--output: expected a name that ends in .png, got '-'"),
        ("export {model} -o x.png", "--output: expected a name that ends in .npz, got 'x.png'"),
        ("sample {model} -o x.png", "--output: expected a folder, or a name for a new one, got 'x.png'"),
        ("analyze {model} -o {file}/below", "expected a file that can be written"),
        ("demo --model {model} -o {out}.png --steps 2", "--steps: expected 4 or more, got 2"),
        ("evaluate {model} --configs w8a4,modulated:8:4", "--configs: expected different configurations"),
        ("analyze {model} -o {out} --steps 5000", "--steps: expected at most 1000, got 5000"),
        ("export {model} -o {out}.npz -n -1", "--num-images: expected 1 or more, got -1"),
        (
            "sample {model} -o {out} --config {file}",
            "file.txt: ModiffConfig: expected JSON, got Expecting value: line 1",
        ),
        ("sample {model} -o {out} --config w9a8", "w9a8: WeightConfig.bits: expected 32 or 2 to 8, got 9"),
        ("explain {model} --config modulated:32:32", "--config: expected 2 to 8 activation bits, got 32"),
        ("quantize {model} --method ptqd --settings no -o {out}", 'Write {"samples": 64}.'),
        ("explain {model} --tolerance nan", "--tolerance: expected a relative error above 0, got nan"),
        (
            "generate {model} -o {out} -n 2 --prompts no",
            "no: expected a text file with a prompt in each line, got No such",
        ),
        (
            "quantize {model} --method q_diffusion --quick --steps 3 -o {out}",
            "--settings: groups: expected 1 to 3, got 10",
        ),
        ("evaluate {model} --configs w9", "--configs: expected bits such as"),
        ("evaluate {model} -n 8 --steps 2 --reference absent", "absent: expected a file or a folder of pictures"),
        ("evaluate {model} --preset fast", "expected one of quick, full, got 'fast'"),
        ("evaluate {model} --metrics clip", "--metrics: expected --clip with the folder of a CLIP model"),
        ("export absent -o {out}.npz", "absent: expected a folder of modiff generate, got one without manifest.json"),
        ("generate {model} -o {out} -n 2 --config {static}", "--config: expected dynamic scales, got 'static ones'"),
        ("generate {model} -o {out} -n 2 --prompts {prompts} --prompt a", "--prompts: expected no --prompt with it"),
        ("quantize {model} --method ptq4dm --weight-bits 1 -o {out}", "--weight-bits: expected 32 or 2 to 8, got 1"),
        ("quantize {model} --method ptq4dm --settings {prompts} -o {out}", "prompts.txt: expected a JSON file"),
        ("quantize {model} --method ptq4dm -o {model}", "expected a new or an empty folder, got files in it"),
        ("sample {model} -o {out} --device tpu", "--device: expected cpu"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {name: tmp_path / f"{name}.txt" for name in ("file", "prompts")} | {"static": tmp_path / "static.json"}
    for path in files.values():
        path.write_text("a fox\na cat\n")
    files["static"].write_text(json.dumps(STATIC))
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "out"
    assert_one_line(command(*(word.format(model=model, out=out, **files) for word in words.split())), message)
    assert sorted(tmp_path.iterdir()) == before
