"""Jobs into folders: nothing lost, nothing doubled, nothing mixed, whatever happens on the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from modiff import presets
from modiff.errors import ConfigError, FormatError, StateError
from modiff.files import LOCK
from modiff.generate import run as engine
from modiff.generate import shards
from modiff.generate.conditions import Conditions
from modiff.generate.job import Job
from modiff.generate.run import Generated, run_job
from modiff.generate.shards import Manifest, Span, read_images
from tests.generate.fakes import ENVIRONMENT, FakeEngine, image
from tests.pixels import saved_pipeline

ROOT = Path(__file__).parents[2]


def job(num_images: int = 11, **changes: Any) -> Job:
    return Job(**{"model": "fake", "num_images": num_images, "batch_size": 2, "shard_size": 4} | changes)


def run(folder: Path, num_images: int = 11, fake: FakeEngine | None = None, **changes: Any) -> Generated:
    return run_job(job(num_images, **changes), folder, engine=fake or FakeEngine())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK}


def images(folder: Path) -> np.ndarray:
    return np.concatenate(list(read_images(folder)))


def expected(num_images: int, seed: int = 0) -> np.ndarray:
    return np.stack([image(seed + index) for index in range(num_images)])


@pytest.mark.parametrize("num_images", [1, 3, 4, 5, 8, 11])
def test_a_folder_holds_the_images_of_the_indices_and_drawing_again_changes_no_byte(
    tmp_path: Path, num_images: int
) -> None:
    done = run(tmp_path, num_images, seed=40)
    assert np.array_equal(images(tmp_path), expected(num_images, seed=40))
    assert (done.made, done.kept, done.damaged) == (num_images, 0, ())
    assert done.manifest == Manifest.load(tmp_path)
    before, fake = content(tmp_path), FakeEngine()
    done = run(tmp_path, num_images, fake, seed=40)
    assert (done.made, done.kept, fake.drawn) == (0, num_images, [])
    assert content(tmp_path) == before


def test_shards_may_come_in_any_order(tmp_path: Path) -> None:
    fake = FakeEngine()
    fake.backwards = True
    run(tmp_path / "backwards", fake=fake)
    run(tmp_path / "forwards")
    assert content(tmp_path / "backwards") == content(tmp_path / "forwards")


@pytest.mark.parametrize("stop_at", [0, 1, 2])
def test_ctrl_c_keeps_what_is_whole_and_frees_the_folder(tmp_path: Path, stop_at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fake=FakeEngine(stop_at=stop_at))
    with pytest.raises(FormatError, match=f"expected 11 images, got {4 * stop_at}"):
        read_images(tmp_path)
    fake = FakeEngine()
    assert run(tmp_path, fake=fake).kept == 4 * stop_at
    assert [span.first for span in fake.drawn] == [0, 4, 8][stop_at:]
    run(tmp_path.parent / "whole")
    assert content(tmp_path) == content(tmp_path.parent / "whole")


def test_killed_before_any_file_operation_it_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.generate.nursery", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["failures"] == []
    assert result["kills"] > 20


def test_more_images_extend_a_folder_to_the_bytes_of_one_that_began_with_them(tmp_path: Path) -> None:
    run(tmp_path / "grown", 5)
    fake = FakeEngine()
    done = run(tmp_path / "grown", 11, fake)
    # the shard that had one image is made again with four
    assert (fake.drawn, done.kept) == ([Span(first=4, count=4), Span(first=8, count=3)], 4)
    run(tmp_path / "whole", 11)
    assert content(tmp_path / "grown") == content(tmp_path / "whole")
    fake = FakeEngine()
    for num_images in (3, 9, 11):  # fewer are the first ones, and the others stay for later
        done = run(tmp_path / "grown", num_images, fake)
        assert (done.made, done.kept) == (0, num_images)
        assert np.array_equal(images(tmp_path / "grown"), expected(num_images))
    assert fake.drawn == []


@pytest.mark.parametrize("how", ["cut", "empty", "gone", "a pixel", "manifest"])
def test_what_is_damaged_is_made_again_and_named(tmp_path: Path, how: str) -> None:
    run(tmp_path)
    before = content(tmp_path)
    path = tmp_path / ("manifest.json" if how == "manifest" else "shard-000001.safetensors")
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "a pixel": whole[:-1] + bytes([whole[-1] ^ 1])}.get(how, whole[:-7]))
    if how == "gone":
        path.unlink()
    fake = FakeEngine()
    done = run(tmp_path, fake=fake)
    assert fake.drawn == ([] if how == "manifest" else [Span(first=4, count=4)])
    assert done.damaged == (() if how in ("gone", "manifest") else (path.name,))
    assert content(tmp_path) == before


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"seed": 1}, "another seed"),
    ({"steps": 3}, "another steps"),
    ({"config": presets.w8a8().to_dict()}, "another config"),
    ({"scheduler": "ddim"}, "another scheduler"),
    ({"conditions": Conditions(prompts=("a fox",), labels=(3,))}, "another labels and prompts"),
    ({"batch_size": 4}, "another batch_size"),
    ({"shard_size": 8}, "another shard_size"),
]


@pytest.mark.parametrize(("other", "message"), OTHERS)
def test_a_folder_never_mixes_two_jobs(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    run(tmp_path, 5)
    before = content(tmp_path)
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, 11, **other)
    assert content(tmp_path) == before


def test_the_weights_make_the_job_and_the_name_of_the_model_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, 5)
    # sizes that are left open are the folder's
    assert run(tmp_path, 11, model="/moved", batch_size=None, shard_size=None).made == 7
    assert np.array_equal(images(tmp_path), expected(11))
    describe = FakeEngine.describe
    monkeypatch.setattr(
        FakeEngine, "describe", lambda self, j: engine.dataclasses.replace(describe(self, j), digest="x")
    )
    with pytest.raises(ConfigError, match="another model"):
        run(tmp_path, 11)


def test_a_worker_with_another_model_stops_the_job(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="expected the same model on every machine"):
        run(tmp_path, fake=FakeEngine(digest="other"))
    assert sorted(content(tmp_path)) == ["job.json", "manifest.json"]


def test_shards_of_another_job_or_of_no_job_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "a", 5)
    run(tmp_path / "b", 11, seed=1)
    shutil.copy(tmp_path / "b" / "shard-000002.safetensors", tmp_path / "a")
    with pytest.raises(ConfigError, match=r"shard-000002\.safetensors: .* one of another job"):
        run(tmp_path / "a", 11)
    (tmp_path / "b" / "job.json").unlink()
    with pytest.raises(ConfigError, match=r"shard-000000\.safetensors alone"):
        run(tmp_path / "b", 11, seed=1)


def test_shards_of_two_environments_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fake=FakeEngine(stop_at=1))
    fake = FakeEngine()
    fake.environment = {"threads": 2}
    assert run(tmp_path, fake=fake).manifest.environments == [ENVIRONMENT, {"threads": 2}]


def test_two_processes_never_write_to_one_folder(tmp_path: Path) -> None:
    run(tmp_path, 5)
    fake = FakeEngine()
    with FileLock(tmp_path / LOCK), pytest.raises(StateError, match="got one in use"):
        run(tmp_path, 11, fake)
    assert fake.drawn == []
    assert run(tmp_path, 11).made == 7


def test_a_disk_without_room_is_an_error_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def free(room: int) -> None:
        usage = namedtuple("Usage", "total used free")(0, 0, room)
        monkeypatch.setattr(engine.shutil, "disk_usage", lambda folder: usage)

    room, fake = (11 + 4) * 4 * 5 * 3 + (1 << 20), FakeEngine()
    free(room - 1)
    with pytest.raises(OSError, match=r"No space left on device: 11 images need 1\.0 MB, free are 1\.0 MB") as caught:
        run(tmp_path, fake=fake)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))
    assert fake.drawn == []
    free(room)
    run(tmp_path)
    free(0)
    assert run(tmp_path).kept == 11  # what is there needs no room


def test_a_disk_that_fills_up_on_the_way_keeps_the_shards_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = shards.write_atomically, []

    def filling(path: Path, writer: Any) -> None:
        def full(file: Any) -> None:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        calls.append(path)
        write(path, writer if len(calls) < 3 else full)

    monkeypatch.setattr(shards, "write_atomically", filling)
    with pytest.raises(OSError, match="No space left") as caught:
        run(tmp_path)
    assert caught.value.filename == str(tmp_path / "shard-000002.safetensors")
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.glob("*shard*")) == [
        "shard-000000.safetensors", "shard-000001.safetensors"
    ]  # fmt: skip
    fake = FakeEngine()
    run(tmp_path, fake=fake)
    assert fake.drawn == [Span(first=8, count=3)]


def test_a_folder_that_cannot_be_written_is_known_before_the_model_is_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"exists|directory") as caught:
        run_job(job(model="absent"), tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value.filename)


@pytest.mark.parametrize("config", [None, presets.w8a4().to_dict()])
def test_a_real_model_stopped_twice_gives_the_bytes_of_one_run(
    tmp_path: Path, config: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(saved_pipeline(tmp_path / "model"))
    real = Job(model=model, num_images=7, steps=2, config=config, batch_size=2, shard_size=2, threads=1)
    run_job(real, tmp_path / "whole")
    written: list[int] = []

    def stopping(*arguments: Any) -> shards.Shard:
        written.append(1)
        if len(written) in (2, 4):
            raise KeyboardInterrupt
        return shards.write_images(*arguments)

    monkeypatch.setattr(engine, "write_images", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_job(real, tmp_path / "halves")
    run_job(real, tmp_path / "halves")
    assert len(written) == 6
    assert content(tmp_path / "halves") == content(tmp_path / "whole")
    assert len({picture.tobytes() for picture in images(tmp_path / "whole")}) == 7
