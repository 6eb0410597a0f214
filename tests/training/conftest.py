"""The training scripts as modules, a clock that ticks once a look, and images small enough for a test."""

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

TRAINING = Path(__file__).parents[2] / "training"


@pytest.fixture(scope="session")
def script():
    """Import a training script by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TRAINING))
        yield importlib.import_module


@pytest.fixture(scope="module", autouse=True)
def _threads():
    """The scripts set the number of threads of the process; the tests after them get it back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class Clock(SimpleNamespace):
    """Stands in for the module `time`: one second passes at each look, and Ctrl-C comes at look `interrupt_at`."""

    def __init__(self, interrupt_at: int = 0) -> None:
        super().__init__(looks=0, interrupt_at=interrupt_at)

    def time(self) -> float:
        self.looks += 1
        if self.looks == self.interrupt_at:
            raise KeyboardInterrupt
        return float(self.looks)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Twelve 6x6 images of noise."""
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (12, 6, 6), dtype=np.uint8))
    return path


@pytest.fixture(scope="session")
def tiny_unet(images):
    """Options of train_reference.py for a U-Net that trains a step in some milliseconds."""
    words = (
        f"--images {images} --size 8 --channels 16,16 --attention 4 --batch 4 --threads 1 --device cpu --anneal 1e-9"
    )
    return words.split()


@pytest.fixture(scope="session")
def ticking(script):
    """Train with a script into a folder for so many ticks of the clock; one step of training takes one tick."""

    def train(
        trainer: ModuleType, options: list[str], output: Path, steps: int, *more: str, interrupt_at: int = 0
    ) -> Path:
        words = [*options, "--minutes", str((steps - 0.5) / 60), "-o", str(output), *more]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script("train_reference"), "time", Clock(interrupt_at))
            trainer.train(trainer.parse_arguments(words))
        return output

    return train
