// The stages' hot loops on a CPU, in bf16 and fp32: flash attention over packed prompts or tiles and over the pages of the
// KV cache, and what lies between a decoder layer's matrix products, each in one pass over memory.
//
// Matrix products are oneDNN's small kernels (brgemm), which take the processor's matrix units where it has them, or
// without AVX-512 our own (products.h); loops are plain C++ that the compiler vectorises for the processor at hand. Sums
// and softmax are fp32. Every query, token and sequence is computed alone: what else is in the batch changes no result.
//
// Legend: S queries, K keys, H query heads, G key heads, R = H / G query heads a key head, d head width, D hidden width,
// F MLP width, n sequences, b tokens of a page.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <array>
#include <numeric>

#include "native.h"
#include "products.h"
#include "rows.h"

namespace {

using namespace focusllava;

// A tile's query rows (heads that share keys, times positions) and keys: its scores and probabilities stay in the L2
// cache. Matrix units want more rows for the keys that they load.
#ifdef __AMX_TILE__
constexpr int64_t kRows = 256, kKeys = 256;
#elif defined(__AVX512F__)
constexpr int64_t kRows = 64, kKeys = 512;
#else
constexpr int64_t kRows = 96, kKeys = 256;
#endif
constexpr int64_t kKeyStep = 32;      // keys of a tile are rounded up to it, so that few kernels are generated
constexpr int64_t kDecodeKeys = 256;  // keys of one decode task; a longer sequence is shared out among threads
constexpr float kNone = -1e30f;       // a score that nothing is below, finite so that differences are

struct Strided {  // a [tokens, heads, d] view, d contiguous
  int64_t token, head;
  explicit Strided(const Tensor& t) : token(t.stride(0)), head(t.stride(1)) {}
};

inline int64_t key_pad(int64_t keys) { return (keys + kKeyStep - 1) / kKeyStep * kKeyStep; }

struct Tile {
  int64_t segment, group, first, last;  // positions first..last-1 of the segment's queries
};

inline float highest(const float* score, int64_t count) {
  float high = kNone;
#pragma omp simd reduction(max : high)
  for (int64_t k = 0; k < count; ++k) high = score[k] > high ? score[k] : high;
  return high;
}

// prob = exp(score * scaling - high), whose sum is returned.
template <typename T>
inline float exponentials(const float* score, int64_t count, float scaling, float high, T* prob) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < count; ++k) {
    const float p = exp_clamped(score[k] * scaling - high);
    sum += p;
    prob[k] = from_float<T>(p);
  }
  return sum;
}

#ifdef __AVX512BF16__
// In powers of two, which the processor scales by in one instruction. The polynomial is that of exp2f in S. Moshier's
// Cephes library without its highest term: 3e-6 for |r| <= 1/2, far below what bf16 keeps.
template <>
inline float exponentials(const float* score, int64_t count, float scaling, float high, BFloat16* prob) {
  constexpr float kLog2e = 1.442695041f;
  const __m512 factor = _mm512_set1_ps(scaling * kLog2e), less = _mm512_set1_ps(-high * kLog2e);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < count; k += 16) {
    const __mmask16 some = count - k < 16 ? (1u << (count - k)) - 1 : 0xffff;
    const __m512 x = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(some, score + k), factor, less);
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

template <typename T>
void packed(const Tensor& query, const Tensor& key, const Tensor& value, at::IntArrayRef query_lens,
            at::IntArrayRef key_lens, float scaling, bool causal, Tensor& out) {
  const int64_t heads = query.size(1), groups = key.size(1), d = query.size(2), repeats = heads / groups;
  const Strided q_at(query), k_at(key), v_at(value), o_at(out);
  const T *q_all = query.const_data_ptr<T>(), *k_all = key.const_data_ptr<T>(), *v_all = value.const_data_ptr<T>();
  T* o_all = out.data_ptr<T>();
  const int64_t segments = query_lens.size();
  int64_t positions = std::max<int64_t>(1, kRows / repeats);
  if (!causal && segments > 0) {
    // Segments are tiles of one length: nine rows of 64 and one of a single token would cost as much as ten of 64.
    const int64_t longest = std::max<int64_t>(1, *std::max_element(query_lens.begin(), query_lens.end()));
    const int64_t pieces = (longest + positions - 1) / positions;
    positions = (longest + pieces - 1) / pieces;
  }

  // Where each segment begins among queries, keys and packed keys.
  std::vector<int64_t> q_start(segments + 1, 0), k_start(segments + 1, 0), packed_start(segments + 1, 0);
  std::vector<Tile> tiles;
  std::vector<std::array<int64_t, 3>> packs;  // segment, group, first key
  for (int64_t s = 0; s < segments; ++s) {
    q_start[s + 1] = q_start[s] + query_lens[s];
    k_start[s + 1] = k_start[s] + key_lens[s];
    packed_start[s + 1] = packed_start[s] + key_pad(key_lens[s]);
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t first = 0; first < key_lens[s]; first += kKeys) packs.push_back({s, g, first});
      for (int64_t first = 0; first < query_lens[s]; first += positions)
        tiles.push_back({s, g, first, std::min(first + positions, query_lens[s])});
    }
  }
  // Long tiles first, so that the threads end together.
  const auto seen = [&](const Tile& t) {
    return causal ? key_lens[t.segment] - query_lens[t.segment] + t.last : key_lens[t.segment];
  };
  std::stable_sort(tiles.begin(), tiles.end(), [&](const Tile& a, const Tile& b) { return seen(a) > seen(b); });

  const int64_t packed_keys = packed_start[segments], wide = value_width(d);
  Tensor packed = at::empty({groups * packed_keys, d + wide}, query.options());
  T *packed_key = packed.data_ptr<T>(), *packed_value = packed_key + groups * packed_keys * d;
  for_each_task(packs.size(), [&](int64_t i) {
    const auto [s, g, first] = packs[i];
    const int64_t count = std::min(kKeys, key_lens[s] - first), tile = key_pad(count);
    const int64_t at = g * packed_keys + packed_start[s] + first, from = k_start[s] + first;
    pack_key(k_all + from * k_at.token + g * k_at.head, k_at.token, count, tile, d, packed_key + at * d);
    pack_value(v_all + from * v_at.token + g * v_at.head, v_at.token, count, tile, d, packed_value + at * wide);
  });

  const int64_t rows = positions * repeats;
  for_each_task(tiles.size(), [&](int64_t i) {
    const Tile& tile = tiles[i];
    const int64_t s = tile.segment, g = tile.group, count = tile.last - tile.first;
    thread_local std::vector<float> scores, sums, total, top;
    thread_local std::vector<T> probs, queries;
    scores.resize(rows * kKeys);
    probs.resize(rows * kKeys);
    queries.resize(rows * d);
    sums.assign(rows * wide, 0.0f);
    total.assign(rows, 0.0f);
    top.assign(rows, kNone);
    // Row r * positions + p is head r of position p; rows of a short last tile repeat its last position.
    for (int64_t r = 0; r < repeats; ++r)
      for (int64_t p = 0; p < positions; ++p) {
        const int64_t at = q_start[s] + tile.first + std::min(p, count - 1);
        const T* from = q_all + at * q_at.token + (g * repeats + r) * q_at.head;
        std::copy(from, from + d, queries.data() + (r * positions + p) * d);
      }
    const int64_t before = key_lens[s] - query_lens[s] + tile.first;  // keys before the tile's first position
    for (int64_t first = 0, end = seen(tile); first < end; first += kKeys) {
      const int64_t stored = key_pad(std::min(kKeys, key_lens[s] - first)), keys = std::min(stored, key_pad(end - first));
      const int64_t at = g * packed_keys + packed_start[s] + first;
      multiply(rows, keys, d, queries.data(), d, Packed<T>{packed_key + at * d, d, stored}, scores.data(), kKeys, false);
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t own = (causal ? before + std::min(row % positions, count - 1) + 1 : end) - first;
        const int64_t visible = std::clamp<int64_t>(own, 0, keys);
        const float* score = scores.data() + row * kKeys;
        T* prob = probs.data() + row * kKeys;
        const float high = std::max(top[row], scaling * highest(score, visible));
        const float sum = exponentials(score, visible, scaling, high, prob);
        std::fill(prob + visible, prob + keys, T(0.0f));
        if (high > top[row]) {
          const float shrink = exp_clamped(top[row] - high);
          total[row] *= shrink;
          float* held = sums.data() + row * wide;
          for (int64_t j = 0; j < d; ++j) held[j] *= shrink;
          top[row] = high;
        }
        total[row] += sum;
      }
      multiply(rows, wide, keys, probs.data(), kKeys, Packed<T>{packed_value + at * wide, stored, wide}, sums.data(), wide,
               true);
    }
    for (int64_t r = 0; r < repeats; ++r)
      for (int64_t p = 0; p < count; ++p) {
        const int64_t row = r * positions + p;
        T* to = o_all + (q_start[s] + tile.first + p) * o_at.token + (g * repeats + r) * o_at.head;
        const float scale = 1.0f / total[row];
        for (int64_t j = 0; j < d; ++j) to[j] = from_float<T>(sums[row * wide + j] * scale);
      }
    release_products<T>();
  });
}

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
    top[h] = highest(scores + h * count, count) * scaling;
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
        const float weight = exp_clamped(part[heads * (d + 1) + h] - high);
        total += weight * part[heads * d + h];
        for (int64_t j = 0; j < d; ++j) sum[j] += weight * part[h * d + j];
      }
      T* to = out.data_ptr<T>() + (i * heads + h) * d;
      for (int64_t j = 0; j < d; ++j) to[j] = from_float<T>(sum[j] / total);
    }
}

constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread

template <typename T>
void norm(const Tensor& hidden, const Tensor& weight, float eps, Tensor& out) {
  const int64_t width = hidden.size(-1), tokens = hidden.numel() / width;
  const T *all = hidden.const_data_ptr<T>(), *scale = weight.const_data_ptr<T>();
  T* to_all = out.data_ptr<T>();
  at::parallel_for(0, tokens, std::max<int64_t>(1, kGrain / width), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const T* row = all + i * width;
      T* to = to_all + i * width;
      float squares = 0;
#pragma omp simd reduction(+ : squares)
      for (int64_t j = 0; j < width; ++j) squares += to_float(row[j]) * to_float(row[j]);
      const float factor = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) to[j] = from_float<T>(to_float(row[j]) * factor * to_float(scale[j]));
    }
  });
}

template <typename T>
void rotate(Tensor& x, const Tensor& cos, const Tensor& sin) {
  const int64_t tokens = x.size(0), heads = x.size(1), d = x.size(2), half = d / 2;
  const Strided at(x);
  T* all = x.data_ptr<T>();
  const T *cos_all = cos.const_data_ptr<T>(), *sin_all = sin.const_data_ptr<T>();
  at::parallel_for(0, tokens, std::max<int64_t>(1, kGrain / (heads * d)), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const T *c = cos_all + i * d, *s = sin_all + i * d;
      for (int64_t h = 0; h < heads; ++h) {
        T *low = all + i * at.token + h * at.head, *high = low + half;
#pragma omp simd
        for (int64_t j = 0; j < half; ++j) {
          const float x1 = to_float(low[j]), x2 = to_float(high[j]);
          low[j] = from_float<T>(x1 * to_float(c[j]) - x2 * to_float(s[j]));
          high[j] = from_float<T>(x2 * to_float(c[half + j]) + x1 * to_float(s[half + j]));
        }
      }
    }
  });
}

// On bits: the compiler does not vectorise this loop over a struct that it reads and writes.
template <typename T>
void gate_part(Bits<T>* __restrict gate, const Bits<T>* __restrict up, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) gate[i] = to_bits<T>(silu(to_float(gate[i])) * to_float(up[i]));
}

template <typename T>
void gate(Tensor& gate, const Tensor& up) {
  auto* to = reinterpret_cast<Bits<T>*>(gate.data_ptr<T>());
  const auto* with = reinterpret_cast<const Bits<T>*>(up.const_data_ptr<T>());
  at::parallel_for(0, gate.numel(), kGrain,
                   [&](int64_t first, int64_t last) { gate_part<T>(to + first, with + first, last - first); });
}

}  // namespace

namespace focusllava {

static int64_t sum_of(at::IntArrayRef lens) { return std::accumulate(lens.begin(), lens.end(), int64_t{0}); }

// Segments end to end: segment i's queries are the last query_lens[i] of its key_lens[i] tokens. Each sees the keys of its
// segment: all of them, or where causal those up to its own position.
Tensor packed_attention(const Tensor& query, const Tensor& key, const Tensor& value, at::IntArrayRef query_lens,
                        at::IntArrayRef key_lens, double scaling, bool causal) {
  const int64_t d = query.size(2);
  for (const Tensor& t : {query, key, value})
    TORCH_CHECK(t.dim() == 3 && t.stride(2) == 1 && t.size(2) == d && t.scalar_type() == query.scalar_type());
  TORCH_CHECK(d % 2 == 0 && query.size(1) % key.size(1) == 0 && key.sizes() == value.sizes());
  TORCH_CHECK(query_lens.size() == key_lens.size() && sum_of(query_lens) == query.size(0) &&
              sum_of(key_lens) == key.size(0));
  for (size_t i = 0; i < query_lens.size(); ++i) TORCH_CHECK(0 <= query_lens[i] && query_lens[i] <= key_lens[i]);
  Tensor out = at::empty(query.sizes(), query.options());
  FOR_DTYPE(query, packed, query, key, value, query_lens, key_lens, static_cast<float>(scaling), causal, out);
  return out;
}

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

// RMS norm of hidden [S, D], times weight [D].
Tensor rms_norm(const Tensor& hidden, const Tensor& weight, double eps) {
  TORCH_CHECK(hidden.is_contiguous() && weight.is_contiguous() && weight.numel() == hidden.size(-1) &&
              weight.scalar_type() == hidden.scalar_type());
  Tensor out = at::empty_like(hidden);
  FOR_DTYPE(hidden, norm, hidden, weight, static_cast<float>(eps), out);
  return out;
}

// Rotary embedding in place, the halves of a head as pairs. x [S, H, d]; cos and sin [S, d].
void rotate_(Tensor x, const Tensor& cos, const Tensor& sin) {
  TORCH_CHECK(x.dim() == 3 && x.stride(2) == 1 && x.size(2) % 2 == 0);
  for (const Tensor& t : {cos, sin})
    TORCH_CHECK(t.is_contiguous() && t.dim() == 2 && t.size(0) == x.size(0) && t.size(1) == x.size(2) &&
                t.scalar_type() == x.scalar_type());
  FOR_DTYPE(x, rotate, x, cos, sin);
}

// gate = silu(gate) * up, in place.
void silu_mul_(Tensor x, const Tensor& up) {
  TORCH_CHECK(x.is_contiguous() && up.is_contiguous() && x.sizes() == up.sizes() && x.scalar_type() == up.scalar_type());
  FOR_DTYPE(x, gate, x, up);
}

}  // namespace focusllava

TORCH_LIBRARY(focusllava, m) {
  m.def(
      "packed_attention(Tensor query, Tensor key, Tensor value, int[] query_lens, int[] key_lens, float scaling, "
      "bool causal) -> Tensor",
      packed_attention);
  m.def(
      "decode_attention(Tensor query, Tensor keys, Tensor values, Tensor table, Tensor lengths, float scaling) -> Tensor",
      decode_attention);
  m.def("rms_norm(Tensor hidden, Tensor weight, float eps) -> Tensor", rms_norm);
  m.def("rotate_(Tensor(a!) x, Tensor cos, Tensor sin) -> ()", rotate_);
  m.def("silu_mul_(Tensor(a!) gate, Tensor up) -> ()", silu_mul_);
}
