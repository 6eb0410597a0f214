"""The options that commands share, and the one way in which they load a model and show results."""

from __future__ import annotations

import importlib
import json
import logging
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modiff.assets import local_folder, packaged
from modiff.config import check
from modiff.files import check_writable, write_json
from modiff.generate.job import Conditions, parse_labels, read_prompts
from modiff.progress import Bar

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

STDOUT = Path("-")
_FILES = (".csv", ".html", ".jpeg", ".jpg", ".json", ".md", ".npy", ".npz", ".png", ".safetensors", ".txt", ".zip")


def hush(ctx: typer.Context, quiet: bool) -> bool:
    """A callback: before or behind the command's name."""
    Bar.quiet = quiet or (ctx.parent is not None and Bar.quiet)
    return quiet


def json_path(path: Path | None) -> Path | None:
    """A callback: a file that cannot be written is refused before a model is loaded; "-" is standard output."""
    if path not in (None, STDOUT):
        check_writable(path)
    return path


def folder_path(path: Path | None) -> Path | None:
    """A callback for options that name a folder."""
    fits = path is None or path.is_dir() or (path.suffix.lower() not in _FILES and not path.exists())
    return path and _output(path, fits, "a folder, or a name for a new one", "out", path / "settings.json")


def png_path(path: Path) -> Path:
    """A callback for options that name a PNG file."""
    return _output(path, path.suffix.lower() == ".png", "a name that ends in .png", "out.png", path)


def npz_path(path: Path) -> Path:
    """A callback for options that name an npz file."""
    return _output(path, path.suffix.lower() == ".npz", "a name that ends in .npz", "out.npz", path)


def _output(path: Path, fits: bool, expected: str, example: str, trial: Path) -> Path:
    check("output", str(path), fits, expected, f"The command writes nothing else. Use output={example}.")
    check_writable(trial)
    return path


def known(parameter: typer.CallbackParam, value: str | None) -> str | None:
    """A callback: a model, sampler or device that cannot exist is refused before anything is loaded."""
    if parameter.name == "model":
        local_folder(value or "")
    elif parameter.name == "scheduler":
        check("scheduler", value, value in (None, *SAMPLERS), f"one of {', '.join(SAMPLERS)}", "Pick one of them.")
    else:
        fits = re.fullmatch(r"cpu|cuda(:\d+)?", value or "") is not None
        check("device", value, fits, "cpu, cuda or cuda:N", "Models run where torch finds a place. Use device=cpu.")
    return value


SAMPLERS = ("ddim", "ddpm", "pndm", "dpmsolver++", "dpmsolver++2s", "sde-dpmsolver++", "euler", "heun", "ddm", "unipc",
            "flow-euler")  # fmt: skip
"""Those of `modiff.generate.samplers`, which takes seconds to import."""
MODEL_HELP = f"{', '.join(map(repr, packaged()))} (of the package), a local diffusers folder, or a hub id."
CONFIG_HELP = (
    "A preset (w8a8, w8a4, ...), a family with weight and activation bits (modulated:8:4, plain:8:4, tuned:32:4), "
    "or a JSON file of ModiffConfig.to_json()."
)
PROMPTS_HELP = "A text file with a prompt in each line: image i is drawn of line i modulo their number."
LABELS_HELP = "Classes such as 0-9 or 3,5,8: image i is drawn of number i modulo how many they are."
SCHEDULER_HELP = f"{', '.join(SAMPLERS[:-1])} or {SAMPLERS[-1]}; the model's own when left out."

Model = Annotated[str, typer.Argument(help=MODEL_HELP, callback=known)]
Config = Annotated[str, typer.Option("--config", help=CONFIG_HELP)]
MaybeConfig = Annotated[str | None, typer.Option("--config", help=f"{CONFIG_HELP} Full precision when left out.")]
Steps = Annotated[int, typer.Option("--steps", help="Denoising steps.")]
NumImages = Annotated[int, typer.Option("-n", "--num-images", help="How many images.")]
Scheduler = Annotated[str | None, typer.Option("--scheduler", callback=known, help=SCHEDULER_HELP)]
Seed = Annotated[int, typer.Option("--seed", help="Image i comes from the noise of seed + i.")]
Prompt = Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="For models that take text.")]
Label = Annotated[int | None, typer.Option("--label", metavar="N", help="For class-conditional models.")]
Prompts = Annotated[Path | None, typer.Option("--prompts", metavar="FILE", help=PROMPTS_HELP)]
Labels = Annotated[str | None, typer.Option("--labels", metavar="N-M,...", help=LABELS_HELP)]
DEVICE_HELP = "cpu, or cuda or cuda:N where there is a GPU."
Device = Annotated[str, typer.Option("--device", callback=known, help=DEVICE_HELP)]
FOLDER_HELP = "Folder of the results; run again, the command goes on where it stopped."
Folder = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", callback=folder_path, help=FOLDER_HELP)]
Quiet = Annotated[bool, typer.Option("--quiet", callback=hush, help="No bars and no remarks: results and errors only.")]
JSON_HELP = "Where the results go; - is standard output, and text for people then goes to standard error."
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", callback=json_path, help=JSON_HELP)]


def say(text: object, json_file: Path | None) -> None:
    """Print text for people: to standard error where standard output is for JSON."""
    typer.echo(text, err=json_file == STDOUT)


def write_results(json_file: Path | None, values: dict[str, Any]) -> None:
    """Write what --json asks for."""
    if json_file == STDOUT:
        typer.echo(json.dumps(values, indent=2, allow_nan=False))
    elif json_file is not None:
        write_json(json_file, values)


def conditions_of(
    *, prompt: str | None = None, label: int | None = None, prompts: Path | None = None, labels: str | None = None
) -> Conditions:
    """What the images are drawn of, from the options of these names. Raises: ConfigError for one and several."""
    for option, one, several in (("prompt", prompt, prompts), ("label", label, labels)):
        why = f"An image is drawn of one. Leave `{option}` out."
        check(f"{option}s", one, one is None or several is None, f"no `{option}` with it", why)
    texts = read_prompts(prompts) if prompts is not None else () if prompt is None else (prompt,)
    classes = parse_labels(labels) if labels is not None else () if label is None else (label,)
    return Conditions(prompts=texts, labels=classes)


def quiet() -> None:
    """Turn the bars and remarks of diffusers and transformers off: commands show one bar and one-line errors."""
    import diffusers  # imported late: `modiff --help` must not wait for it
    import huggingface_hub.utils as hub

    libraries = [diffusers, importlib.import_module("transformers")] if find_spec("transformers") else [diffusers]
    for library in libraries:
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity(logging.CRITICAL)  # what they log as an error they raise as well
    if sys.stderr.isatty() and not Bar.quiet:  # downloads take long
        hub.enable_progress_bars()


def quiet_pipeline(model: str, device: str, scheduler: str | None = None) -> DiffusionPipeline:
    """Load a pipeline without the bars and remarks of diffusers; convolutions of this process round to no TF32."""
    import torch

    from modiff.generate.samplers import set_scheduler
    from modiff.hosts.diffusers.load import load_pipeline

    quiet()
    torch.backends.cudnn.allow_tf32 = False  # full precision is what everything is compared with
    pipe = load_pipeline(model, device=device)
    return pipe if scheduler is None else set_scheduler(pipe, scheduler)


def plain_pipeline(model: str, device: str, scheduler: str | None = None) -> DiffusionPipeline:
    """As `quiet_pipeline`. Raises: ConfigError for a model that modiff has quantized."""
    from modiff.hosts.diffusers.host import denoisers
    from modiff.model.attach import attachment_of

    pipe = quiet_pipeline(model, device, scheduler)
    plain = all(attachment_of(network) is None for network in denoisers(pipe).values())
    check("model", model, plain, "one in full precision", "modiff has quantized it. Give what it was made from.")
    return pipe


def save(pipe: DiffusionPipeline, folder: Path) -> None:
    """A folder that samples as `pipe` does: 8-bit codes stand in for the exact weights of its anchors."""
    from modiff import api

    exact = any(entry.anchor.startswith("exact") for entry in api.report(pipe).taken)
    api.save(pipe, folder, anchor_weights="int8" if exact else "quantized")
