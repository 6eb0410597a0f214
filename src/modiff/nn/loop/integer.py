"""One layer's loop on real integers: the codes and input states of the simulation bit for bit, states in place.

ô_t += s s_w[o] Σ (code - zero) * weight code
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modiff.config import ModulationConfig
from modiff.core.affine import QParams, noise_of
from modiff.core.granularity import granularity_named
from modiff.core.jumps import jumped, thinned
from modiff.core.predictors import Hold, Linear, predictor_named
from modiff.core.quantizer import Quantizer
from modiff.core.recursion import State, Update, accumulate
from modiff.kernels.backend import PREPACKED
from modiff.kernels.dispatch import Choice, plan
from modiff.kernels.encode import Encoded, FixedState, encode_residual
from modiff.kernels.input_fusion import InputFusion
from modiff.kernels.kernel import Kernel, largest_weight_code
from modiff.kernels.layout import channels_innermost, innermost
from modiff.kernels.problem import Problem
from modiff.nn.clock import Clock
from modiff.nn.loop.simulated import InputState, Memory, SimulatedLoop
from modiff.nn.operator import LayerOperator, LayerSpec
from modiff.nn.weight import PackedWeight, version_of

Run = tuple[Tensor, InputFusion | None]
"""Some channels of an input, and what they pass through on the way."""
Codes = tuple[Tensor, Tensor]
"""uint8 or int8 codes and their scales."""


def unsupported(spec: LayerSpec, quantizer: Quantizer | None) -> str:
    """Why a layer cannot run on integers and is simulated; empty if it can. What no kernel knows is refused."""
    config, modulation = spec.config, spec.config.modulation or ModulationConfig()
    if config.weight.bits is None:
        return "its weight keeps floats"
    if quantizer is None:
        return "its input is not quantized"
    granularity = granularity_named(quantizer.granularity).unsupported(spec.kernel_size, spec.stride)
    known = type(predictor_named(modulation.predictor)) in (Hold, Linear)
    reasons = (
        (quantizer.bits == 0, "0 bits send nothing that could be summed"),
        (bool(quantizer.config.step_bits), "its bits change between steps"),
        (not quantizer.config.symmetric, "codes with a zero point of their own have no kernel"),
        (spec.unsupported, spec.unsupported),
        (granularity, granularity),
        (not known, f"no kernel knows the predictor {modulation.predictor!r}"),
        (modulation.error_compensation == "none", "the ablation without error compensation is for study"),
        (modulation.state_dtype == "float64", "its states are kept in float64, kernels add up float32"),
    )
    return next((why for applies, why in reasons if applies), "")


class ByteCode(NamedTuple):
    """The integers of one step as kernels read them: uint8 codes, where 2^(bits - 1) stands for 0, and their scales."""

    runs: tuple[Codes, ...]


def dense_runs(x: Tensor, runs: tuple[int, ...], channel_dim: int) -> tuple[Tensor, ...]:
    """The runs of channels of x, each dense in memory, channels innermost where x has them so; copies, but for one."""
    if len(runs) == 1:
        return (x,)
    split = x.split_with_sizes(runs, channel_dim)
    if channel_dim == 1 and channels_innermost(x, x.dim() - 2):
        return tuple(innermost(run) for run in split)
    return tuple(run.contiguous() for run in split)


def runs_of(x: Tensor, fusion: InputFusion | None, quantizer: Quantizer) -> list[Run]:
    """What is encoded for each run of channels: a tensor, and what it passes through, where kernels compute that."""
    if len(quantizer.runs) == 1:
        return [(x, fusion)]
    if fusion is not None:
        if split := fusion.split(x, quantizer.runs):
            return list(split)
        x = fusion.compute(x)
    return [(run, None) for run in dense_runs(x, quantizer.runs, quantizer.channel_dim)]


def encode_run(
    x: Tensor, fusion: InputFusion | None, state: Tensor | FixedState | None, quantizer: Quantizer,
    scale: Tensor | None = None, *, move: Tensor | None = None, gain: Tensor | None = None,
    clipped: Tensor | None = None,
) -> Encoded:  # fmt: skip
    """Codes of one run of channels against its state, which becomes the next one in place."""
    encode = encode_residual if fusion is None else fusion.encode
    return encode(
        x, state, scale, quantizer.bits, quantizer.config.clip, quantizer.granularity,
        channel_dim=quantizer.channel_dim, move=move, gain=gain, clipped=clipped,
    )  # fmt: skip


def laid_as(state: Tensor, x: Tensor) -> Tensor:
    """A state in the memory layout of x, which compiled loops need; that of some channels or of a chunk is dense."""
    if state.stride() == x.stride() or not (x.is_contiguous() or channels_innermost(x, max(x.dim() - 2, 0))):
        return state
    return torch.empty_like(x, dtype=state.dtype).copy_(state)


class IntegerInput(InputState):
    """â_t in one dense tensor for each run of channels; a steady step makes bytes and writes the state in place.

    The first step, and every step while scales are being measured, runs as in the simulation.
    jumps: on a device, whether a sample jumped in the first step after an anchor; None until then, and on CPUs.
    """

    jumps: bool | None = None

    @property
    def state(self) -> State | None:
        """The state as one tensor. Cost: nothing for one run of channels, otherwise a copy."""
        if len(self.states) < 2:
            return super().state
        values = zip(*((state.value, *state.moves) for state in self.states), strict=True)
        value, *moves = (torch.cat(runs, self.spec.channel_dim) for runs in values)
        return State(value, tuple(moves))

    def advance(self, x: Tensor, fusion: InputFusion | None) -> Update:
        """Encode into bytes and write the state in place; with `fusion` in the same pass over memory."""
        if fusion is not None and not self.spec.fuses(fusion.norm, x.device):
            x, fusion = fusion.compute(x), None
        if not self.states or (not self.quantizer.config.dynamic and self.quantizer.watching):
            return self.begin(x, fusion)
        value = x if self.spec.encodes_as_it_comes else self.spec.prepared(x, None)
        if self.spec.channel_dim == -1 and fusion is None:
            value = value.contiguous()  # compiled loops read tokens whose channels lie next to each other
        return self.encode(value, fusion)

    def begin(self, x: Tensor, fusion: InputFusion | None) -> Update:
        """A step of the simulation."""
        self.jumps = None
        update, state = self.encoded(x, fusion, self.state)
        split = [dense_runs(t, self.quantizer.runs, self.spec.channel_dim) for t in (state.value, *state.moves)]
        self.states = tuple(State(value, tuple(moves)) for value, *moves in zip(*split, strict=True))
        return update

    def encode(self, x: Tensor, fusion: InputFusion | None) -> Update:
        """A steady step."""
        quantizer, gain = self.quantizer, None
        if self.predictor.past_states > 1:
            weights = self.predictor.weights(len(self.states[0].moves), self.config.gain, self.ratio(x.device))
            gain = torch.as_tensor(weights[0] if weights else 0.0, dtype=torch.float32, device=x.device)
        every, scales = quantizer.config.refresh_every, None
        if not quantizer.config.dynamic:
            scales = quantizer.scales(x)
        elif every > 1 and self.age % every:
            scales = [q.scale for q in self.scales]
        codes, states, jumps, runs = [], [], False, runs_of(x, fusion, quantizer)
        intra = quantizer.intra(x) if quantizer.of_values else None
        for index, (run, fused) in enumerate(runs):
            state = self.states[index]
            if gain is not None or state.value.stride() != run.stride():
                state = _laid(state, run, gain is not None)
            states.append(state)
            for tensor in () if intra is None else (state.value, *state.moves):
                tensor.zero_()
            scale, move = None if scales is None else scales[index], state.moves[0] if state.moves else None
            *sent, jump = encode_run(run, fused, state.value, quantizer, scale, move=move, gain=gain)
            codes.append((sent[0], sent[1]))
            jumps = jumps or jump
            for move in () if intra is None else state.moves:
                move.zero_()
        self.states = tuple(states)
        if jumps or (scales is None and self.anchor is not None):
            intra = self.from_zero(codes, runs, lambda i, s: encode_run(*runs[i], s.value, quantizer), jumps=jumps)
        if every > 1:
            self.held(tuple(QParams(scale, None) for _, scale in codes), intra)
        return Update(None, (ByteCode(tuple(codes)),), weights=() if gain is None else (gain,), intra=intra)

    def from_zero(
        self, codes: Sequence[Codes], runs: Sequence[Run], encode: Callable[[int, Any], Encoded], *, jumps: bool
    ) -> Tensor | None:
        """`core.jumps.from_zero`, in place, in codes and states. Returns: flags of samples that start from zero.

        encode: the codes of a run of channels against a state, which becomes the next one. jumps: whether one may.
        Cost: a second encoding, if so. A device is waited for after an anchor alone, for what jumps then.
        """
        due, dim, excess = self.anchor is not None and self.anchor.due(), self.spec.channel_dim, torch.zeros(())
        if self.jumps is False or not (jumps or due):
            return None
        noise = noise_of([QParams(s, None) for _, s in codes], self.quantizer.runs)
        if self.anchor is not None:
            values = [type(state)(thinned(state[0], dim), *state[1:]) for state in self.states]
            values = [each.value() if isinstance(each, FixedState) else each.value for each in values]
            excess = self.anchor.excess(values, noise, due=due)
            if not jumps and not float(excess.max()) > 0:
                return None
        blank = [type(state)(torch.zeros_like(state[0]), *state[1:]) for state in self.states]
        own = [encode(i, state)[:2] for i, state in enumerate(blank)]
        least = noise_of([QParams(s, None) for _, s in own], self.quantizer.runs)
        intra = jumped(noise + excess, least)
        if self.jumps is None and intra is not None and not intra.is_cpu:
            self.jumps = bool(intra.any())
            intra = intra if self.jumps else None
        if intra is not None and getattr(self.states[0], "moves", ()):  # x less the state that it met, which moved on
            held = [x - state.value + state.moves[0] for x, state in zip(self._values(runs), self.states, strict=True)]
            noise = noise_of([self.quantizer.measured(run) for run in held], self.quantizer.runs)
            intra = jumped((noise + excess).where(intra, 0.0), least)
        if intra is not None:
            intra = jumped(self._unsent(runs, self.states) + excess / 12, self._unsent(runs, blank), intra)
        if intra is not None and self.anchor is not None:
            self.anchor.leave(intra)
        for i, state in enumerate(self.states if intra is not None else ()):
            for new, old in ((blank[i][0], state[0]), *zip(own[i], codes[i], strict=True)):
                torch.where(intra, new, old, out=old)
            for move in getattr(state, "moves", ()):
                move.masked_fill_(intra, 0.0)
        return intra

    @staticmethod
    def _values(runs: Sequence[Run]) -> list[Tensor]:
        return [x.float() if fusion is None else fusion.compute(x).float() for x, fusion in runs]

    def _unsent(self, runs: Sequence[Run], states: Sequence[Any]) -> Tensor:
        missing = []
        for x, state in zip(self._values(runs), states, strict=True):
            value = state.value() if isinstance(state, FixedState) else state.value
            missing.append((x - value).square())
        return missing[0] if len(missing) == 1 else torch.cat(missing, self.spec.channel_dim)


def _laid(state: State, x: Tensor, moves: bool) -> State:
    value = laid_as(state.value, x)
    if not moves:
        return State(value)
    return State(value, (laid_as(state.moves[0], value) if state.moves else torch.zeros_like(value),))


class IntegerLoop(SimulatedLoop):
    """ô_t with the kernels of one layer, one for each run of its input channels, built at first use and kept."""

    input_kind: type[InputState] = IntegerInput

    def __init__(self, spec: LayerSpec, operator: LayerOperator, quantizer: Quantizer | None, clock: Clock) -> None:
        super().__init__(spec, operator, quantizer, clock)
        self._source: tuple[object, ...] = ()  # of the codes that the kernels were made of
        self._codes: tuple[Codes, ...] = ()
        self._kernels: tuple[Kernel, ...] = ()

    def step(self, x: Tensor, fusion: InputFusion | None = None, read: int | None = None) -> Tensor:
        """As simulated. States are no inference tensors, which a later step without that mode could not write."""
        if not torch.is_inference_mode_enabled():
            return super().step(x, fusion, read)
        with torch.inference_mode(mode=False):
            torch.set_grad_enabled(False)  # until that mode comes back; cheaper than a context of its own
            return super().step(x, fusion, read)

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Those of the present weight. Cost: building them waits for the device once."""
        weight, quantized = self.operator.parameters["weight"], self.operator.quantized
        packed, edition = isinstance(quantized, PackedWeight), quantized.refresh(weight)
        source = edition, *((weight.data_ptr(), version_of(weight), weight.device) if packed else ())
        if source != self._source:
            self.clock.weights_changed |= self._source != ()
            rewritten = packed and self._source[:1] != source[:1]  # codes that are kept would equal themselves
            if packed and len(quantized.columns) == 1:
                codes: tuple[Codes, ...] = (quantized.stored(),)  # two 4-bit codes in a byte, as they are kept
            else:
                codes = tuple((each.contiguous(), q.scale) for each, q in quantized.codes(weight))
            if rewritten or len(codes) != len(self._codes) or not all(map(_equal, codes, self._codes)):
                self._codes, self._kernels = codes, tuple(map(self._kernel, self.spec.runs, codes))
            self._source = source  # where the codes are the same, what a backend made of them stays
        return self._kernels

    def choices(self) -> tuple[Choice, ...]:
        """The backend of each run of channels, and why; before there are codes, by the largest that its bits allow."""
        weight, largest = self.operator.weight, 2 ** ((self.spec.config.weight.bits or 8) - 1) - 1
        if self._kernels or weight.is_meta:
            return tuple(kernel.choice for kernel in self._kernels)
        return tuple(plan(self._problem(run, len(weight), weight.device.type, largest)) for run in self.spec.runs)

    def bytes_of_backends(self) -> int:
        """Of the copies that backends made of the weight's codes."""
        return sum(PREPACKED.bytes_of(kernel.weight) for kernel in self._kernels)

    def take(self, update: Update, memory: Memory, dtype: torch.dtype) -> Tensor:
        """Move the output state on, in place where the codes are bytes."""
        code, state = update.codes[0] if update.codes else None, memory.output
        if not isinstance(code, ByteCode) or not isinstance(state, State):
            state = memory.output = self.started(update, state if isinstance(state, State) else None)
            return state.value.to(dtype, copy=True)
        if update.intra is not None:
            start = torch.as_tensor(self.operator.start(), dtype=state.value.dtype, device=state.value.device)
            torch.where(update.intra, start, state.value, out=state.value)
        *others, (kernel, codes) = zip(self.kernels, code.runs, strict=True)
        if not update.weights:
            for other, sent in others:
                other.accumulate(state.value, *sent)
            return kernel.step(state.value, *codes, dtype)
        # the move takes what is sent, ô_t - ô_{t+1} = g (ô_{t+1} - ô_{t+2}) + A_q(q_t), and the state takes the move
        move = state.moves[0].mul_(*update.weights) if state.moves else torch.zeros_like(state.value)
        if update.intra is not None:
            move.masked_fill_(update.intra, 0.0)
        for other, sent in (*others, (kernel, codes)):
            other.accumulate(move, *sent)
        memory.output = State(state.value.add_(move), (move,))
        if update.intra is not None:
            move.masked_fill_(update.intra, 0.0)
        return state.value.to(dtype, copy=True)

    def started(self, update: Update, state: State | None) -> State:
        """The next output state as the simulation has it, in the memory layout that kernels add into."""
        state = accumulate(update, state, self.operator, self.modulation)
        if self.spec.channel_dim == -1:
            return state
        return State(innermost(state.value), tuple(innermost(move) for move in state.moves))

    def plain(self, x: Tensor, fusion: InputFusion | None) -> Tensor:
        """A_q(quantize(x)) + bias without memory. Raises: CalibrationError as the quantizer does."""
        quantizer, kernels, dtype = self.quantizer, self.kernels, x.dtype
        if quantizer is None or quantizer.watching:
            return super().plain(x, fusion)
        if fusion is None or not self.spec.fuses(fusion.norm, x.device):
            x, fusion = self.spec.prepared(x, fusion), None
        scales, total = quantizer.scales(x), None
        for i, ((run, fused), kernel) in enumerate(zip(runs_of(x, fusion, quantizer), kernels, strict=True)):
            codes, scale, _ = encode_run(run, fused, None, quantizer, None if scales is None else scales[i])
            if total is None:
                total = kernel.compute(codes, scale, self.operator.bias, dtype if len(kernels) == 1 else torch.float32)
            else:
                kernel.accumulate(total, codes, scale)
        return torch.as_tensor(total).to(dtype)

    def _kernel(self, inputs: int, codes: Codes) -> Kernel:
        weight, scale = codes
        problem = self._problem(inputs, len(weight), weight.device.type, largest_weight_code(weight))
        return Kernel(problem, weight, scale.to(torch.float32))

    def _problem(self, inputs: int, outputs: int, device: str, weight_max: int) -> Problem:
        spec, bits = self.spec, self.spec.config.activation.bits or 8
        geometry = spec.kernel_size, spec.stride, spec.padding, spec.dilation, spec.groups
        return Problem(inputs, outputs, *geometry, bits=bits, weight_max=weight_max, device=device)


def _equal(one: Codes, other: Codes) -> bool:
    pairs = zip(one, other, strict=True)
    return all((a.device, a.dtype) == (b.device, b.dtype) and torch.equal(a, b) for a, b in pairs)
