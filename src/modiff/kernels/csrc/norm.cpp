// The input side with what stands before the layer computed on the way:
//
//     y = activation(x)                                              mode 0
//     y = activation(a[c] x + b[c])                                  mode 1: GroupNorm, channels innermost in memory
//     y = activation(a[plane] x + b[plane])                          mode 2: GroupNorm, a plane for each channel
//     y = activation((x - mean[t]) rstd[t] a[c] + b[c])              mode 3: LayerNorm and its modulation, t a token
//
// and y coded as in prologue.cpp. Statistics take a pass of their own. Norms and exponentials are not torch's, bit for
// bit: they are within float error, and what the codes miss stays in the residual as always.

#include "loops.h"

#if defined(__FMA__)
#define MODIFF_FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define MODIFF_FMA(a, b, c) ((a) * (b) + (c))
#endif

namespace {

using namespace modiff;

// exp(x) within 2 units in the last place for |x| <= 87, beyond that the value at the bound; NaN stays.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 87.0f ? 87.0f : x;
  const float whole = __builtin_rintf(x * 1.44269504088896341f);
  float rest = MODIFF_FMA(whole, -0.693359375f, x);
  rest = MODIFF_FMA(whole, 2.12194440e-4f, rest);
  float p = 1.9875691500e-4f;
  p = MODIFF_FMA(p, rest, 1.3981999507e-3f);
  p = MODIFF_FMA(p, rest, 8.3334519073e-3f);
  p = MODIFF_FMA(p, rest, 4.1665795894e-2f);
  p = MODIFF_FMA(p, rest, 1.6666665459e-1f);
  p = MODIFF_FMA(p, rest, 5.0000001201e-1f);
  p = MODIFF_FMA(p, rest * rest, rest) + 1.0f;
  const float number = whole == whole ? whole : 0.0f;
  const int32_t power = (static_cast<int32_t>(number) + 127) << 23;
  return p * __builtin_bit_cast(float, power);
}

struct None {
  static float of(float y) { return y; }
};
struct Silu {
  static float of(float y) { return y / (1.0f + exponential(-y)); }
};
// 0.5 y (1 + tanh(u)) = y / (1 + exp(-2 u)),  u = sqrt(2 / pi) (y + 0.044715 y^3)
struct Gelu {
  static float of(float y) { return y / (1.0f + exponential(-1.59576912160573071f * (y + 0.044715f * y * y * y))); }
};

template <class X, class Activation>
struct Raw {
  const X* x;
  float operator()(int64_t i) const { return Activation::of(load(x[i])); }
};

template <class X, class Activation>
struct Channels {
  const X* x;
  const float* a;
  const float* b;
  float operator()(int64_t i) const { return Activation::of(MODIFF_FMA(load(x[i]), a[i], b[i])); }
};

template <class X, class Activation>
struct Plane {
  const X* x;
  float a, b;
  float operator()(int64_t i) const { return Activation::of(MODIFF_FMA(load(x[i]), a, b)); }
};

template <class X, class Activation>
struct Token {
  const X* x;
  const float* a;
  const float* b;
  float mean, rstd;
  float operator()(int64_t i) const {
    return Activation::of(MODIFF_FMA((load(x[i]) - mean) * rstd, a[i], b[i]));
  }
};

// What a call works on: `segments` runs of `length` elements, the same number of them for each scale and each sample.
struct Work {
  const float* a;
  const float* b;
  const float* mean;
  const float* rstd;
  float* state;
  uint8_t* codes;
  float* scale;
  uint32_t* partial;
  int64_t segments, length, per_sample, per_scale;
  bool dynamic;
  float factor;
  int32_t lowest, highest, threads;
};

template <class MakeSource>
void run(const Work& w, MakeSource source) {
  const bool parallel = w.threads > 1 && w.segments * w.length >= kParallel;
  if (w.per_scale == 1) {  // a scale for each run: both passes while it is in the cache
#pragma omp parallel for num_threads(w.threads) if (parallel)
    for (int64_t s = 0; s < w.segments; ++s) {
      const int64_t at = s * w.length;
      if (w.dynamic) {
        w.scale[s] = scale_of(largest(source(s), Hold{w.state + at}, w.length), w.factor);
      }
      code(source(s), Hold{w.state + at}, w.codes + at, w.scale[s], w.lowest, w.highest, w.length);
    }
    return;
  }
  if (w.dynamic) {
#pragma omp parallel for num_threads(w.threads) if (parallel)
    for (int64_t s = 0; s < w.segments; ++s) {
      w.partial[s] = largest(source(s), Hold{w.state + s * w.length}, w.length);
    }
    for (int64_t row = 0; row < w.segments / w.per_scale; ++row) {
      uint32_t found = 0;
      for (int64_t s = row * w.per_scale; s < (row + 1) * w.per_scale; ++s) {
        found = w.partial[s] > found ? w.partial[s] : found;
      }
      w.scale[row] = scale_of(found, w.factor);
    }
  }
#pragma omp parallel for num_threads(w.threads) if (parallel)
  for (int64_t s = 0; s < w.segments; ++s) {
    const int64_t at = s * w.length;
    code(source(s), Hold{w.state + at}, w.codes + at, w.scale[s / w.per_scale], w.lowest, w.highest, w.length);
  }
}

template <class X, class Activation>
void choose(const X* x, int32_t mode, const Work& w) {
  const auto at = [&](int64_t s) { return x + s * w.length; };
  const auto channel = [&](int64_t s) { return s / w.per_sample * w.length; };
  if (mode == 0) {
    run(w, [&](int64_t s) { return Raw<X, Activation>{at(s)}; });
  } else if (mode == 1) {
    run(w, [&](int64_t s) { return Channels<X, Activation>{at(s), w.a + channel(s), w.b + channel(s)}; });
  } else if (mode == 2) {
    run(w, [&](int64_t s) { return Plane<X, Activation>{at(s), w.a[s], w.b[s]}; });
  } else {
    run(w, [&](int64_t s) {
      return Token<X, Activation>{at(s), w.a + channel(s), w.b + channel(s), w.mean[s], w.rstd[s]};
    });
  }
}

template <class X>
void choose(const X* x, int32_t mode, int32_t activation, const Work& w) {
  if (activation == 0) {
    choose<X, None>(x, mode, w);
  } else if (activation == 1) {
    choose<X, Silu>(x, mode, w);
  } else {
    choose<X, Gelu>(x, mode, w);
  }
}

// Sum of f(x[i]) in double, in 16 lanes that can be vectorized.
template <class X, class F>
double summed(const X* x, int64_t count, F f) {
  constexpr int64_t kLanes = 16;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += f(load(x[i + lane]));
    }
  }
  for (; i < count; ++i) {
    lanes[0] += f(load(x[i]));
  }
  double total = 0.0;
  for (const double lane : lanes) {
    total += lane;
  }
  return total;
}

// Mean and 1 / sqrt(variance + eps) of runs that lie side by side; two passes, so large means cost no digits.
template <class X>
void moments(const X* x, int64_t runs, int64_t count, float eps, float* mean, float* rstd, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && runs * count >= kParallel)
  for (int64_t run = 0; run < runs; ++run) {
    const X* from = x + run * count;
    const double total = summed(from, count, [](float value) { return static_cast<double>(value); });
    const float middle = static_cast<float>(total / static_cast<double>(count));
    const double square = summed(from, count, [middle](float value) {
      const double off = static_cast<double>(value - middle);
      return off * off;
    });
    mean[run] = middle;
    rstd[run] = static_cast<float>(1.0 / __builtin_sqrt(square / static_cast<double>(count) + eps));
  }
}

// The same for groups of channels where the channels of a pixel lie side by side: sums for each channel, then joined.
template <class X>
void grouped_moments(const X* x, int64_t samples, int64_t pixels, int64_t channels, int64_t groups, float eps,
                     double* sums, float* mean, float* rstd, int threads) {
  const int64_t each = channels / groups;
  const double count = static_cast<double>(each * pixels);
#pragma omp parallel for num_threads(threads) if (threads > 1 && samples > 1 && samples * pixels * channels >= kParallel)
  for (int64_t n = 0; n < samples; ++n) {
    const X* from = x + n * pixels * channels;
    double* total = sums + n * channels;
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t c = 0; c < channels; ++c) {
        total[c] = 0.0;
      }
      for (int64_t p = 0; p < pixels; ++p) {
        const X* pixel = from + p * channels;
        if (pass == 0) {
          for (int64_t c = 0; c < channels; ++c) {
            total[c] += static_cast<double>(load(pixel[c]));
          }
        } else {
          for (int64_t g = 0; g < groups; ++g) {
            const float middle = mean[n * groups + g];
            for (int64_t c = g * each; c < (g + 1) * each; ++c) {
              const double off = static_cast<double>(load(pixel[c]) - middle);
              total[c] += off * off;
            }
          }
        }
      }
      for (int64_t g = 0; g < groups; ++g) {
        double sum = 0.0;
        for (int64_t c = g * each; c < (g + 1) * each; ++c) {
          sum += total[c];
        }
        if (pass == 0) {
          mean[n * groups + g] = static_cast<float>(sum / count);
        } else {
          rstd[n * groups + g] = static_cast<float>(1.0 / __builtin_sqrt(sum / count + eps));
        }
      }
    }
  }
}

}  // namespace

extern "C" {

// Version of this interface; the loader refuses another one.
int32_t modiff_interface() { return 2; }

// Mean and reciprocal deviation of `runs` runs of `count` elements each.
void modiff_moments(const void* x, int32_t kind, int64_t runs, int64_t count, float eps, float* mean, float* rstd,
                    int32_t threads) {
  kind == 0 ? moments(static_cast<const float*>(x), runs, count, eps, mean, rstd, threads)
            : moments(static_cast<const Bf16*>(x), runs, count, eps, mean, rstd, threads);
}

// The same of groups of channels, channels innermost; `sums` holds samples * channels numbers of scratch.
void modiff_grouped_moments(const void* x, int32_t kind, int64_t samples, int64_t pixels, int64_t channels,
                            int64_t groups, float eps, double* sums, float* mean, float* rstd, int32_t threads) {
  kind == 0
      ? grouped_moments(static_cast<const float*>(x), samples, pixels, channels, groups, eps, sums, mean, rstd, threads)
      : grouped_moments(static_cast<const Bf16*>(x), samples, pixels, channels, groups, eps, sums, mean, rstd, threads);
}

// x: float (kind 0) or bfloat16 (kind 1). activation: 0 none, 1 SiLU, 2 GELU by tanh. partial: one number a segment.
void modiff_prologue_after(const void* x, int32_t kind, int32_t mode, int32_t activation, const float* a,
                           const float* b, const float* mean, const float* rstd, float* state, uint8_t* codes,
                           float* scale, uint32_t* partial, int64_t segments, int64_t length, int64_t per_sample,
                           int64_t per_scale, int32_t dynamic, float factor, int32_t lowest, int32_t highest,
                           int32_t threads) {
  const Work work{a,      b,          mean,      rstd,         state,  codes,  scale,   partial, segments,
                  length, per_sample, per_scale, dynamic != 0, factor, lowest, highest, threads};
  kind == 0 ? choose(static_cast<const float*>(x), mode, activation, work)
            : choose(static_cast<const Bf16*>(x), mode, activation, work);
}
}
