"""How many Python calls, in how many files, does a steady step of one layer take? Counted with `sys.setprofile`.

python bench/hops.py
"""

import gc
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel

import modiff
from modiff.assets import embedded_folder

STEPS = 4
"""Of which the last is counted: states have started and kernels are built."""
_STDLIB = sysconfig.get_paths()["stdlib"]


class Hops(NamedTuple):
    """Calls per layer and distinct files. Python's own library does not count.

    calls, files: from a layer's `__call__` until it returns. kernels: how many of the calls are in `modiff/kernels`.
    all_calls, all_files: of the whole evaluation, those of the network around the layers too.
    """

    calls: float
    files: int
    kernels: float
    all_calls: float
    all_files: int


class Profile:
    """What `sys.setprofile` calls: counts calls by file, in all and below the layers."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = {id(layer) for layer in layers}
        self.everywhere: Counter[str] = Counter()
        self.inside: Counter[str] = Counter()
        self._outermost: FrameType | None = None

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        """One event."""
        if event == "return" and frame is self._outermost:
            self._outermost = None
        if event != "call":
            return
        if (
            self._outermost is None
            and frame.f_code.co_name == "_wrapped_call_impl"
            and id(frame.f_locals.get("self")) in self.layers
        ):
            self._outermost = frame
        file = frame.f_code.co_filename
        if not file.startswith("<") and ("site-packages" in file or not file.startswith(_STDLIB)):
            self.everywhere[file] += 1
            self.inside[file] += self._outermost is not None


@contextmanager
def _profiled(counted: Profile) -> Iterator[None]:
    """Garbage is left where it lies meanwhile: finalizers would run wherever a collection starts."""
    collects, before = gc.isenabled(), sys.getprofile()
    gc.disable()
    sys.setprofile(counted)
    try:
        yield
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()


def profile(config: modiff.ModiffConfig) -> tuple[Profile, int]:
    """The last of `STEPS` evaluations of the embedded model under `config`, eager; and how many layers it has."""
    unet: Any = UNet2DModel.from_pretrained(embedded_folder() / "unet")
    modiff.apply(unet, config)
    layers = [module for module in unet.modules() if type(module).__name__.startswith("Modulated")]
    counted = Profile(layers)
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), modiff.trajectory(unet):
        for step in range(STEPS):
            with _profiled(counted) if step == STEPS - 1 else nullcontext():
                unet(x * (1 - 0.01 * step), 900 - 20 * step)
    return counted, len(layers)


def hops(config: modiff.ModiffConfig) -> Hops:
    """The count of one config."""
    counted, layers = profile(config)
    inside, everywhere = +counted.inside, counted.everywhere
    kernels = sum(calls for name, calls in inside.items() if "/modiff/kernels/" in name)
    return Hops(
        inside.total() / layers, len(inside), kernels / layers, everywhere.total() / layers, len(everywhere)
    )  # fmt: skip


def main() -> None:
    """Print both executions."""
    config = modiff.presets.modulated(8, 8)
    for name, each in (("simulated", config), ("integer", config.on_integers())):
        print(f"{name:10}", *(f"{key} {value:.4g}" for key, value in hops(each)._asdict().items()), sep="  ")


if __name__ == "__main__":
    main()
