"""Deliberate bugs in the modulated layers: states, streams, clock, weights."""

from __future__ import annotations

from mutation import Mutation

NN: tuple[Mutation, ...] = (
    Mutation(
        file="src/modiff/nn/layer.py",
        old="output = self.outputs[key].value.to(x.dtype, copy=True)",
        new="output = self.outputs[key].value.to(x.dtype)",
        tests=("tests/nn/test_linear.py",),
        why="a model that changes the layer's output in place changes our output state",
    ),
    Mutation(
        file="src/modiff/nn/layer.py",
        old="self.quantized_weight.dense(self.weight, value.dtype), None)",
        new="self.quantized_weight.dense(self.weight, value.dtype), self.bias)",
        tests=("tests/nn/test_linear.py",),
        why="the bias is added again at every step",
    ),
    Mutation(
        file="src/modiff/nn/layer.py",
        old='return "token" if self.channel_dim == -1 else "sample"',
        new='return "sample"',
        tests=("tests/nn/test_linear.py",),
        why="linear layers lose their scale per token",
    ),
    Mutation(
        file="src/modiff/nn/layer.py",
        old="self._calls = self._calls + 1 if self._tick == clock.tick else 0",
        new="self._calls = 0",
        tests=("tests/nn/test_layer.py",),
        why="a layer called twice in an evaluation differences one call against the other",
    ),
    Mutation(
        file="src/modiff/nn/layer.py",
        old="return clock.context, self._calls",
        new='return "default", self._calls',
        tests=("tests/nn/test_layer.py",),
        why="the branches of guidance share one state",
    ),
    Mutation(
        file="src/modiff/nn/layer.py",
        old="        self.outputs.clear()\n",
        new="",
        tests=("tests/nn/test_layer.py",),
        why="output states outlive the trajectory",
    ),
    Mutation(
        file="src/modiff/nn/layer.py",
        old="        if stream.count != seen + 1 and not message.starts:",
        new="        if False:",
        tests=("tests/nn/test_stream.py",),
        why="a group member that was skipped goes on with a message missing",
    ),
    Mutation(
        file="src/modiff/nn/layer.py",
        old="        self.quantized_weight.forget()\n",
        new="",
        tests=("tests/nn/test_weight.py",),
        why="a LoRA fused between two generations has no effect",
    ),
    Mutation(
        file="src/modiff/nn/conv.py",
        old="return self.in_channels, self.groups, self.kernel_size",
        new="return self.in_channels, 1, self.kernel_size",
        tests=("tests/nn/test_conv.py",),
        why="grouped convolutions are rotated across their groups",
    ),
    Mutation(
        file="src/modiff/nn/stream.py",
        old="return source() is x and version == version_of(x)",
        new="return source() is x",
        tests=("tests/nn/test_stream.py",),
        why="a tensor changed in place between two readers passes as the one that was coded",
    ),
    Mutation(
        file="src/modiff/nn/stream.py",
        old="if every and self.clock.step % every == 0:",
        new="if every and self.clock.step % every == 1:",
        tests=("tests/nn/test_stream.py",),
        why="states anchor again one step late",
    ),
    Mutation(
        file="src/modiff/nn/stream.py",
        old="self._held != (x.shape, x.device):",
        new="self._held[1] != x.device:",
        tests=("tests/nn/test_stream.py",),
        why="a batch that shrinks to one inside a trajectory broadcasts against old states",
    ),
    Mutation(
        file="src/modiff/nn/clock.py",
        old="            context.step += 1",
        new="            context.step = self.tick - 1",
        tests=("tests/nn/test_clock.py",),
        why="re-anchoring counts the evaluations of all contexts",
    ),
    Mutation(
        file="src/modiff/nn/weight.py",
        old="key = (weight.data_ptr(), version,",
        new="key = (weight.data_ptr(),",
        tests=("tests/nn/test_weight.py",),
        why="a weight changed in place keeps its old codes",
    ),
    Mutation(
        file="src/modiff/nn/clock.py",
        old="size, previous = (now - last).abs(), (last - before).abs()",
        new="previous, size = (now - last).abs(), (last - before).abs()",
        tests=("tests/nn/test_clock.py",),
        why="the step size ratio is upside down",
    ),
    Mutation(
        file="src/modiff/nn/weight.py",
        old="observer.observe(part)",
        new="observer.observe(values)",
        tests=("tests/nn/test_weight.py",),
        why="the two halves of a split weight share one scale",
    ),
)
