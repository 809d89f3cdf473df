// Matrix products with a weight that lies in panels of 32 outputs: decode reads each weight once, at the memory's speed,
// and prefill multiplies from the same bytes. Matrix units (AMX) multiply bf16 where the processor has them.
//
// Each output is one fp32 sum over the inputs in their order, whatever the number of tokens: what else is in the batch
// changes no result.
//
// Legend: M tokens, N outputs, K inputs.
#include <ATen/core/Tensor.h>
#include <ATen/cpu/Utils.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <utility>

#include "native.h"
#include "rows.h"

namespace {

using namespace focusllava;

constexpr int64_t kPanel = 32;                // outputs of a panel
constexpr int64_t kRegisterRows = kSums / 2;  // tokens of a pass: their sums, two vectors each, stay in registers
constexpr int64_t kTileRows = 32;             // the same on matrix units: with two vectors of outputs four tiles of sums
constexpr int64_t kRows = 96;                 // tokens of a task
constexpr int64_t kWordBytes = 128;           // of a panel for one word of the inputs
constexpr int64_t kAhead = 32;  // words, 4 KiB, that a task of a single pass asks for ahead, its next panel's at last
// Words of a panel that all passes of a task take from a cache: 256 KiB from L2, or 16 KiB from L1 without AVX-512, whose
// passes of half as many tokens load weights twice as often.
constexpr int64_t kWords = kVector == 16 ? 2048 : 128;

// Weights to ask for meanwhile: so many bytes with each word. All 128 of a word are read soon, from the L1 cache; half of
// them belong to the next panel, which would drive the own one out of it.
struct Ahead {
  const char* from;
  int64_t bytes;
  void ask(int64_t words) {
    const char* end = from + words * bytes;
    if (bytes == kWordBytes) for (; from < end; from += 64) __builtin_prefetch(from, 0, kNear);
    else for (; from < end; from += 64) __builtin_prefetch(from, 0, 2);
  }
};

// Adds to sums [R, 32] of R tokens (or to zeros, where the words begin) the words first..last-1 of their inputs x [R, K].
template <typename T, int R>
void multiply_panel(const T* x, int64_t width, const T* panel, int64_t first, int64_t last, Ahead ahead, float* sums) {
  constexpr int kWhole = kPanel / kVector, kColumns = R * kWhole <= kSums ? kWhole : 2;
  // Where registers take a part of the panel at a time, the others find their words in the L1 cache.
  const int64_t piece = kColumns < kWhole ? kWords : last - first;
  for (int64_t begin = first; begin < last; begin += piece) {
    const int64_t end = std::min(begin + piece, last);
    multiply_rows<T, R, kColumns>(x, width, panel, kPanel, begin, end, begin == 0, sums, kPanel, [&] { ahead.ask(1); });
    for (int c = kColumns; c < kWhole; c += kColumns)
      multiply_rows<T, R, kColumns>(x, width, panel + c * kVector * kPair<T>, kPanel, begin, end, begin == 0,
                                    sums + c * kVector, kPanel, [] {});
  }
}

template <typename T, size_t... i>
constexpr auto row_kernels(std::index_sequence<i...>) { return std::array{multiply_panel<T, i + 1>...}; }

#ifdef __AMX_BF16__
// Rows and bytes a row of the matrix tiles for some tokens, as ldtilecfg takes them: tiles 0 and 1 sums of the first 16
// tokens, 2 and 3 those of the others, 4 and 5 the tokens, 6 and 7 weights.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
constexpr auto kTileShapes = [] {
  std::array<TileShapes, kTileRows> shapes;
  for (int64_t tokens = 1; tokens <= kTileRows; ++tokens) {
    const uint8_t upper = std::min(tokens, kVector), lower = tokens - upper, weights = kVector;
    TileShapes& shape = shapes[tokens - 1];
    for (int tile = 0; const uint8_t rows : {upper, upper, lower, lower, upper, lower, weights, weights}) {
      shape.row_bytes[tile] = rows ? 64 : 0;
      shape.rows[tile++] = rows;
    }
  }
  return shapes;
}();

// This thread's matrix tiles. To shape them stops the pipeline, so they keep their shape from task to task.
class Tiles {
 public:
  Tiles() { tokens = 0; }
  ~Tiles() {
    if (tokens) _tile_release();
  }
  static void shape_for(int64_t count) {
    if (tokens != count) _tile_loadconfig(&kTileShapes[count - 1]);
    tokens = count;
  }

 private:
  static inline thread_local int64_t tokens = 0;
};

// multiply_panel of up to 32 tokens.
void multiply_tiles(const BFloat16* x, int64_t rows, int64_t width, const BFloat16* panel, int64_t first, int64_t last,
                    Ahead ahead, float* sums) {
  constexpr int64_t kStride = kPanel * sizeof(float);
  const int64_t x_stride = width * sizeof(BFloat16);
  const bool lower = rows > kVector;
  float *right = sums + kVector, *below = sums + kVector * kPanel, *last_sums = below + kVector;
  Tiles::shape_for(rows);
  if (first == 0) {
    _tile_zero(0);
    _tile_zero(1);
    if (lower) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, sums, kStride);
    _tile_loadd(1, right, kStride);
    if (lower) {
      _tile_loadd(2, below, kStride);
      _tile_loadd(3, last_sums, kStride);
    }
  }
  for (int64_t k = first; k < last; k += kVector) {
    const BFloat16 *weight = panel + k * kPanel * 2, *token = x + k * 2;
    ahead.ask(kVector);
    _tile_loadd(6, weight, kWordBytes);
    _tile_loadd(4, token, x_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, weight + kVector * 2, kWordBytes);
    _tile_dpbf16ps(1, 4, 7);
    if (lower) {
      _tile_loadd(5, token + kVector * width, x_stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kStride);
  _tile_stored(1, right, kStride);
  if (lower) {
    _tile_stored(2, below, kStride);
    _tile_stored(3, last_sums, kStride);
  }
}

// Whether matrix units take inputs of so many words; the system has to let a process use them.
template <typename T>
bool use_tiles(int64_t words) {
  static const bool allowed = at::cpu::init_amx();
  return std::is_same_v<T, BFloat16> && allowed && words % kVector == 0;
}
#else
struct Tiles {};
void multiply_tiles(...) {}
template <typename T>
bool use_tiles(int64_t) { return false; }
#endif

struct Panels {  // nn.Linear's weight [ceil(N / 32), K / pair, 32, pair], zeros beyond N, and its bias [N]
  Tensor weight;
  std::optional<Tensor> bias;
  int64_t outputs;
  int64_t inputs() const { return weight.size(1) * weight.size(3); }
  int64_t count() const { return weight.size(0); }
  template <typename T>
  const T* panel(int64_t index) const { return weight.const_data_ptr<T>() + index * kPanel * inputs(); }
};

// Calls f(j) for the outputs of a panel that are there: nearly always all, which the compiler then knows.
template <typename F>
void for_columns(int64_t columns, const F& f) {
  if (columns == kPanel) {
#pragma omp simd
    for (int64_t j = 0; j < kPanel; ++j) f(j);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) f(j);
  }
}

// The products of one panel and `rows` tokens, plus the bias: sums [rows, 32]. next: the panel that this thread takes
// next, or null; its way from memory overlaps with the passes, which find their own panel in the cache.
template <typename T>
void multiply(const T* x, int64_t rows, const Panels& linear, int64_t panel, const T* next, float* sums) {
  constexpr auto kKernels = row_kernels<T>(std::make_index_sequence<kRegisterRows>());
  const int64_t width = linear.inputs(), words = width / kPair<T>;
  const T* weight = linear.panel<T>(panel);
  const bool tiles = use_tiles<T>(words);
  const int64_t most = tiles ? kTileRows : kRegisterRows, passes = (rows + most - 1) / most;
  const int64_t piece = passes > 1 || words <= kAhead ? kWords : words - kAhead;
  for (int64_t first = 0; first < words; first += piece) {
    const int64_t last = std::min(first + piece, words);
    const auto* here = reinterpret_cast<const char*>(weight + first * kPanel * kPair<T>);
    const auto* after = last < words ? here + (last - first) * kWordBytes : reinterpret_cast<const char*>(next);
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t r = pass * most, some = std::min(most, rows - r);
      Ahead ahead{nullptr, 0};
      if (passes == 1 && last < words) ahead = {here + kAhead * kWordBytes, kWordBytes};
      else if (passes == 1 && after) ahead = {after, kWordBytes};
      else if (after && pass < 2) ahead = {after + pass * (last - first) * 64, 64};  // one half of it in each
      if constexpr (std::is_same_v<T, BFloat16>)
        if (tiles) {
          multiply_tiles(x + r * width, some, width, weight, first, last, ahead, sums + r * kPanel);
          continue;
        }
      kKernels[some - 1](x + r * width, width, weight, first, last, ahead, sums + r * kPanel);
    }
  }
  if (!linear.bias) return;
  const T* bias = linear.bias->const_data_ptr<T>() + panel * kPanel;
  const int64_t columns = std::min(kPanel, linear.outputs - panel * kPanel);
  for (int64_t r = 0; r < rows; ++r)
    for_columns(columns, [&](int64_t j) { sums[r * kPanel + j] += to_float(bias[j]); });
}

// Calls task(panel, first token, tokens, more) for all panels and tokens, a few tokens at a time; more: the same thread
// goes on with the next panel.
template <typename F>
void for_each_part(int64_t panels, int64_t tokens, const F& task) {
  if (tokens <= kRows) {  // a run of panels for each thread
    at::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
      [[maybe_unused]] Tiles tiles;
      for (int64_t panel = first; panel < last; ++panel) task(panel, 0, tokens, panel + 1 < last);
    });
    return;
  }
  for_each_task<Tiles>((tokens + kRows - 1) / kRows * panels, [&](int64_t i) {
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
      for_columns(columns, [&](int64_t j) { out[r * wide + j] = from_float<T>(sums[r * kPanel + j]); });
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
      for_columns(columns, [&](int64_t j) {
        out[r * wide + j] = to_bits<T>(to_float(out[r * wide + j]) + sums[r * kPanel + j]);
      });
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
      for_columns(columns, [&](int64_t j) {
        // Rounded as oneDNN leaves it, which takes larger passes.
        to[r * wide + j] = to_bits<T>(to_float(to_bits<T>(silu(gates[r * kPanel + j]))) * ups[r * kPanel + j]);
      });
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

}  // namespace

namespace focusllava {

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

// Whether these products are made for the processor: with AVX2, in bf16 with AVX-512 BF16. Elsewhere oneDNN's are faster.
bool has_panels(at::ScalarType dtype) {
#ifdef __AVX512BF16__
  if (dtype == at::kBFloat16) return true;
#endif
#ifdef __AVX2__
  if (dtype == at::kFloat) return true;
#endif
  return false;
}

}  // namespace focusllava

TORCH_LIBRARY_FRAGMENT(focusllava, m) {
  m.def("has_panels(ScalarType dtype) -> bool", focusllava::has_panels);
  m.def("linear(Tensor x, Tensor[] weights, Tensor?[] biases, int[] outputs) -> Tensor[]", linear);
  m.def("linear_add_(Tensor(a!) hidden, Tensor x, Tensor weight, Tensor? bias) -> ()", linear_add_);
  m.def(
      "linear_gated(Tensor x, Tensor gate, Tensor? gate_bias, Tensor up, Tensor? up_bias, int outputs) -> Tensor",
      linear_gated);
}
