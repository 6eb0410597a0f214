"""One layer's loop with the values that its integers stand for: what the others are compared with.

Layers that read one tensor share one quantized residual: `source` says how they know that it is one.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modiff.config import ModulationConfig, StateDtype
from modiff.core.affine import QParams
from modiff.core.granularity import granularity_named
from modiff.core.jumps import Anchor
from modiff.core.predictors import Weight, predictor_named
from modiff.core.quantizer import Quantizer, Sums
from modiff.core.recursion import State, Update, accumulate, encode, encode_plain, output_of
from modiff.errors import StateError, warn_once
from modiff.kernels.encode import FixedState, start
from modiff.kernels.input_fusion import InputFusion
from modiff.nn.branches import Fork, rows_at
from modiff.nn.clock import Clock
from modiff.nn.loop.source import Source
from modiff.nn.operator import LayerOperator, LayerSpec
from modiff.nn.weight import at_least_float32


def _reordered(state: Any, index: Tensor, where: str) -> Any:
    if isinstance(state, FixedState):
        return state._replace(n=rows_at(state.n, index, where))
    moves = tuple(rows_at(move, index, where) for move in state.moves)
    return state._replace(value=rows_at(state.value, index, where), moves=moves)


def _taken(state: Any, fork: Fork, come: Tensor | None) -> Any:
    """The rows that go on and those that come; None where these leave the grid of a state of integers."""
    if isinstance(state, FixedState):
        whole = None if come is None else state.integers(come)
        return state._replace(n=fork.take(state.n, whole)) if come is None or whole is not None else None
    value, moves = fork.take(state.value, come), tuple(map(fork.take, state.moves))
    return State(value, moves, 0.0 if fork.grows else state.least)


class InputState:
    """One tensor's input state â_t, as `core.recursion` keeps it, and its update, for each layer that reads the tensor.

    spec: of the layer that opened it; what concerns the input is the same in all of a group.
    count: updates so far. readers: how many layers read it. unread: those that did not take this update yet; after the
    last one it is freed. open: others may join. turn: the step at which it anchors again first where anchors are
    staggered. scales, age: of the last residual, and how many were quantized since an anchor, where scales last longer
    than a step. anchor: where it started, to tell how far away it is, where rounding of the weights loses most.
    shape, origin: of what it read last; of which state it has some of the rows, since which evaluation.
    Subclasses keep the state and the codes in another form.
    """

    def __init__(self, spec: LayerSpec, quantizer: Quantizer, config: ModulationConfig, clock: Clock) -> None:
        self.spec, self.quantizer, self.config, self.clock = spec, quantizer, config, clock
        self.predictor = predictor_named(config.predictor)
        self.states: tuple[Any, ...] = ()
        self.update: Update | None = None
        self.count, self.readers, self.unread, self.open, self.turn, self.tick, self.age = 0, 1, 0, False, 0, -1, 0
        self.scales: tuple[QParams, ...] = ()
        self.shape: tuple[torch.Size, torch.device] | None = None
        self.origin: tuple[InputState, int] | None = None
        self.anchor: Anchor | None = None
        self._source: Source | None = None
        self._anchor: Tensor | None = None
        self._sums: Sums | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}  # of this evaluation alone, and no pickle holds a weak reference

    @property
    def state(self) -> State | None:
        """The state as one tensor, None before the first step."""
        return self.states[0] if self.states else None

    def tensors(self) -> list[Tensor]:
        """Every tensor that the state keeps."""
        anchor = [] if self.anchor is None else self.anchor.runs
        return [*anchor, *(tensor for state in self.states for tensor in (state.value, *state.moves))]

    def advance(self, x: Tensor, fusion: InputFusion | None) -> Update:
        """Encode x, or what `fusion` makes of it, and move the state on."""
        update, state = self.encoded(x, fusion, self.states[0] if self.states else None)
        self.states = (state,)
        return update

    def begins(self, x: Tensor, read: int | None) -> bool:
        """Whether the states started in this evaluation, and from this very tensor, unchanged since."""
        if self.update is None or not self.update.starts or self.tick != self.clock.tick or self._source is None:
            return False
        return self._source.begins(x, read)

    def read(self, where: str, x: Tensor, fusion: InputFusion | None, read: int | None) -> Update:
        """The update for `x`: encoded for the first reader of the evaluation, the same for all others.

        It begins again where shape or device changed. Raises: StateError if the readers no longer agree.
        """
        if self.tick == self.clock.tick and self.update is not None:
            if self._source is None or not self._source.carries(x, read):
                raise StateError(
                    f"{where}: expected the tensor that its group read before, got another one. These layers read one "
                    "tensor at the first step and no longer do. Use ModiffConfig(share_residuals='off')."
                )
            return self.update
        every, turn = self.config.reanchor_every, self.turn if self.config.stagger else 0
        shape = (x.shape, x.device)
        other = self.shape is not None and self.shape != shape
        if other:
            warn_once(
                f"rows of {self.clock.name}",
                f"{where}: expected an input of shape {tuple(self.shape[0])} on {self.shape[1]}, as in the step "
                f"before, got {tuple(x.shape)} on {x.device}. Its states begin again. A layer whose rows change at "
                "every step, as those of experts do, gains nothing from states: exclude it.",
            )
        if other or (every and (self.clock.step - turn) % every == 0):
            self.states, self.age = (), 0
        source = Source(x, read, self.readers > 1 or (self.open and not self.count), where)
        self.update = self.advance(x, fusion)
        if self.update.starts:
            start, quantizer = self.update.anchor, self.quantizer
            watched = start is not None and self.spec.watches_anchor
            self.anchor = Anchor(quantizer.split(start), self.spec.channel_dim) if watched else None
        self.shape, self.tick, self._source = shape, self.clock.tick, source
        self.count += 1
        self.unread = 0 if self.open and self.update.starts else self.readers
        return self.update

    def reorder(self, index: Tensor) -> None:
        """Row i goes on from the state of row index[i]. A bound on the noise of all rows bounds that of any of them.

        Raises: StateError where the rows share scales, so that each depends on all, or `index` is not of these rows.
        """
        quantizer, tied = self.quantizer, False
        for state in self.states if quantizer.config.dynamic and quantizer.bits else ():
            two = torch.empty(2, *state[0].shape[1:], device="meta")
            scales = granularity_named(quantizer.granularity).reduce(two, quantizer.channel_dim, torch.amax)
            tied |= len(scales) == 1
        if tied:
            raise StateError(
                f"{self.spec.name}: expected scales of each sample or token, got some that the batch shares. A row "
                "then depends on all others. Use granularity='sample' or 'token'."
            )
        self.states = tuple(_reordered(state, index, self.spec.name) for state in self.states)
        rows = [[None if t is None else rows_at(t, index, self.spec.name) for t in each] for each in self.scales]
        self.scales = tuple(QParams(*each) for each in rows)
        if self.anchor is not None:
            self.anchor = self.anchor.of_rows(lambda run: rows_at(run, index, self.spec.name))

    def forked(self, fork: Fork, come: Tensor | None) -> "InputState | None":
        """A copy with the rows that go on, and with those that come; None where these leave its grid."""
        other, (shape, device) = copy.copy(self), self.shape or (torch.Size([1]), None)
        runs = (
            [None] * len(self.states)
            if come is None
            else [come]
            if len(self.states) == 1
            else self.quantizer.split(come)
        )
        other.states = tuple(_taken(state, fork, run) for state, run in zip(self.states, runs, strict=True))
        if any(state is None for state in other.states):
            return None
        other.scales = tuple(QParams(*(None if t is None else fork.take(t) for t in each)) for each in self.scales)
        if self.anchor is not None:
            other.anchor = None if fork.grows else self.anchor.of_rows(fork.take)
        other.shape = torch.Size((fork.size(shape[0]), *shape[1:])), device
        return other

    def stand(self) -> None:
        """Forget the moves: the next prediction is what the state holds, for every layer that reads it."""
        if self.predictor.past_states > 1:
            self.states = tuple(State(each.value) for each in self.states)

    def encoded(self, x: Tensor, fusion: InputFusion | None, state: State | None) -> tuple[Update, State]:
        """The step of `core.recursion`."""
        value = x if fusion is None and self.spec.encodes_as_it_comes else self.spec.prepared(x, fusion)
        if not self.quantizer.config.dynamic and self.quantizer.watching:
            self._observe(at_least_float32(value.detach()), state)
        ratio = 1.0 if self.predictor.past_states == 1 or state is None else self.ratio(x.device)
        every = self.quantizer.config.refresh_every
        scales = self.scales if every > 1 and self.age % every else None
        update, state = encode(value, state, self.quantizer, self.config, ratio, scales, self.anchor)
        if every > 1 and update.codes and not update.starts:
            self.held(tuple(q for _, q in update.codes[0].parts), update.intra)
        return update, state

    def _observe(self, value: Tensor, state: State | None) -> None:
        """While static scales are measured: show the quantizer what residuals are compared with."""
        if state is None:
            self._anchor = value.clone() if self.spec.anchors_exactly else None
        elif self.config.error_compensation == "closed_loop":
            self._sums = self.quantizer.observe_value(value, self._anchor, self._sums, self.clock.kept)

    def held(self, scales: tuple[QParams, ...], intra: Tensor | None) -> None:
        """Keep scales for the next steps; those of samples that jump tell nothing of the next one."""
        self.scales, self.age = scales, 0 if intra is not None and bool(intra.any()) else self.age + 1

    def ratio(self, device: torch.device) -> Weight:
        """Size of this step over the last one, on a device."""
        ratio = self.clock.ratio
        return ratio.to(device) if isinstance(ratio, Tensor) else ratio


class InputGroup:
    """The input states of a group of layers; a group of one is the usual case.

    At the step where states start, a layer joins the state of the very tensor that it reads, or opens one.
    turn: the number of the group in its model: the groups anchor again in turn where anchors are staggered.
    """

    def __init__(self, make: Callable[[], InputState], clock: Clock) -> None:
        self.make, self.clock = make, clock
        self.states: list[InputState] = []
        self.shared, self.turn = False, 0
        clock.on_reset(self.forget)

    def forget(self) -> None:
        """Free the states."""
        self.states.clear()

    def forked(self, before: InputState, fork: Fork, x: Tensor, come: Tensor | None) -> InputState | None:
        """A state with the rows of another that go on, the same for all of its readers; None where x has others."""
        origin = before, self.clock.tick
        known = (state for state in reversed(self.states) if state.origin == origin)
        state = next(known, None) or before.forked(fork, come)
        if state is None or state.shape != (x.shape, x.device):
            return None
        state.origin = origin
        self.states += [] if state in self.states else [state]
        return state

    def state_for(self, x: Tensor, read: int | None) -> InputState:
        """That of `x` in this evaluation, the newest if several fit; a new one if there is none."""
        for state in reversed(self.states):
            if state.begins(x, read):
                state.readers += 1
                return state
        state = self.make()
        state.open, state.turn = self.shared, self.turn
        self.states.append(state)
        return state


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
        self._calls, self._tick, self._number = 0, -1, -1  # the number of the weight where there is no memory
        clock.on_reset(self.forget)

    @property
    def state_dtype(self) -> StateDtype:
        """Of the states, where the weight lies now."""
        dtype = self.spec.config.state_dtype
        return "float32" if dtype == "int16" else dtype

    def _outside(self) -> StateError:
        if self.clock.active:
            return StateError(
                f"{self.spec.name}: expected a call of {self.clock.name}, got one of a module inside of it. Steps are "
                "counted by calls of the module that modiff was applied to, not of its methods. Apply modiff to the "
                "module that your loop calls, or to each of them, and open a trajectory of each."
            )
        return StateError(
            f"{self.spec.name}: expected a running trajectory, got a call outside of one. The states of a modulated "
            "layer live for one generation. Call the model inside `with modiff.trajectory(model):`."
        )

    def step(self, x: Tensor, fusion: InputFusion | None = None, read: int | None = None) -> Tensor:
        """The layer's output for `x`, or for what `fusion` makes of it; in the dtype of x. read: as `Source` has it.

        Raises: StateError outside a trajectory, or if the input does not fit the states.
        """
        inputs = self.inputs
        if inputs is None:
            return self.plain(x, fusion)
        clock = self.clock
        if not clock.inside:
            raise self._outside()
        self._calls = self._calls + 1 if self._tick == clock.tick else 0
        self._tick = clock.tick
        memory = self.memories.get((clock.context, self._calls))
        if memory is None:
            memory = self._forked(x, fusion) or Memory(inputs.state_for(x, read))
            self.memories[clock.context, self._calls] = memory
        state = memory.input
        update = state.read(self.spec.name, x, fusion, read)
        if state.count != memory.taken + 1 and not update.starts:
            raise StateError(
                f"{self.spec.name}: expected update {memory.taken + 1} of its group, got update {state.count}. The "
                "layer did not run in the last step, but shares its quantized input with layers that did. Use "
                "ModiffConfig(share_residuals='off'), or exclude it."
            )
        operator, parameters = self.operator, self.operator.parameters
        bias = parameters["bias"]
        key = None if bias is None else (bias.data_ptr(), 0 if bias.is_inference() else bias._version)
        if key != operator.bias_key:
            operator.compare_bias(key)
        number = operator.bias_edition + operator.quantized.refresh(parameters["weight"])
        if memory.weight != number and memory.taken and not update.starts:
            update = self.anchored(memory)
            clock.weights_changed = True
            state.stand()
        if update.starts and state.anchor is not None:
            state.anchor.noise = max(state.anchor.noise, operator.weight_noise())
        memory.taken, memory.weight = state.count, number
        output = self.take(update, memory, x.dtype)
        state.unread -= 1
        if state.unread == 0:
            state.update = None
        return output

    def _forked(self, x: Tensor, fusion: InputFusion | None) -> Memory | None:
        """What the rows of a batch that goes on with others left here; rows that come start their states."""
        fork = self.clock.fork
        memory = None if fork is None else self.memories.get((fork.context, self._calls))
        if fork is None or memory is None or self.inputs is None or memory.output is None:
            return None
        come, output = None, memory.output
        if fork.grows:
            lasting = memory.input.quantizer.config.refresh_every > 1  # rows that come have no scale yet
            if lasting or len(x) % len(fork.index):
                return None
            come = at_least_float32(self.spec.prepared(x.detach(), fusion))[fork.coming(len(x), x.device)]
        state = self.inputs.forked(memory.input, fork, x, come)
        if state is None:
            return None
        if come is not None:
            held = state.state if isinstance(output, FixedState) else None  # outputs start from what the input holds
            come = self.operator.anchor(come if held is None else held.value[fork.coming(len(x), x.device)])
        rows = _taken(output, fork, come) or start(fork.take(output.value(), come))  # on a coarser grid
        return Memory(state, rows, memory.taken, memory.weight)

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
        number, before = self.operator.quantized.refresh(self.operator.weight), self._number
        self._number, self.clock.weights_changed = number, self.clock.weights_changed or before not in (-1, number)
        value = self.spec.prepared(x, fusion)
        if self.quantizer is None:
            return self.operator.affine(at_least_float32(value)).to(x.dtype)
        return output_of(encode_plain(value, self.quantizer), self.operator).to(x.dtype)

    def reorder(self, index: Tensor) -> None:
        """Row i of the output states goes on from that of row index[i], in all contexts."""
        for memory in self.memories.values():
            if memory.output is not None:
                memory.output = _reordered(memory.output, index, self.spec.name)

    def forget(self) -> None:
        """Free the states of all contexts; the parameters are looked at again."""
        self.operator.forget()
        self.memories.clear()
        self._tick = -1

    def tensors(self) -> list[Tensor]:
        """Every tensor that the states keep now, of all contexts; shared ones appear in each sharer."""
        tensors = [t for memory in self.memories.values() for t in memory.input.tensors()]
        for output in (memory.output for memory in self.memories.values() if memory.output is not None):
            tensors += output if isinstance(output, FixedState) else [output.value, *output.moves]
        return tensors
