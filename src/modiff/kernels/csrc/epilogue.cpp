// The output side behind a matmul in one pass over memory: the scale of each row, the sum into the state, and the
// layer's output in the dtype of the model.
//
//     state += scale[row] * sent                                     float states
//     n     += round(scale[row] * sent / grid), state = n * grid     integer states; what leaves 16 bits is counted
//     out    = state                                                 NaN where `sent` is

#include <cstdint>

#include "loops.h"

namespace {

using namespace modiff;

template <class Out>
void add(float* __restrict state, const float* __restrict sent, Out* __restrict out, float scale, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = state[i] + scale * sent[i];
    state[i] = value;
    store(out, i, value);
  }
}

template <class Out>
int32_t add(int16_t* __restrict state, const float* __restrict sent, Out* __restrict out, float scale, float grid,
            int64_t count) {
  const float share = 1.0f / grid;  // exact, as the grid is a power of two
  int32_t clipped = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float step = scale * sent[i];
    int32_t cut;
    const float n = moved_on(state[i], step * share, &cut);
    clipped += cut;
    state[i] = static_cast<int16_t>(static_cast<int32_t>(n));
    store(out, i, step == step ? n * grid : step);
  }
  return clipped;
}

// Calls run(row, at, size) for pieces of rows that one task works on.
template <class Run>
void pieces(int64_t rows, int64_t count, int threads, Run run) {
  const int64_t each = (count + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * count >= kParallel)
  for (int64_t task = 0; task < rows * each; ++task) {
    const int64_t start = task % each * kBlock, row = task / each;
    run(row, row * count + start, count - start < kBlock ? count - start : kBlock);
  }
}

template <class Out>
void choose(void* state, const float* grid, const float* sent, const float* scale, Out* out, int32_t* clipped,
            int64_t rows, int64_t count, int threads) {
  if (grid == nullptr) {
    float* values = static_cast<float*>(state);
    pieces(rows, count, threads, [=](int64_t row, int64_t at, int64_t size) {
      add(values + at, sent + at, out + at, scale[row], size);
    });
    return;
  }
  int16_t* values = static_cast<int16_t*>(state);
  pieces(rows, count, threads, [=](int64_t row, int64_t at, int64_t size) {
    const int32_t found = add(values + at, sent + at, out + at, scale[row], *grid, size);
    if (found != 0) {
      __atomic_fetch_add(clipped, found, __ATOMIC_RELAXED);
    }
  });
}

}  // namespace

extern "C" {

// state: float where grid is null, else int16 in units of *grid. out: float (kind 0) or bfloat16 (kind 1).
void modiff_epilogue(void* state, const float* grid, const float* sent, const float* scale, void* out, int32_t kind,
                     int32_t* clipped, int64_t rows, int64_t count, int32_t threads) {
  kind == 0 ? choose(state, grid, sent, scale, static_cast<float*>(out), clipped, rows, count, threads)
            : choose(state, grid, sent, scale, static_cast<Bf16*>(out), clipped, rows, count, threads);
}
}
