"""Table 6: memory, with both states counted."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from experiments.charts import Line, line_chart
from experiments.configs import in_dtype, looped
from experiments.experiment import Experiment, Shown, Values, printed_table
from experiments.lab import Lab
from experiments.runs import Run
from experiments.tables import listing
from experiments.words import find
from modiff import presets
from modiff.api import apply, remove
from modiff.config import ModiffConfig
from modiff.evaluate.cost import ModelCost
from modiff.evaluate.report.document import Figure
from modiff.hosts.diffusers.host import denoisers
from modiff.model.attach import required_attachment

BATCHES = (1, 2, 4, 8)
BITS = 4
STEPS = 3
"""The linear predictor has all it keeps from the third evaluation on."""
MIB = 2**20


def measure(lab: Lab) -> Values:
    """Measured bytes of both states at each batch size; weights, and the paper's way of counting, by arithmetic."""
    base = presets.published(8, BITS)
    variants = {
        "hold, float32": base,
        "hold, float16": in_dtype(base, "float16"),
        "linear, float32": looped(base, predictor="linear", gain=0.8),
    }
    rows: list[dict[str, Any]] = []
    taken: set[str] = set()
    with lab.sampling(Run(steps=STEPS)) as pipe, lab.bar(0):
        for name, config in variants.items():
            for batch in BATCHES:
                inputs, outputs, taken = _states(lab, pipe, config, batch)
                rows.append({"states": name, "batch": batch, "input": inputs / MIB, "output": outputs / MIB})
    layers = ModelCost(tuple(layer for layer in lab.cost.layers if layer.name in taken))
    printed = [
        {"bits": bits, "batch": batch, "state": sum(x.output_elements for x in layers.layers) * batch * bits / 8 / MIB}
        for bits in (2, 4, 8)
        for batch in BATCHES
    ]
    weights = lab.cost.weight_bytes(lambda name: 8 if name in taken else None) / MIB
    return {
        "rows": rows,
        "printed": printed,
        "weights": weights,
        "float_weights": lab.cost.weight_bytes(lambda _: None) / MIB,
    }


def _states(lab: Lab, pipe: DiffusionPipeline, config: ModiffConfig, batch: int) -> tuple[int, int, set[str]]:
    """Bytes of the input states and of the output states at the end of a short trajectory, and the layers' names."""
    held = (0, 0)
    report = apply(pipe, config)
    (model,) = denoisers(pipe).values()

    def look(*_: object) -> None:
        nonlocal held
        held = state_sides(model)

    handle = model.register_forward_hook(look)
    try:
        lab.sample(pipe, range(batch), STEPS)
    finally:
        handle.remove()
        remove(pipe)
    return *held, {entry.name for entry in report.taken}


def state_sides(model: nn.Module) -> tuple[int, int]:
    """Bytes of all input states and of all output states now; what layers share counts once."""
    quantized_layers = required_attachment(model, "state_sides").layers.values()
    inputs = [t for quantized in quantized_layers for m in quantized.loop.memories.values() for t in m.input.tensors()]
    both = [t for quantized in quantized_layers for t in quantized.loop.tensors()]
    return _bytes(list(inputs)), _bytes(list(both)) - _bytes(list(inputs))


def _bytes(tensors: list[Tensor | None]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def show(values: Values) -> Shown:
    """Both states, and what counting as the paper does would give."""
    weights = values["weights"]
    rows = [
        {**row, "both": row["input"] + row["output"], "total": weights + row["input"] + row["output"]}
        for row in values["rows"]
    ]
    table = listing(
        "study-memory",
        f"MiB, measured in a trajectory at W8A{BITS}; total is with the 8-bit weights.",
        rows,
        [
            ("states", "states", ""),
            ("batch", "batch", "d"),
            ("input", "input states", ".2f"),
            ("output", "output states", ".2f"),
            ("both", "both", ".2f"),
            ("total", "total", ".2f"),
        ],
    )
    printed = [{**row, "total": weights + row["state"]} for row in values["printed"]]
    as_printed = listing(
        "study-memory-counted-as-printed",
        "MiB of this model counted as the paper does: the output state alone, at the bits of the residual.",
        printed,
        [("bits", "bits", "d"), ("batch", "batch", "d"), ("state", "output states", ".2f"), ("total", "total", ".2f")],
    )
    figure = _chart(rows, printed)
    eight = find(rows, states=rows[0]["states"], batch=max(BATCHES))
    counted = find(printed, bits=BITS, batch=max(BATCHES))["state"]
    return Shown(
        (
            f"The weights of this model are {values['float_weights']:.1f} MiB in float32 and {weights:.1f} MiB with "
            f"8-bit codes. At batch {max(BATCHES)} the states hold {eight['both']:.1f} MiB: {eight['input']:.1f} of "
            f"input and {eight['output']:.1f} of output, {eight['both'] / counted:.1f} times what counting as printed "
            f"would give ({counted:.1f} MiB). They are the same at every bit width.",
            table,
            as_printed,
            figure,
        ),
        (
            "the printed table counts one state of the two, at the bits of the residual. Neither state is a quantity "
            "of so few bits: the output state is a running sum, the input state a sum of codes with other scales at "
            "every step. Both are kept in float32 here, and in float16 where the dtype is chosen.",
        ),
    )


def _chart(rows: list[dict[str, Any]], printed: list[dict[str, Any]]) -> Figure:
    """Measured bytes, and those counted as printed."""
    names = list(dict.fromkeys(row["states"] for row in rows))
    lines = [
        Line(
            label=name,
            x=[r["batch"] for r in rows if r["states"] == name],
            y=[r["both"] for r in rows if r["states"] == name],
        )
        for name in names
    ]
    lines.append(
        Line(
            label=f"counted as printed, {BITS} bits",
            x=BATCHES,
            dashed=True,
            y=[find(printed, bits=BITS, batch=b)["state"] for b in BATCHES],
        )
    )
    return line_chart(
        "study-table6",
        lines,
        title="Memory of the states",
        x="batch",
        y="MiB",
        log_x=True,
        caption="Measured bytes of both states, and the paper's way of counting.",
    )


EXPERIMENT = Experiment(
    name="table6",
    title="Memory (table 6)",
    printed=(
        "MB on CIFAR-10; A32 keeps no state.",
        printed_table(
            "study-printed-table6",
            "Table 6 as printed, MB.",
            "batch|A2|A4|A8|A32",
            (
                "1|35.28|36.40|38.89|35.09",
                "2|36.49|38.89|43.69|36.09",
                "4|38.89|43.69|53.28|38.09",
                "8|43.69|53.28|72.47|42.09",
            ),
        ),
    ),
    measure=measure,
    show=show,
)
