"""What the page may open: models of the package and folders inside the root; links and .. are resolved."""

import json
from pathlib import Path

import pytest

from modiff import presets
from modiff.errors import ConfigError, FormatError, ModiffError
from modiff.hosts.diffusers.load import load_pipeline
from modiff.web.models import Models
from tests.pixels import saved_pipeline


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outside = tmp_path_factory.mktemp("outside")
    saved_pipeline(outside / "secret")
    (outside / "config.json").write_text(presets.w8a4().to_json())
    root = tmp_path_factory.mktemp("root")
    saved_pipeline(root / "models" / "tiny")
    saved_pipeline(root / ".hidden")
    (root / "empty").mkdir()
    (root / "linked").symlink_to(outside / "secret")
    saved_pipeline(root / "weights_linked")
    weights = root / "weights_linked/unet/diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.symlink_to(outside / "secret/unet/diffusion_pytorch_model.safetensors")
    (root / "inside").symlink_to(root / "models")
    (root / "loop").symlink_to(root / "loop")
    (root / "mine.json").write_text(presets.w4a8().to_json())
    (root / "static.json").write_text(
        json.dumps({"layer": {"activation": {"bits": 8, "dynamic": False}, "modulation": None}})
    )
    (root / "broken").mkdir()
    (root / "broken/model_index.json").write_text("{")
    (root / "odd").mkdir()
    (root / "odd/model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    return root


@pytest.fixture(scope="module")
def models(root: Path) -> Models:
    return Models(root, load_pipeline)


def test_choices_are_the_models_of_the_package_and_the_pipelines_below_the_root(models: Models) -> None:
    assert models.choices()[0] == "embedded"
    assert {"models/tiny", "broken"} <= {*models.choices()}
    assert not {".hidden", "linked", "empty", "inside/tiny"} & {*models.choices()}


@pytest.mark.parametrize("name", ["models/tiny", " models/tiny ", "inside/tiny", "models/../models/tiny"])
def test_a_folder_inside_is_loaded_whatever_way_its_path_takes(models: Models, root: Path, name: str) -> None:
    assert models.folder(name) == (root / "models/tiny").resolve()
    assert type(models.load(name).pipe).__name__ == "DDIMPipeline"
    assert models.load(name) is models.load("models/tiny")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../outside", "inside the folder"),
        ("/etc", "inside the folder"),
        ("linked", "inside the folder"),
        ("weights_linked", "inside the folder"),
        ("a" * 5000, "inside the folder"),
        ("a\0b", "inside the folder"),
        ("loop", "folder"),
        ("~root", "no such folder"),
        ("google/ddpm-cifar10-32", "no such folder"),
        ("empty", "folder of a diffusers pipeline"),
        ("", "folder of a diffusers pipeline"),
    ],
)
def test_anything_else_is_refused_in_one_line(models: Models, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        models.load(name)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 6000


@pytest.mark.parametrize("name", ["broken", "odd"])
def test_a_damaged_folder_is_named(models: Models, name: str) -> None:
    with pytest.raises(FormatError, match=name):
        models.load(name)


def test_a_folder_that_was_written_again_is_read_again(tmp_path: Path) -> None:
    saved_pipeline(tmp_path / "tiny")
    models = Models(tmp_path, load_pipeline)
    before = models.load("tiny")
    saved_pipeline(tmp_path / "tiny")
    assert models.load("tiny") is not before


def test_only_the_last_models_stay_in_memory(tmp_path: Path) -> None:
    for name in "abc":
        saved_pipeline(tmp_path / name)
    models = Models(tmp_path, load_pipeline)
    first = models.load("a")
    assert models.load("b") is models.load("b")
    models.load("c")
    assert models.load("a") is not first


def test_facts_are_known_before_weights_are_read(models: Models) -> None:
    assert models.facts("embedded")[1:] == (False, False)
    assert models.facts("odd")[1:] == (False, False)
    with pytest.raises(FormatError, match="broken"):
        models.facts("broken")


def test_a_configuration_is_what_apply_accepts_and_files_lie_inside_the_root(models: Models) -> None:
    assert models.config(" w8a4 ", integers=False) == presets.w8a4()
    assert models.config("modulated:8:4", integers=True) == presets.w8a4().on_integers()
    assert models.config("mine.json", integers=False) == presets.w4a8()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("w8a", "config: expected bits"),
        ("", "config"),
        ("../outside/config.json", "inside the folder"),
        ("/etc/passwd", "inside the folder"),
        ("missing.json", "missing.json"),
        ("static.json", "dynamic scales"),
    ],
)
def test_a_bad_configuration_is_refused_in_one_line(models: Models, text: str, words: str) -> None:
    with pytest.raises(ModiffError, match=words):
        models.config(text, integers=True)


def test_a_file_of_the_working_folder_is_no_configuration(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text(presets.w8a4().to_json())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModiffError):
        models.config("secret", integers=True)


def test_a_text_model_is_refused(tmp_path: Path) -> None:
    from modiff.assets import text_folder
    from modiff.sampling.masked import MaskedTextPipeline

    MaskedTextPipeline.from_pretrained(text_folder()).save_pretrained(tmp_path / "text")
    with pytest.raises(ConfigError, match="makes images"):
        Models(tmp_path, load_pipeline).load("text")


def test_a_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="root"):
        Models(tmp_path / "none", load_pipeline)
