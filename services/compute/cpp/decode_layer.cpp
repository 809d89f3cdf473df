// A whole decoder layer of tokens that each continue a sequence of their own, in one call: at so few tokens the way from
// operator to operator through Python costs as much as some of them.
#include <torch/library.h>

#include "native.h"

namespace {

using namespace focusllava;

enum Weight { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kWeights };

int64_t inputs_of(const Tensor& panels) { return panels.size(1) * panels.size(3); }

// pool[slots[i]] = rows[i]; pool in pages [rows, b, G, d], slots count its tokens.
template <typename T>
void store(const Tensor& rows, const Tensor& slots, Tensor& pool) {
  const int64_t width = pool.size(2) * pool.size(3), all = pool.size(0) * pool.size(1);
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < slots.size(0); ++i) {
    TORCH_CHECK(0 <= slot[i] && slot[i] < all, "slot ", slot[i], " of ", all);
    std::memcpy(pool.data_ptr<T>() + slot[i] * width, rows.const_data_ptr<T>() + i * width, width * sizeof(T));
  }
}

// Norm, attention, norm, gated MLP on hidden [n, D], in place; the new keys and values go to `slots` [n] of the pools.
// norms: of attention and MLP. weights, biases: in the order of Weight, weights in panels. table, lengths: as
// decode_attention takes them.
void decode_layer_(Tensor hidden, const Tensor& cos, const Tensor& sin, at::TensorList norms, double eps,
                   at::TensorList weights, const c10::List<std::optional<Tensor>>& biases, Tensor keys, Tensor values,
                   const Tensor& slots, const Tensor& table, const Tensor& lengths, double scaling) {
  TORCH_CHECK(norms.size() == 2 && weights.size() == kWeights && biases.size() == kWeights);
  for (const Tensor& weight : weights) TORCH_CHECK(weight.dim() == 4, "a weight that is not in panels");
  for (const Tensor& pool : {keys, values})
    TORCH_CHECK(pool.is_contiguous() && pool.dim() == 4 && pool.scalar_type() == hidden.scalar_type());
  TORCH_CHECK(slots.is_contiguous() && slots.scalar_type() == at::kLong && slots.dim() == 1 &&
              slots.size(0) == hidden.size(0));
  const int64_t groups = keys.size(2), d = keys.size(3), width = inputs_of(weights[kOutput]);
  const c10::List<std::optional<Tensor>> first_biases({biases.get(kQuery), biases.get(kKey), biases.get(kValue)});
  const auto projected = linear(rms_norm(hidden, norms[0], eps), weights.slice(0, 3), first_biases,
                                {width, groups * d, groups * d});
  Tensor query = projected[kQuery].unflatten(-1, {-1, d}), key = projected[kKey].unflatten(-1, {groups, d});
  rotate_(key, cos, sin);
  rotate_(query, cos, sin);
  FOR_DTYPE(keys, store, projected[kKey], slots, keys);
  FOR_DTYPE(values, store, projected[kValue], slots, values);
  const Tensor out = decode_attention(query, keys, values, table, lengths, scaling);
  linear_add_(hidden, out.flatten(1), weights[kOutput], biases.get(kOutput));
  const Tensor inner = linear_gated(rms_norm(hidden, norms[1], eps), weights[kGate], biases.get(kGate), weights[kUp],
                                    biases.get(kUp), inputs_of(weights[kDown]));
  linear_add_(hidden, inner, weights[kDown], biases.get(kDown));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(focusllava, m) {
  m.def(
      "decode_layer_(Tensor(a!) hidden, Tensor cos, Tensor sin, Tensor[] norms, float eps, Tensor[] weights, "
      "Tensor?[] biases, Tensor(b!) keys, Tensor(c!) values, Tensor slots, Tensor table, Tensor lengths, "
      "float scaling) -> ()",
      decode_layer_);
}
