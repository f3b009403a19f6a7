// The ops on torch tensors, the same for every device: what the arguments must be, the outputs, the job to run.
//
// Device supplies what differs: a Guard, check_index() and run(). Only torch's stable ABI is used, so that what is
// compiled once serves every later torch. An argument that does not fit is a std::invalid_argument, which arrives in
// Python as ValueError; nothing has been written then.
#pragma once

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "rows.h"

namespace todo_attn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '(';
  for (int64_t i = 0; i < t.dim(); ++i) {
    text << (i ? ", " : "") << t.size(i);
  }
  text << ')';
  return text.str();
}

inline void check_floats(const char* name, const Tensor& t, int64_t dims) {
  const ScalarType dtype = t.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Half && dtype != ScalarType::BFloat16 &&
      dtype != ScalarType::Double) {
    refuse(name, " must be fp32, fp16, bf16 or fp64, got ", dtype);
  }
  if (t.dim() != dims) {
    refuse(name, " must have ", dims, " dimensions, got shape ", shape_of(t));
  }
}

// `t` beside `x`: the same device, and where the dtype matters also that.
inline void check_beside(const char* name, const Tensor& t, const char* beside, const Tensor& x, bool dtype = true) {
  if (t.is_cpu() != x.is_cpu() || t.is_cuda() != x.is_cuda() || t.get_device_index() != x.get_device_index()) {
    refuse(name, " must be on the device of ", beside);
  }
  if (dtype && t.scalar_type() != x.scalar_type()) {
    refuse(name, " must have the dtype of ", beside, ", ", x.scalar_type(), ", got ", t.scalar_type());
  }
}

inline void check_shape(const char* name, const Tensor& t, std::array<int64_t, 3> shape) {
  if (t.size(0) != shape[0] || t.size(1) != shape[1] || t.size(2) != shape[2]) {
    refuse(name, " must have shape (", shape[0], ", ", shape[1], ", ", shape[2], "), got ", shape_of(t));
  }
}

inline Index index_of(const char* name, const Tensor& t, const char* beside, const Tensor& x) {
  if (t.scalar_type() != ScalarType::Int && t.scalar_type() != ScalarType::Long) {
    refuse(name, " must be int32 or int64, got ", t.scalar_type());
  }
  if (t.dim() != 2 || t.size(0) != x.size(0)) {
    refuse(name, " must have 2 dimensions and the batch of ", beside, ", ", x.size(0), ", got shape ", shape_of(t));
  }
  check_beside(name, t, beside, x, /*dtype=*/false);
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.scalar_type() == ScalarType::Long};
}

inline int64_t width_of(const Tensor& t) {
  return static_cast<int64_t>(t.element_size());
}

inline Rows<const char> rows_of(const Tensor& t) {
  const int64_t width = width_of(t);
  return {static_cast<const char*>(t.const_data_ptr()), t.stride(0) * width, t.stride(1) * width, t.stride(2) * width};
}

inline Rows<char> mutable_rows_of(const Tensor& t) {
  const int64_t width = width_of(t);
  return {static_cast<char*>(t.mutable_data_ptr()), t.stride(0) * width, t.stride(1) * width, t.stride(2) * width};
}

// Calls f with a value of the C++ type of a float dtype that check_floats() let through.
template <class F>
void with_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(c10::Half{});
    default:
      return f(c10::BFloat16{});
  }
}

// `names`: what the tensor of rows and the one of indices are called, for the messages.
template <class Device>
Tensor gather_named(const char* x_name, const char* index_name, const Tensor& x, const Tensor& index) {
  check_floats(x_name, x, 3);
  const Index numbers = index_of(index_name, index, x_name, x);
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2), rows = index.size(1);
  const typename Device::Guard guard(x.get_device_index());
  Device::check_index(index_name, numbers, batch, rows, tokens);
  Tensor out = torch::stable::new_empty(x, {batch, rows, channels});
  if (out.numel() != 0) {
    const int64_t width = width_of(x);
    const Gather job{mutable_rows_of(out), rows_of(x), numbers, tokens, {channels, width}};
    Device::run(job, batch, rows, channels * width, x.get_device_index());
  }
  return out;
}

template <class Device>
Tensor gather_tokens(const Tensor& x, const Tensor& index) {
  return gather_named<Device>("x", "index", x, index);
}

template <class Device>
Index check_scatter(const Tensor& x, const Tensor& index, const Tensor& source) {
  check_floats("x", x, 3);
  const Index numbers = index_of("index", index, "x", x);
  check_floats("source", source, 3);
  check_beside("source", source, "x", x);
  check_shape("source", source, {x.size(0), index.size(1), x.size(2)});
  const typename Device::Guard guard(x.get_device_index());
  Device::check_index("index", numbers, x.size(0), index.size(1), x.size(1));
  return numbers;
}

template <class Device>
void scatter_rows(const Tensor& x, const Index& numbers, const Tensor& source) {
  if (source.numel() == 0) return;
  const typename Device::Guard guard(x.get_device_index());
  const int64_t width = width_of(x), channels = x.size(2);
  const Scatter job{mutable_rows_of(x), rows_of(source), numbers, x.size(1), {channels, width}};
  Device::run(job, x.size(0), source.size(1), channels * width, x.get_device_index());
}

// Where an index row names a token twice, which of the two source rows stays is not specified.
template <class Device>
Tensor scatter_tokens(const Tensor& x, const Tensor& index, const Tensor& source) {
  const Index numbers = check_scatter<Device>(x, index, source);
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2), width = width_of(x);
  const typename Device::Guard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, {batch, tokens, channels});
  if (out.numel() == 0) return out;
  Tensor place = torch::stable::new_empty(x, {batch, tokens}, ScalarType::Long);
  torch::stable::zero_(place);
  int64_t* places = static_cast<int64_t*>(place.mutable_data_ptr());
  const int64_t rows = index.size(1);
  if (rows != 0) Device::run(Place{places, numbers, tokens}, batch, rows, 8, x.get_device_index());
  const Replace job{mutable_rows_of(out), rows_of(x), rows_of(source), places, tokens, {channels, width}};
  Device::run(job, batch, tokens, channels * width, x.get_device_index());
  return out;
}

template <class Device>
void scatter_tokens_(Tensor x, const Tensor& index, const Tensor& source) {
  const Index numbers = check_scatter<Device>(x, index, source);
  for (int64_t i = 0; i < 3; ++i) {
    if (x.size(i) > 1 && x.stride(i) == 0) {
      refuse("x must not be expanded, since it is written to, got stride 0 in dimension ", i);
    }
  }
  scatter_rows<Device>(x, numbers, source);
}

template <class Device>
Tensor recover_tokens(const Tensor& y, const Tensor& source, const std::optional<Tensor>& residual) {
  if (!residual) return gather_named<Device>("y", "source", y, source);
  check_floats("y", y, 3);
  const Index numbers = index_of("source", source, "y", y);
  const int64_t batch = y.size(0), tokens = y.size(1), channels = y.size(2), rows = source.size(1);
  check_floats("residual", *residual, 3);
  check_beside("residual", *residual, "y", y);
  check_shape("residual", *residual, {batch, rows, channels});
  const typename Device::Guard guard(y.get_device_index());
  Device::check_index("source", numbers, batch, rows, tokens);
  Tensor out = torch::stable::new_empty(y, {batch, rows, channels});
  if (out.numel() == 0) return out;
  with_type(y.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const RecoverAdd<T> job{mutable_rows_of(out), rows_of(y), rows_of(*residual), numbers, tokens, channels};
    Device::run(job, batch, rows, channels * width_of(y), y.get_device_index());
  });
  return out;
}

template <class Device>
Tensor select_base_tokens(
    const Tensor& score, int64_t height, int64_t width, int64_t patch_height, int64_t patch_width) {
  check_floats("score", score, 2);
  if (height < 1 || width < 1 || score.size(1) / width != height || score.size(1) % width != 0) {
    refuse("score must have height * width = ", height, " * ", width, " tokens, got shape ", shape_of(score));
  }
  if (patch_height < 1 || patch_width < 1) {
    refuse("patch must be at least (1, 1), got (", patch_height, ", ", patch_width, ")");
  }
  const int64_t batch = score.size(0), across = width / patch_width, patches = height / patch_height * across;
  const typename Device::Guard guard(score.get_device_index());
  Tensor out = torch::stable::new_empty(score, {batch, patches}, ScalarType::Long);
  if (out.numel() == 0) return out;
  with_type(score.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const SelectBase<T> job{
        static_cast<int64_t*>(out.mutable_data_ptr()),
        patches,
        across,
        static_cast<const T*>(score.const_data_ptr()),
        score.stride(0),
        score.stride(1),
        width,
        patch_height,
        patch_width};
    Device::run(job, batch, patches, patch_height * patch_width * width_of(score), score.get_device_index());
  });
  return out;
}

template <class Device>
void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("gather_tokens", TORCH_BOX(&gather_tokens<Device>));
  m.impl("scatter_tokens", TORCH_BOX(&scatter_tokens<Device>));
  m.impl("scatter_tokens_", TORCH_BOX(&scatter_tokens_<Device>));
  m.impl("recover_tokens", TORCH_BOX(&recover_tokens<Device>));
  m.impl("select_base_tokens", TORCH_BOX(&select_base_tokens<Device>));
}

}  // namespace todo_attn
