// A linear layer or convolution on codes, with the output side in the tile: no pass over memory of its own.
//
//     sent   = float(sum (code - zero) w) * weight scale * scale           zero * sum w is taken off each sum
//     state += sent, out = state                                           or n += round(sent / grid), out = n * grid
//     out    = bias + sent                                                 layers without memory
//
// Rows whose codes are all zero are left out of the product, where a kernel has one tap; their sums are zero.
//
// Codes lie as pixels with their channels innermost; a linear layer is one row of pixels with a kernel of one tap.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "loops.h"
#include "tile.h"

namespace {

using namespace modiff;

constexpr int64_t kResident = 192 << 10;  // bytes of codes that stay in the second cache while all weights pass by
constexpr int64_t kMostRows = 40 * kRows;
constexpr int64_t kSmall = 1 << 20;       // products below which one thread is faster

struct Shape {
  int64_t samples, height, width, groups, inputs, outputs;  // channels of a group
  int64_t out_height, out_width, stride_y, stride_x, pad_y, pad_x;
  int64_t padded() const { return (inputs + 3) / 4 * 4; }   // whole groups of inputs
  int64_t tall() const { return height + 2 * pad_y; }
  int64_t broad() const { return width + 2 * pad_x; }
  int64_t pixels() const { return samples * out_height * out_width; }
};

enum Mode : int32_t { kSums, kAccumulate, kStep, kCompute };

struct Output {
  Mode mode;
  void* state;           // float; int16 in units of grid where `clipped` counts what leaves 16 bits
  float grid, share;     // a power of two, and its inverse
  int32_t* clipped;
  const int32_t* zeros;  // zero * sum of the weights, for each output
  const float* weight_scale;
  const float* scale;
  int64_t each;          // pixels that share a scale
  const float* bias;
  void* out;
};

inline void copy(const uint8_t* from, uint8_t* to, int64_t count, int32_t) { std::memcpy(to, from, count); }
inline void copy(const uint8_t* __restrict from, int16_t* __restrict to, int64_t count, int32_t zero) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = static_cast<int16_t>(from[i] - zero);
  }
}

// Rows of codes as tiles read them: padded by the zero point (or widened to int16 and zero), whole groups of channels.
template <bool wide>
void lay(const uint8_t* codes, const Shape& s, int32_t zero, void* laid, int threads) {
  using Code = std::conditional_t<wide, int16_t, uint8_t>;
  const int64_t padded = s.padded(), line = s.broad() * s.groups * padded;
  const Code fill = wide ? 0 : static_cast<Code>(zero);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t y = 0; y < s.samples * s.tall(); ++y) {
    Code* to = static_cast<Code*>(laid) + y * line;
    const int64_t inside = y % s.tall() - s.pad_y;
    if (inside < 0 || inside >= s.height) {
      std::fill(to, to + line, fill);
      continue;
    }
    const int64_t blocks = s.width * s.groups, inputs = s.inputs;  // bytes may alias `s`: read it once
    const uint8_t* from = codes + (y / s.tall() * s.height + inside) * blocks * inputs;
    const int64_t edge = s.pad_x * s.groups * padded;
    std::fill(to, to + edge, fill);
    std::fill(to + line - edge, to + line, fill);
    to += edge;
    if (padded == inputs) {
      copy(from, to, blocks * inputs, zero);
      continue;
    }
    for (int64_t block = 0; block < blocks; ++block, from += inputs, to += padded) {
      copy(from, to, inputs, zero);
      std::fill(to + inputs, to + padded, fill);
    }
  }
}

// One pixel's outputs of a tile; `columns` of them exist, and `at` is the first in all tensors of pixels.
template <class Out>
void finish(const Output& o, const int32_t* sums, int64_t first, float scale, int64_t at, int columns,
            int32_t* __restrict clipped) {
  const int32_t* zeros = o.zeros + first;
  if (o.mode == kSums) {
    for (int c = 0; c < columns; ++c) {
      static_cast<int32_t*>(o.out)[at + c] = sums[c] - zeros[c];
    }
    return;
  }
  const float* __restrict weights = o.weight_scale + first;
  float sent[kOutputs];
  for (int c = 0; c < columns; ++c) {
    sent[c] = static_cast<float>(sums[c] - zeros[c]) * weights[c] * scale;
  }
  Out* __restrict out = static_cast<Out*>(o.out) + at;
  if (o.mode == kCompute) {
    const float* bias = o.bias;
    for (int c = 0; c < columns; ++c) {
      store(out, c, (bias == nullptr ? 0.0f : bias[first + c]) + sent[c]);
    }
  } else if (o.clipped == nullptr) {
    float* __restrict state = static_cast<float*>(o.state) + at;
    if (o.mode == kStep) {
      for (int c = 0; c < columns; ++c) {
        state[c] += sent[c];
        store(out, c, state[c]);
      }
    } else {
      for (int c = 0; c < columns; ++c) {
        state[c] += sent[c];
      }
    }
  } else {
    int16_t* __restrict state = static_cast<int16_t*>(o.state) + at;
    const float grid = o.grid, share = o.share;
    if (scale - scale == 0.0f) {  // then what is sent is no NaN
      for (int c = 0; c < columns; ++c) {
        int32_t cut;
        const float n = moved_on<true>(state[c], sent[c] * share, &cut);
        clipped[c] += cut;
        state[c] = static_cast<int16_t>(static_cast<int32_t>(n));
        store_number(out, c, n * grid);
      }
      return;
    }
    for (int c = 0; c < columns; ++c) {
      int32_t cut;
      const float n = moved_on(state[c], sent[c] * share, &cut);
      clipped[c] += cut;
      state[c] = static_cast<int16_t>(static_cast<int32_t>(n));
      store(out, c, sent[c] == sent[c] ? n * grid : sent[c]);
    }
  }
}

// Whether all bytes of a row, four or more, have this value; the first four tell in nearly every case.
inline bool silent(const uint8_t* row, int64_t size, uint8_t value) {
  return read<uint32_t>(row) == value * 0x01010101u && std::memcmp(row, row + 1, size - 1) == 0;
}

// Two 4-bit codes in a byte: the low halves are the first half of a group's weights.
void unpack(const int8_t* halves, int64_t groups, int8_t* weights) {
  constexpr int kHalf = 2 * kOutputs;
  for (int64_t g = 0; g < groups; ++g, halves += kHalf, weights += 2 * kHalf) {
    for (int i = 0; i < kHalf; ++i) {
      weights[i] = static_cast<int8_t>(((halves[i] & 15) ^ 8) - 8);
      weights[kHalf + i] = static_cast<int8_t>(halves[i] >> 4);
    }
  }
}

template <bool wide, class Out>
void run(const uint8_t* laid, const Shape& s, int32_t zero, const Stretch* stretches, int64_t count,
         const int8_t* weights, bool halves, const Output& o, int threads) {
  const int64_t bytes = wide ? 2 : 1, pitch = s.groups * s.padded() * bytes, pixels = s.pixels();
  int64_t summed = 0;  // groups of inputs
  for (int64_t i = 0; i < count; ++i) {
    summed += stretches[i].groups;
  }
  const int64_t size = summed * kOutputs * (wide ? 2 : 4), tiles = (s.outputs + kOutputs - 1) / kOutputs;
  const bool one_tap = summed * (wide ? 2 : 4) == s.padded();
  int64_t block = std::clamp<int64_t>(kResident / (s.padded() * bytes), kRows, kMostRows) / kRows * kRows;
  const int64_t parts = threads > 1 ? 2 * threads : 1;
  if (pixels < parts * block) {  // a share for each thread
    block = std::max<int64_t>((pixels + parts * kRows - 1) / (parts * kRows), 1) * kRows;
  }
  const int64_t blocks = (pixels + block - 1) / block;
  const int64_t splits = std::min<int64_t>(tiles, (parts + blocks - 1) / blocks), tasks = blocks * s.groups * splits;
  int32_t clipped = 0;
#pragma omp parallel num_threads(threads) if (threads > 1 && pixels * s.outputs * summed > kSmall / 4) reduction(+ : clipped)
  {
    std::vector<const uint8_t*> rows(block);
    std::vector<int64_t> numbers(block);  // of the rows: those with a code first, silent ones behind them
    std::vector<float> scales(block);
    std::vector<int8_t> whole(halves ? size : 0);
    alignas(64) int32_t sums[kRows * kOutputs], cut[kOutputs] = {};
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t split = task % splits, group = task / splits % s.groups, begin = task / splits / s.groups * block;
      const int64_t end = std::min(begin + block, pixels);
      int64_t x = begin % s.out_width, y = begin / s.out_width % s.out_height, n = begin / s.out_width / s.out_height;
      int64_t loud = 0, rest = end - begin;
      for (int64_t m = begin; m < end; ++m) {
        const uint8_t* row = laid + ((n * s.tall() + y * s.stride_y) * s.broad() + x * s.stride_x) * pitch +
                             group * s.padded() * bytes;
        const bool out = one_tap && silent(row, s.padded() * bytes, wide ? 0 : static_cast<uint8_t>(zero));
        const int64_t slot = out ? --rest : loud++;
        rows[slot] = row;
        numbers[slot] = m - begin;
        scales[m - begin] = o.scale == nullptr ? 1.0f : o.scale[m / o.each];
        if (++x == s.out_width) {
          x = 0;
          if (++y == s.out_height) {
            y = 0;
            ++n;
          }
        }
      }
      for (int64_t t = tiles * split / splits; t < tiles * (split + 1) / splits; ++t) {
        const int64_t first = group * s.outputs + t * kOutputs;
        const int columns = static_cast<int>(std::min<int64_t>(kOutputs, s.outputs - t * kOutputs));
        const int8_t* w = weights + (group * tiles + t) * (halves ? size / 2 : size);
        if (halves && loud > 0) {
          unpack(w, summed, whole.data());
          w = whole.data();
        }
        const auto end_of = [&](int64_t slot, const int32_t* from) {
          const int64_t at = (begin + numbers[slot]) * s.groups * s.outputs + first;
          const float scale = scales[numbers[slot]];
          if (columns == kOutputs) {
            finish<Out>(o, from, first, scale, at, kOutputs, cut);
          } else {
            finish<Out>(o, from, first, scale, at, columns, cut);
          }
        };
        for (int64_t slot = 0; slot < loud; slot += kRows) {
          const int64_t some = std::min<int64_t>(kRows, loud - slot);
          tile_of<wide>(some, rows.data() + slot, stretches, count, w, sums);
          for (int64_t r = 0; r < some; ++r) {
            end_of(slot + r, sums + r * kOutputs);
          }
        }
        for (int64_t slot = loud; slot < end - begin; ++slot) {
          end_of(slot, o.zeros + first);
        }
      }
    }
    for (int c = 0; c < kOutputs; ++c) {
      clipped += cut[c];
    }
  }
  if (clipped != 0 && o.clipped != nullptr) {
    __atomic_fetch_add(o.clipped, clipped, __ATOMIC_RELAXED);
  }
}

}  // namespace

extern "C" {

// 0 plain C++, 1 AVX2, 2 AVX-VNNI, 3 AVX-512 VNNI.
int32_t modiff_family() { return kFamily; }

// Outputs of a tile of weights.
int32_t modiff_outputs() { return kOutputs; }

// shape: as `Shape`. stretches: (offset in bytes, groups, flush) triples. pointers: of the output, null where its mode
// has none. Codes are read as they lie where nothing pads them, groups of inputs are whole and they are not widened.
void modiff_product(const uint8_t* codes, const int64_t* shape, int32_t zero, int32_t wide,
                    const int64_t* stretches, int64_t count, const int8_t* weights, int32_t halves, int32_t mode,
                    void* state, const float* grid, int32_t* clipped, const int32_t* zeros, const float* weight_scale,
                    const float* scale, int64_t each, const float* bias, void* out, int32_t kind, int32_t threads) {
  Shape s;
  std::copy(shape, shape + 12, &s.samples);
  std::vector<Stretch> list(count);
  for (int64_t i = 0; i < count; ++i) {
    list[i] = {stretches[3 * i], static_cast<int32_t>(stretches[3 * i + 1]), static_cast<int32_t>(stretches[3 * i + 2])};
  }
  const float unit = grid == nullptr ? 1.0f : *grid;
  const Output o{static_cast<Mode>(mode), state, unit, 1.0f / unit, clipped, zeros, weight_scale, scale, each, bias, out};
  thread_local std::vector<uint8_t> laid;  // kept: fresh memory for each call costs as much as the copy
  const uint8_t* from = codes;
  if (wide || s.pad_y > 0 || s.pad_x > 0 || s.padded() != s.inputs) {
    const size_t size = s.samples * s.tall() * s.broad() * s.groups * s.padded() * (wide ? 2 : 1);
    laid.resize(std::max(laid.size(), size));
    wide ? lay<true>(codes, s, zero, laid.data(), threads) : lay<false>(codes, s, zero, laid.data(), threads);
    from = laid.data();
  }
  const auto start = [&](auto wider) {
    kind == 0 ? run<wider.value, float>(from, s, zero, list.data(), count, weights, halves != 0, o, threads)
              : run<wider.value, Bf16>(from, s, zero, list.data(), count, weights, halves != 0, o, threads);
  };
  wide ? start(std::true_type{}) : start(std::false_type{});
}
}
