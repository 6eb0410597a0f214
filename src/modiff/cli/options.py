"""The options that commands share, and the one way in which they load a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from modiff.generate.conditions import Conditions

MODEL_HELP = (
    "'embedded' (the Fashion-MNIST model of the package), 'cifar10' (where the package has it), a local diffusers "
    "folder, or a hub id."
)
PROMPTS_HELP = "A text file with a prompt in each line: image i is drawn of line i modulo their number."
LABELS_HELP = "Classes such as 0-9 or 3,5,8: image i is drawn of number i modulo how many they are."

Steps = Annotated[int, typer.Option("--steps", help="Denoising steps.")]
NumImages = Annotated[int, typer.Option("-n", "--num-images", help="How many images.")]
Seed = Annotated[int, typer.Option("--seed", help="Image i comes from the noise of seed + i.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results to this file.")]


def conditions_of(prompts: Path | None, labels: str | None) -> Conditions:
    """What the images are drawn of, from --prompts and --labels."""
    from modiff.generate.conditions import Conditions, parse_labels, read_prompts  # imported late, as diffusers

    known = () if labels is None else parse_labels(labels)
    return Conditions(prompts=() if prompts is None else read_prompts(prompts), labels=known)


def quiet() -> None:
    """Turn the bars and remarks of diffusers off: commands show one bar and one-line errors."""
    import diffusers  # imported late: `modiff --help` must not wait for it

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()


def quiet_pipeline(model: str, device: str) -> DiffusionPipeline:
    """Load a pipeline without the bars and remarks of diffusers; convolutions of this process round to no TF32."""
    import torch

    from modiff.hosts.diffusers.load import load_pipeline

    quiet()
    torch.backends.cudnn.allow_tf32 = False  # full precision is what everything is compared with
    return load_pipeline(model, device=device)
