// The input side with a norm and an activation computed on the way:
//
//     y = activation(x)                                              mode 0
//     y = activation(a[c] x + b[c])                                  mode 1: GroupNorm, channels innermost in memory,
//                                                                            or a part of the channels of each pixel
//     y = activation(a[plane] x + b[plane])                          mode 2: GroupNorm, a plane for each channel
//     y = activation((x - mean[t]) rstd[t] a[c] + b[c])              mode 3: LayerNorm and its modulation, t a token
//     y = x activation(gate)                                         mode 4: GEGLU, SwiGLU
//
// and y coded as in encode.cpp, from a buffer that stays in the cache: never more than the elements of one scale, so
// an exponential is computed once. Statistics take a pass of their own. Norms and exponentials are not torch's, bit for
// bit: they are within float error, and what the codes miss stays in the residual as always.

#include <memory>

#include "loops.h"
#include "moments.h"

namespace {

using namespace modiff;

constexpr int64_t kStrip = 2048;      // elements that are computed before they are coded: 8 KiB
constexpr int64_t kKept = 1 << 22;    // floats of scratch that a thread keeps between calls

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
// y Phi(y), 1 - Phi(|y|) = p(t) exp(-y^2 / 2) / 2 within 7.5e-8, t = 1 / (1 + 0.3275911 |y| / sqrt(2)):
// Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26
struct ExactGelu {
  static float of(float y) {
    const float t = 1.0f / (1.0f + 0.231641888f * __builtin_fabsf(y));
    float p = 1.061405429f;
    p = MODIFF_FMA(p, t, -1.453152027f);
    p = MODIFF_FMA(p, t, 1.421413741f);
    p = MODIFF_FMA(p, t, -0.284496736f);
    p = MODIFF_FMA(p, t, 0.254829592f);
    const float tail = 0.5f * p * t * exponential(-0.5f * y * y);
    return y * (y < 0.0f ? tail : 1.0f - tail);
  }
};

template <class X, class Activation>
void raw(const X* __restrict x, float* __restrict y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    y[i] = Activation::of(load(x[i]));
  }
}

template <class X, class Activation>
void channels(const X* __restrict x, const float* __restrict a, const float* __restrict b, float* __restrict y,
              int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    y[i] = Activation::of(MODIFF_FMA(load(x[i]), a[i], b[i]));
  }
}

template <class X, class Activation>
void plane(const X* __restrict x, float a, float b, float* __restrict y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    y[i] = Activation::of(MODIFF_FMA(load(x[i]), a, b));
  }
}

template <class X, class Activation>
void token(const X* __restrict x, const float* __restrict a, const float* __restrict b, float mean, float rstd,
           float* __restrict y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    y[i] = Activation::of(MODIFF_FMA((load(x[i]) - mean) * rstd, a[i], b[i]));
  }
}

template <class X, class Activation>
void gated(const X* __restrict x, const X* __restrict gate, float* __restrict y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    y[i] = load(x[i]) * Activation::of(load(gate[i]));
  }
}

// What a call works on: `runs` runs of `length` elements, the same number of them for each scale and each sample.
struct Work {
  const float* a;
  const float* b;
  const float* mean;
  const float* rstd;
  const void* gate;  // typed and laid as x
  void* state;  // null: plain quantization; 16-bit integers where there is a grid, else floats
  float* move;  // null: the predictor holds
  const float* gain;
  const float* grid;
  int32_t* clipped;
  uint8_t* codes;
  float* scale;
  int64_t runs, length, per_sample, per_scale;
  int64_t pitch, channels;  // elements from run to run in x, and from sample to sample in a and b
  int64_t samples;
  bool dynamic;
  float factor, unsent;
  int32_t lowest, highest, threads;
};

// y of the elements [from, to), which lie within the runs of one call.
template <class X, class Activation>
MODIFF_APART void fill(const X* x, int32_t mode, const Work& w, int64_t from, int64_t to, float* y) {
  if (mode == 0) {
    raw<X, Activation>(x + from, y, to - from);
    return;
  }
  for (int64_t at = from; at < to;) {
    const int64_t s = at / w.length, start = at - s * w.length;
    const int64_t rest = w.length - start, count = rest < to - at ? rest : to - at;
    const int64_t channel = s / w.per_sample * w.channels + start;
    const X* const source = x + s * w.pitch + start;
    if (mode == 1) {
      channels<X, Activation>(source, w.a + channel, w.b + channel, y + (at - from), count);
    } else if (mode == 2) {
      plane<X, Activation>(source, w.a[s], w.b[s], y + (at - from), count);
    } else if (mode == 4) {
      const X* const gate = static_cast<const X*>(w.gate) + (source - x);
      gated<X, Activation>(source, gate, y + (at - from), count);
    } else {
      token<X, Activation>(source, w.a + channel, w.b + channel, w.mean[s], w.rstd[s], y + (at - from), count);
    }
    at += count;
  }
}

// A buffer of this thread; kept for the next call unless it is large.
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    static thread_local std::unique_ptr<float[]> kept;
    static thread_local int64_t size = 0;
    if (count > kKept) {
      own_.reset(new float[count]);
      at = own_.get();
      return;
    }
    if (count > size) {
      kept.reset(new float[count]);
      size = count;
    }
    at = kept.get();
  }
  float* at;

 private:
  std::unique_ptr<float[]> own_;
};

// Calls act(state) with the state from the element `at` on, as the call has it.
template <class Act>
auto with_state(const Work& w, int64_t at, Act act) {
  if (w.state == nullptr) {
    return act(Nothing{});
  }
  if (w.grid != nullptr) {
    return act(Fixed{static_cast<int16_t*>(w.state) + at, *w.grid, 0, w.clipped});
  }
  float* const state = static_cast<float*>(w.state) + at;
  return w.move == nullptr ? act(Hold{state}) : act(Linear{state, w.move + at, *w.gain});
}

uint32_t largest(const Work& w, const float* y, int64_t at, int64_t count) {
  return with_state(w, at, [&](const auto& state) { return largest(Plain<float>{y}, state, count); });
}

float finished(const Work& w, uint32_t found) {
  return with_state(w, 0, [&](const auto& state) { return finished(state, found, w.factor); });
}

uint32_t code(const Work& w, const float* y, int64_t at, int64_t count, float scale) {
  return with_state(w, at, [&](const auto& state) {
    return code(Plain<float>{y}, ready(state, scale), w.codes + at, scale, w.lowest, w.highest, count,
                w.dynamic ? w.factor : 0.0f);
  });
}

// Calls run(from, to) for strips of [begin, end), in parallel if asked to.
template <class Run>
void strips(int64_t begin, int64_t end, bool parallel, int32_t threads, Run run) {
  const int64_t each = (end - begin + kStrip - 1) / kStrip;
#pragma omp parallel for num_threads(threads) if (parallel)
  for (int64_t strip = 0; strip < each; ++strip) {
    const int64_t from = begin + strip * kStrip;
    run(from, end - from < kStrip ? end : from + kStrip);
  }
}

template <class Fill>
void given(const Work& w, Fill fill_in, bool parallel) {
  const int64_t row = w.per_scale * w.length;
  strips(0, w.runs * w.length, parallel, w.threads, [&](int64_t from, int64_t to) {
    const Scratch scratch(kStrip);
    fill_in(from, to, scratch.at);
    for (int64_t at = from; at < to;) {  // a strip may hold several scales, or a part of one
      const int64_t r = at / row, stop = (r + 1) * row < to ? (r + 1) * row : to;
      code(w, scratch.at + (at - from), at, stop - at, w.scale[r]);
      at = stop;
    }
  });
}

// All elements of one scale by this thread: computed and compared strip by strip, then coded. Returns: as `code`.
template <class Fill>
uint32_t measured(const Work& w, Fill fill_in, int64_t r) {
  const int64_t row = w.per_scale * w.length, begin = r * row;
  const Scratch scratch(row);
  uint32_t found = 0;
  for (int64_t from = 0; from < row; from += kStrip) {
    const int64_t count = row - from < kStrip ? row - from : kStrip;
    fill_in(begin + from, begin + from + count, scratch.at + from);
    const uint32_t one = largest(w, scratch.at + from, begin + from, count);
    found = one > found ? one : found;
  }
  w.scale[r] = finished(w, found);
  return code(w, scratch.at, begin, row, w.scale[r]);
}

// The same by all threads: fewer scales than threads.
template <class Fill>
uint32_t measured_together(const Work& w, Fill fill_in, int64_t r) {
  const int64_t row = w.per_scale * w.length, begin = r * row;
  const Scratch scratch(row);
  float* const y = scratch.at;
  uint32_t found = 0;
  const int64_t each = (row + kStrip - 1) / kStrip;
#pragma omp parallel for num_threads(w.threads) reduction(max : found)
  for (int64_t strip = 0; strip < each; ++strip) {
    const int64_t from = strip * kStrip, count = row - from < kStrip ? row - from : kStrip;
    fill_in(begin + from, begin + from + count, y + from);
    const uint32_t one = largest(w, y + from, begin + from, count);
    found = one > found ? one : found;
  }
  const float scale = w.scale[r] = finished(w, found);
  uint32_t reach = 0;
#pragma omp parallel for num_threads(w.threads) reduction(max : reach)
  for (int64_t strip = 0; strip < each; ++strip) {
    const int64_t from = strip * kStrip, count = row - from < kStrip ? row - from : kStrip;
    const uint32_t one = code(w, y + from, begin + from, count, scale);
    reach = one > reach ? one : reach;
  }
  return reach;
}

template <class X, class Activation>
bool run(const X* x, int32_t mode, const Work& w) {
  const auto fill_in = [&](int64_t from, int64_t to, float* y) { fill<X, Activation>(x, mode, w, from, to, y); };
  const bool parallel = w.threads > 1 && w.runs * w.length >= kParallel;
  if (!w.dynamic) {
    given(w, fill_in, parallel);
    return false;
  }
  const int64_t rows = w.runs / w.per_scale;
  const std::unique_ptr<uint32_t[]> reach(new uint32_t[rows]);
  if (parallel && rows < w.threads) {
    for (int64_t r = 0; r < rows; ++r) {
      reach[r] = measured_together(w, fill_in, r);
    }
  } else {
#pragma omp parallel for num_threads(w.threads) if (parallel)
    for (int64_t r = 0; r < rows; ++r) {
      reach[r] = measured(w, fill_in, r);
    }
  }
  const float least = with_state(w, 0, [](const auto& state) { return smallest(state); });
  return w.state != nullptr && may_jump(w.scale, reach.get(), rows, w.samples, w.factor, w.unsent, least);
}

template <class X>
bool choose(const X* x, int32_t mode, int32_t activation, const Work& w) {
  switch (activation) {
    case 0: return run<X, None>(x, mode, w);
    case 1: return run<X, Silu>(x, mode, w);
    case 2: return run<X, Gelu>(x, mode, w);
    default: return run<X, ExactGelu>(x, mode, w);
  }
}

}  // namespace

extern "C" {

// Mean and reciprocal deviation of `runs` runs of `count` elements each.
void modiff_moments(const void* x, int32_t kind, int64_t runs, int64_t count, float eps, float* mean, float* rstd,
                    int32_t threads) {
  kind == 0 ? moments(static_cast<const float*>(x), runs, count, eps, mean, rstd, threads)
            : moments(static_cast<const Bf16*>(x), runs, count, eps, mean, rstd, threads);
}

// A norm of groups of channels as a line for each: a = rstd weight, b = bias - mean a, (samples, channels). weight,
// bias: of kind `kind_w`, or null. pieces: in which a sample is added up, channels innermost; 0: channels outermost.
void modiff_group_affine(const void* x, int32_t kind, int64_t samples, int64_t pixels, int64_t channels, int64_t groups,
                         float eps, int64_t pieces, const void* weight, const void* bias, int32_t kind_w, float* a,
                         float* b, int32_t threads) {
  const Groups g{samples, pixels, channels, groups, pieces, eps};
  const auto lines = [&](const auto* values, const auto* w, const auto* bias_of) {
    const std::unique_ptr<float[]> moment(new float[2 * samples * groups]);
    float *const mean = moment.get(), *const rstd = mean + samples * groups;
    if (pieces > 0) {
      const std::unique_ptr<double[]> sums(new double[2 * samples * pieces * channels]);
      grouped_moments(values, g, sums.get(), mean, rstd, threads);
    } else {
      moments(values, samples * groups, pixels * channels / groups, eps, mean, rstd, threads);
    }
    lines_of(g, mean, rstd, w, bias_of, a, b);
  };
  const auto typed = [&](const auto* values) {
    kind_w == 0 ? lines(values, static_cast<const float*>(weight), static_cast<const float*>(bias))
                : lines(values, static_cast<const Bf16*>(weight), static_cast<const Bf16*>(bias));
  };
  kind == 0 ? typed(static_cast<const float*>(x)) : typed(static_cast<const Bf16*>(x));
}

// x, gate: float (kind 0) or bfloat16 (kind 1). activation: 0 none, 1 SiLU, 2 GELU by tanh, 3 GELU. state: null for
// plain codes; with a grid 16-bit integers, whose cut codes are added to `clipped`; else floats, with a move or without.
// Returns: as modiff_encode.
int32_t modiff_encode_fused(const void* x, int32_t kind, int32_t mode, int32_t activation, const float* a,
                           const float* b, const float* mean, const float* rstd, const void* gate, void* state,
                           float* move, const float* gain, const float* grid, int32_t* clipped, uint8_t* codes,
                           float* scale, int64_t runs, int64_t length, int64_t per_sample, int64_t per_scale,
                           int64_t pitch, int64_t channels, int64_t samples, int32_t dynamic, float factor,
                           float unsent, int32_t lowest, int32_t highest, int32_t threads) {
  const Work work{a,      b,          mean,      rstd,  gate,     state,   move,         gain,   grid,   clipped, codes,
                  scale,  runs,       length,    per_sample,      per_scale,             pitch,  channels, samples,
                  dynamic != 0,       factor,    unsent,          lowest,  highest,      threads};
  return kind == 0 ? choose(static_cast<const float*>(x), mode, activation, work)
                   : choose(static_cast<const Bf16*>(x), mode, activation, work);
}
}
