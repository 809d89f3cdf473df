// Attention of one token a sequence over the pages of the KV cache, in bf16 and fp32.
//
// Loops are plain C++ that the compiler vectorises for the processor at hand, but for pairs of bf16. Sums and softmax are
// fp32. Every sequence is computed alone: what else is in the batch changes no result.
//
// Legend: H query heads, G key heads, R = H / G query heads a key head, d head width, n sequences, b tokens of a page.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>

#include "attention.h"
#include "rows.h"

namespace {

using namespace focusllava;

constexpr int64_t kDecodeKeys = 256;  // keys of one task; a longer sequence is shared out among threads

inline Vector load(const float* x) {
  Vector v;
  std::memcpy(&v, x, sizeof v);
  return v;
}
inline Vector load(const BFloat16* x) {
  typedef uint16_t Halves __attribute__((vector_size(kVector * sizeof(uint16_t))));
  Halves v;
  std::memcpy(&v, x, sizeof v);
  return std::bit_cast<Vector>(__builtin_convertvector(v, Words) << 16);
}

// The floats of each of four vectors added up.
inline std::array<float, 4> sums_of(const Vector (&v)[4]) {
#ifdef __AVX512F__
  const auto a = std::bit_cast<__m512>(v[0]), b = std::bit_cast<__m512>(v[1]);
  const auto c = std::bit_cast<__m512>(v[2]), d = std::bit_cast<__m512>(v[3]);
  const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
  const __m512 fours = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                                     _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  const __m256 twos = _mm256_add_ps(_mm512_castps512_ps256(fours),
                                    _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(fours), 1)));
  return std::bit_cast<std::array<float, 4>>(_mm_add_ps(_mm256_castps256_ps128(twos), _mm256_extractf128_ps(twos, 1)));
#elif defined(__AVX__)
  const auto a = std::bit_cast<__m256>(v[0]), b = std::bit_cast<__m256>(v[1]);
  const auto c = std::bit_cast<__m256>(v[2]), d = std::bit_cast<__m256>(v[3]);
  const __m256 twos = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return std::bit_cast<std::array<float, 4>>(_mm_add_ps(_mm256_castps256_ps128(twos), _mm256_extractf128_ps(twos, 1)));
#else
  std::array<float, 4> sums;
  for (int i = 0; i < 4; ++i) {
    Vector one = v[i];
    for (int half = kVector / 2; half > 0; half /= 2)
      for (int j = 0; j < half; ++j) one[j] += one[j + half];
    sums[i] = one[0];
  }
  return sums;
#endif
}

// Whether the processor multiplies pairs of bf16 at once (AVX-512 BF16) and heads are wide enough for it.
#ifdef __AVX512BF16__
template <typename T, int64_t D>
constexpr bool kPairs = std::is_same_v<T, BFloat16> && D > 0 && D % 32 == 0;

inline __m512bh load_pairs(const BFloat16* x) { return std::bit_cast<__m512bh>(_mm512_loadu_si512(x)); }
#else
template <typename T, int64_t D>
constexpr bool kPairs = false;
#endif

// The products of a token's keys, which lie side by side, with four query heads [.., D] from head h on: a head that is not
// there is the last one once more. R heads share a key; that of each begins at `own`.
template <typename T, int64_t D, int R, typename Q>
inline std::array<float, 4> dots(const Q* query, const T* keys, int64_t h, int64_t heads, const int64_t* own) {
  Vector sums[4] = {};
#pragma GCC unroll 4
  for (int i = 0; i < 4; i += R) {
    const int64_t head = std::min(h + i, heads - R);
    const Q* q = query + head * D;
    const T* key = keys + own[head];
#ifdef __AVX512BF16__
    if constexpr (kPairs<T, D>) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < D; j += 32) {
        const __m512bh k = load_pairs(key + j);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r)
          sums[i + r] = std::bit_cast<Vector>(
              _mm512_dpbf16_ps(std::bit_cast<__m512>(sums[i + r]), load_pairs(q + r * D + j), k));
      }
    } else
#endif
#pragma GCC unroll 16
      for (int64_t j = 0; j < D; j += kVector) {
        const Vector k = load(key + j);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) sums[i + r] += load(q + r * D + j) * k;
      }
  }
  return sums_of(sums);
}

// Adds the weighted values of a page's tokens, whose rows lie `stride` apart, to the sums [R, D] of R heads; the weights
// of head r begin at weight + r * count. Where bf16 goes in pairs, so do tokens, and the sums' columns are to be `sorted`.
template <typename T, int64_t D, int R>
inline void add_values(const T* value, int64_t stride, int64_t tokens, const T* weight, int64_t count, float* sum) {
#ifdef __AVX512BF16__
  if constexpr (kPairs<T, D>) {
    Vector part[R][D / 16];
    std::memcpy(part, sum, sizeof part);
    for (int64_t t = 0; t < tokens; t += 2) {
      const bool two = t + 1 < tokens;
      const T *first = value + t * stride, *second = two ? first + stride : first;
      __m512bh weights[R];
      for (int r = 0; r < R; ++r) {
        const T* own = weight + r * count + t;
        weights[r] = std::bit_cast<__m512bh>(_mm512_set1_epi32(own[0].x | (two ? own[1].x : 0) << 16));
      }
#pragma GCC unroll 4
      for (int j = 0; j < D / 32; ++j) {
        const auto a = std::bit_cast<__m512i>(load_pairs(first + j * 32));
        const auto b = std::bit_cast<__m512i>(load_pairs(second + j * 32));
        const __m512i pairs[] = {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)};
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) {
            Vector& to = part[r][2 * j + half];
            to = std::bit_cast<Vector>(_mm512_dpbf16_ps(std::bit_cast<__m512>(to), weights[r],
                                                        std::bit_cast<__m512bh>(pairs[half])));
          }
      }
    }
    std::memcpy(sum, part, sizeof part);
    return;
  }
#endif
  // As many columns at a time as registers hold sums of, a power of two as D is.
  constexpr int kWhole = D / kVector, kColumns = std::min<int>(kWhole, std::bit_floor<uint64_t>(kSums / R));
  static_assert(kWhole % kColumns == 0);
  for (int first = 0; first < kWhole; first += kColumns) {
    Vector part[R][kColumns];
    for (int r = 0; r < R; ++r) std::memcpy(part[r], sum + r * D + first * kVector, sizeof part[r]);
    for (int64_t t = 0; t < tokens; ++t) {
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) {
        const Vector one = load(value + t * stride + (first + j) * kVector);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) part[r][j] += to_float(weight[r * count + t]) * one;
      }
    }
    for (int r = 0; r < R; ++r) std::memcpy(sum + r * D + first * kVector, part[r], sizeof part[r]);
  }
}

// Of 32 columns unpacklo puts 0-3, 8-11, 16-19 and 24-27 first: brings `count` of them in order.
inline void sorted(float* columns, int64_t count) {
  for (float* end = columns + count; columns < end; columns += 32) {
    float mixed[32];
    std::copy(columns, columns + 32, mixed);
    for (int lane = 0; lane < 4; ++lane)
      for (int half = 0; half < 2; ++half)
        std::copy_n(mixed + half * 16 + lane * 4, 4, columns + lane * 8 + half * 4);
  }
}

// Sixteen sums side by side, added up in pairs: one sum alone would be a chain of d additions.
template <typename T>
inline float dot(const float* x, const T* y, int64_t d) {
  float sums[16] = {};
  int64_t j = 0;
  for (; j + 16 <= d; j += 16)
#pragma omp simd
    for (int64_t i = 0; i < 16; ++i) sums[i] += x[j + i] * to_float(y[j + i]);
  for (int64_t i = 0; j + i < d; ++i) sums[i] += x[j + i] * to_float(y[j + i]);
  for (int64_t half = 8; half > 0; half /= 2)
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

// One decode task: keys first..last-1 of one sequence, all heads, so that a page is read from end to end. Leaves for each
// head its values weighted by exp(score - top) [H, d], the sum of the weights [H] and the top score [H].
// D: the head width where the compiler is to know it, else 0. R: heads that share a key and go together, 1 where D is 0.
template <typename T, int64_t D, int R>
void decode_part(const T* query, const Strided& q_at, const Tensor& keys, const Tensor& values, const int64_t* rows,
                 int64_t first, int64_t last, int64_t heads, float scaling, float* out) {
  const int64_t b = keys.size(1), groups = keys.size(2), d = D ? D : keys.size(3), repeats = heads / groups;
  const int64_t token = groups * d, page = b * token, count = last - first;
  const T *key_pool = keys.const_data_ptr<T>(), *value_pool = values.const_data_ptr<T>();
  // A page at a time: calls f(k, tokens, at, next) for the tokens k..k+tokens-1, which lie at `at`. Pages lie apart, so
  // the processor cannot guess the next one: f asks for it while it works, with each head of each token for as much more
  // of it, from its beginning to its end, which is the order that the processor reads memory fastest in.
  const int64_t share = d * sizeof(T) / repeats;
  const auto ask = [&](const T* next, int64_t number) {
    const auto *from = reinterpret_cast<const char*>(next) + number * share, *end = from + share;
    for (from += -reinterpret_cast<uintptr_t>(from) % 64; from < end; from += 64) __builtin_prefetch(from, 0, kNear);
  };
  const auto for_each_page = [&](const T* pool, const auto& f) {
    for (int64_t k = 0, tokens; k < count; k += tokens) {
      tokens = std::min(b - (first + k) % b, count - k);
      const T* next = pool + rows[std::min(first + k + tokens, last - 1) / b] * page;
      f(k, tokens, pool + rows[(first + k) / b] * page + (first + k) % b * token, next);
    }
  };
  using Q = std::conditional_t<kPairs<T, D>, T, float>;
  thread_local std::vector<float> scores_memory;
  thread_local std::vector<T> weights_memory;
  thread_local std::vector<Q> query_memory;
  thread_local std::vector<int64_t> own_memory;
  scores_memory.resize(heads * count);
  weights_memory.resize(heads * count);
  query_memory.resize(heads * d);
  own_memory.resize(heads);
  float* scores = scores_memory.data();  // [H, count], as are the weights
  T* weights = weights_memory.data();
  Q* q = query_memory.data();        // [H, d]
  int64_t* own = own_memory.data();  // where in a token each head's key or value begins: divisions are slow
  for (int64_t h = 0; h < heads; ++h) own[h] = h / repeats * d;
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t j = 0; j < d; ++j) q[h * d + j] = query[h * q_at.head + j];
  for_each_page(key_pool, [&](int64_t k, int64_t tokens, const T* at, const T* next) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t h = 0; h < heads; h += D ? 4 : 1) {
        const T* row = at + t * token;
        float* score = scores + h * count + k + t;
        if constexpr (D > 0) {
          const auto four = dots<T, D, R>(q, row, h, heads, own);
          for (int64_t i = 0; i < std::min<int64_t>(4, heads - h); ++i) {
            ask(next, t * heads + h + i);
            score[i * count] = four[i];
          }
        } else {
          ask(next, t * heads + h);
          *score = dot(q + h * d, row + own[h], d);
        }
      }
  });
  float *total = out + heads * d, *top = total + heads;
  for (int64_t h = 0; h < heads; ++h) {
    top[h] = highest(scores + h * count, count);
    total[h] = exponentials(scores + h * count, count, scaling, top[h], weights + h * count);
  }
  std::fill(out, out + heads * d, 0.0f);
  for_each_page(value_pool, [&](int64_t k, int64_t tokens, const T* at, const T* next) {
    for (int64_t h = 0; h < heads; h += R) {
      const T *value = at + own[h], *weight = weights + h * count + k;
      for (int64_t i = 0; i < tokens * R; ++i) ask(next, h * tokens + i);
      if constexpr (D > 0) add_values<T, D, R>(value, token, tokens, weight, count, out + h * d);
      else
        for (int64_t t = 0; t < tokens; ++t) {
          const float one = to_float(weight[t]);
#pragma omp simd
          for (int64_t j = 0; j < d; ++j) out[h * d + j] += one * to_float(value[t * token + j]);
        }
    }
  });
  if constexpr (kPairs<T, D>) sorted(out, heads * d);
}

template <typename T>
void decode(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& table, const Tensor& lengths,
            float scaling, Tensor& out) {
  const int64_t count = query.size(0), heads = query.size(1), d = query.size(2), size = heads * (d + 2);
  const Strided q_at(query);
  const T* q_all = query.const_data_ptr<T>();
  const int64_t *length = lengths.const_data_ptr<int64_t>(), *rows = table.const_data_ptr<int64_t>();
  std::vector<std::array<int64_t, 2>> parts;  // sequence, first key
  std::vector<int64_t> first_part(count + 1, 0);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t first = 0; first < length[i]; first += kDecodeKeys) parts.push_back({i, first});
    first_part[i + 1] = parts.size();
  }
  std::vector<float> results(parts.size() * size);
  const bool even = heads / keys.size(2) % 2 == 0;
  const auto part = d == 64    ? (even ? decode_part<T, 64, 2> : decode_part<T, 64, 1>)
                    : d == 128 ? (even ? decode_part<T, 128, 2> : decode_part<T, 128, 1>)
                               : decode_part<T, 0, 1>;
  for_each_task(parts.size(), [&](int64_t index) {
    const auto [i, first] = parts[index];
    part(q_all + i * q_at.token, q_at, keys, values, rows + i * table.stride(0), first,
                std::min(first + kDecodeKeys, length[i]), heads, scaling, results.data() + index * size);
  });
  std::vector<float> sum(d);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t h = 0; h < heads; ++h) {
      const float *begin = results.data() + first_part[i] * size, *end = results.data() + first_part[i + 1] * size;
      float high = kNone, total = 0;
      for (const float* part = begin; part < end; part += size) high = std::max(high, part[heads * (d + 1) + h]);
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (const float* part = begin; part < end; part += size) {
        const float weight = exp_clamped((part[heads * (d + 1) + h] - high) * scaling);
        total += weight * part[heads * d + h];
        for (int64_t j = 0; j < d; ++j) sum[j] += weight * part[h * d + j];
      }
      T* to = out.data_ptr<T>() + (i * heads + h) * d;
      const float scale = share(high, total);
      for (int64_t j = 0; j < d; ++j) to[j] = from_float<T>(sum[j] * scale);
    }
}

}  // namespace

namespace focusllava {

Tensor decode_attention(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& table,
                        const Tensor& lengths, double scaling) {
  TORCH_CHECK(keys.is_contiguous() && values.is_contiguous() && keys.sizes() == values.sizes() && keys.dim() == 4);
  TORCH_CHECK(query.dim() == 3 && query.stride(2) == 1 && query.size(2) == keys.size(3) &&
              query.size(1) % keys.size(2) == 0);
  TORCH_CHECK(query.scalar_type() == keys.scalar_type() && query.scalar_type() == values.scalar_type());
  TORCH_CHECK(table.scalar_type() == at::kLong && lengths.scalar_type() == at::kLong && lengths.is_contiguous());
  TORCH_CHECK(table.dim() == 2 && table.stride(1) == 1 && table.size(0) == query.size(0) &&
              lengths.size(0) == query.size(0));
  Tensor out = at::empty(query.sizes(), query.options());
  FOR_DTYPE(query, decode, query, keys, values, table, lengths, static_cast<float>(scaling), out);
  return out;
}

}  // namespace focusllava

TORCH_LIBRARY_FRAGMENT(focusllava, m) {
  m.def(
      "decode_attention(Tensor query, Tensor keys, Tensor values, Tensor table, Tensor lengths, float scaling) -> Tensor",
      decode_attention);
}
