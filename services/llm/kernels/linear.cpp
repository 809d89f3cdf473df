// Matrix products with a weight that lies in panels of 64 outputs: decode reads each weight once, at the memory's
// speed, and prefill multiplies from the same bytes.
//
// Each output is one fp32 sum over the inputs in their order, whatever the number of tokens: what else is in the batch
// changes no result.
//
// Legend: M tokens, N outputs, K inputs.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "native.h"

namespace {

using namespace focusllava;

constexpr int64_t kPanel = 64;    // outputs of a panel: four vectors of fp32
constexpr int64_t kVector = 16;   // floats of a vector
constexpr int kRegisterRows = 6;  // tokens of a pass: their sums stay in registers, 24 of AVX-512's 32
constexpr int64_t kRows = 96;     // tokens of a task
constexpr int64_t kWords = 1024;  // words of a panel, 256 KiB, that all passes of a task take in turn from the L2 cache
constexpr int64_t kAhead = 4096;  // bytes of its panel that a task of a single pass asks for ahead

typedef float Vector __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

template <typename T>
constexpr int64_t kPair = 4 / sizeof(T);  // inputs of a 32-bit word

// sum += x * w for 16 outputs: one input in fp32, two in bf16, side by side in a word.
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

// Weights to ask for meanwhile: so many bytes with each word, whose own are 256.
struct Ahead {
  const char* from;
  int64_t bytes;
};

// Adds to sums [R, 64] of R tokens the words first..last-1 of their inputs x [R, K].
template <typename T, int R>
void multiply_rows(const T* x, int64_t width, const T* panel, int64_t first, int64_t last, Ahead ahead, float* sums) {
  Vector sum[R][4];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < 4; ++c) std::memcpy(&sum[r][c], sums + r * kPanel + c * kVector, sizeof(Vector));
  for (int64_t k = first; k < last; ++k) {
    const T* weight = panel + k * kPanel * kPair<T>;
    for (int64_t line = 0; line < ahead.bytes; line += 64) __builtin_prefetch(ahead.from + line, 0, 2);
    ahead.from += ahead.bytes;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      uint32_t word;
      std::memcpy(&word, x + r * width + k * kPair<T>, sizeof word);
#pragma GCC unroll 8
      for (int c = 0; c < 4; ++c)
        sum[r][c] = multiply_add<T>(sum[r][c], word, weight + c * kVector * kPair<T>);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < 4; ++c) std::memcpy(sums + r * kPanel + c * kVector, &sum[r][c], sizeof(Vector));
}

struct Panels {  // nn.Linear's weight [ceil(N / 64), K / pair, 64, pair], zeros beyond N, and its bias [N]
  Tensor weight;
  std::optional<Tensor> bias;
  int64_t outputs;
  int64_t inputs() const { return weight.size(1) * weight.size(3); }
  int64_t count() const { return weight.size(0); }
  template <typename T>
  const T* panel(int64_t index) const { return weight.const_data_ptr<T>() + index * kPanel * inputs(); }
};

// The products of one panel and `rows` tokens, plus the bias: sums [rows, 64]. next: the panel that this thread takes
// next, or null; its way from memory overlaps with the passes, which find their own panel in the cache.
template <typename T>
void multiply(const T* x, int64_t rows, const Panels& linear, int64_t panel, const T* next, float* sums) {
  constexpr decltype(&multiply_rows<T, 1>) kKernels[] = {multiply_rows<T, 1>, multiply_rows<T, 2>, multiply_rows<T, 3>,
                                                         multiply_rows<T, 4>, multiply_rows<T, 5>, multiply_rows<T, 6>};
  const int64_t width = linear.inputs(), words = width / kPair<T>;
  const T* weight = linear.panel<T>(panel);
  const int64_t passes = (rows + kRegisterRows - 1) / kRegisterRows;
  const int64_t share = passes < 4 ? 128 : 64;  // of the 256 bytes that a word of the next panel has, a pass's
  std::fill(sums, sums + rows * kPanel, 0.0f);
  for (int64_t first = 0; first < words; first += kWords) {
    const int64_t last = std::min(first + kWords, words);
    const auto* after = reinterpret_cast<const char*>(last < words ? weight + last * kPanel * kPair<T> : next);
    const auto* here = reinterpret_cast<const char*>(weight + first * kPanel * kPair<T>);
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t r = pass * kRegisterRows, some = std::min<int64_t>(kRegisterRows, rows - r);
      const int64_t done = pass * share;
      Ahead ahead{nullptr, 0};
      if (passes == 1) ahead = {here + kAhead, 256};
      else if (after && done < 256) ahead = {after + done * (last - first), share};
      kKernels[some - 1](x + r * width, width, weight, first, last, ahead, sums + r * kPanel);
    }
  }
  if (!linear.bias) return;
  const T* bias = linear.bias->const_data_ptr<T>() + panel * kPanel;
  const int64_t columns = std::min(kPanel, linear.outputs - panel * kPanel);
  for (int64_t r = 0; r < rows; ++r)
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) sums[r * kPanel + j] += to_float(bias[j]);
}

// Calls task(panel, first token, tokens, more) for all panels and tokens, a few tokens at a time; more: the same thread
// goes on with the next panel.
template <typename F>
void for_each_part(int64_t panels, int64_t tokens, const F& task) {
  if (tokens <= kRows) {  // a run of panels for each thread
    at::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
      for (int64_t panel = first; panel < last; ++panel) task(panel, 0, tokens, panel + 1 < last);
    });
    return;
  }
  for_each_task((tokens + kRows - 1) / kRows * panels, [&](int64_t i) {
    const int64_t first = i / panels * kRows;
    task(i % panels, first, std::min(kRows, tokens - first), false);
  });
}

template <typename T>
void products(const Tensor& x, const std::vector<Panels>& linears, std::vector<Tensor>& outs) {
  std::vector<int64_t> first_panel{0};
  for (const Panels& linear : linears) first_panel.push_back(first_panel.back() + linear.count());
  const int64_t width = x.size(-1);
  const T* x_all = x.const_data_ptr<T>();
  for_each_part(first_panel.back(), x.numel() / width, [&](int64_t panel, int64_t first, int64_t rows, bool more) {
    const size_t i = std::upper_bound(first_panel.begin(), first_panel.end(), panel) - first_panel.begin() - 1;
    panel -= first_panel[i];
    more = more && panel + 1 < linears[i].count();
    alignas(64) float sums[kRows * kPanel];
    multiply(x_all + first * width, rows, linears[i], panel, more ? linears[i].panel<T>(panel + 1) : nullptr, sums);
    const int64_t wide = linears[i].outputs, columns = std::min(kPanel, wide - panel * kPanel);
    T* out = outs[i].data_ptr<T>() + first * wide + panel * kPanel;
    for (int64_t r = 0; r < rows; ++r)
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) out[r * wide + j] = from_float<T>(sums[r * kPanel + j]);
  });
}

template <typename T>
void product_add(Tensor& hidden, const Tensor& x, const Panels& linear) {
  const int64_t width = x.size(-1), wide = linear.outputs;
  const T* x_all = x.const_data_ptr<T>();
  for_each_part(linear.count(), x.numel() / width, [&](int64_t panel, int64_t first, int64_t rows, bool more) {
    alignas(64) float sums[kRows * kPanel];
    multiply(x_all + first * width, rows, linear, panel, more ? linear.panel<T>(panel + 1) : nullptr, sums);
    auto* out = reinterpret_cast<Bits<T>*>(hidden.data_ptr<T>()) + first * wide + panel * kPanel;
    const int64_t columns = std::min(kPanel, wide - panel * kPanel);
    for (int64_t r = 0; r < rows; ++r)
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j)
        out[r * wide + j] = to_bits<T>(to_float(out[r * wide + j]) + sums[r * kPanel + j]);
  });
}

template <typename T>
void product_gated(const Tensor& x, const Panels& gate, const Panels& up, Tensor& out) {
  const int64_t width = x.size(-1), wide = gate.outputs;
  const T* x_all = x.const_data_ptr<T>();
  for_each_part(gate.count(), x.numel() / width, [&](int64_t panel, int64_t first, int64_t rows, bool more) {
    alignas(64) float gates[kRows * kPanel], ups[kRows * kPanel];
    multiply(x_all + first * width, rows, gate, panel, up.panel<T>(panel), gates);
    multiply(x_all + first * width, rows, up, panel, more ? gate.panel<T>(panel + 1) : nullptr, ups);
    auto* to = reinterpret_cast<Bits<T>*>(out.data_ptr<T>()) + first * wide + panel * kPanel;
    const int64_t columns = std::min(kPanel, wide - panel * kPanel);
    for (int64_t r = 0; r < rows; ++r)
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j)
        to[r * wide + j] = to_bits<T>(silu(gates[r * kPanel + j]) * ups[r * kPanel + j]);
  });
}

Panels panels(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t outputs) {
  TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && weight.dim() == 4 && weight.size(2) == kPanel);
  TORCH_CHECK(weight.scalar_type() == x.scalar_type() && weight.size(3) * x.element_size() == 4);
  Panels made{weight, bias, outputs};
  TORCH_CHECK(made.inputs() == x.size(-1), x.size(-1), " inputs for a weight of ", made.inputs());
  TORCH_CHECK((outputs + kPanel - 1) / kPanel == made.count(), outputs, " outputs of ", made.count(), " panels");
  TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == outputs && bias->scalar_type() == x.scalar_type()));
  return made;
}

Tensor like(const Tensor& x, int64_t outputs) {
  auto sizes = x.sizes().vec();
  sizes.back() = outputs;
  return at::empty(sizes, x.options());
}

// x [..., K] times each weight.
std::vector<Tensor> linear(const Tensor& x, at::TensorList weights, const c10::List<std::optional<Tensor>>& biases,
                           at::IntArrayRef outputs) {
  TORCH_CHECK(weights.size() == biases.size() && weights.size() == outputs.size());
  std::vector<Panels> linears;
  std::vector<Tensor> outs;
  for (size_t i = 0; i < weights.size(); ++i) {
    linears.push_back(panels(x, weights[i], biases.get(i), outputs[i]));
    outs.push_back(like(x, outputs[i]));
  }
  FOR_DTYPE(x, products, x, linears, outs);
  return outs;
}

// hidden += x times the weight.
void linear_add_(Tensor hidden, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Panels made = panels(x, weight, bias, hidden.size(-1));
  TORCH_CHECK(hidden.is_contiguous() && hidden.scalar_type() == x.scalar_type() &&
              hidden.numel() / hidden.size(-1) == x.numel() / x.size(-1));
  FOR_DTYPE(x, product_add, hidden, x, made);
}

// silu(x times the gate's weight) * (x times up's).
Tensor linear_gated(const Tensor& x, const Tensor& gate, const std::optional<Tensor>& gate_bias, const Tensor& up,
                    const std::optional<Tensor>& up_bias, int64_t outputs) {
  const Panels gates = panels(x, gate, gate_bias, outputs), ups = panels(x, up, up_bias, outputs);
  Tensor out = like(x, outputs);
  FOR_DTYPE(x, product_gated, x, gates, ups, out);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(focusllava, m) {
  m.def("linear(Tensor x, Tensor[] weights, Tensor?[] biases, int[] outputs) -> Tensor[]", linear);
  m.def("linear_add_(Tensor(a!) hidden, Tensor x, Tensor weight, Tensor? bias) -> ()", linear_add_);
  m.def(
      "linear_gated(Tensor x, Tensor gate, Tensor? gate_bias, Tensor up, Tensor? up_bias, int outputs) -> Tensor",
      linear_gated);
}
