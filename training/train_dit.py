"""Train a class-conditional diffusion transformer (DiT) on pixels, with guidance by a class of its own for "none".

    python training/train_dit.py --images train_images.npy --labels train_labels.npy -o runs/dit --flip --compile

Images and runs are as in train_reference.py; labels are (N,) integers from 0. `OUT/pipeline` holds `transformer` and
`scheduler` in diffusers' format: `load_model(OUT/pipeline/transformer)` of modiff.hosts.diffusers.load loads it, and
training/sample_dit.py draws from it. There is no model_index.json: diffusers' DiTPipeline wants an autoencoder, and has
class 1000 stand for "none", so no pipeline of diffusers draws pixels of ten classes.
"""

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor, nn
from train_classifier import load_labels
from train_reference import Task, add_arguments, add_weighting, fit, load_images

PART = "transformer"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with DiT-S/2's size as default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, required=True, help="(N,) integer .npy file")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--depth", type=int, default=12, help="blocks")
    parser.add_argument("--patch", type=int, default=2, help="pixels a side of a token")
    parser.add_argument("--drop", type=float, default=0.1, help="share of the labels that training hides")
    add_arguments(parser, batch=256, learning_rate=3e-4)
    add_weighting(parser)
    return parser.parse_args(arguments)


def build_model(options: argparse.Namespace, image_channels: int, classes: int) -> DiTTransformer2DModel:
    """The transformer, with one class more than there are: the last stands for "none"."""
    if options.width % options.heads or options.size % options.patch:
        raise SystemExit(
            f"--width {options.width}, --size {options.size}: expected multiples of --heads {options.heads} and of "
            f"--patch {options.patch}. Heads and patches divide them evenly."
        )
    model = DiTTransformer2DModel(
        num_attention_heads=options.heads,
        attention_head_dim=options.width // options.heads,
        in_channels=image_channels,
        out_channels=image_channels,
        num_layers=options.depth,
        sample_size=options.size,
        patch_size=options.patch,
        num_embeds_ada_norm=classes,
        norm_type="ada_norm_zero",
    )
    for block in model.transformer_blocks:
        # Every block has a label embedding, and would hide labels by a coin of its own: the network as a whole would
        # never see an image without its class. `hidden` throws one coin for all.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    initialize(model)
    return model


def initialize(model: DiTTransformer2DModel) -> None:
    """As DiT starts (Peebles and Xie, ICCV 2023): every block is the identity, the output is zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.pos_embed.proj.weight.data.flatten(1))
    nn.init.zeros_(model.pos_embed.proj.bias)
    for block in model.transformer_blocks:
        embedder = block.norm1.emb
        for weight in (
            embedder.timestep_embedder.linear_1.weight,
            embedder.timestep_embedder.linear_2.weight,
            embedder.class_embedder.embedding_table.weight,
        ):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)


def hidden(labels: Tensor, share: float, none: int) -> Tensor:
    """Labels with a share of them, drawn at random, replaced by the class for "none"."""
    return torch.where(torch.rand(len(labels)) < share, none, labels)


def write_dit(model: DiTTransformer2DModel, scheduler: DDIMScheduler, folder: Path) -> None:
    """Network and scheduler, each in a folder of diffusers."""
    model.save_pretrained(folder / PART)
    scheduler.save_pretrained(folder / "scheduler")


def train(options: argparse.Namespace) -> None:
    """A class-conditional transformer."""
    torch.manual_seed(options.seed)
    images = load_images(options.images, options.size)
    labels = load_labels(options.labels, images)
    classes = int(labels.max()) + 1
    model = build_model(options, images.shape[1], classes)

    def further(picked: Tensor) -> dict[str, Tensor]:
        return {"class_labels": hidden(labels[picked], options.drop, classes)}

    fit(Task(model, images, write_dit, PART, further), options)


if __name__ == "__main__":
    for stop in (signal.SIGINT, signal.SIGTERM):  # a shell that starts jobs in the background ignores Ctrl-C for them
        signal.signal(stop, signal.default_int_handler)
    train(parse_arguments())
