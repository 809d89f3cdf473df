// What lies between a decoder layer's matrix products, in bf16 and fp32, each in one pass over memory.
//
// Legend: S tokens, H heads, d head width, D hidden width.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "attention.h"

namespace {

using namespace focusllava;

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

TORCH_LIBRARY_FRAGMENT(focusllava, m) {
  m.def("rms_norm(Tensor hidden, Tensor weight, float eps) -> Tensor", rms_norm);
  m.def("rotate_(Tensor(a!) x, Tensor cos, Tensor sin) -> ()", rotate_);
  m.def("silu_mul_(Tensor(a!) gate, Tensor up) -> ()", silu_mul_);
}
