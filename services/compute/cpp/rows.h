// The innermost loop of our own matrix products: a few rows times a few vectors of columns, the sums in registers.
#pragma once
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "native.h"

namespace focusllava {

// A vector as wide as the processor's, and how many of them may hold sums, of 32 or of 16 registers.
#ifdef __AVX512F__
constexpr int64_t kVector = 16, kSums = 24;
#else
constexpr int64_t kVector = 8, kSums = 12;
#endif
typedef float Vector __attribute__((vector_size(kVector * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(kVector * sizeof(float))));

template <typename T>
constexpr int64_t kPair = 4 / sizeof(T);  // inputs of a 32-bit word

// sum += x * w for a vector of outputs: one input in fp32, two in bf16, side by side in a word.
template <typename T>
inline Vector multiply_add(Vector sum, uint32_t x, const T* weight) {
  Words w;
  std::memcpy(&w, weight, sizeof w);
  if constexpr (std::is_same_v<T, float>) return sum + std::bit_cast<float>(x) * std::bit_cast<Vector>(w);
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(sum, std::bit_cast<__m512bh>(Words{} + x), std::bit_cast<__m512bh>(w));
#else
  sum += std::bit_cast<float>(x << 16) * std::bit_cast<Vector>(w << 16);
  return sum + std::bit_cast<float>(x & 0xffff0000u) * std::bit_cast<Vector>(w & 0xffff0000u);
#endif
}

// Adds to sums, R rows of C vectors (or to zeros, if they are `fresh`), the products of the words first..last-1 of R rows
// of x and those of w. A word of w is w_words columns, which begin at w + k * w_words * kPair. `also` is called with
// every word. Inlined, so that what it keeps count of stays in registers.
template <typename T, int R, int C, typename F>
__attribute__((always_inline)) inline void multiply_rows(const T* x, int64_t x_stride, const T* w, int64_t w_words,
                                                         int64_t first, int64_t last, bool fresh, float* sums,
                                                         int64_t sums_stride, F&& also) {
  Vector sum[R][C] = {};
  if (!fresh)
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) std::memcpy(&sum[r][c], sums + r * sums_stride + c * kVector, sizeof(Vector));
  // A pointer to every third row: the two between are one and two strides away, which an address holds beside it. With
  // one for each row there are more than registers.
  constexpr int kPointers = (R + 2) / 3;
  const T* rows[kPointers];
#pragma GCC unroll 4
  for (int p = 0; p < kPointers; ++p) rows[p] = x + 3 * p * x_stride + first * kPair<T>;
  const T *weight = w + first * w_words * kPair<T>, *end = w + last * w_words * kPair<T>;
  for (; weight < end; weight += w_words * kPair<T>) {
    also();
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      uint32_t word;
      std::memcpy(&word, rows[r / 3] + r % 3 * x_stride, sizeof word);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] = multiply_add<T>(sum[r][c], word, weight + c * kVector * kPair<T>);
    }
#pragma GCC unroll 4
    for (int p = 0; p < kPointers; ++p) rows[p] += kPair<T>;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) std::memcpy(sums + r * sums_stride + c * kVector, &sum[r][c], sizeof(Vector));
}

}  // namespace focusllava
