"""The picture of docs/index.md, and the figures of docs/benchmarks.md from the rows of bench/results.

python tools/docs_figures.py
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import modiff
from modiff.assets import embedded_folder
from modiff.generate.samplers import set_scheduler
from modiff.hosts.diffusers.load import load_pipeline

ROOT = Path(__file__).parents[1]
RESULTS, FIGURES = ROOT / "bench" / "results", ROOT / "docs" / "figures"
LOOP = ("embedded", "avx512_vnni", "bd2b297")
"""Model, instructions and commit of the loops that are drawn."""
NAMES = {
    "fewer-steps-2": "half of the steps, bfloat16",
    "deepcache-2": "DeepCache, bfloat16",
    "bf16-compiled": "compiled bfloat16",
    "torchao-int8": "torchao int8",
    "modulated-w8a8": "modulated W8A8",
    "modulated-w8a4": "modulated W8A4",
    "plain-w8a8": "plain W8A8",
    "accelerate": "accelerate",
}
LABELS = {
    "bf16-compiled": (8, -12, "left"), "torchao-int8": (-6, -15, "right"), "modulated-w8a8": (9, 0, "left"),
    "accelerate": (8, -3, "left"), "modulated-w8a4": (-8, -3, "right"), "plain-w8a8": (8, -3, "left"),
}  # fmt: skip
"""Offset and alignment of labels that would lie on each other."""


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of a file of bench/results."""
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def speed_and_error(loops: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """(times as fast as compiled float32, relative L2) of each variant of `NAMES`."""
    of = {row["variant"]: row for row in loops if (row["model"], row["isa"], row["commit"]) == LOOP}
    base = of["fp32-compiled"]["seconds_min"]
    return {name: (base / of[name]["seconds_min"], of[name]["relative_l2"]) for name in NAMES}


def products(runs: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """(W8A8, W8A4) times as fast as float32 of each layer, AVX2, one thread, fastest rounds."""
    (run,) = (run for run in runs if (run["threads"], run["isa"]) == (1, "avx2"))
    layers = {name: {kind: min(times) for kind, times in kinds.items()} for name, kinds in run["seconds"].items()}
    return {n: tuple(t["float32"] / t[f"native {kind}"] for kind in ("W8A8", "W8A4")) for n, t in layers.items()}


def _save(figure: Figure, name: str) -> None:
    figure.savefig(FIGURES / name, format="png", dpi=130)
    print(FIGURES / name)


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(True, alpha=0.25)
    axes.axvline(1, color="gray", linestyle="--", linewidth=1, zorder=3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def unbeaten(points: dict[str, tuple[float, float]]) -> list[tuple[float, float]]:
    """The (speed, error) pairs that no other beats in both, compiled float32 (1, 0) among them, slowest first."""
    pairs = [(1.0, 0.0), *points.values()]
    beaten = {p for p in pairs for q in pairs if q != p and q[0] >= p[0] and q[1] <= p[1]}
    return sorted(set(pairs) - beaten)


def draw_loops(points: dict[str, tuple[float, float]]) -> Figure:
    """Error against speed of whole loops."""
    figure, axes = _axes(7, 4)
    axes.plot(*zip(*unbeaten(points), strict=True), color="gray", linewidth=1, zorder=1)
    for name, (speed, error) in points.items():
        ours = name.startswith(("modulated", "plain", "accelerate"))
        axes.plot(speed, error, "o", color="tab:blue" if ours else "tab:orange")
        x, y, side = LABELS.get(name, (7, 4, "left"))
        axes.annotate(NAMES[name], (speed, error), (x, y), textcoords="offset points", ha=side, fontsize=9)
    axes.set(xlim=(0.6, 4.4), ylim=(-0.002, 0.066), ylabel="relative L2 to full precision")
    axes.set_xlabel("times as fast as compiled float32 (dashed, no error); line: what nothing beats in both")
    return figure


def draw_products(speeds: dict[str, tuple[float, float]]) -> Figure:
    """Speed of the products of layers, at two widths of the residual."""
    figure, axes = _axes(7, 4.6)
    for offset, index, name, color in ((-0.2, 1, "W8A4", "tab:blue"), (0.2, 0, "W8A8", "tab:cyan")):
        places = [place + offset for place in range(len(speeds))]
        axes.barh(places, [pair[index] for pair in speeds.values()], 0.38, label=name, color=color, zorder=2)
    axes.set_yticks(range(len(speeds)), list(speeds), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as oneDNN's float32 (dashed), processor limited to AVX2")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return figure


def images(count: int, steps: int) -> dict[str, np.ndarray]:
    """Images of the embedded model from the same noise: (count, height, width) each, in [0, 1]."""
    pipe = set_scheduler(load_pipeline(embedded_folder()), "ddim")

    def sample(evaluations: int = steps) -> np.ndarray:
        noise = [torch.Generator().manual_seed(i) for i in range(count)]
        made = pipe(batch_size=count, generator=noise, num_inference_steps=evaluations, output_type="np").images
        return made[..., 0]

    rows = {"full precision": sample(), "half of the steps": sample(steps // 2)}
    for name, config in (("4 bits, plain", "plain:8:4"), ("4 bits, modiff", "modulated:8:4")):
        modiff.apply(pipe, config)
        rows[name] = sample()
        modiff.remove(pipe)
    return rows


def draw_images(rows: dict[str, np.ndarray]) -> Figure:
    """A row of images for each setting, with its relative L2 to the first."""
    first = next(iter(rows.values()))
    figure = Figure(figsize=(7, 0.78 * len(rows)))
    FigureCanvasAgg(figure)
    places = figure.subplots(len(rows), 1, gridspec_kw={"hspace": 0.04, "left": 0.2, "right": 1, "top": 1, "bottom": 0})
    for axes, (name, made) in zip(places, rows.items(), strict=True):
        axes.imshow(
            np.concatenate(list(made), axis=1), cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto"
        )
        axes.set_axis_off()
        error = np.linalg.norm(made - first) / np.linalg.norm(first)
        label = name if made is first else f"{name}\nrelative L2 {error:.3f}"
        axes.text(-0.015, 0.5, label, transform=axes.transAxes, ha="right", va="center", fontsize=9)
    return figure


if __name__ == "__main__":
    _save(draw_images(images(count=8, steps=50)), "same-noise.png")
    _save(draw_loops(speed_and_error(rows("loop.jsonl"))), "loop-vnni.png")
    _save(draw_products(products(rows("products.jsonl"))), "products-avx2.png")
