"""Train a small unconditional DDPM U-Net on any array of images, and save it as a diffusers pipeline folder.

    python training/train_reference.py --images train_images.npy -o runs/fashion --minutes 60

Images are one `.npy` array (N, H, W) or (N, H, W, C) of uint8. They are padded with black to `--size`. The run writes
`OUT/checkpoint.pt` every few minutes and goes on from there when it is started again with the same `-o`;
`OUT/pipeline` is a diffusers folder (fp16 safetensors) of the averaged weights (EMA), rewritten at every checkpoint.
`kill` (and `timeout 9m`) saves before it ends. Where only OUT/pipeline is left of a run, `--start-from` it goes on with
the averaged weights and a fresh optimizer.
"""

import argparse
import contextlib
import json
import pickle
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = "diffusion_pytorch_model.safetensors"
CALL_OPTIONS = ("minutes", "weighting", "batch", "learning_rate", "warmup", "anneal", "ema")
BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
FIXED_OPTIONS = ("schedule", "flip", "drop", "seed")


@dataclass
class Progress:
    """Where a run stands: what a restart needs to go on, and what the model card reports."""

    step: int = 0
    images_seen: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    calls: list[dict[str, float | str]] = field(default_factory=list)
    """The options of each call with other ones than the call before, and the images seen when it began."""


@dataclass(frozen=True)
class Task:
    """What is trained.

    model: sees images (N, C, H, W) uint8. further: its other inputs, for the indices of a batch.
    write: puts a finished model, in float16, into a folder. part: the folder of its weights in there.
    loss: of the model and a batch in [-1, 1]; the noise that it predicts, as `loss_of_batch` has it, when None.
    """

    model: Any
    images: Tensor
    write: Callable[[Any, DDIMScheduler, Path], object]
    part: str
    further: Callable[[Tensor], dict[str, Tensor]] = lambda picked: {}
    loss: Callable[[Callable[..., Any], Tensor], Tensor] | None = None


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the values that trained the embedded checkpoint as defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_architecture(parser)
    add_arguments(parser, batch=64, learning_rate=4e-4)
    add_weighting(parser)
    return parser.parse_args(arguments)


def add_architecture(parser: argparse.ArgumentParser) -> None:
    """The options of a U-Net."""
    parser.add_argument("--channels", default="32,64,128", help="channels per resolution level")
    parser.add_argument("--layers", type=int, default=1, help="residual blocks a level")
    parser.add_argument("--attention", default="8", help="resolutions that get self-attention, comma-separated")


def add_arguments(parser: argparse.ArgumentParser, *, batch: int, learning_rate: float) -> None:
    """The options that do not depend on what is trained."""
    parser.add_argument("--images", type=Path, required=True, help="(N, H, W[, C]) uint8 .npy file")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for checkpoint.pt and pipeline/")
    parser.add_argument("--start-from", type=Path, metavar="PIPELINE", help="weights of a run without a checkpoint.pt")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this much training time in all runs")
    parser.add_argument("--size", type=int, default=32, help="images are padded to SIZE x SIZE")
    parser.add_argument("--schedule", choices=BETAS, default="linear")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--warmup", type=int, default=300, help="steps of linear learning-rate warm-up")
    parser.add_argument("--anneal", type=float, default=0.25, help="last share of the time with the rate going to 0")
    parser.add_argument("--ema", type=float, default=0.9995)
    parser.add_argument("--flip", action="store_true", help="random horizontal flips")
    parser.add_argument("--compile", action="store_true", help="compiling does not count as training time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=240.0, help="seconds between checkpoints")


def add_weighting(parser: argparse.ArgumentParser) -> None:
    """The option of a model that predicts noise alone."""
    parser.add_argument(
        "--weighting", choices=["uniform", "min-snr"], default="uniform", help="loss weight per timestep"
    )


def load_array(path: Path, content: str) -> np.ndarray:
    """The array of an .npy file, or one line that says what `path` should hold."""
    try:
        with path.open("rb") as file:
            array = np.load(file)
    except (OSError, ValueError, EOFError) as error:
        raise SystemExit(f"{path}: expected {content}, got {type(error).__name__}: {error}.") from error
    if not isinstance(array, np.ndarray):
        raise SystemExit(f"{path}: expected {content}, got an archive of several arrays. Give one of them as .npy.")
    return array


def load_images(path: Path, size: int) -> Tensor:
    """(N, C, size, size) uint8, padded with black on all sides."""
    images = load_array(path, "an .npy array of images")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not len(images):
        described = f"{images.shape} {images.dtype}"
        raise SystemExit(f"{path}: expected (N, H, W) or (N, H, W, C) uint8 with N > 0, got {described}.")
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    rows, columns = size - images.shape[2], size - images.shape[3]
    if rows < 0 or columns < 0:
        raise SystemExit(f"{path}: images of {images.shape[2:]} do not fit --size {size}. Give a larger --size.")
    pads = ((0, 0), (0, 0), (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2))
    return torch.from_numpy(np.pad(images, pads))


def build_model(options: argparse.Namespace, image_channels: int, out_channels: int | None = None) -> UNet2DModel:
    """The DDPM U-Net with self-attention at the resolutions asked for and in the middle."""
    channels = [int(c) for c in options.channels.split(",")]
    if any(c < 16 or c % 16 for c in channels):
        raise SystemExit(f"--channels {options.channels}: expected multiples of 16. Each norm has 16 groups.")
    attention = {int(r) for r in options.attention.split(",") if r}
    with_attention = [options.size // 2**level in attention for level in range(len(channels))]
    return UNet2DModel(
        sample_size=options.size,
        in_channels=image_channels,
        out_channels=out_channels or image_channels,
        layers_per_block=options.layers,
        block_out_channels=channels,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in with_attention],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(with_attention)],
        attention_head_dim=min(32, *channels),
        norm_num_groups=16,
    )


def build_scheduler(schedule: str) -> DDIMScheduler:
    """1000 training steps; the beta schedule is "linear" (DDPM) or "cosine" (improved DDPM)."""
    return DDIMScheduler(
        num_train_timesteps=1000, beta_schedule=BETAS[schedule], clip_sample=True, timestep_spacing="leading"
    )


def timestep_weights(scheduler: DDIMScheduler, weighting: str) -> Tensor:
    """(T,): 1, or min(SNR, 5) / SNR with SNR = abar / (1 - abar): shapes are learnt sooner (Hang et al., ICCV 2023)."""
    ratio = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    return {"uniform": torch.ones_like(ratio), "min-snr": ratio.clamp(max=5) / ratio}[weighting]


def write_unet(model: UNet2DModel, scheduler: DDIMScheduler, folder: Path) -> None:
    """A DDIM pipeline of diffusers."""
    DDIMPipeline(unet=model, scheduler=scheduler).save_pretrained(folder)


def loss_of_batch(
    model: Callable[..., Any],
    scheduler: DDIMScheduler,
    weights: Tensor,
    batch: Tensor,
    further: dict[str, Tensor] | None = None,
) -> Tensor:
    """Mean over the batch of w_t ||eps - eps_theta(x_t, t)||^2 / pixels, at uniform t; further: inputs of the model."""
    noise = torch.randn_like(batch)
    steps = torch.randint(0, len(weights), (batch.shape[0],), device=batch.device)
    prediction = model(scheduler.add_noise(batch, noise, steps), steps, **(further or {}), return_dict=False)[0]
    errors = (prediction.float() - noise).square().flatten(1).mean(1)
    return (weights[steps] * errors).mean()


def has_fast_bfloat16(device: torch.device) -> bool:
    """CUDA, or a CPU with AMX tiles: elsewhere bfloat16 convolutions run 10 to 80 times slower than float32."""
    return device.type != "cpu" or bool(torch.cpu.get_capabilities().get("amx_bf16"))


def rate_factor(progress: Progress, options: argparse.Namespace) -> float:
    """Linear warm-up over steps, constant, then linear to zero over the last share of the time."""
    left = max(0.0, 1 - progress.seconds / (60 * options.minutes))
    return min(1.0, (progress.step + 1) / options.warmup, left / options.anneal + 1e-3)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """EMA with a decay that grows with the step, so that the start is forgotten soon."""
    decay = min(decay, (1 + step) / (10 + step))
    mine, theirs = list(average.parameters()), list(model.parameters())
    torch._foreach_lerp_(mine, theirs, 1 - decay)


def save(output: Path, task: Task, average: Any, optimizer: torch.optim.Optimizer, scheduler: DDIMScheduler,
         progress: Progress, options: argparse.Namespace) -> None:  # fmt: skip
    """Checkpoint (atomically replaced) and the diffusers folder of the averaged weights."""
    state = {
        "model": task.model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": vars(progress),
        "random": torch.get_rng_state(),
        "random_of_gpus": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "fixed": fixed(task, options),
    }
    torch.save(state, output / "checkpoint.tmp")
    (output / "checkpoint.tmp").replace(output / "checkpoint.pt")
    half = type(average).from_config(average.config)
    half.load_state_dict(average.state_dict())
    task.write(half.half(), scheduler, output / "pipeline")
    card = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    card |= {"step": progress.step, "images_seen": progress.images_seen}
    card |= {"calls": progress.calls, "training_seconds": round(progress.seconds)}
    card |= {"parameters": sum(p.numel() for p in average.parameters()), "losses": progress.losses[-50:]}
    card |= {name: value.name for name, value in vars(options).items() if isinstance(value, Path)}
    (output / "training.json").write_text(json.dumps(card, indent=1))


def start_from(folder: Path, task: Task) -> Progress:
    """Take the weights of a pipeline folder, and the counts of the training.json next to it."""
    path = folder / task.part / WEIGHTS
    try:
        task.model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
        record = json.loads((folder.parent / "training.json").read_text())
        return Progress(
            step=record["step"], images_seen=record["images_seen"], seconds=float(record["training_seconds"]),
            losses=record["losses"], calls=record["calls"],
        )  # fmt: skip
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SystemExit(
            f"--start-from {folder}: expected a pipeline folder of this model next to its training.json, got: {reason} "
            "The architecture differs, or a file is missing. Give the pipeline folder of a run."
        ) from error


def fixed(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """What must stay from call to call: one model is trained on one noise schedule and one set of images."""
    settings = {name: getattr(options, name) for name in FIXED_OPTIONS if hasattr(options, name)}
    return settings | {"images": list(task.images.shape)}


def resume(
    output: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, present: dict[str, Any]
) -> Progress | None:
    """The state of `checkpoint.pt` if there is one."""
    if not (output / "checkpoint.pt").exists():
        return None
    try:
        state = torch.load(output / "checkpoint.pt", map_location="cpu", weights_only=True)
        other = [name for name, value in present.items() if state["fixed"].get(name) != value]
        if other:
            raise ValueError(f"one with another {' and '.join(other)}.")
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available() and state["random_of_gpus"]:
            torch.cuda.set_rng_state_all(state["random_of_gpus"])
        return Progress(**state["progress"])
    except (RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SystemExit(
            f"{output / 'checkpoint.pt'}: expected a checkpoint of this model, got: {reason} The file is damaged or "
            "from a run with other options. Give the options of that run, or another folder with -o."
        ) from error


def note_call(progress: Progress, options: argparse.Namespace) -> None:
    """Keep how this call trains, unless the last one did the same: a model trained in stages says so."""
    present = {name: getattr(options, name) for name in CALL_OPTIONS}
    if not progress.calls or {name: progress.calls[-1].get(name) for name in CALL_OPTIONS} != present:
        progress.calls.append({**present, "from_image": progress.images_seen})


def prepare(batch: Tensor, options: argparse.Namespace) -> Tensor:
    """uint8 -> [-1, 1] float32 on the device, flipped at random if asked for."""
    batch = batch.to(options.device, non_blocking=True).float() / 127.5 - 1
    if options.flip:
        batch = torch.where(torch.rand(batch.shape[0], 1, 1, 1, device=batch.device) < 0.5, batch.flip(3), batch)
    return batch.contiguous(memory_format=torch.channels_last)


def train(options: argparse.Namespace) -> None:
    """An unconditional U-Net."""
    torch.manual_seed(options.seed)
    images = load_images(options.images, options.size)
    fit(Task(build_model(options, images.shape[1]), images, write_unet, "unet"), options)


def compiled(task: Task, loss: Callable[[Tensor], Tensor], batch: int) -> None:
    """Compile forward and backward before the clock runs; no weight and no random number is spent on it."""
    with torch.random.fork_rng():
        loss(torch.arange(batch) % len(task.images)).backward()
    task.model.zero_grad(set_to_none=True)


def report(progress: Progress, loss: Tensor, since: tuple[float, int], options: argparse.Namespace) -> None:
    """Note the loss, and print a line."""
    progress.losses.append(round(loss.item(), 5))
    rate = (progress.images_seen - since[1]) / (time.time() - since[0])
    print(
        f"step {progress.step}  images {progress.images_seen}  loss {progress.losses[-1]:.4f}  "
        f"{rate:.0f} images/s  {progress.seconds / 60:.1f} of {options.minutes:.0f} min",
        flush=True,
    )


def fit(task: Task, options: argparse.Namespace) -> None:
    """The loop: one optimizer step a batch until the time is used up; Ctrl-C and `kill` save first."""
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    scheduler, device = build_scheduler(options.schedule), torch.device(options.device)
    fresh = options.start_from is None or (options.output / "checkpoint.pt").exists()
    begun = Progress() if fresh else start_from(options.start_from, task)
    model = task.model.to(device, memory_format=torch.channels_last)
    average = type(model).from_config(model.config).to(device, memory_format=torch.channels_last)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.99))
    progress = resume(options.output, model, average, optimizer, fixed(task, options)) or begun
    note_call(progress, options)
    forward = torch.compile(model) if options.compile else model
    weights = timestep_weights(scheduler, options.weighting).to(device)

    def loss_of(picked: Tensor) -> Tensor:
        batch = prepare(task.images[picked], options)
        further = {name: value.to(device) for name, value in task.further(picked).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bfloat16(device)):
            if task.loss is not None:
                return task.loss(forward, batch)
            return loss_of_batch(forward, scheduler, weights, batch, further)

    if options.compile:
        compiled(task, loss_of, options.batch)
    saved, since = time.time(), (time.time(), progress.images_seen)
    with contextlib.suppress(KeyboardInterrupt):
        while progress.seconds < 60 * options.minutes:
            started = time.time()
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * rate_factor(progress, options)
            loss = loss_of(torch.randint(len(task.images), (options.batch,)))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            update_average(average, model, options.ema, progress.step)
            progress.step += 1
            progress.images_seen += options.batch
            progress.seconds += time.time() - started
            if progress.step % 50 == 0:
                report(progress, loss, since, options)
                since = (time.time(), progress.images_seen)
            if time.time() - saved > options.save_every:
                save(options.output, task, average, optimizer, scheduler, progress, options)
                saved = time.time()
    save(options.output, task, average, optimizer, scheduler, progress, options)
    print(f"saved {options.output / 'pipeline'}: {progress.images_seen} images seen")


if __name__ == "__main__":
    for stop in (signal.SIGINT, signal.SIGTERM):  # a shell that starts jobs in the background ignores Ctrl-C for them
        signal.signal(stop, signal.default_int_handler)
    train(parse_arguments())
