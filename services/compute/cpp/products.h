// The matrix products of packed attention, one operand reordered before: oneDNN's small kernels (brgemm) or our own
// (rows.h).
// brgemm is for AVX-512 and takes the processor's matrix units where it has them; without AVX-512 it has no bf16 and calls
// a library's product for fp32. Its bf16 needs AVX-512 BF16 besides, which it says at the first product and no sooner,
// with an exception: so it is asked for one (`computes`), and what it cannot do our own products do.
#pragma once
#include <ATen/native/CPUBlas.h>

#include "rows.h"

namespace focusllava {

template <typename T>
struct Reordered {  // by reorder_key: d times `tile` keys, or by reorder_value: `tile` keys times value_width(d)
  const T* data;
  int64_t inner, columns;
};

#ifdef __AVX512F__
struct Brgemm {
  // A tile's query rows (heads that share keys, times positions) and keys: its scores and probabilities stay in the L2
  // cache. Matrix units want more rows for the keys that they load.
#ifdef __AMX_TILE__
  static constexpr int64_t kRows = 256, kKeys = 256;
#else
  static constexpr int64_t kRows = 64, kKeys = 512;
#endif

  static int64_t value_width(int64_t d) { return d; }

  // Operand layouts of brgemm: bf16 takes pairs of the inner dimension side by side, fp32 takes rows.
  // K^T of `tile` keys, columns beyond `count` zero: bf16 [d/2][tile][2], fp32 [d][tile].
  static void reorder_key(const BFloat16* in, int64_t stride, int64_t count, int64_t tile, int64_t d, BFloat16* out) {
    uint32_t* pairs = reinterpret_cast<uint32_t*>(out);
    for (int64_t k = 0; k < count; ++k) {
      const BFloat16* row = in + k * stride;
      for (int64_t j = 0; j < d / 2; ++j) std::memcpy(pairs + j * tile + k, row + 2 * j, 4);
    }
    for (int64_t j = 0; j < d / 2; ++j) std::fill(pairs + j * tile + count, pairs + (j + 1) * tile, 0u);
  }
  static void reorder_key(const float* in, int64_t stride, int64_t count, int64_t tile, int64_t d, float* out) {
    for (int64_t k = 0; k < count; ++k)
      for (int64_t j = 0; j < d; ++j) out[j * tile + k] = in[k * stride + j];
    for (int64_t j = 0; j < d; ++j) std::fill(out + j * tile + count, out + (j + 1) * tile, 0.0f);
  }
  // V of `tile` keys: bf16 [tile/2][d][2], fp32 [tile][d].
  static void reorder_value(const BFloat16* in, int64_t stride, int64_t count, int64_t tile, int64_t d, BFloat16* out) {
    const BFloat16 zero(0.0f);
    for (int64_t k = 0; k < tile; k += 2) {
      const BFloat16 *first = in + k * stride, *second = first + stride;
      BFloat16* pair = out + k * d;
      if (k + 1 < count) {
        uint32_t* both = reinterpret_cast<uint32_t*>(pair);
        for (int64_t j = 0; j < d; ++j) both[j] = first[j].x | static_cast<uint32_t>(second[j].x) << 16;
      } else {
        for (int64_t j = 0; j < d; ++j) { pair[2 * j] = k < count ? first[j] : zero; pair[2 * j + 1] = zero; }
      }
    }
  }
  static void reorder_value(const float* in, int64_t stride, int64_t count, int64_t tile, int64_t d, float* out) {
    for (int64_t k = 0; k < count; ++k) std::copy(in + k * stride, in + k * stride + d, out + k * d);
    std::fill(out + count * d, out + tile * d, 0.0f);
  }

  // c [rows, columns] = (with `add` +=) a [rows, inner] times as many rows and columns of b.
  template <typename T>
  static void multiply(int64_t rows, int64_t columns, int64_t inner, const T* a, int64_t a_stride,
                       Reordered<T> b, float* c, int64_t c_stride, bool add) {
    constexpr bool pairs = std::is_same_v<T, BFloat16>;
    at::native::cpublas::brgemm(rows, columns, inner, a_stride, b.columns, c_stride, add, a, b.data, c, pairs);
  }

  // After a thread's last product.
  template <typename T>
  static void release() { at::native::cpublas::brgemm_release(std::is_same_v<T, BFloat16>); }

  // Whether this process has a brgemm of T: asked once, for the products of a small tile.
  template <typename T>
  static bool computes() {
    static const bool does = [] {
      constexpr int64_t d = 32, keys = 32;
      std::vector<T> query(d, from_float<T>(1.0f)), key(keys * d), reordered(keys * d);
      for (int64_t k = 0; k < keys; ++k) std::fill_n(key.begin() + k * d, d, from_float<T>(k));
      std::vector<float> scores(keys, -1.0f);
      try {
        reorder_key(key.data(), d, keys, keys, d, reordered.data());
        multiply(1, keys, d, query.data(), d, Reordered<T>{reordered.data(), d, keys}, scores.data(), keys, false);
        release<T>();
      } catch (const std::exception&) {
        return false;
      }
      for (int64_t k = 0; k < keys; ++k)
        if (scores[k] != d * k) return false;
      return true;
    }();
    return does;
  }
};
#else
struct Brgemm {
  template <typename T>
  static bool computes() { return false; }
};
#endif

struct OwnProducts {
  static constexpr int64_t kRows = 96, kKeys = 256;  // as Brgemm's
  static constexpr int64_t kPanelColumns = 2 * kVector, kPassRows = kSums / 2;

  static int64_t value_width(int64_t d) { return (d + kPanelColumns - 1) / kPanelColumns * kPanelColumns; }

  // K^T of `tile` keys in panels of kPanelColumns, [tile / columns][d / pair][columns][pair], zero beyond `count`.
  template <typename T>
  static void reorder_key(const T* in, int64_t stride, int64_t count, int64_t tile, int64_t d, T* out) {
    const int64_t words = d / kPair<T>;
    uint32_t* to = reinterpret_cast<uint32_t*>(out);
    for (int64_t k = 0; k < tile; ++k) {
      uint32_t* column = to + k / kPanelColumns * words * kPanelColumns + k % kPanelColumns;
      for (int64_t j = 0; j < words; ++j) {
        uint32_t word = 0;
        if (k < count) std::memcpy(&word, in + k * stride + j * kPair<T>, sizeof word);
        column[j * kPanelColumns] = word;
      }
    }
  }
  // V of `tile` keys likewise, [width / columns][tile / pair][columns][pair], zero beyond `count` and d.
  template <typename T>
  static void reorder_value(const T* in, int64_t stride, int64_t count, int64_t tile, int64_t d, T* out) {
    const T zero(0.0f);
    for (int64_t first = 0; first < d; first += kPanelColumns)
      for (int64_t k = 0; k < tile; ++k)
        for (int64_t j = 0; j < kPanelColumns; ++j) {
          const bool there = k < count && first + j < d;
          out[first * tile + (k / kPair<T> * kPanelColumns + j) * kPair<T> + k % kPair<T>] =
              there ? in[k * stride + first + j] : zero;
        }
  }

  // The product of a panel and some rows, at most kPassRows.
  template <typename T, int R = kPassRows>
  static void pass(int64_t rows, const T* a, int64_t a_stride, const T* panel, int64_t words, float* c, int64_t c_stride,
                   bool add) {
    if constexpr (R > 1)
      if (rows < R) return pass<T, R - 1>(rows, a, a_stride, panel, words, c, c_stride, add);
    multiply_rows<T, R, 2>(a, a_stride, panel, kPanelColumns, 0, words, !add, c, c_stride, [] {});
  }

  // As Brgemm's.
  template <typename T>
  static void multiply(int64_t rows, int64_t columns, int64_t inner, const T* a, int64_t a_stride,
                       Reordered<T> b, float* c, int64_t c_stride, bool add) {
    const int64_t words = inner / kPair<T>;
    for (int64_t first = 0; first < columns; first += kPanelColumns)
      for (int64_t r = 0; r < rows; r += kPassRows)
        pass<T>(std::min(kPassRows, rows - r), a + r * a_stride, a_stride, b.data + first * b.inner, words,
                c + r * c_stride + first, c_stride, add);
  }

  template <typename T>
  static void release() {}
};

}  // namespace focusllava
