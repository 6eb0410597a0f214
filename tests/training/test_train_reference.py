"""Training of the diffusion model: the loss, what a restart keeps, what the folder holds, what is refused."""

import json
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline
from safetensors.torch import load_file
from torch import nn

WEIGHTS = Path("pipeline") / "unet" / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def reference(script):
    return script("train_reference")


@pytest.fixture(scope="module")
def run(ticking, reference, tiny_unet):
    """`ticking` with this script and its smallest options."""
    return partial(ticking, reference, tiny_unet)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A run of four steps; tests only read it."""
    return run(tmp_path_factory.mktemp("runs") / "whole", 4)


@pytest.fixture
def copy(whole, tmp_path):
    """The same run, to go on with or to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def progress(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["progress"]


def test_a_run_writes_a_pipeline_of_the_averaged_weights_that_diffusers_loads_and_samples(whole):
    state = torch.load(whole / "checkpoint.pt", weights_only=True)
    saved, done = load_file(whole / WEIGHTS), state["progress"]
    assert [call["from_image"] for call in done.pop("calls")] == [0]
    assert done == {"step": 4, "images_seen": 16, "seconds": 4.0, "losses": []}
    assert saved.keys() == state["average"].keys()
    assert all(torch.equal(saved[name], tensor.half()) for name, tensor in state["average"].items())
    assert any(not torch.equal(saved[name], tensor.half()) for name, tensor in state["model"].items())
    record = (whole / "training.json").read_text()
    assert json.loads(record)["images"] == "images.npy"
    assert str(whole.parent) not in record
    pipeline = DDIMPipeline.from_pretrained(whole / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    assert np.isfinite(images).all()
    assert 0 <= images.min() < images.max() <= 1


def test_a_run_that_was_interrupted_goes_on_to_the_weights_of_one_that_was_not(run, whole, tmp_path):
    # Two looks at the clock before the loop, then three a step: the ninth opens the third step.
    run(tmp_path / "halves", 4, interrupt_at=9)
    assert progress(tmp_path / "halves")["step"] == 2
    halves = run(tmp_path / "halves", 4)
    assert progress(halves) == progress(whole)
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, halves)]
    for part in ("model", "average"):
        assert all(torch.equal(states[0][part][name], states[1][part][name]) for name in states[0][part]), part


@pytest.mark.parametrize(("option", "value"), [("--seed", "7"), ("--flip", None)])
def test_a_run_does_not_go_on_with_what_would_be_another_model(run, copy, option, value):
    before = (copy / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit, match=f"one with another {option[2:]}"):
        run(copy, 6, *([option] if value is None else [option, value]))
    assert (copy / "checkpoint.pt").read_bytes() == before


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("spoil", "options"),
    [
        (lambda path: None, ("--channels", "16,32")),
        (cut_short, ()),
        (lambda path: path.write_bytes(pickle.dumps(Path("x"), protocol=2)), ()),
        (lambda path: torch.save({"model": {}}, path), ()),
    ],
    ids=["of other channels", "cut short", "pickle of an object", "without its parts"],
)
def test_a_checkpoint_that_does_not_fit_ends_in_one_line_and_stays_as_it_is(run, copy, spoil, options):
    checkpoint = copy / "checkpoint.pt"
    spoil(checkpoint)
    before = checkpoint.read_bytes()
    with pytest.raises(SystemExit, match="expected a checkpoint of this model") as caught:
        run(copy, 5, *options)
    assert "\n" not in str(caught.value)
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "got FileNotFoundError"),
        (lambda path: path.write_bytes(b""), "expected an .npy array of images"),
        (lambda path: np.save(path, np.zeros((6, 6), np.uint8)), r"got \(6, 6\) uint8"),
        (lambda path: np.save(path, np.zeros((0, 6, 6), np.uint8)), "N > 0"),
        (lambda path: np.save(path, np.zeros((2, 9, 6), np.uint8)), "do not fit --size 8"),
    ],
    ids=["missing", "empty file", "one image", "no images", "too large"],
)
def test_a_wrong_image_file_ends_in_one_line(reference, tmp_path, write, message):
    path = tmp_path / "wrong.npy"
    write(path)
    with pytest.raises(SystemExit, match=message) as caught:
        reference.load_images(path, 8)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 5, 6, 3)], ids=["grey", "colour"])
def test_images_are_padded_with_black_and_put_in_the_middle(reference, tmp_path, shape):
    images = np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    padded = reference.load_images(tmp_path / "images.npy", 8).numpy()
    assert padded.dtype == np.uint8
    assert padded.shape == (2, shape[3] if len(shape) == 4 else 1, 8, 8)
    for n in range(2):
        for channel in range(padded.shape[1]):
            expected = images[n] if len(shape) == 3 else images[n, :, :, channel]
            assert (padded[n, channel, 1:6, 1:7] == expected).all()
            assert padded[n, channel].astype(int).sum() == expected.astype(int).sum()


class Oracle(nn.Module):
    """Knows the clean images, and solves x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps for the noise."""

    def __init__(self, clean: torch.Tensor, survival: torch.Tensor) -> None:
        super().__init__()
        self.clean, self.survival = clean, survival

    def forward(self, x: torch.Tensor, steps: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        abar = self.survival[steps].reshape(-1, 1, 1, 1)
        return ((x - abar.sqrt() * self.clean) / (1 - abar).sqrt(),)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_loss_is_zero_for_a_model_that_knows_the_noise_and_one_for_silence(reference, schedule):
    t = torch.arange(1000, dtype=torch.float64)
    if schedule == "linear":
        survival = (1 - (1e-4 + (0.02 - 1e-4) * t / 999)).cumprod(0)
    else:
        shape = torch.cos((torch.arange(1001) / 1000 + 0.008) / 1.008 * torch.pi / 2).double() ** 2
        survival = (1 - (1 - shape[1:] / shape[:-1]).clamp(max=0.999)).cumprod(0)
    torch.manual_seed(0)
    clean = torch.rand(64, 1, 8, 8) * 2 - 1
    scheduler = reference.build_scheduler(schedule)
    # The scheduler's float32 table at t = 0, divided by sqrt(1 - abar_0) = 0.006 to 0.01: errors of 1e-7 become 1e-5.
    assert reference.loss_of_batch(Oracle(clean, survival), scheduler, torch.ones(1000), clean) < 1e-6
    silence = Oracle(torch.zeros(1), torch.zeros(1000))
    silence.forward = lambda x, steps, return_dict: (torch.zeros_like(x),)  # type: ignore[method-assign]
    # The mean square of 4096 normal numbers is 1 with a standard deviation of sqrt(2 / 4096) = 0.022.
    assert abs(reference.loss_of_batch(silence, scheduler, torch.ones(1000), clean) - 1) < 0.11


def test_min_snr_weighs_a_timestep_by_five_over_its_signal_to_noise_ratio_where_that_is_above_five(reference):
    scheduler = reference.build_scheduler("linear")
    survival = (1 - (1e-4 + (0.02 - 1e-4) * torch.arange(1000, dtype=torch.float64) / 999)).cumprod(0)
    ratio = survival / (1 - survival)
    expected = torch.where(ratio > 5, 5 / ratio, 1.0)
    torch.testing.assert_close(reference.timestep_weights(scheduler, "min-snr").double(), expected, rtol=1e-3, atol=0)
    assert (ratio > 5).sum() > 100
    assert torch.equal(reference.timestep_weights(scheduler, "uniform"), torch.ones(1000))
    clean = torch.zeros(64, 1, 8, 8)
    silence = Oracle(torch.zeros(1), torch.zeros(1000))
    silence.forward = lambda x, steps, return_dict: (torch.zeros_like(x),)  # type: ignore[method-assign]
    torch.manual_seed(0)
    weights = torch.zeros(1000)  # a weight of zero silences the loss, one of two doubles it
    assert reference.loss_of_batch(silence, scheduler, weights, clean) == 0
    assert abs(reference.loss_of_batch(silence, scheduler, weights + 2, clean) - 2) < 0.22


def test_a_run_goes_on_from_the_folder_of_another_where_its_checkpoint_is_lost(run, whole, tmp_path):
    started = run(tmp_path / "started", 4, "--start-from", str(whole / "pipeline"))
    assert progress(started) == progress(whole)  # its time is used up: no further step
    state = torch.load(started / "checkpoint.pt", weights_only=True)
    saved = load_file(whole / WEIGHTS)
    assert all(torch.equal(state[part][name], saved[name].float()) for part in ("model", "average") for name in saved)
    assert (progress(run(started, 6, "--start-from", "gone"))["step"]) == 6  # its own checkpoint counts, nothing else
