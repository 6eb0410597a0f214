// The input side of a modulated layer in one pass over memory (two with a dynamic scale):
//
//     residual  r = x - p,  p = state  or  p = state + gain * move  or  p = grid * integer state  or  p = 0
//     scale     s = max(factor * max|r|, 1e-12)                      dynamic only, one for each row
//     code      q = clamp(round(r / s), lowest, highest)             ties to even; NaN codes to 0
//     state     p + q * s,  move = new state - old state

#include <algorithm>
#include <memory>

#include "loops.h"

namespace {

using namespace modiff;

inline Nothing moved(const Nothing& s, int64_t) { return s; }
inline Hold moved(const Hold& s, int64_t at) { return {s.state + at}; }
inline Linear moved(const Linear& s, int64_t at) { return {s.state + at, s.move + at, s.gain}; }
inline Fixed moved(const Fixed& s, int64_t at) { return {s.state + at, s.grid, s.multiple, s.clipped}; }

template <class X, class State>
bool run(const X* x, const State& state, uint8_t* codes, float* scale, uint32_t* partial, int64_t rows, int64_t count,
         int64_t samples, bool dynamic, float factor, float unsent, int32_t lowest, int32_t highest, int threads) {
  const bool compared = dynamic && State::kept;
  const float measured = dynamic ? factor : 0.0f;
  const std::unique_ptr<uint32_t[]> reach(compared ? new uint32_t[rows]() : nullptr);
  const auto jumps = [&] {
    return compared && may_jump(scale, reach.get(), rows, samples, factor, unsent, smallest(state));
  };
  const bool parallel = threads > 1 && rows * count >= kParallel;
  if (count <= kBlock) {  // a row stays in the cache between its two passes
#pragma omp parallel for num_threads(threads) if (parallel)
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = row * count;
      const Plain<X> source{x + at};
      const State held = moved(state, at);
      if (dynamic) {
        scale[row] = finished(state, largest(source, held, count), factor);
      }
      const uint32_t bits =
          code(source, ready(held, scale[row]), codes + at, scale[row], lowest, highest, count, measured);
      if (compared) {
        reach[row] = bits;
      }
    }
    return jumps();
  }
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  if (dynamic) {
#pragma omp parallel for num_threads(threads) if (parallel)
    for (int64_t task = 0; task < rows * blocks; ++task) {
      const int64_t start = task % blocks * kBlock, at = task / blocks * count + start;
      partial[task] = largest(Plain<X>{x + at}, moved(state, at), count - start < kBlock ? count - start : kBlock);
    }
    for (int64_t row = 0; row < rows; ++row) {
      uint32_t found = 0;
      for (int64_t block = 0; block < blocks; ++block) {
        const uint32_t bits = partial[row * blocks + block];
        found = bits > found ? bits : found;
      }
      scale[row] = finished(state, found, factor);
    }
  }
#pragma omp parallel for num_threads(threads) if (parallel)
  for (int64_t task = 0; task < rows * blocks; ++task) {
    const int64_t start = task % blocks * kBlock, row = task / blocks, at = row * count + start;
    const uint32_t bits = code(Plain<X>{x + at}, ready(moved(state, at), scale[row]), codes + at, scale[row], lowest,
                               highest, count - start < kBlock ? count - start : kBlock, measured);
    if (compared) {
      partial[task] = bits;
    }
  }
  for (int64_t task = 0; compared && task < rows * blocks; ++task) {
    uint32_t& most = reach[task / blocks];
    most = partial[task] > most ? partial[task] : most;
  }
  return jumps();
}

// n = round(x / grid), grid the least power of two above factor * max|x|; NaN, and n = 0, where x is not finite.
template <class X>
void begin(const X* x, int64_t count, float factor, int16_t* n, float* grid, int32_t threads) {
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  const bool parallel = threads > 1 && count >= kParallel;
  uint32_t found = 0;
#pragma omp parallel for num_threads(threads) if (parallel) reduction(max : found)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t at = block * kBlock;
    const uint32_t bits = largest(Plain<X>{x + at}, Nothing{}, count - at < kBlock ? count - at : kBlock);
    found = bits > found ? bits : found;
  }
  const float step = __builtin_bit_cast(float, found) * factor;
  int exponent = -100;
  if (step - step != 0.0f) {
    *grid = __builtin_nanf("");
    std::fill(n, n + count, int16_t{0});
    return;
  }
  if (step != 0.0f) {
    __builtin_frexpf(step, &exponent);
    exponent = exponent < -100 ? -100 : exponent > 100 ? 100 : exponent;
  }
  *grid = __builtin_ldexpf(1.0f, exponent);
  const float share = 1.0f / *grid;
#pragma omp parallel for num_threads(threads) if (parallel)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t end = (block + 1) * kBlock < count ? (block + 1) * kBlock : count;
    for (int64_t i = block * kBlock; i < end; ++i) {
      n[i] = static_cast<int16_t>(rounded<true>(load(x[i]) * share, -32768, 32767));
    }
  }
}

}  // namespace

extern "C" {

// Where a state of 16-bit integers starts: as `begin`.
void modiff_start(const void* x, int32_t kind, int64_t count, float factor, int16_t* n, float* grid, int32_t threads) {
  kind == 0 ? begin(static_cast<const float*>(x), count, factor, n, grid, threads)
            : begin(static_cast<const Bf16*>(x), count, factor, n, grid, threads);
}

// x: float (kind 0) or bfloat16 (kind 1). state: null for plain quantization, p = 0. grid: null for states of floats;
// else the state is 16-bit integers in units of *grid, a power of two, and given scales must be multiples of it: the
// number of codes that were cut to stay within 16 bits is added to *clipped. move: null for the "hold" predictor, else
// *gain is its weight. scale: one for each row, read unless `dynamic`. factor: clip / highest.
// Returns: whether one of the samples, which have equal numbers of rows, may jump; 0 with given scales or no state.
int32_t modiff_encode(const void* x, int32_t kind, void* state, float* move, const float* gain, const float* grid,
                   int32_t* clipped, uint8_t* codes, float* scale, uint32_t* partial, int64_t rows, int64_t count,
                   int64_t samples, int32_t dynamic, float factor, float unsent, int32_t lowest, int32_t highest,
                   int32_t threads) {
  const auto against = [&](const auto* values, const auto& held) {
    return run(values, held, codes, scale, partial, rows, count, samples, dynamic != 0, factor, unsent, lowest,
               highest, threads);
  };
  const auto start = [&](const auto* values) {
    if (state == nullptr) {
      return against(values, Nothing{});
    }
    if (grid != nullptr) {
      return against(values, Fixed{static_cast<int16_t*>(state), *grid, 0, clipped});
    }
    return move == nullptr ? against(values, Hold{static_cast<float*>(state)})
                           : against(values, Linear{static_cast<float*>(state), move, *gain});
  };
  return kind == 0 ? start(static_cast<const float*>(x)) : start(static_cast<const Bf16*>(x));
}
}
