"""One layer's loop with the values that its integers stand for: what the others are compared with."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from modiff.config import ModulationConfig
from modiff.core.quantizer import Quantizer
from modiff.core.recursion import State, Update, accumulate, encode_plain, output_of
from modiff.errors import StateError
from modiff.kernels.encode import FixedState
from modiff.kernels.input_fusion import InputFusion
from modiff.nn.clock import Clock
from modiff.nn.operator import LayerOperator, LayerSpec
from modiff.nn.sharing import InputGroup, InputState
from modiff.nn.weight import at_least_float32


@dataclass(slots=True)
class Memory:
    """Of one layer in one context: its input and output state, the updates it took, the number of its weight."""

    input: InputState
    output: State | FixedState | None = None
    taken: int = 0
    weight: int = -1


class SimulatedLoop:
    """y_t = ô_t of one layer; without modulation A_q(quantize(x)) + b, without activation bits A_q(x) + b.

    quantizer, inputs: None where the input is not quantized, not modulated; the same objects in all layers of a group.
    memories: by context, and how many times the layer was called before in the evaluation.
    """

    input_kind: type[InputState] = InputState

    def __init__(self, spec: LayerSpec, operator: LayerOperator, quantizer: Quantizer | None, clock: Clock) -> None:
        self.spec, self.operator, self.quantizer, self.clock = spec, operator, quantizer, clock
        self.modulation = spec.config.modulation or ModulationConfig()
        self.inputs: InputGroup | None = None
        if quantizer is not None and spec.config.modulation is not None:
            make = functools.partial(self.input_kind, spec, quantizer, spec.config.modulation, clock)
            self.inputs = InputGroup(make, clock)
        self.memories: dict[tuple[str, int], Memory] = {}
        self._calls, self._tick = 0, -1
        clock.on_reset(self.forget)

    def step(self, x: Tensor, fusion: InputFusion | None = None, read: int | None = None) -> Tensor:
        """The layer's output for `x`, or for what `fusion` makes of it; in the dtype of x. read: as `Source` has it.

        Raises: StateError outside a trajectory, or if the input does not fit the states.
        """
        inputs = self.inputs
        if inputs is None:
            return self.plain(x, fusion)
        clock = self.clock
        if not clock.inside:
            raise StateError(
                f"{self.spec.name}: expected a running trajectory, got a call outside of one. The states of a "
                "modulated layer live for one generation. Call the model inside `with modiff.trajectory(model):`."
            )
        self._calls = self._calls + 1 if self._tick == clock.tick else 0
        self._tick = clock.tick
        memory = self.memories.get((clock.context, self._calls))
        if memory is None:
            memory = self.memories[clock.context, self._calls] = Memory(inputs.state_for(x, read))
        state = memory.input
        update = state.read(self.spec.name, x, fusion, read)
        if state.count != memory.taken + 1 and not update.starts:
            raise StateError(
                f"{self.spec.name}: expected update {memory.taken + 1} of its group, got update {state.count}. The "
                "layer did not run in the last step, but shares its quantized input with layers that did. Use "
                "ModiffConfig(share_residuals='off'), or exclude it."
            )
        number = self.operator.quantized.refresh(self.operator.parameters["weight"])
        if memory.weight != number and memory.taken and not update.starts:
            update = self.anchored(memory)
            state.stand()
        memory.taken, memory.weight = state.count, number
        output = self.take(update, memory, x.dtype)
        state.unread -= 1
        if state.unread == 0:
            state.update = None
        return output

    def anchored(self, memory: Memory) -> Update:
        """Where an output state starts again from what its input state holds: the law holds from there on."""
        state = memory.input.state
        return Update(None if state is None else at_least_float32(state.value), (), starts=True)

    def take(self, update: Update, memory: Memory, dtype: torch.dtype) -> Tensor:
        """Move the output state on. Returns: its value in `dtype`, a tensor of its own."""
        state = memory.output
        state = accumulate(update, state if isinstance(state, State) else None, self.operator, self.modulation)
        memory.output = state
        return state.value.to(dtype, copy=True)

    def plain(self, x: Tensor, fusion: InputFusion | None) -> Tensor:
        """The output of a layer without memory."""
        value = self.spec.prepared(x, fusion)
        if self.quantizer is None:
            return self.operator.affine(at_least_float32(value)).to(x.dtype)
        return output_of(encode_plain(value, self.quantizer), self.operator).to(x.dtype)

    def forget(self) -> None:
        """Free the states of all contexts; the weight is looked at again, as writes through `.data` leave no trace."""
        self.operator.quantized.forget()
        self.memories.clear()
        self._tick = -1

    def tensors(self) -> list[Tensor]:
        """Every tensor that the states keep now, of all contexts; shared ones appear in each sharer."""
        tensors = [t for memory in self.memories.values() for t in memory.input.tensors()]
        for output in (memory.output for memory in self.memories.values() if memory.output is not None):
            tensors += output if isinstance(output, FixedState) else [output.value, *output.moves]
        return tensors
