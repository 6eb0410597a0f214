"""One layer's loop with both states in 16-bit integers: two bytes an element, and a way out of 16 bits.

input     n_t = n_{t+1} + m_t q_t              exact: every scale is m_t times the grid
output    n_t = n_{t+1} + round(A_q(q_t) / grid)
"""

import torch
from torch import Tensor

from modiff.config import ModulationConfig, StateDtype
from modiff.core.quantizer import Quantizer
from modiff.core.recursion import State, Update
from modiff.kernels.encode import FixedState, start
from modiff.kernels.input_fusion import InputFusion
from modiff.nn.clock import Clock
from modiff.nn.loop.integer import ByteCode, IntegerInput, IntegerLoop, dense_runs, encode_run, laid_as, runs_of
from modiff.nn.loop.simulated import InputState, Memory
from modiff.nn.operator import LayerSpec

MOST = 2**15 - 1
HEADROOM = 1.25
"""How much larger than at its start a state may become before it starts again."""


def keeps_int16(config: ModulationConfig, device: torch.device) -> bool:
    """Whether states on a device are integers: on a GPU, which would be waited for at each step, only where told."""
    return device.type in ("cpu", "meta") or config.state_dtype == "int16"


class Int16Input(IntegerInput):
    """â_t = grid n_t. An input that outgrows 16 bits starts again.

    The outputs start from what the integers stand for, so that a_anchor = â there and the law holds.
    """

    def __init__(self, spec: LayerSpec, quantizer: Quantizer, config: ModulationConfig, clock: Clock) -> None:
        super().__init__(spec, quantizer, config, clock)
        self._clipped = torch.zeros(1, dtype=torch.int32)

    @property
    def fixed(self) -> bool:
        """Whether the states are integers."""
        return bool(self.states) and isinstance(self.states[0], FixedState)

    @property
    def state(self) -> State | None:
        """What the integers stand for. Cost: a pass over them."""
        if not self.fixed:
            return super().state
        values = [fixed.value() for fixed in self.states]
        return State(values[0] if len(values) == 1 else torch.cat(values, self.spec.channel_dim))

    def tensors(self) -> list[Tensor]:
        """Integers and grids."""
        if not self.fixed:
            return super().tensors()
        return [*(self.anchor.runs if self.anchor else ()), *(tensor for fixed in self.states for tensor in fixed)]

    def begin(self, x: Tensor, fusion: InputFusion | None) -> Update:
        """The states start from what the integers stand for."""
        if not keeps_int16(self.config, x.device):
            return super().begin(x, fusion)
        self.jumps = None
        value = self.spec.prepared(x.detach(), fusion)
        runs = dense_runs(value, self.quantizer.runs, self.spec.channel_dim)
        self.states = tuple(start(run, HEADROOM) for run in runs)
        whole = self.state
        return Update(None if whole is None else whole.value, (), starts=True)

    def encode(self, x: Tensor, fusion: InputFusion | None) -> Update:
        """A steady step; where codes were cut to stay within 16 bits the state starts again instead."""
        if not isinstance(self.states[0], FixedState):
            return super().encode(x, fusion)
        if self._clipped.device != x.device:
            self._clipped = self._clipped.to(x.device)
        runs = runs_of(x, fusion, self.quantizer)
        if [state.n.stride() for state in self.states] != [run.stride() for run, _ in runs]:
            layouts = zip(self.states, runs, strict=True)
            self.states = tuple(state._replace(n=laid_as(state.n, run)) for state, (run, _) in layouts)
        codes, jumps, intra = [], False, None
        for run, state in zip(runs, self.states, strict=True):
            code, scale, jump = encode_run(*run, state, self.quantizer, clipped=self._clipped)
            codes.append((code, scale))
            jumps = jumps or jump
        if jumps or self.anchor is not None:
            intra = self.from_zero(
                codes, runs, lambda i, s: encode_run(*runs[i], s, self.quantizer, clipped=self._clipped), jumps=jumps
            )
        if self._clipped.item():
            self._clipped.zero_()
            return self.begin(x, fusion)
        return Update(None, (ByteCode(tuple(codes)),), intra=intra)


class Int16Loop(IntegerLoop):
    """ô_t = grid n_t. A state that outgrows 16 bits anchors again at â_t.

    Each step rounds to the grid, and no step repairs that: the relative error is some 0.001 after 200 steps.
    """

    input_kind: type[InputState] = Int16Input
    _clipped: Tensor | None = None  # zero between steps

    @property
    def state_dtype(self) -> StateDtype:
        """Of the states, where the weight lies now."""
        return "int16" if keeps_int16(self.modulation, self.operator.weight.device) else "float32"

    def take(self, update: Update, memory: Memory, dtype: torch.dtype) -> Tensor:
        """Move the output state on, in place."""
        if not isinstance(memory.input.states[0], FixedState):
            return super().take(update, memory, dtype)
        code, state = update.codes[0] if update.codes else None, memory.output
        if not (isinstance(code, ByteCode) and isinstance(state, FixedState)):
            return self._start(update, memory, dtype)
        clipped = self._clipped
        if clipped is None or clipped.device != state.n.device:
            clipped = self._clipped = torch.zeros(1, dtype=torch.int32, device=state.n.device)
        if update.intra is not None:
            zero = torch.round(torch.as_tensor(self.operator.start(), device=state.n.device) / state.grid)
            clipped += (zero.abs() > MOST).sum()
            torch.where(update.intra, zero.clamp(-MOST, MOST).to(torch.int16), state.n, out=state.n)
        kernels = self.kernels
        if len(kernels) == 1:
            outputs = [kernels[0].step(state, *code.runs[0], dtype, clipped)]
        else:
            outputs = [k.step(state, *sent, dtype, clipped) for k, sent in zip(kernels, code.runs, strict=True)]
        if clipped.item():
            clipped.zero_()
            return self._start(self.anchored(memory), memory, dtype)
        *earlier, output = outputs
        for other, (_, scale) in zip(earlier, code.runs, strict=False):
            if scale.isnan().any():  # it leaves no trace in the integers of the state
                output = torch.where(other.isnan(), other, output)
        return output

    def _start(self, update: Update, memory: Memory, dtype: torch.dtype) -> Tensor:
        value = self.started(update, None).value
        memory.output = start(value, HEADROOM)
        return value.to(dtype)
