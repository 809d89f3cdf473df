// What the native operators share: bf16 as bits, exp, tasks shared out among threads, a choice of dtype.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

namespace focusllava {

using at::BFloat16;
using at::Tensor;

// How near the processor is asked to bring what is needed soon, as __builtin_prefetch takes it: into the L1 cache
// with AMX (Sapphire Rapids), as these kernels were tuned there; else into L2: on Zen 4 a tenth faster for scattered pages.
#ifdef __AMX_BF16__
constexpr int kNear = 3;
#else
constexpr int kNear = 2;
#endif

inline float to_float(float x) { return x; }
inline float to_float(uint16_t bfloat16) { return std::bit_cast<float>(static_cast<uint32_t>(bfloat16) << 16); }
inline float to_float(BFloat16 x) { return to_float(x.x); }
template <typename T>
using Bits = std::conditional_t<std::is_same_v<T, BFloat16>, uint16_t, float>;
template <typename T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline BFloat16 from_float<BFloat16>(float x) {  // to nearest even
  uint32_t bits = std::bit_cast<uint32_t>(x);
  bits += 0x7fff + ((bits >> 16) & 1);
  return BFloat16(static_cast<uint16_t>(bits >> 16), BFloat16::from_bits());
}

template <typename T>
inline Bits<T> to_bits(float x) { return std::bit_cast<Bits<T>>(from_float<T>(x)); }

// exp(x) for x <= 88, 2 ulp, exp(-87) below -87, and NaN for NaN. Without a branch, so that it vectorises. The polynomial
// and the two parts of ln 2 are those of expf in S. Moshier's Cephes library.
__attribute__((always_inline)) inline float exp_clamped(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float whole = std::floor(x * 1.442695041f + 0.5f);
  float r = x - whole * 0.693359375f;
  r = r + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * std::bit_cast<float>((static_cast<int32_t>(whole) + 127) << 23);
}

__attribute__((always_inline)) inline float silu(float x) { return x / (1.0f + exp_clamped(x > -88.0f ? -x : 88.0f)); }

// Runs tasks 0..count-1, each on whichever thread is free next. Scope: what a thread has one of meanwhile.
struct NoScope {};
template <typename Scope = NoScope, typename F>
void for_each_task(int64_t count, const F& task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    [[maybe_unused]] Scope scope;
    for (int64_t i = next++; i < count; i = next++) task(i);
  });
}

// Operators that decode_layer.cpp calls as well; described where they are defined.
Tensor rms_norm(const Tensor& hidden, const Tensor& weight, double eps);
void rotate_(Tensor x, const Tensor& cos, const Tensor& sin);
Tensor decode_attention(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& table,
                        const Tensor& lengths, double scaling);
std::vector<Tensor> linear(const Tensor& x, at::TensorList weights, const c10::List<std::optional<Tensor>>& biases,
                           at::IntArrayRef outputs);
void linear_add_(Tensor hidden, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);
Tensor linear_gated(const Tensor& x, const Tensor& gate, const std::optional<Tensor>& gate_bias, const Tensor& up,
                    const std::optional<Tensor>& up_bias, int64_t outputs);

}  // namespace focusllava

// Calls f<T>(...) for the tensor's dtype.
#define FOR_DTYPE(tensor, f, ...)                                                               \
  do {                                                                                          \
    const auto dtype = (tensor).scalar_type();                                                  \
    TORCH_CHECK(dtype == at::kBFloat16 || dtype == at::kFloat, "dtype ", dtype, " is not ours"); \
    if (dtype == at::kBFloat16) f<BFloat16>(__VA_ARGS__);                                       \
    else f<float>(__VA_ARGS__);                                                                 \
  } while (false)
