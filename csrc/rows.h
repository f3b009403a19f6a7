// The arithmetic of the token operations, one row (the channels of one token) at a time, for the CPU and the GPU.
//
// `lanes` workers share a row, and the caller is worker `lane`: one worker on the CPU, neighbouring threads on the GPU.
// Each job below is a small object, copied to the device that runs it. A call processes one row of one batch element.
// This file does not depend on torch's tensors or CUDA's grids.
#pragma once

#include <cassert>
#include <cstdint>
#include <cstring>

#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__F16C__) && !defined(__CUDACC__)
#include <immintrin.h>
#define TODO_ATTN_F16C
#endif

#define TODO_ATTN_ROW C10_HOST_DEVICE inline

namespace todo_attn {

// Words for copying bytes of any type.
struct __attribute__((aligned(16), may_alias)) Word16 {
  uint64_t low, high;
};
typedef uint64_t __attribute__((may_alias)) Word8;
typedef uint32_t __attribute__((may_alias)) Word4;
typedef uint16_t __attribute__((may_alias)) Word2;
typedef uint8_t Word1;

// Rows of a (batch, row, channel) tensor; strides in bytes, any sign or zero. Byte is char or const char.
template <class Byte>
struct Rows {
  Byte* data;
  int64_t batch_stride, row_stride, channel_stride;

  TODO_ATTN_ROW Byte* at(int64_t batch, int64_t row) const {
    return data + batch * batch_stride + row * row_stride;
  }
};

// Token indices of a (batch, row) tensor of int64 (wide) or int32; strides in elements.
struct Index {
  const void* data;
  int64_t batch_stride, row_stride;
  bool wide;

  TODO_ATTN_ROW int64_t at(int64_t batch, int64_t row) const {
    const int64_t i = batch * batch_stride + row * row_stride;
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

TODO_ATTN_ROW bool within(int64_t token, int64_t tokens) {
  return static_cast<uint64_t>(token) < static_cast<uint64_t>(tokens);
}

// Whether a job may use this token index. On the GPU an index out of range is a device assert. On the CPU indices were
// checked before; one that another thread has changed since is skipped.
TODO_ATTN_ROW bool usable(int64_t token, int64_t tokens) {
#ifdef __CUDA_ARCH__
  assert(within(token, tokens) && "token index out of range");
#endif
  return within(token, tokens);
}

// Copies the whole words in bytes [done, bytes); returns how many bytes have been copied in total.
template <class Word>
TODO_ATTN_ROW int64_t copy_words(
    char* __restrict__ to, const char* __restrict__ from, int64_t done, int64_t bytes, int lane, int lanes) {
  const int64_t words = (bytes - done) / static_cast<int64_t>(sizeof(Word));
  Word* __restrict__ target = reinterpret_cast<Word*>(to + done);
  const Word* __restrict__ source = reinterpret_cast<const Word*>(from + done);
  for (int64_t i = lane; i < words; i += lanes) {
    target[i] = source[i];
  }
  return done + words * static_cast<int64_t>(sizeof(Word));
}

// Copies a row of adjacent bytes in the widest words that both addresses are aligned to; narrower ones take the tail.
TODO_ATTN_ROW void copy_bytes(
    char* __restrict__ to, const char* __restrict__ from, int64_t bytes, int lane, int lanes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  int64_t done = 0;
  if (address % 16 == 0) done = copy_words<Word16>(to, from, done, bytes, lane, lanes);
  if (address % 8 == 0) done = copy_words<Word8>(to, from, done, bytes, lane, lanes);
  if (address % 4 == 0) done = copy_words<Word4>(to, from, done, bytes, lane, lanes);
  if (address % 2 == 0) done = copy_words<Word2>(to, from, done, bytes, lane, lanes);
  copy_words<Word1>(to, from, done, bytes, lane, lanes);
}

template <class Word>
TODO_ATTN_ROW void copy_strided(
    char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t channels, int lane, int lanes) {
  for (int64_t c = lane; c < channels; c += lanes) {
    *reinterpret_cast<Word*>(to + c * to_stride) = *reinterpret_cast<const Word*>(from + c * from_stride);
  }
}

// How the rows of one tensor are copied to those of another: `channels` elements of `width` (2, 4 or 8) bytes.
struct RowCopy {
  int64_t channels, width;

  TODO_ATTN_ROW void operator()(
      char* to, int64_t to_stride, const char* from, int64_t from_stride, int lane, int lanes) const {
    if (channels == 1 || (to_stride == width && from_stride == width)) {
      copy_bytes(to, from, channels * width, lane, lanes);
    } else if (width == 2) {
      copy_strided<Word2>(to, to_stride, from, from_stride, channels, lane, lanes);
    } else if (width == 4) {
      copy_strided<Word4>(to, to_stride, from, from_stride, channels, lane, lanes);
    } else {
      copy_strided<Word8>(to, to_stride, from, from_stride, channels, lane, lanes);
    }
  }
};

// out[b, k] = x[b, index[b, k]]
struct Gather {
  static constexpr int kLanes = 8;  // on the GPU: eight 16-byte words are one 128-byte line
  Rows<char> out;
  Rows<const char> x;
  Index index;
  int64_t tokens;  // of x
  RowCopy copy;

  TODO_ATTN_ROW void operator()(int64_t batch, int64_t row, int lane, int lanes) const {
    const int64_t token = index.at(batch, row);
    if (!usable(token, tokens)) return;
    copy(out.at(batch, row), out.channel_stride, x.at(batch, token), x.channel_stride, lane, lanes);
  }
};

// x[b, index[b, k]] = source[b, k]
struct Scatter {
  static constexpr int kLanes = 8;
  Rows<char> x;
  Rows<const char> source;
  Index index;
  int64_t tokens;  // of x
  RowCopy copy;

  TODO_ATTN_ROW void operator()(int64_t batch, int64_t row, int lane, int lanes) const {
    const int64_t token = index.at(batch, row);
    if (!usable(token, tokens)) return;
    copy(x.at(batch, token), x.channel_stride, source.at(batch, row), source.channel_stride, lane, lanes);
  }
};

// place[b, index[b, k]] = k + 1, place adjacent and 0 elsewhere: for each token, which row takes its place.
struct Place {
  static constexpr int kLanes = 1;
  int64_t* place;
  Index index;
  int64_t tokens;

  TODO_ATTN_ROW void operator()(int64_t batch, int64_t row, int /*lane*/, int /*lanes*/) const {
    const int64_t token = index.at(batch, row);
    if (usable(token, tokens)) place[batch * tokens + token] = row + 1;
  }
};

// out[b, n] = source[b, place[b, n] - 1] if place is above 0, else x[b, n]. Each row of out is written once.
struct Replace {
  static constexpr int kLanes = 8;
  Rows<char> out;
  Rows<const char> x, source;
  const int64_t* place;
  int64_t tokens;
  RowCopy copy;

  TODO_ATTN_ROW void operator()(int64_t batch, int64_t token, int lane, int lanes) const {
    const int64_t row = place[batch * tokens + token] - 1;
    const Rows<const char>& rows = row < 0 ? x : source;
    const char* from = rows.at(batch, row < 0 ? token : row);
    copy(out.at(batch, token), out.channel_stride, from, rows.channel_stride, lane, lanes);
  }
};

// The type a sum is computed in before it is rounded, once, to T.
template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

template <class T>
TODO_ATTN_ROW T rounded_sum(T a, T b) {
  return static_cast<T>(static_cast<Wide<T>>(a) + static_cast<Wide<T>>(b));
}

// 16 bytes of channels; read and written as one word, which compilers would otherwise split into its elements.
template <class T>
struct alignas(16) Piece {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];

  TODO_ATTN_ROW static Piece load(const T* from) {
    const Word16 word = *reinterpret_cast<const Word16*>(from);
    Piece piece;
    memcpy(&piece, &word, sizeof(word));
    return piece;
  }
  TODO_ATTN_ROW void store(T* to) const {
    Word16 word;
    memcpy(&word, this, sizeof(word));
    *reinterpret_cast<Word16*>(to) = word;
  }
};

template <class T>
TODO_ATTN_ROW Piece<T> rounded_sum(const Piece<T>& a, const Piece<T>& b) {
  Piece<T> sum;
  for (int i = 0; i < Piece<T>::kSize; ++i) {
    sum.value[i] = rounded_sum(a.value[i], b.value[i]);
  }
  return sum;
}

#ifdef TODO_ATTN_F16C
// The same with the processor's own conversions, which compilers do not use by themselves: 20 times as fast.
inline Piece<c10::Half> rounded_sum(const Piece<c10::Half>& a, const Piece<c10::Half>& b) {
  const __m256 left = _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(&a)));
  const __m256 right = _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(&b)));
  Piece<c10::Half> sum;
  _mm_store_si128(
      reinterpret_cast<__m128i*>(&sum), _mm256_cvtps_ph(_mm256_add_ps(left, right), _MM_FROUND_TO_NEAREST_INT));
  return sum;
}
#endif

// out[c] = a[c] + b[c] over adjacent channels, 16 bytes at a time if all three addresses are aligned.
template <class T>
TODO_ATTN_ROW void add_adjacent(
    T* __restrict__ out, const T* __restrict__ a, const T* __restrict__ b, int64_t channels, int lane, int lanes) {
  int64_t done = 0;
  const uintptr_t address =
      reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b);
  if (address % 16 == 0) {
    const int64_t pieces = channels / Piece<T>::kSize;
    for (int64_t i = lane; i < pieces; i += lanes) {
      const int64_t c = i * Piece<T>::kSize;
      rounded_sum(Piece<T>::load(a + c), Piece<T>::load(b + c)).store(out + c);
    }
    done = pieces * Piece<T>::kSize;
  }
  for (int64_t c = done + lane; c < channels; c += lanes) {
    out[c] = rounded_sum(a[c], b[c]);
  }
}

// out[b, n] = y[b, source[b, n]] + residual[b, n], out with adjacent channels
template <class T>
struct RecoverAdd {
  static constexpr int kLanes = 8;
  Rows<char> out;
  Rows<const char> y, residual;
  Index source;
  int64_t tokens;  // of y
  int64_t channels;

  TODO_ATTN_ROW void operator()(int64_t batch, int64_t row, int lane, int lanes) const {
    const int64_t token = source.at(batch, row);
    if (!usable(token, tokens)) return;
    T* to = reinterpret_cast<T*>(out.at(batch, row));
    const char* a = y.at(batch, token);
    const char* b = residual.at(batch, row);
    constexpr int64_t width = sizeof(T);
    if (channels == 1 || (y.channel_stride == width && residual.channel_stride == width)) {
      add_adjacent(to, reinterpret_cast<const T*>(a), reinterpret_cast<const T*>(b), channels, lane, lanes);
      return;
    }
    for (int64_t c = lane; c < channels; c += lanes) {
      to[c] = rounded_sum(
          *reinterpret_cast<const T*>(a + c * y.channel_stride),
          *reinterpret_cast<const T*>(b + c * residual.channel_stride));
    }
  }
};

// out[b, p] = the token with the highest score in patch p of a grid, the first of equal ones. NaN counts as highest, as
// in torch's argmax. Patches are in row-major order; tokens beyond the last whole patch belong to none.
template <class T>
struct SelectBase {
  static constexpr int kLanes = 1;
  int64_t* out;  // (batch, patches), adjacent
  int64_t patches, patches_across;
  const T* score;
  int64_t batch_stride, token_stride;  // in elements
  int64_t width, patch_height, patch_width;

  TODO_ATTN_ROW void operator()(int64_t batch, int64_t patch, int /*lane*/, int /*lanes*/) const {
    const int64_t first =
        patch / patches_across * patch_height * width + patch % patches_across * patch_width;
    int64_t best = first;
    Wide<T> highest = at(batch, first);
    for (int64_t dy = 0; dy < patch_height; ++dy) {
      for (int64_t dx = 0; dx < patch_width; ++dx) {
        const int64_t token = first + dy * width + dx;
        const Wide<T> value = at(batch, token);
        if (value > highest || (value != value && highest == highest)) {
          highest = value;
          best = token;
        }
      }
    }
    out[batch * patches + patch] = best;
  }

  TODO_ATTN_ROW Wide<T> at(int64_t batch, int64_t token) const {
    return static_cast<Wide<T>>(score[batch * batch_stride + token * token_stride]);
  }
};

}  // namespace todo_attn
