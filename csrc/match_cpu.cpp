// The most similar row on the CPU, shared out over torch's own threads: what todo_attn/ops/matching.py runs there.
#include <algorithm>

#include "match.h"
#include "ops.h"

namespace todo_attn {
namespace {

void check_rows(const char* name, const Tensor& t) {
  if (t.scalar_type() != ScalarType::Float || t.dim() != 3 || !t.is_contiguous()) {
    refuse(name, " must be contiguous fp32 of 3 dimensions, got ", t.scalar_type(), " of shape ", shape_of(t));
  }
}

// (B, Q, C) and (B, K, C) rows of length 1 -> (B, Q) int64, the first of the keys with the largest product.
Tensor match_rows(const Tensor& query, const Tensor& key) {
  check_rows("query", query);
  check_rows("key", key);
  const int64_t batch = query.size(0), queries = query.size(1), channels = query.size(2), keys = key.size(1);
  if (key.size(0) != batch || key.size(2) != channels || (keys == 0 && queries != 0)) {
    refuse("key must have the batch and channels of query, and a row at least, got shape ", shape_of(key));
  }
  Tensor position = torch::stable::new_empty(query, {batch, queries}, ScalarType::Long);
  if (position.numel() == 0) return position;

  const int64_t count = panels_of(keys), panel_size = 2 * channels;  // in Floats
  Tensor memory = torch::stable::new_empty(query, {batch, count, kPanel * channels});
  Floats* panels = static_cast<Floats*>(memory.mutable_data_ptr());
  const float* from = static_cast<const float*>(key.const_data_ptr());
  torch::stable::parallel_for(0, batch * count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pack_panel(panels + i * panel_size, from + i / count * keys * channels, keys, channels, i % count);
    }
  });

  const float* rows = static_cast<const float*>(query.const_data_ptr());
  int64_t* out = static_cast<int64_t*>(position.mutable_data_ptr());
  const int64_t step = kTile * kTiles, steps = (queries + step - 1) / step;
  torch::stable::parallel_for(0, batch * steps, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / steps, first = i % steps * step;
      match_queries(
          out + b * queries, rows + b * queries * channels, first, std::min(first + step, queries),
          panels + b * count * panel_size, keys, channels);
    }
  });
  return position;
}

}  // namespace
}  // namespace todo_attn

STABLE_TORCH_LIBRARY_FRAGMENT(todo_attn, m) {
  m.def("match_rows(Tensor query, Tensor key) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(todo_attn, CPU, m) {
  m.impl("match_rows", TORCH_BOX(&todo_attn::match_rows));
}
