"""The options that commands share, and the one way in which they load a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MODEL_HELP = "'embedded' (the Fashion-MNIST model of the package), a local diffusers folder, or a hub id."

Steps = Annotated[int, typer.Option("--steps", help="Denoising steps.")]
NumImages = Annotated[int, typer.Option("-n", "--num-images", help="How many images.")]
Seed = Annotated[int, typer.Option("--seed", help="Image i comes from the noise of seed + i.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results to this file.")]


def quiet() -> None:
    """Turn the bars and remarks of diffusers off: commands show one bar and one-line errors."""
    import diffusers  # imported late: `modiff --help` must not wait for it

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()


def quiet_pipeline(model: str, device: str) -> DiffusionPipeline:
    """Load a pipeline without the bars and remarks of diffusers."""
    from modiff.hosts.load import load_pipeline

    quiet()
    return load_pipeline(model, device=device)
