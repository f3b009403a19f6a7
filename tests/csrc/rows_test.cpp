// The jobs of csrc/rows.h over random shapes, strides, alignments and indices against loops over single elements; each
// run both as the CPU library does and by the CUDA kernel itself, whose grid is walked here one thread after another.
// And csrc/match.h, on whole numbers, whose products are exact: the first of the largest, ties and all.
// Buffers end where their tensor ends, so that the sanitizers see every byte too far.
//
//   rows_test CASES SEED     prints how many cases of each job ran; 1 and the case where one differs
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#define __global__
#define __launch_bounds__(threads)
struct Triple {
  unsigned x = 1, y = 1, z = 1;
};
static Triple gridDim, blockDim, blockIdx, threadIdx;

#include "../../csrc/row_kernel.h"
#include "../../csrc/match.h"
#include "../../csrc/rows.h"

using namespace todo_attn;

static std::mt19937_64 generator;

static int64_t from_to(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

static bool chance(int percent) {
  return from_to(1, 100) <= percent;
}

// A (batch, row, channel) tensor somewhere in a buffer: any order of dimensions, gaps, an offset, expanded dimensions.
struct Tensor {
  std::vector<int64_t> sizes, strides;  // strides in elements
  int64_t width, offset, bytes;
  std::unique_ptr<char[]> memory;

  Tensor(std::vector<int64_t> shape, int64_t element, bool plain, bool expandable)
      : sizes(std::move(shape)), strides(sizes.size()), width(element) {
    std::vector<size_t> order;
    for (size_t i = sizes.size(); i-- > 0;) order.push_back(i);
    if (!plain && chance(30)) std::shuffle(order.begin(), order.end(), generator);
    int64_t step = !plain && chance(20) ? 2 : 1, last = 0;
    for (size_t i : order) {
      const bool expanded = !plain && expandable && chance(10);
      strides[i] = expanded ? 0 : step;
      last += std::max<int64_t>(0, sizes[i] - 1) * strides[i];
      if (!expanded) step = step * std::max<int64_t>(1, sizes[i]) + (!plain && chance(30) ? from_to(0, 9) : 0);
    }
    offset = chance(50) ? 0 : from_to(0, 16);
    const bool empty = std::find(sizes.begin(), sizes.end(), 0) != sizes.end();
    bytes = (offset + (empty ? 0 : last + 1)) * width;
    memory.reset(new char[bytes]);
    for (int64_t i = 0; i < bytes; ++i) memory[i] = static_cast<char>(from_to(-128, 127));
  }

  char* data() const {
    return memory.get() + offset * width;
  }
  char* at(int64_t b, int64_t r, int64_t c) const {
    return data() + (b * strides[0] + r * strides[1] + c * strides[2]) * width;
  }
  Rows<char> rows() const {
    return {data(), strides[0] * width, strides[1] * width, strides[2] * width};
  }
  Rows<const char> const_rows() const {
    return {data(), strides[0] * width, strides[1] * width, strides[2] * width};
  }
};

struct Numbers {
  Tensor tensor;
  bool wide;

  // Most in [0, tokens), now and then one that is not; none twice where `unique`.
  Numbers(int64_t batch, int64_t rows, int64_t tokens, bool unique, bool wide_)
      : tensor({batch, rows}, wide_ ? 8 : 4, false, false), wide(wide_) {
    std::vector<int64_t> all(tokens);
    for (int64_t i = 0; i < tokens; ++i) all[i] = i;
    for (int64_t b = 0; b < batch; ++b) {
      std::shuffle(all.begin(), all.end(), generator);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t outside[] = {-1, tokens, wide ? std::numeric_limits<int64_t>::min() : INT32_MIN, INT32_MAX};
        const int64_t token =
            tokens == 0 || chance(3) ? outside[from_to(0, 3)] : all[unique ? r : from_to(0, tokens - 1)];
        char* to = tensor.data() + (b * tensor.strides[0] + r * tensor.strides[1]) * tensor.width;
        const int32_t narrow = static_cast<int32_t>(token);
        std::memcpy(to, wide ? static_cast<const void*>(&token) : &narrow, tensor.width);
      }
    }
  }

  Index index() const {
    return {tensor.data(), tensor.strides[0], tensor.strides[1], wide};
  }
  int64_t at(int64_t b, int64_t r) const {
    const char* from = tensor.data() + (b * tensor.strides[0] + r * tensor.strides[1]) * tensor.width;
    int64_t token;
    int32_t narrow;
    if (wide) {
      std::memcpy(&token, from, 8);
      return token;
    }
    std::memcpy(&narrow, from, 4);
    return narrow;
  }
};

template <class Job>
void run(const Job& job, int64_t batches, int64_t rows, bool as_kernel) {
  if (!as_kernel) {
    for (int64_t i = 0; i < batches * rows; ++i) job(i / rows, i % rows, 0, 1);
    return;
  }
  blockDim = {Job::kLanes, static_cast<unsigned>(from_to(1, 4)), 1};
  gridDim = {static_cast<unsigned>(from_to(1, 5)), static_cast<unsigned>(from_to(1, 3)), 1};
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
      for (threadIdx.y = 0; threadIdx.y < blockDim.y; ++threadIdx.y)
        for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) over_rows(job, batches, rows);
}

// Runs the job both ways on the memory at `written` and compares all of it with what `naive` makes of it.
template <class Job, class Naive>
void compare(
    const char* name, const Job& job, int64_t batches, int64_t rows, char* written, int64_t bytes, const Naive& naive) {
  const std::vector<char> before(written, written + bytes);
  naive();
  const std::vector<char> expected(written, written + bytes);
  for (bool as_kernel : {false, true}) {
    std::copy(before.begin(), before.end(), written);
    run(job, batches, rows, as_kernel);
    if (!std::equal(expected.begin(), expected.end(), written)) {
      std::printf("%s differs: batches %ld rows %ld kernel %d\n", name, long(batches), long(rows), as_kernel);
      std::exit(1);
    }
  }
}

static int64_t some_channels() {
  return chance(10) ? from_to(0, 1) : chance(50) ? 8 * from_to(1, 12) : from_to(2, 70);
}

static void gather_and_scatter(int64_t width) {
  const int64_t batch = from_to(0, 3), tokens = from_to(0, 12), channels = some_channels();
  const bool wide = chance(50);
  {
    const int64_t rows = from_to(0, 12);
    const Numbers index(batch, rows, tokens, false, wide);
    const Tensor x({batch, tokens, channels}, width, false, true), out({batch, rows, channels}, width, true, false);
    const Gather job{out.rows(), x.const_rows(), index.index(), tokens, {channels, width}};
    compare("gather", job, batch, rows, out.memory.get(), out.bytes, [&] {
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = 0; c < channels; ++c)
            if (const int64_t t = index.at(b, r); t >= 0 && t < tokens)
              std::memcpy(out.at(b, r, c), x.at(b, t, c), width);
    });
  }
  const int64_t rows = from_to(0, tokens);
  const Numbers index(batch, rows, tokens, true, wide);
  const Tensor source({batch, rows, channels}, width, false, true), x({batch, tokens, channels}, width, false, false);
  const Scatter job{x.rows(), source.const_rows(), index.index(), tokens, {channels, width}};
  compare("scatter", job, batch, rows, x.memory.get(), x.bytes, [&] {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < channels; ++c)
          if (const int64_t t = index.at(b, r); t >= 0 && t < tokens)
            std::memcpy(x.at(b, t, c), source.at(b, r, c), width);
  });
  // The same into another tensor, in two jobs.
  const Tensor place({batch, tokens, 1}, 8, true, false), out({batch, tokens, channels}, width, true, false);
  int64_t* places = reinterpret_cast<int64_t*>(place.data());
  std::fill(places, places + batch * tokens, 0);
  compare("place", Place{places, index.index(), tokens}, batch, rows, place.memory.get(), place.bytes, [&] {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t r = 0; r < rows; ++r)
        if (const int64_t t = index.at(b, r); t >= 0 && t < tokens) places[b * tokens + t] = r + 1;
  });
  const Replace replace{out.rows(), x.const_rows(), source.const_rows(), places, tokens, {channels, width}};
  compare("replace", replace, batch, tokens, out.memory.get(), out.bytes, [&] {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t row = places[b * tokens + t] - 1;
          std::memcpy(out.at(b, t, c), row < 0 ? x.at(b, t, c) : source.at(b, row, c), width);
        }
  });
}

template <class T>
T read(const char* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <class T>
void fill(const Tensor& t) {
  for (int64_t i = 0; i < t.bytes; i += sizeof(T)) {
    const T value = static_cast<T>(static_cast<float>(from_to(-1000000, 1000000)) * (chance(50) ? 1e-5f : 1e-2f));
    std::memcpy(t.memory.get() + i, &value, sizeof(T));
  }
}

template <class T>
void recover() {
  const int64_t batch = from_to(0, 3), tokens = from_to(0, 12), rows = from_to(0, 12), channels = some_channels();
  const int64_t width = sizeof(T);
  const Numbers source(batch, rows, tokens, false, chance(50));
  const Tensor y({batch, tokens, channels}, width, false, true), residual({batch, rows, channels}, width, false, true);
  const Tensor out({batch, rows, channels}, width, true, false);
  fill<T>(y);
  fill<T>(residual);
  const RecoverAdd<T> job{out.rows(), y.const_rows(), residual.const_rows(), source.index(), tokens, channels};
  compare("recover", job, batch, rows, out.memory.get(), out.bytes, [&] {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < channels; ++c)
          if (const int64_t t = source.at(b, r); t >= 0 && t < tokens) {
            const T left = read<T>(y.at(b, t, c)), right = read<T>(residual.at(b, r, c));
            T sum;
            if constexpr (std::is_same_v<T, double>) {
              sum = left + right;
            } else {
              sum = static_cast<T>(static_cast<float>(left) + static_cast<float>(right));
            }
            std::memcpy(out.at(b, r, c), &sum, width);
          }
  });
}

template <class T>
void select() {
  const int64_t batch = from_to(0, 3), height = from_to(1, 9), width = from_to(1, 9), ph = from_to(1, 4),
                pw = from_to(1, 4);
  const int64_t across = width / pw, patches = height / ph * across;
  const Tensor score({batch, height * width, 1}, sizeof(T), false, true), out({batch, patches, 1}, 8, true, false);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (int64_t i = 0; i < score.bytes; i += sizeof(T)) {
    const T value = static_cast<T>(static_cast<float>(chance(10) ? nan : static_cast<double>(from_to(-2, 2))));
    std::memcpy(score.memory.get() + i, &value, sizeof(T));
  }
  const SelectBase<T> job{
      reinterpret_cast<int64_t*>(out.data()),
      patches,
      across,
      reinterpret_cast<const T*>(score.data()),
      score.strides[0],
      score.strides[1],
      width,
      ph,
      pw};
  compare("select", job, batch, patches, out.memory.get(), out.bytes, [&] {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t p = 0; p < patches; ++p) {
        std::vector<int64_t> patch;
        for (int64_t y = 0; y < height; ++y)
          for (int64_t x = 0; x < width; ++x)
            if (x / pw < across && y / ph * across + x / pw == p) patch.push_back(y * width + x);
        const auto rank = [&](int64_t token) {
          const double value = static_cast<double>(read<T>(score.at(b, token, 0)));
          return value != value ? std::numeric_limits<double>::infinity() : value;
        };
        const int64_t best =
            *std::max_element(patch.begin(), patch.end(), [&](auto i, auto j) { return rank(i) < rank(j); });
        std::memcpy(out.at(b, p, 0), &best, 8);
      }
  });
}

static void match() {
  const int64_t queries = from_to(1, 60), keys = from_to(1, 70), channels = from_to(1, 40), count = panels_of(keys);
  const std::unique_ptr<float[]> query(new float[queries * channels]), key(new float[keys * channels]);
  for (int64_t i = 0; i < queries * channels; ++i) query[i] = static_cast<float>(from_to(-2, 2));
  for (int64_t i = 0; i < keys * channels; ++i) key[i] = static_cast<float>(from_to(-1, 1));
  const std::unique_ptr<Floats[]> panels(new Floats[count * 2 * channels]);
  for (int64_t i = 0; i < count; ++i) pack_panel(panels.get() + i * 2 * channels, key.get(), keys, channels, i);
  const std::unique_ptr<int64_t[]> position(new int64_t[queries]);
  for (int64_t begin = 0; begin < queries; begin += kTile * kTiles) {
    const int64_t end = std::min(begin + kTile * kTiles, queries);
    match_queries(position.get(), query.get(), begin, end, panels.get(), keys, channels);
  }
  for (int64_t q = 0; q < queries; ++q) {
    int64_t best = 0;
    double highest = -1e9;
    for (int64_t k = 0; k < keys; ++k) {
      double product = 0;
      for (int64_t c = 0; c < channels; ++c) product += double(query[q * channels + c]) * key[k * channels + c];
      if (product > highest) highest = product, best = k;
    }
    if (position[q] != best) {
      std::printf("match differs: keys %ld channels %ld\n", long(keys), long(channels));
      std::exit(1);
    }
  }
}

int main(int count, char** arguments) {
  const long cases = count > 1 ? std::atol(arguments[1]) : 1000;
  generator.seed(count > 2 ? std::atol(arguments[2]) : 0);
  for (long i = 0; i < cases; ++i) {
    gather_and_scatter(int64_t{2} << i % 3);
    match();
    switch (i % 4) {
      case 0:
        recover<float>(), select<float>();
        break;
      case 1:
        recover<double>(), select<double>();
        break;
      case 2:
        recover<c10::Half>(), select<c10::Half>();
        break;
      default:
        recover<c10::BFloat16>(), select<c10::BFloat16>();
    }
  }
  std::printf("%ld cases\n", cases);
}
