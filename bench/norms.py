"""What does a norm cost in front of a layer on integers: computed by inductor, or while the layer codes its input?

OMP_NUM_THREADS=1 python bench/norms.py
python bench/norms.py --quick --json bench/results/norms.jsonl

Apart: inductor's norm and activation, then the compiled input side of modulated W8A8. Fused: one operator for all of
it, which is what `torch.compile(model, backend="modiff")` puts into the graph. Interleaved in one process; minima and
medians.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from modiff.generate.environment import environment
from modiff.kernels.encode import encode_residual
from modiff.kernels.input_fusion import Activation, InputFusion, Norm
from modiff.model.autotune import interleaved


@dataclass(frozen=True)
class Case:
    """What stands before a layer, and the shape of its input."""

    name: str
    size: tuple[int, ...]
    norm: Norm
    activation: Activation

    @property
    def granularity(self) -> str:
        """Of the scales: a sample's before convolutions, a token's before linear layers."""
        return "sample" if len(self.size) == 4 else "token"


CASES = (
    Case("GroupNorm, SiLU, 64 channels, 32x32, batch 16", (16, 64, 32, 32), "group", "silu"),
    Case("GroupNorm, SiLU, 128 channels, 32x32, batch 8", (8, 128, 32, 32), "group", "silu"),
    Case("GroupNorm, SiLU, 320 channels, 64x64, batch 2", (2, 320, 64, 64), "group", "silu"),
    Case("GroupNorm, SiLU, 1280 channels, 16x16, batch 2", (2, 1280, 16, 16), "group", "silu"),
    Case("LayerNorm, modulated, 1152 channels, 512 tokens", (2, 256, 1152), "layer", "none"),
    Case("GELU, 4608 channels, 512 tokens", (2, 256, 4608), "none", "gelu_tanh"),
    Case("GEGLU, 1280 channels, 8192 tokens", (2, 4096, 1280), "gated", "gelu"),
    Case("GEGLU, 5120 channels, 512 tokens", (2, 256, 5120), "gated", "gelu"),
)
QUICK = (
    Case("GroupNorm, SiLU, 32 channels, 8x8, batch 2", (2, 32, 8, 8), "group", "silu"),
    Case("LayerNorm, modulated, 64 channels, 16 tokens", (2, 8, 64), "layer", "none"),
    Case("GEGLU, 48 channels, 16 tokens", (2, 8, 48), "gated", "gelu"),
)


def input_of(case: Case) -> tuple[Tensor, Tensor | None]:
    """(x, the gate): halves of what the layer before them gives, or x alone, channels innermost before convolutions."""
    if case.norm == "gated":
        x, gate = torch.randn(*case.size[:-1], 2 * case.size[-1]).chunk(2, -1)
        return x, gate
    x = torch.randn(case.size)
    return x.contiguous(memory_format=torch.channels_last) if len(case.size) == 4 else x, None


def fusion_of(case: Case, gate: Tensor | None) -> tuple[InputFusion, Callable[[Tensor], Tensor]]:
    """(what the layer computes, the same as inductor compiles it)."""
    if gate is not None:
        gated = torch.compile(lambda x, gate: x * functional.gelu(gate), dynamic=False)
        return InputFusion("gated", weight=gate, activation=case.activation), lambda x: gated(x, gate)
    samples, channels = case.size[0], case.size[1 if case.norm == "group" else -1]
    each = (samples, channels) if case.norm == "layer" else (channels,)
    weight, bias = (None, None) if case.norm == "none" else (1 + 0.1 * torch.randn(each), torch.randn(each))
    groups = min(32, channels) if case.norm == "group" else 1

    def apart(x: Tensor) -> Tensor:
        if case.norm == "group":
            x = functional.group_norm(x, groups, weight, bias, 1e-5)
        elif weight is not None and bias is not None:
            x = functional.layer_norm(x, x.shape[-1:], eps=1e-5) * weight[:, None] + bias[:, None]
        if case.activation == "silu":
            return functional.silu(x)
        return functional.gelu(x, approximate="tanh") if case.activation == "gelu_tanh" else x

    return InputFusion(case.norm, groups, weight, bias, 1e-5, case.activation), torch.compile(apart, dynamic=False)


def runs_of(case: Case, static: bool) -> dict[str, Callable[[], object]]:
    """Both ways, on the same input and states of their own."""
    x, gate = input_of(case)
    fusion, apart = fusion_of(case, gate)
    channel = 1 if len(case.size) == 4 else -1
    states = torch.randn_like(x), torch.randn_like(x)
    shape = [n if i < (1 if channel == 1 else len(case.size) - 1) else 1 for i, n in enumerate(case.size)]
    scale = torch.full(shape, 0.02) if static else None
    options = {"bits": 8, "granularity": case.granularity, "channel_dim": channel}
    return {
        "apart": lambda: encode_residual(apart(x), states[0], scale, **options),
        "fused": lambda: fusion.encode(x, states[1], scale, **options),
    }


def main(arguments: list[str] | None = None) -> list[dict[str, object]]:
    """Print a line a case; append JSON lines where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small inputs: does it run? Its times mean little")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--json", type=Path, help="append one JSON line a row")
    options = parser.parse_args(arguments)
    rounds, rows = options.rounds or (3 if options.quick else 30), []
    torch.manual_seed(0)
    head = environment()
    print(f"{head['cpu']}, {torch.get_num_threads()} threads")
    with torch.inference_mode():
        for case in QUICK if options.quick else CASES:
            for static in (False, True):
                times = interleaved(runs_of(case, static), rounds)
                best = {name: min(each) for name, each in times.items()}
                median = {name: statistics.median(each) for name, each in times.items()}
                rows.append({**asdict(case), "static": static, "seconds_min": best, "seconds_median": median})
                print(
                    f"{case.name:<50} {'static' if static else 'dynamic':<8} apart {best['apart'] * 1e3:7.3f} ms  "
                    f"fused {best['fused'] * 1e3:7.3f} ms  {best['apart'] / best['fused']:.2f}x in the minima, "
                    f"{median['apart'] / median['fused']:.2f}x in the medians"
                )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        with options.json.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({**row, **head}) + "\n" for row in rows)
    return rows


if __name__ == "__main__":
    main()
