"""The options that commands share, and the one way in which they load a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modiff.errors import ConfigError
from modiff.files import check_writable

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from modiff.generate.job import Conditions


def writable(path: Path | None) -> Path | None:
    """A callback for options that name a file: it is refused before a model is loaded."""
    if path == Path("-"):
        raise ConfigError("output: expected the name of a file, got '-'. Standard output has the table. Use a.json.")
    if path is not None:
        check_writable(path)
    return path


MODEL_HELP = (
    "'embedded' (the Fashion-MNIST model of the package), 'cifar10' (where the package has it), a local diffusers "
    "folder, or a hub id."
)
CONFIG_HELP = (
    "A preset (w8a8, w8a4, ...), a family with weight and activation bits (modulated:8:4, plain:8:4, tuned:32:4), "
    "or a JSON file of ModiffConfig.to_json()."
)
PROMPTS_HELP = "A text file with a prompt in each line: image i is drawn of line i modulo their number."
LABELS_HELP = "Classes such as 0-9 or 3,5,8: image i is drawn of number i modulo how many they are."
SCHEDULER_HELP = "ddim, ddpm, dpmsolver++, euler, heun, unipc, ...; the model's own when left out."

Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Unconditional = Annotated[str, typer.Argument(help=f"{MODEL_HELP} Unconditional ones only.")]
Config = Annotated[str, typer.Option("--config", help=CONFIG_HELP)]
MaybeConfig = Annotated[str | None, typer.Option("--config", help=f"{CONFIG_HELP} Full precision when left out.")]
Steps = Annotated[int, typer.Option("--steps", help="Denoising steps.")]
NumImages = Annotated[int, typer.Option("-n", "--num-images", help="How many images.")]
Scheduler = Annotated[str | None, typer.Option("--scheduler", help=SCHEDULER_HELP)]
Seed = Annotated[int, typer.Option("--seed", help="Image i comes from the noise of seed + i.")]
Prompt = Annotated[str | None, typer.Option("--prompt", help="For models that take text.")]
Label = Annotated[int | None, typer.Option("--label", help="For class-conditional models.")]
Prompts = Annotated[Path | None, typer.Option("--prompts", metavar="FILE", help=PROMPTS_HELP)]
Labels = Annotated[str | None, typer.Option("--labels", metavar="N-M,...", help=LABELS_HELP)]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", callback=writable, help="Where the results go.")]


def conditions_of(
    *, prompt: str | None = None, label: int | None = None, prompts: Path | None = None, labels: str | None = None
) -> Conditions:
    """What the images are drawn of, from the options of these names. Raises: ConfigError for one and several."""
    from modiff.generate.job import Conditions, parse_labels, read_prompts  # imported late, as diffusers

    for option, one, several in (("prompt", prompt, prompts), ("label", label, labels)):
        if one is not None and several is not None:
            raise ConfigError(
                f"--{option}s: expected no --{option} with it, got {one!r:.60}. An image is drawn of one. "
                f"Leave --{option} out."
            )
    texts = read_prompts(prompts) if prompts is not None else () if prompt is None else (prompt,)
    classes = parse_labels(labels) if labels is not None else () if label is None else (label,)
    return Conditions(prompts=texts, labels=classes)


def quiet() -> None:
    """Turn the bars and remarks of diffusers off: commands show one bar and one-line errors."""
    import diffusers  # imported late: `modiff --help` must not wait for it

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()


def quiet_pipeline(model: str, device: str, scheduler: str | None = None) -> DiffusionPipeline:
    """Load a pipeline without the bars and remarks of diffusers; convolutions of this process round to no TF32.

    scheduler: that of SCHEDULER_HELP; None leaves the model its own.
    """
    import torch

    from modiff.generate.samplers import set_scheduler
    from modiff.hosts.diffusers.load import load_pipeline

    quiet()
    torch.backends.cudnn.allow_tf32 = False  # full precision is what everything is compared with
    pipe = load_pipeline(model, device=device)
    return pipe if scheduler is None else set_scheduler(pipe, scheduler)
