"""Table 6: memory, with both states counted."""

from dataclasses import replace

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from experiments.charts import curves, line_chart
from experiments.experiment import Experiment, Row, Shown, Values, listing, printed_table
from experiments.lab import Lab
from experiments.runs import PAPER, Run, in_dtype, looped
from modiff import presets
from modiff.api import apply, remove
from modiff.config import ModiffConfig
from modiff.hosts.diffusers.host import denoisers
from modiff.model.attach import required_attachment
from modiff.model.observe import observe

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
        "linear, float32": looped(base, replace(PAPER, predictor="linear", gain=0.8)),
    }
    rows: list[Row] = []
    taken: set[str] = set()
    with lab.sampling(Run(steps=STEPS)) as pipe, lab.bar(0):
        for name, config in variants.items():
            for batch in BATCHES:
                inputs, outputs, taken = _states(lab, pipe, config, batch)
                rows.append({"states": name, "batch": batch, "input": inputs / MIB, "output": outputs / MIB})
    elements = sum(layer.output_elements for layer in lab.cost if layer.name in taken)
    printed = [
        {"bits": bits, "batch": batch, "state": elements * batch * bits / 8 / MIB}
        for bits in (2, 4, 8)
        for batch in BATCHES
    ]
    return {
        "rows": rows,
        "printed": printed,
        "weights": sum(layer.weight_elements * (1 if layer.name in taken else 4) for layer in lab.cost) / MIB,
        "float_weights": sum(4 * layer.weight_elements for layer in lab.cost) / MIB,
    }


def _states(lab: Lab, pipe: DiffusionPipeline, config: ModiffConfig, batch: int) -> tuple[int, int, set[str]]:
    """Bytes of the input states and of the output states at the end of a short trajectory, and the layers' names."""
    sizes = [(0, 0)]
    report = apply(pipe, config)
    (model,) = denoisers(pipe).values()
    try:
        with observe(model, on_step=lambda *_: sizes.append(state_sizes(model))):
            lab.sample(pipe, range(batch), STEPS)
    finally:
        remove(pipe)
    return *sizes[-1], {entry.name for entry in report.taken}


def state_sizes(model: nn.Module) -> tuple[int, int]:
    """Bytes of all input states and of all output states now; what layers share counts once."""
    layers = required_attachment(model, "state_sizes").layers.values()
    inputs = _bytes([t for layer in layers for memory in layer.loop.memories.values() for t in memory.input.tensors()])
    return inputs, _bytes([t for layer in layers for t in layer.loop.tensors()]) - inputs


def _bytes(tensors: list[Tensor | None]) -> int:
    storages = [t.untyped_storage() for t in tensors if t is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def show(values: Values) -> Shown:
    """The page of `values`: tables and charts, and what they say."""
    weights, counted = values["weights"], f"counted as printed, {BITS} bits"
    rows = [{**row, "both": row["input"] + row["output"]} for row in values["rows"]]
    rows = [{**row, "total": weights + row["both"]} for row in rows]
    printed = [{**row, "total": weights + row["state"]} for row in values["printed"]]
    four = [{**row, "states": counted} for row in printed if row["bits"] == BITS]
    most = next(row for row in rows if row["batch"] == max(BATCHES))
    return Shown(
        (
            f"The weights of this model are {values['float_weights']:.1f} MiB in float32 and {weights:.1f} MiB with "
            f"8-bit codes. At batch {max(BATCHES)} the states hold {most['both']:.1f} MiB, counting as printed gives "
            f"{four[-1]['state']:.1f} MiB. They are the same at every bit width.",
            listing(
                "study-memory",
                f"MiB, measured in a trajectory at W8A{BITS}; total is with the 8-bit weights.",
                rows,
                "states; batch: d; input: .2f = input states; output: .2f = output states; both: .2f; total: .2f",
            ),
            listing(
                "study-memory-counted-as-printed",
                "MiB of this model counted as the paper does: the output state alone, at the bits of the residual.",
                printed,
                "bits: d; batch: d; state: .2f = output states; total: .2f",
            ),
            line_chart(
                "study-table6",
                [*curves(rows, "states", "batch", "both"), *curves(four, "states", "batch", "state", dashed=True)],
                title="Memory of the states",
                x="batch",
                y="MiB",
                log_x=True,
                caption="Measured bytes of both states, and the paper's way of counting.",
            ),
        ),
        (
            "the printed table counts one state of the two, at the bits of the residual. Neither state is a quantity "
            "of few bits: the output state is a running sum, the input state a sum of codes with other scales at "
            "every step. Both are kept in float32 here, and in float16 where the dtype is chosen.",
        ),
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
