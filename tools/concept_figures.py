"""Which pictures explain the method? Draws those of docs/concepts on the embedded model: a minute or two on one core.

python tools/concept_figures.py             # into docs/figures
python tools/concept_figures.py --steps 4 --folder figures
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMPipeline
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import modiff
from modiff.assets import embedded_folder
from modiff.model.observe import observe

BLUE, ORANGE, GREY = "#2166ac", "#d6604d", "#777777"
BITS = (8, 7, 6, 5, 4, 3, 2)


def draw(path: Path, title: str, plot: Callable[[Axes], None]) -> None:
    """One chart; its words go around it, so that `plot` draws data alone."""
    figure = Figure(figsize=(6.4, 3.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    plot(axes)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def images(pipe: DDIMPipeline, steps: int) -> Tensor:
    """Four images from the same noise at each call, in [0, 1]."""
    noise = [torch.Generator().manual_seed(seed) for seed in range(4)]
    made = pipe(batch_size=4, num_inference_steps=steps, generator=noise, output_type="np", return_dict=False)[0]
    return torch.as_tensor(made)


def ranges(pipe: DDIMPipeline, steps: int) -> tuple[Tensor, Tensor]:
    """Largest |input| of each layer at each step, and largest |change| since the step before: (layers, steps - 1)."""
    last: dict[str, Tensor] = {}
    largest: dict[str, list[float]] = {}
    changes: dict[str, list[float]] = {}

    def see(name: str, _: object, inputs: tuple[Tensor, ...], _output: object) -> None:
        x = inputs[0].detach()
        if name in last:
            largest.setdefault(name, []).append(float(x.abs().amax()))
            changes.setdefault(name, []).append(float((x - last[name]).abs().amax()))
        last[name] = x.clone()

    names = [entry.name for entry in modiff.select(pipe, "w8a8").taken]
    with observe(pipe.unet, see, layers=names):
        images(pipe, steps)
    return torch.tensor(list(largest.values())), torch.tensor(list(changes.values()))


def draw_change(axes: Axes, values: Tensor, changes: Tensor) -> None:
    """The middle half of the layers and their median, by step."""
    steps = torch.arange(2, values.shape[1] + 2)
    for data, color, label in ((values, BLUE, "the input itself"), (changes, ORANGE, "its change since the last step")):
        low, middle, high = torch.quantile(data, torch.tensor([0.25, 0.5, 0.75]), dim=0)
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(steps, middle, color=color, label=label)
    axes.set(xlabel="denoising step", ylabel="largest magnitude", yscale="log")


def sent(values: Tensor, scale: float, *, compensated: bool) -> Tensor:
    """What is known of a number after each step, if its changes are rounded to multiples of `scale`."""
    state, states = values[0], [values[0]]
    for before, now in itertools.pairwise(values):
        change = now - (state if compensated else before)
        state = state + scale * torch.round(change / scale)
        states.append(state)
    return torch.stack(states)


def draw_loop(axes: Axes, steps: int) -> None:
    """One number that moves slowly, and its two states."""
    time = torch.linspace(0, 1, steps)
    values = torch.sin(3 * time) + 0.4 * time
    axes.plot(values, color=GREY, linewidth=3, alpha=0.5, label="the value")
    axes.step(range(steps), sent(values, 0.12, compensated=True), where="post", color=BLUE,
              label="rounding errors are sent later (modiff)")  # fmt: skip
    axes.step(range(steps), sent(values, 0.12, compensated=False), where="post", color=ORANGE,
              label="rounding errors are forgotten")  # fmt: skip
    axes.set(xlabel="denoising step", ylabel="value")


def draw_bits(axes: Axes, pipe: DDIMPipeline, steps: int) -> None:
    """Error of the images by bits of activations or of their changes."""
    exact = images(pipe, steps)
    for family, color in (("plain", ORANGE), ("modulated", BLUE)):
        errors = []
        for bits in BITS:
            modiff.apply(pipe, f"{family}:8:{bits}")
            errors.append(float((images(pipe, steps) - exact).norm() / exact.norm()))
            modiff.remove(pipe)
        label = "the input is quantized (plain)" if family == "plain" else "its change is quantized (modulated)"
        axes.plot(BITS, errors, "o-", color=color, label=label)
        print(family, dict(zip(BITS, (round(e, 4) for e in errors), strict=True)))
    axes.set(xlabel="bits of activations, 8-bit weights", ylabel="relative L2 of the images", yscale="log")
    axes.invert_xaxis()


def main() -> None:
    """Draw all three, and print what their captions say."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "docs" / "figures")
    options = parser.parse_args()
    pipe = DDIMPipeline.from_pretrained(embedded_folder())
    pipe.set_progress_bar_config(disable=True)
    values, changes = ranges(pipe, options.steps)
    print("input / change, median over layers and steps:", round(float((values / changes).median()), 1))
    draw(options.folder / "concept-change.png", "Inputs of layers change little from step to step",
         lambda axes: draw_change(axes, values, changes))  # fmt: skip
    draw(options.folder / "concept-loop.png", "Changes rounded to coarse steps, with and without compensation",
         lambda axes: draw_loop(axes, options.steps))  # fmt: skip
    draw(options.folder / "concept-bits.png", "The same bits spent on the change go further",
         lambda axes: draw_bits(axes, pipe, options.steps))  # fmt: skip


if __name__ == "__main__":
    main()
