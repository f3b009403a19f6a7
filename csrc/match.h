// The most similar row on the CPU: for each query the key with the largest dot product. No product is stored.
//
// Keys are packed in panels of 16, channel by channel, so that the products of a panel with a few queries accumulate in
// registers. Every product is computed by the same instructions wherever its rows lie, so equal rows give equal products.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace todo_attn {

constexpr int64_t kPanel = 16;  // keys
constexpr int kTile = 6;        // queries: 6 x 16 sums, a row of a panel and a query's element fill 16 registers of 8
constexpr int64_t kTiles = 8;   // tiles that read a block of panels while it is in the L2 cache
constexpr int64_t kPart = 64;   // channels per partial sum: a long sum rounds less in parts
constexpr int64_t kBlockBytes = 1 << 17;
// Products this close are ties, which the lower position wins. The kept product is at most this far below the largest
// so far; todo_attn/ops/matching.py documents twice this as the tolerance.
constexpr float kTie = 0x1p-22f;

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));

inline int64_t panels_of(int64_t keys) {
  return (keys + kPanel - 1) / kPanel;
}

// Packs panel `number` of (keys, channels) rows. Copies of the last key fill the panel; they lose every tie with it.
inline void pack_panel(Floats* panel, const float* key, int64_t keys, int64_t channels, int64_t number) {
  float* to = reinterpret_cast<float*>(panel);
  for (int64_t lane = 0; lane < kPanel; ++lane) {
    const int64_t row = number * kPanel + lane;
    const float* from = key + (row < keys ? row : keys - 1) * channels;
    for (int64_t c = 0; c < channels; ++c) {
      to[c * kPanel + lane] = from[c];
    }
  }
}

// For each of a tile's queries and each of the 16 places in a panel, the best product so far and its panel.
struct Best {
  Floats product[kTile][2];
  Ints panel[kTile][2];
};

inline void match_panel(Best& best, const float* const* query, const Floats* panel, int64_t channels, int32_t number) {
  Floats sum[kTile][2] = {};
  for (int64_t start = 0; start < channels; start += kPart) {
    const int64_t stop = start + kPart < channels ? start + kPart : channels;
    Floats part[kTile][2] = {};
    for (int64_t c = start; c < stop; ++c) {
      const Floats left = panel[2 * c], right = panel[2 * c + 1];
      for (int q = 0; q < kTile; ++q) {
        part[q][0] += query[q][c] * left;
        part[q][1] += query[q][c] * right;
      }
    }
    for (int q = 0; q < kTile; ++q) {
      sum[q][0] += part[q][0];
      sum[q][1] += part[q][1];
    }
  }
  for (int q = 0; q < kTile; ++q) {
    for (int half = 0; half < 2; ++half) {
      const Ints higher = sum[q][half] > best.product[q][half] + kTie;
      best.product[q][half] = higher ? sum[q][half] : best.product[q][half];
      best.panel[q][half] = higher ? number - Ints{} : best.panel[q][half];
    }
  }
}

inline int64_t first_of_the_best(const Best& best, int q) {
  const float* product = reinterpret_cast<const float*>(best.product[q]);
  const int32_t* panel = reinterpret_cast<const int32_t*>(best.panel[q]);
  float highest = product[0];
  for (int64_t lane = 1; lane < kPanel; ++lane) {
    highest = product[lane] > highest ? product[lane] : highest;
  }
  int64_t first = std::numeric_limits<int64_t>::max();
  for (int64_t lane = 0; lane < kPanel; ++lane) {
    const int64_t position = panel[lane] * kPanel + lane;
    if (product[lane] >= highest - kTie && position < first) first = position;
  }
  return first;
}

// position[q] of the queries [begin, end), each against all keys in `panels`. Queries: (queries, channels) rows.
inline void match_queries(
    int64_t* position, const float* query, int64_t begin, int64_t end, const Floats* panels, int64_t keys,
    int64_t channels) {
  const int64_t count = panels_of(keys), tiles = (end - begin + kTile - 1) / kTile;
  const int64_t panel_size = 2 * channels;  // in Floats
  const int64_t block = kBlockBytes / (panel_size * static_cast<int64_t>(sizeof(Floats))) + 1;
  const Floats low = Floats{} - std::numeric_limits<float>::infinity();
  std::vector<Best> best(tiles);
  for (Best& tile : best) {
    for (int q = 0; q < kTile; ++q) {
      tile.product[q][0] = tile.product[q][1] = low;
      tile.panel[q][0] = tile.panel[q][1] = Ints{};
    }
  }
  for (int64_t start = 0; start < count; start += block) {
    const int64_t stop = start + block < count ? start + block : count;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const float* rows[kTile];
      for (int q = 0; q < kTile; ++q) {  // a last tile that is not full repeats the last query
        const int64_t row = begin + tile * kTile + q;
        rows[q] = query + (row < end ? row : end - 1) * channels;
      }
      for (int64_t panel = start; panel < stop; ++panel) {
        match_panel(best[tile], rows, panels + panel * panel_size, channels, static_cast<int32_t>(panel));
      }
    }
  }
  for (int64_t row = begin; row < end; ++row) {
    position[row] = first_of_the_best(best[(row - begin) / kTile], static_cast<int>((row - begin) % kTile));
  }
}

}  // namespace todo_attn
