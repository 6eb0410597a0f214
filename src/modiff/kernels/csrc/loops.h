// The two loops of the input side, over one run of elements that lie side by side in memory.
//
// Every operation is the one that eager torch does, in its order, so codes and states are equal bit for bit:
// no fused multiply-add, no reciprocal, no flush of denormals. Plain C++: no torch headers.

#pragma once

#include <cstdint>

// One copy of each loop, not one for each place that calls it: the build takes half as long.
#define MODIFF_APART __attribute__((noinline))

namespace modiff {

constexpr float kSmallestScale = 1e-12f;
constexpr float kMostMultiple = 16384.0f;   // of the grid, that an integer state takes as a scale
constexpr int64_t kBlock = MODIFF_BLOCK;  // elements that one task works on
constexpr int64_t kParallel = 65536;  // below this one thread is faster

struct Bf16 {
  uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(Bf16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }

inline void store(float* out, int64_t i, float value) { out[i] = value; }
inline void store_number(float* out, int64_t i, float value) { out[i] = value; }
inline uint32_t nearest(float value) {  // bfloat16, ties to even
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
inline void store_number(Bf16* out, int64_t i, float value) { out[i].bits = static_cast<uint16_t>(nearest(value)); }
inline void store(Bf16* out, int64_t i, float value) {  // NaN stays NaN
  out[i].bits = static_cast<uint16_t>(value == value ? nearest(value) : 0x7fc0u);
}

// The input as it is. Other sources compute it on the way: a norm, an activation.
template <class X>
struct Plain {
  const X* x;
  float operator()(int64_t i) const { return load(x[i]); }
};

// Plain quantization: predict zero, remember nothing.
struct Nothing {
  static constexpr bool kept = false;
  float before(int64_t) const { return 0.0f; }
  void after(int64_t, float) const {}
};

struct Hold {
  static constexpr bool kept = true;
  float* state;
  float before(int64_t i) const { return state[i]; }
  void after(int64_t i, float value) const { state[i] = value; }
};

struct Linear {
  static constexpr bool kept = true;
  float* state;
  float* move;
  float gain;
  float before(int64_t i) const { return state[i] + gain * move[i]; }
  void after(int64_t i, float value) const {
    move[i] = value - state[i];
    state[i] = value;
  }
};

// An integer in units of a power of two: exact, also after a thousand steps. clipped counts the codes that were cut.
struct Fixed {
  static constexpr bool kept = true;
  int16_t* state;
  float grid;
  int32_t multiple;  // of the grid: the scale
  int32_t* clipped;
  float before(int64_t i) const { return static_cast<float>(state[i]) * grid; }
};

// Largest |x - p| as the bits of a float: ordered like the floats, with NaN above everything.
template <class Source, class State>
MODIFF_APART uint32_t largest(Source source, State state, int64_t count) {
  uint32_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float r = source(i) - state.before(i);
    const uint32_t bits = __builtin_bit_cast(uint32_t, r) & 0x7fffffffu;
    found = bits > found ? bits : found;
  }
  return found;
}

inline float scale_of(uint32_t largest_bits, float factor) {
  const float scale = __builtin_bit_cast(float, largest_bits) * factor;
  return scale < kSmallestScale ? kSmallestScale : scale;  // NaN stays
}

// The scale that a state takes.
template <class State>
float finished(const State&, uint32_t bits, float factor) {
  return scale_of(bits, factor);
}

// The multiple of the grid next above the scale asked for; NaN and infinity become NaN.
inline float finished(const Fixed& s, uint32_t bits, float factor) {
  const float ratio = scale_of(bits, factor) / s.grid;
  if (!(ratio < __builtin_inff())) {
    return __builtin_nanf("");
  }
  const float whole = __builtin_ceilf(ratio);
  return (whole < 1.0f ? 1.0f : whole > kMostMultiple ? kMostMultiple : whole) * s.grid;
}

// A state that is about to take codes of this scale.
template <class State>
State ready(const State& s, float) {
  return s;
}
inline Fixed ready(const Fixed& s, float scale) {
  return {s.state, s.grid, scale == scale ? static_cast<int32_t>(scale / s.grid) : 1, s.clipped};
}

// clamp(round(x), lowest, highest), ties to even; NaN gives 0. tame: |x| < 2^31, and no NaN, which takes half as long.
template <bool tame>
inline int32_t rounded(float x, int32_t lowest, int32_t highest) {
  if constexpr (tame) {
    const int32_t q = __builtin_irintf(x), least = q < lowest ? lowest : q;
    return least > highest ? highest : least;
  }
  const float low = static_cast<float>(lowest), high = static_cast<float>(highest);
  float q = __builtin_rintf(x);
  q = q < low ? low : q;
  q = q > high ? high : q;
  q = q == q ? q : 0.0f;
  return static_cast<int32_t>(q);
}

// Whether residuals over their scale are tame: where it was measured on them, |r| / s <= 1 / factor. factor: 0 where not.
template <class State>
bool tamed(const State&, float scale, float factor) {
  return factor > 1e-6f && scale - scale == 0.0f;
}
inline bool tamed(const Fixed& s, float scale, float factor) {
  return factor > 1e-6f && scale - scale == 0.0f && static_cast<float>(s.multiple) < kMostMultiple;
}

// The state n moved on by `step` units of its grid, in 16 bits; NaN, unless there is none, moves nothing. *cut: whether
// it would leave them.
template <bool numbers = false>
inline float moved_on(int16_t n, float step, int32_t* cut) {
  const float whole = __builtin_rintf(step);
  const float value = static_cast<float>(n) + (numbers || whole == whole ? whole : 0.0f);  // exact, unless it is cut
  float kept = value < -32768.0f ? -32768.0f : value;
  kept = kept > 32767.0f ? 32767.0f : kept;
  *cut = kept != value;
  return kept;
}

template <bool tame, class Source, class State>
MODIFF_APART uint32_t code_rounded(Source source, State state, uint8_t* codes, float scale, int32_t lowest,
                                   int32_t highest, int64_t count) {
  uint32_t reach = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float p = state.before(i);
    const int32_t q = rounded<tame>((source(i) - p) / scale, lowest, highest);
    const float value = p + static_cast<float>(q) * scale;
    state.after(i, value);
    codes[i] = static_cast<uint8_t>(q - lowest);
    if constexpr (State::kept) {
      const uint32_t bits = __builtin_bit_cast(uint32_t, value) & 0x7fffffffu;
      reach = bits > reach ? bits : reach;
    }
  }
  return reach;
}

// Codes and the next state. factor: of the scale, where it was measured on these residuals; otherwise 0.
// Returns: the largest magnitude of the state, as `largest` has it; 0 where none is kept.
template <class Source, class State>
uint32_t code(Source source, State state, uint8_t* codes, float scale, int32_t lowest, int32_t highest, int64_t count,
              float factor) {
  return tamed(state, scale, factor) ? code_rounded<true>(source, state, codes, scale, lowest, highest, count)
                                     : code_rounded<false>(source, state, codes, scale, lowest, highest, count);
}

// The same on integers. Returns: false where a value left 16 bits; it has wrapped then, and is to be taken back.
template <bool tame, class Source>
MODIFF_APART bool code_wrapping(Source source, Fixed state, uint8_t* __restrict codes, float scale, int32_t lowest,
                                int32_t highest, int64_t count, int32_t* reach) {
  int32_t least = 0, most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t q = rounded<tame>((source(i) - state.before(i)) / scale, lowest, highest);
    const int32_t value = state.state[i] + q * state.multiple;
    state.state[i] = static_cast<int16_t>(value);
    codes[i] = static_cast<uint8_t>(q - lowest);
    least = value < least ? value : least;
    most = value > most ? value : most;
  }
  *reach = -least > most ? -least : most;
  return least >= -32768 && most <= 32767;
}

// The same on integers; a code that would leave 16 bits is cut, so that state and codes never part.
template <class Source>
MODIFF_APART uint32_t code(Source source, Fixed state, uint8_t* codes, float scale, int32_t lowest, int32_t highest,
                           int64_t count, float factor) {
  int32_t clipped = 0, reach = 0;
  const bool whole = tamed(state, scale, factor)
                         ? code_wrapping<true>(source, state, codes, scale, lowest, highest, count, &reach)
                         : code_wrapping<false>(source, state, codes, scale, lowest, highest, count, &reach);
  if (!whole) {
    // floor(room / multiple) is the whole part of (room + 1/2) / multiple: half a step apart from rounding errors
    const float share = 1.0f / static_cast<float>(state.multiple);
    reach = 0;
    for (int64_t i = 0; i < count; ++i) {
      state.state[i] = static_cast<int16_t>(state.state[i] - (codes[i] + lowest) * state.multiple);
      const int32_t held = state.state[i];
      int32_t q = rounded<false>((source(i) - state.before(i)) / scale, lowest, highest);
      const int32_t asked = q;
      const int32_t most = static_cast<int32_t>((static_cast<float>(32767 - held) + 0.5f) * share);
      const int32_t least = -static_cast<int32_t>((static_cast<float>(32768 + held) + 0.5f) * share);
      q = q > most ? most : q;
      q = q < least ? least : q;
      clipped += q != asked;
      const int32_t value = held + q * state.multiple;
      state.state[i] = static_cast<int16_t>(value);
      const int32_t size = value < 0 ? -value : value;
      reach = size > reach ? size : reach;
      codes[i] = static_cast<uint8_t>(q - lowest);
    }
  }
  if (clipped != 0) {
    __atomic_fetch_add(state.clipped, clipped, __ATOMIC_RELAXED);
  }
  return __builtin_bit_cast(uint32_t, static_cast<float>(reach) * state.grid);
}

// The smallest scale that a state takes: a value needs no smaller one.
template <class State>
float smallest(const State&) {
  return kSmallestScale;
}
inline float smallest(const Fixed& s) { return s.grid; }

// Whether the residual of a sample may be coded with more noise than its value: the mean of s^2 over its rows against
// that of v^2, where a row whose state reaches R has the scale v >= factor R - unsent s. False where it surely may not.
inline bool may_jump(const float* scale, const uint32_t* reach, int64_t rows, int64_t samples, float factor,
                     float unsent, float smallest) {
  const int64_t each = rows / samples;
  for (int64_t sample = 0; sample < samples; ++sample) {
    double residual = 0.0, value = 0.0;
    bool any = false;
    for (int64_t row = sample * each; row < (sample + 1) * each; ++row) {
      const double s = scale[row], v = __builtin_bit_cast(float, reach[row]) * factor - unsent * s;
      residual += 1.002 * s * s;
      value += v > 0.0 ? v * v : 0.0;
      any |= s > smallest;
    }
    if (any && !(residual < value)) {
      return true;
    }
  }
  return false;
}

}  // namespace modiff
