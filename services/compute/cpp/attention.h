// What attention over packed keys and over pages shares: strided views, the softmax of a row of scores.
#pragma once
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include <limits>

#include "native.h"

namespace focusllava {

// Below every score that is a number, and finite: its difference to itself is none, that of two infinite scores is NaN.
constexpr float kNone = std::numeric_limits<float>::lowest();

struct Strided {  // a [tokens, heads, d] view, d contiguous
  int64_t token, head;
  explicit Strided(const Tensor& t) : token(t.stride(0)), head(t.stride(1)) {}
};

inline float highest(const float* score, int64_t count) {
  float high = kNone;
#pragma omp simd reduction(max : high)
  for (int64_t k = 0; k < count; ++k) high = score[k] > high ? score[k] : high;
  return high;
}

// prob = exp((score - high) * scaling), whose sum is returned: NaN where a score is, or where the highest is infinite.
template <typename T>
inline float exponentials(const float* score, int64_t count, float scaling, float high, T* prob) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < count; ++k) {
    const float p = exp_clamped((score[k] - high) * scaling);
    sum += p;
    prob[k] = from_float<T>(p);
  }
  return sum;
}

// What the weighted sums are multiplied by at last, where `high` is the highest score and `total` the sum of the weights:
// none where all scores are minus infinity, as torch does it, NaN where the total is.
inline float share(float high, float total) { return high == kNone ? 0.0f * total : 1.0f / total; }

#ifdef __AVX512BF16__
// In powers of two, which the processor scales by in one instruction. The polynomial is that of exp2f in S. Moshier's
// Cephes library without its highest term: 3e-6 for |r| <= 1/2, far below what bf16 keeps.
template <>
inline float exponentials(const float* score, int64_t count, float scaling, float high, BFloat16* prob) {
  constexpr float kLog2e = 1.442695041f;
  const __m512 factor = _mm512_set1_ps(scaling * kLog2e), top = _mm512_set1_ps(high);
  const __m512 least = _mm512_set1_ps(-150.0f);  // a smaller power is zero
  __m512 sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < count; k += 16) {
    const __mmask16 some = count - k < 16 ? (1u << (count - k)) - 1 : 0xffff;
    __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(some, score + k), top), factor);
    x = _mm512_max_ps(least, x);  // of a number and NaN the second
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.339887440e-3f);
    for (const float c : {9.618437357e-3f, 5.550332471e-2f, 2.402264791e-1f, 6.931472028e-1f, 1.0f})
      p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    p = _mm512_maskz_scalef_ps(some, p, whole);
    sum = _mm512_add_ps(sum, p);
    _mm256_mask_storeu_epi16(prob + k, some, std::bit_cast<__m256i>(_mm512_cvtneps_pbh(p)));
  }
  return _mm512_reduce_add_ps(sum);
}
#endif

}  // namespace focusllava
