// Mean and 1 / sqrt(variance + eps) in one pass: sums of x - pivot and of its square, where the pivot is an element of
// the data, so that large means cost no digits. Floats add up within a block, doubles the blocks.

#pragma once

#include "loops.h"

#if defined(__FMA__)
#define MODIFF_FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define MODIFF_FMA(a, b, c) ((a) * (b) + (c))
#endif

namespace modiff {

constexpr int64_t kSummed = 1024;  // elements of a lane's block, at most: 64 a lane
constexpr int64_t kPixels = 32;    // pixels of a block
constexpr int64_t kLanes = 16;
constexpr int64_t kWide = 256;     // channels that are added up at a time: sums stay in the first cache

// Sums of d = x - pivot and d^2 over a run.
template <class X>
void summed(const X* x, int64_t count, float pivot, double* first, double* second) {
  double one = 0.0, two = 0.0;
  for (int64_t begin = 0; begin < count; begin += kSummed) {
    const int64_t end = count - begin < kSummed ? count : begin + kSummed;
    float lane1[kLanes] = {}, lane2[kLanes] = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const float d = load(x[i + lane]) - pivot;
        lane1[lane] += d;
        lane2[lane] = MODIFF_FMA(d, d, lane2[lane]);
      }
    }
    for (; i < end; ++i) {
      const float d = load(x[i]) - pivot;
      lane1[0] += d;
      lane2[0] = MODIFF_FMA(d, d, lane2[0]);
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      one += static_cast<double>(lane1[lane]);
      two += static_cast<double>(lane2[lane]);
    }
  }
  *first = one;
  *second = two;
}

// Of runs that lie side by side.
template <class X>
void moments(const X* x, int64_t runs, int64_t count, float eps, float* mean, float* rstd, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && runs * count >= kParallel)
  for (int64_t run = 0; run < runs; ++run) {
    const X* from = x + run * count;
    const float pivot = load(from[0]);
    double first, second;
    summed(from, count, pivot, &first, &second);
    const double off = first / static_cast<double>(count);
    const double variance = second / static_cast<double>(count) - off * off;
    mean[run] = static_cast<float>(static_cast<double>(pivot) + off);
    rstd[run] = static_cast<float>(1.0 / __builtin_sqrt((variance < 0.0 ? 0.0 : variance) + eps));
  }
}

// samples of `pixels` pixels, the channels of a pixel side by side; a sample is added up in `pieces`.
struct Groups {
  int64_t samples, pixels, channels, groups, pieces;
  float eps;
};

// Sums of d = x - pivot[c] and d^2 for each channel over pixels [begin, end).
template <class X>
void channel_sums(const X* x, const X* pivot, int64_t channels, int64_t begin, int64_t end, double* one, double* two) {
  for (int64_t c = 0; c < channels; ++c) {
    one[c] = two[c] = 0.0;
  }
  for (int64_t left = 0; left < channels; left += kWide) {
    const int64_t wide = channels - left < kWide ? channels - left : kWide;
    for (int64_t block = begin; block < end; block += kPixels) {
      const int64_t stop = end - block < kPixels ? end : block + kPixels;
      float first[kWide] = {}, second[kWide] = {};
      for (int64_t p = block; p < stop; ++p) {
        const X* pixel = x + p * channels + left;
        for (int64_t c = 0; c < wide; ++c) {
          const float d = load(pixel[c]) - load(pivot[left + c]);
          first[c] += d;
          second[c] = MODIFF_FMA(d, d, second[c]);
        }
      }
      for (int64_t c = 0; c < wide; ++c) {
        one[left + c] += static_cast<double>(first[c]);
        two[left + c] += static_cast<double>(second[c]);
      }
    }
  }
}

// Joins the channels of each group: sum (x - m)^2 = sum d^2 - 2 (m - pivot) sum d + count (m - pivot)^2.
template <class X>
void join(const Groups& g, const X* pivot, const double* one, const double* two, float* mean, float* rstd) {
  const int64_t each = g.channels / g.groups, step = 2 * g.channels;
  const double pixels = static_cast<double>(g.pixels), count = pixels * static_cast<double>(each);
  for (int64_t group = 0; group < g.groups; ++group) {
    double total = 0.0, square = 0.0;
    for (int64_t c = group * each; c < (group + 1) * each; ++c) {
      total += pixels * static_cast<double>(load(pivot[c]));
      for (int64_t piece = 0; piece < g.pieces; ++piece) {
        total += one[piece * step + c];
      }
    }
    const double middle = total / count;
    for (int64_t c = group * each; c < (group + 1) * each; ++c) {
      const double off = middle - static_cast<double>(load(pivot[c]));
      square += pixels * off * off;
      for (int64_t piece = 0; piece < g.pieces; ++piece) {
        square += two[piece * step + c] - 2.0 * off * one[piece * step + c];
      }
    }
    mean[group] = static_cast<float>(middle);
    rstd[group] = static_cast<float>(1.0 / __builtin_sqrt((square < 0.0 ? 0.0 : square) / count + g.eps));
  }
}

// Of groups of channels. sums: 2 * samples * pieces * channels doubles of scratch.
template <class X>
void grouped_moments(const X* x, const Groups& g, double* sums, float* mean, float* rstd, int32_t threads) {
  const int64_t tasks = g.samples * g.pieces, size = g.pixels * g.channels;
  const bool parallel = threads > 1 && g.samples * size >= kParallel;
#pragma omp parallel for num_threads(threads) if (parallel)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t n = task / g.pieces, piece = task % g.pieces;
    const X* from = x + n * size;
    double* one = sums + task * 2 * g.channels;
    channel_sums(from, from, g.channels, g.pixels * piece / g.pieces, g.pixels * (piece + 1) / g.pieces, one,
                 one + g.channels);
  }
  for (int64_t n = 0; n < g.samples; ++n) {
    const double* one = sums + n * g.pieces * 2 * g.channels;
    join(g, x + n * size, one, one + g.channels, mean + n * g.groups, rstd + n * g.groups);
  }
}

// (x - mean) rstd weight + bias = a x + b for each channel; weight and bias may be null.
template <class W>
void lines_of(const Groups& g, const float* mean, const float* rstd, const W* weight, const W* bias, float* a,
              float* b) {
  const int64_t each = g.channels / g.groups;
  for (int64_t n = 0; n < g.samples; ++n) {
    for (int64_t c = 0; c < g.channels; ++c) {
      const int64_t i = n * g.channels + c, group = n * g.groups + c / each;
      a[i] = rstd[group] * (weight == nullptr ? 1.0f : load(weight[c]));
      b[i] = (bias == nullptr ? 0.0f : load(bias[c])) - mean[group] * a[i];
    }
  }
}

}  // namespace modiff
