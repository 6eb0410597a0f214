// One number for a run of bytes: other bytes give another number, but for one chance in 2^64.
//
// As XXH3 (Collet 2019) accumulates: eight lanes of 64 bits, where v, which lane i of stripe s reads, adds the product of
// the two halves of v ^ key(i, s) to its own lane and v itself to the lane beside it, so that whatever changes within v
// changes a sum. The key moves from stripe to stripe, so the same bytes elsewhere give another sum. Blocks are summed on
// their own and mixed in their order, so the number does not depend on the threads. Not for security: whoever wants two
// runs of bytes with one number can make them.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t kLanes = 8, kStripe = kLanes * 8;
constexpr int64_t kBytes = 1 << 18;  // of a block
constexpr uint64_t kOdd = 0x9e3779b97f4a7c15u;  // 2^64 / golden ratio

// The finalizer of splitmix64 (Steele, Lea, Flood 2014): every bit of x reaches every bit of the result.
inline uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

inline void add(uint64_t* sums, uint64_t* keys, const uint64_t* steps, const uint8_t* bytes) {
  uint64_t read[kLanes];
  std::memcpy(read, bytes, kStripe);
  for (int64_t i = 0; i < kLanes; ++i) {
    const uint64_t v = read[i] ^ keys[i];
    sums[i] += (v & 0xffffffffu) * (v >> 32);
    sums[i ^ 1] += read[i];
    keys[i] += steps[i];
  }
}

uint64_t block(const uint8_t* bytes, int64_t count) {
  uint64_t sums[kLanes], keys[kLanes], steps[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    sums[i] = 0;
    keys[i] = mixed(kOdd * static_cast<uint64_t>(2 * i + 1));
    steps[i] = mixed(kOdd * static_cast<uint64_t>(2 * i + 2)) | 1u;
  }
  int64_t at = 0;
  for (; at + kStripe <= count; at += kStripe) {
    add(sums, keys, steps, bytes + at);
  }
  if (at < count) {
    uint8_t rest[kStripe] = {};
    std::memcpy(rest, bytes + at, static_cast<size_t>(count - at));
    add(sums, keys, steps, rest);
  }
  uint64_t found = static_cast<uint64_t>(count);
  for (int64_t i = 0; i < kLanes; ++i) {
    found = mixed(found ^ sums[i]) + kOdd;
  }
  return found;
}

}  // namespace

extern "C" {

uint64_t modiff_fingerprint(const uint8_t* bytes, int64_t count, int32_t threads) {
  const int64_t blocks = (count + kBytes - 1) / kBytes;
  std::vector<uint64_t> found(static_cast<size_t>(blocks));
#pragma omp parallel for num_threads(threads) if (threads > 1 && blocks > 1)
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t start = i * kBytes;
    found[static_cast<size_t>(i)] = block(bytes + start, count - start < kBytes ? count - start : kBytes);
  }
  uint64_t all = static_cast<uint64_t>(count);
  for (const uint64_t one : found) {
    all = mixed(all ^ one) + kOdd;
  }
  return all;
}
}
