// Flash attention over packed prompts or tiles, in bf16 and fp32.
//
// Products are oneDNN's small kernels (brgemm) where the processor has them, or our own (products.h). Sums and softmax are
// fp32. Every query is computed alone: what else is in the batch changes no result. A score that is NaN makes its query's
// whole result NaN.
//
// Legend: S queries, K keys, H query heads, G key heads, d head width.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <numeric>

#include "attention.h"
#include "products.h"

namespace {

using namespace focusllava;

constexpr int64_t kKeyStep = 32;  // keys of a tile are rounded up to it, so that few kernels are generated

inline int64_t key_pad(int64_t keys) { return (keys + kKeyStep - 1) / kKeyStep * kKeyStep; }

struct Tile {
  int64_t segment, group, first, last;  // positions first..last-1 of the segment's queries
};

// Products: Brgemm or OwnProducts.
template <typename T, typename Products>
void attend_by(const Tensor& query, const Tensor& key, const Tensor& value, at::IntArrayRef query_lens,
               at::IntArrayRef key_lens, float scaling, bool causal, Tensor& out) {
  constexpr int64_t kRows = Products::kRows, kKeys = Products::kKeys;
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

  // Where each segment begins among queries, keys and reordered keys.
  std::vector<int64_t> q_start(segments + 1, 0), k_start(segments + 1, 0), reordered_start(segments + 1, 0);
  std::vector<Tile> tiles;
  std::vector<std::array<int64_t, 3>> pieces;  // segment, group, first key
  for (int64_t s = 0; s < segments; ++s) {
    q_start[s + 1] = q_start[s] + query_lens[s];
    k_start[s + 1] = k_start[s] + key_lens[s];
    reordered_start[s + 1] = reordered_start[s] + key_pad(key_lens[s]);
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t first = 0; first < key_lens[s]; first += kKeys) pieces.push_back({s, g, first});
      for (int64_t first = 0; first < query_lens[s]; first += positions)
        tiles.push_back({s, g, first, std::min(first + positions, query_lens[s])});
    }
  }
  // Long tiles first, so that the threads end together.
  const auto seen = [&](const Tile& t) {
    return causal ? key_lens[t.segment] - query_lens[t.segment] + t.last : key_lens[t.segment];
  };
  std::stable_sort(tiles.begin(), tiles.end(), [&](const Tile& a, const Tile& b) { return seen(a) > seen(b); });

  const int64_t reordered_keys = reordered_start[segments], wide = Products::value_width(d);
  Tensor reordered = at::empty({groups * reordered_keys, d + wide}, query.options());
  T *reordered_key = reordered.data_ptr<T>(), *reordered_value = reordered_key + groups * reordered_keys * d;
  for_each_task(pieces.size(), [&](int64_t i) {
    const auto [s, g, first] = pieces[i];
    const int64_t count = std::min(kKeys, key_lens[s] - first), tile = key_pad(count);
    const int64_t at = g * reordered_keys + reordered_start[s] + first, from = k_start[s] + first;
    Products::reorder_key(k_all + from * k_at.token + g * k_at.head, k_at.token, count, tile, d,
                          reordered_key + at * d);
    Products::reorder_value(v_all + from * v_at.token + g * v_at.head, v_at.token, count, tile, d,
                            reordered_value + at * wide);
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
      const int64_t at = g * reordered_keys + reordered_start[s] + first;
      Products::multiply(rows, keys, d, queries.data(), d, Reordered<T>{reordered_key + at * d, d, stored},
                         scores.data(), kKeys, false);
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t own = (causal ? before + std::min(row % positions, count - 1) + 1 : end) - first;
        const int64_t visible = std::clamp<int64_t>(own, 0, keys);
        const float* score = scores.data() + row * kKeys;
        T* prob = probs.data() + row * kKeys;
        const float high = std::max(top[row], highest(score, visible));
        const float sum = exponentials(score, visible, scaling, high, prob);
        std::fill(prob + visible, prob + keys, T(0.0f));
        if (high > top[row]) {
          const float shrink = exp_clamped((top[row] - high) * scaling);
          total[row] *= shrink;
          float* held = sums.data() + row * wide;
          for (int64_t j = 0; j < d; ++j) held[j] *= shrink;
          top[row] = high;
        }
        total[row] += sum;
      }
      Products::multiply(rows, wide, keys, probs.data(), kKeys, Reordered<T>{reordered_value + at * wide, stored, wide},
                         sums.data(), wide, true);
    }
    for (int64_t r = 0; r < repeats; ++r)
      for (int64_t p = 0; p < count; ++p) {
        const int64_t row = r * positions + p;
        T* to = o_all + (q_start[s] + tile.first + p) * o_at.token + (g * repeats + r) * o_at.head;
        const float scale = share(top[row], total[row]);
        for (int64_t j = 0; j < d; ++j) to[j] = from_float<T>(sums[row * wide + j] * scale);
      }
    Products::template release<T>();
  });
}

template <typename T>
void attend(const Tensor& query, const Tensor& key, const Tensor& value, at::IntArrayRef query_lens,
            at::IntArrayRef key_lens, float scaling, bool causal, Tensor& out) {
#ifdef __AVX512F__
  if (Brgemm::computes<T>()) return attend_by<T, Brgemm>(query, key, value, query_lens, key_lens, scaling, causal, out);
#endif
  attend_by<T, OwnProducts>(query, key, value, query_lens, key_lens, scaling, causal, out);
}

int64_t sum_of(at::IntArrayRef lens) { return std::accumulate(lens.begin(), lens.end(), int64_t{0}); }

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
  FOR_DTYPE(query, attend, query, key, value, query_lens, key_lens, static_cast<float>(scaling), causal, out);
  return out;
}

// Whether packed attention's products are brgemm's in this dtype. Only with its bf16 instructions has a processor that of
// bf16.
bool has_brgemm(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? Brgemm::computes<BFloat16>() : dtype == at::kFloat && Brgemm::computes<float>();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(focusllava, m) {
  m.def(
      "packed_attention(Tensor query, Tensor key, Tensor value, int[] query_lens, int[] key_lens, float scaling, "
      "bool causal) -> Tensor",
      packed_attention);
  m.def("has_brgemm(ScalarType dtype) -> bool", has_brgemm);
}
