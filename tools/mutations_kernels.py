"""Deliberate bugs in the kernels: dispatch, backends, caches, the input side and the output side."""

from __future__ import annotations

from mutation import Mutation

KERNELS: tuple[Mutation, ...] = (
    Mutation(
        file="src/modiff/kernels/dispatch.py",
        old="    pair = 2 * problem.largest_byte * problem.weight_max\n    if pair <= _INT16",
        new="    pair = problem.largest_byte * problem.weight_max\n    if pair <= _INT16",
        tests=("tests/kernels/test_dispatch.py",),
        why="processors without VNNI saturate pairs of products, silently",
    ),
    Mutation(
        file="src/modiff/kernels/dispatch.py",
        old="(isa.sums_in_int32 and trust.full)",
        new="isa.sums_in_int32",
        tests=("tests/kernels/test_dispatch.py",),
        why="a machine that says VNNI and saturates is believed",
    ),
    Mutation(
        file="src/modiff/kernels/dispatch.py",
        old="    if not trust.bounded:",
        new="    if False:",
        tests=("tests/kernels/test_dispatch.py",),
        why="oneDNN runs although it failed the self-test",
    ),
    Mutation(
        file="src/modiff/kernels/isa.py",
        old='    "AVX2": ("avx2", "sse41"),',
        new='    "AVX2": ("avx2_vnni", "avx2", "sse41"),',
        tests=("tests/kernels/test_isa.py",),
        why="a limit without VNNI is taken for one with it",
    ),
    Mutation(
        file="src/modiff/kernels/self_test.py",
        old="        codes[0] //= 2\n",
        new="        codes //= 2\n",
        tests=("tests/kernels/test_self_test.py",),
        why="the self-test never saturates, so every machine passes",
    ),
    Mutation(
        file="src/modiff/kernels/problem.py",
        old="return 2 ** (self.bits - 1)",
        new="return 128",
        tests=("tests/kernels/test_dispatch.py",),
        why="few-bit codes take the full byte range and lose the integer path without VNNI",
    ),
    Mutation(
        file="src/modiff/kernels/float_exact.py",
        old="EXACT = 2**24",
        new="EXACT = 2**27",
        tests=("tests/kernels/test_backends.py",),
        why="long sums are rounded to float32",
    ),
    Mutation(
        file="src/modiff/kernels/float_exact.py",
        old="    return torch.ops.aten.mkldnn_convolution(\n"
        "        values, weight, None, geometry.padding, geometry.stride, "
        "geometry.dilation, geometry.groups\n    )",
        new="    return functional.conv2d(values, weight, None, geometry.stride, geometry.padding, geometry.dilation, "
        "geometry.groups) if geometry.axes == 2 else functional.conv1d(values, weight, None, geometry.stride, "
        "geometry.padding, geometry.dilation, geometry.groups)",
        tests=("tests/kernels/test_backends.py",),
        why="with oneDNN switched off, Winograd's algorithm rounds the sums",
    ),
    Mutation(
        file="src/modiff/kernels/nibbles.py",
        old="(signed << 4) >> 4, signed >> 4",
        new="signed >> 4, (signed << 4) >> 4",
        tests=("tests/kernels/test_backends.py",),
        why="the two codes of a byte change places",
    ),
    Mutation(
        file="src/modiff/kernels/ops.py",
        old="    if {*geometry.stride, *call.shape[2:]} != {1}:\n        return call, output\n",
        new="    if {*call.shape[2:]} != {1}:\n        return call, output\n",
        tests=("tests/kernels/test_backends.py",),
        why="a strided 1x1 convolution runs as a matmul over all pixels",
    ),
    Mutation(
        file="src/modiff/kernels/ops.py",
        old="        output.copy_(bias.reshape(-1, *[1] * geometry.axes).expand_as(output))",
        new="        output.zero_()",
        tests=("tests/kernels/test_backends.py",),
        why="the plain form loses its bias",
    ),
    Mutation(
        file="src/modiff/kernels/prepacked.py",
        old="        if found is None or found[0] != version:",
        new="        if found is None:",
        tests=("tests/kernels/test_prepacked.py",),
        why="a weight written in place goes on with its old codes",
    ),
    Mutation(
        file="src/modiff/kernels/prepacked.py",
        old="            del self._shelves[address]",
        new="            pass",
        tests=("tests/kernels/test_prepacked.py",),
        why="prepared weights outlive their model",
    ),
    Mutation(
        file="src/modiff/kernels/kernel.py",
        old="return int(codes.to(torch.int16).abs().max())",
        new="return int(codes.abs().max())",
        tests=("tests/kernels/test_backends.py",),
        why="|-128| is -128 in int8: the bound against saturation fails",
    ),
    Mutation(
        file="src/modiff/kernels/csrc/loops.h",
        old="  float q = __builtin_rintf(x);",
        new="  float q = __builtin_floorf(x + 0.5f);",
        tests=("tests/kernels/test_prologue.py",),
        why="ties go up instead of to even: other codes than the core's",
    ),
    Mutation(
        file="src/modiff/kernels/csrc/loops.h",
        old="  q = q == q ? q : 0.0f;",
        new="  q = q == q ? q : lowest;",
        tests=("tests/kernels/test_prologue.py",),
        why="a NaN is sent as the lowest code",
    ),
    Mutation(
        file="src/modiff/kernels/csrc/loops.h",
        old="    q = q > most ? most : q;\n",
        new="",
        tests=("tests/kernels/test_fixed_point.py",),
        why="an integer state wraps around while its code is sent whole",
    ),
    Mutation(
        file="src/modiff/kernels/csrc/prologue.cpp",
        old="step < ratio; ++shift",
        new="step * 2.0f < ratio; ++shift",
        tests=("tests/kernels/test_fixed_point.py",),
        why="scales are rounded down: twice the clipping that was asked for",
    ),
    Mutation(
        file="src/modiff/kernels/native.py",
        old='"-ffp-contract=off", ',
        new='"-ffp-contract=fast", ',
        tests=("tests/kernels/test_prologue.py",),
        why="fused multiply-adds give states that are not the core's",
    ),
    Mutation(
        file="src/modiff/kernels/csrc/norm.cpp",
        old="    run(w, [&](int64_t s) { return Plane<X, Activation>{at(s), w.a[s], w.b[s]}; });",
        new="    run(w, [&](int64_t s) { return Plane<X, Activation>{at(s), w.a[0], w.b[s]}; });",
        tests=("tests/kernels/test_after.py",),
        why="every plane is normalized as the first",
    ),
    Mutation(
        file="src/modiff/kernels/csrc/epilogue.cpp",
        old="    clipped += n != held;",
        new="",
        tests=("tests/kernels/test_epilogue.py",),
        why="an integer output state saturates and nobody knows",
    ),
)
