"""`modiff export` end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from modiff.generate.job import Job
from modiff.generate.run import run_job
from tests.cli.commands import assert_one_line, done, modiff
from tests.generate.fakes import FakeEngine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    job = Job(model="fake", num_images=7, batch_size=2, shard_size=4)
    run_job(job, tmp_path / "images", engine=FakeEngine())
    return tmp_path / "images"


def invoke(*arguments: object) -> Result:
    return modiff("export", *arguments)


def test_it_writes_the_array_and_says_what_it_is(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    result = invoke(folder, "-o", path, "-n", 5, "--json", tmp_path / "export.json")
    done(result)
    assert result.stdout == f"arr_0 (5, 4, 5, 3) uint8: {path}\n"
    assert np.load(path)["arr_0"].shape == (5, 4, 5, 3)
    expected = {"array": "arr_0", "shape": [5, 4, 5, 3], "dtype": "uint8", "file": str(path)}
    assert json.loads((tmp_path / "export.json").read_text()) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent", "-o", "{out}"], "absent: expected a folder of modiff generate, got one without manifest.json"),
        (["{folder}", "-o", "{out}", "-n", "8"], "expected 8 images, got 4 in whole shards"),
        (["{folder}", "-o", "{folder}"], "expected a file that can be written, got Is a directory"),
        (["{folder}", "-o", "{out}", "--json", "{folder}"], "got Is a directory"),
    ],
)
def test_a_mistake_is_one_line_and_no_file(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    out = tmp_path / "out.npz"
    result = invoke(*[text.format(folder=folder, out=out) for text in arguments])
    assert_one_line(result, message)
    assert not out.exists()
