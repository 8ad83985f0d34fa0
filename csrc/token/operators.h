// The operators of one token, which are the same in all libraries that have them.
#pragma once

#include "tensors.h"
#include "token/arguments.h"

namespace s0::steps {

constexpr int64_t kNone = -1;

// [rows, heads, columns]. A dimension of kNone is absent.
inline Values values_of(Device device, const Optional& x, int64_t rows, int64_t heads, int64_t columns) {
  if (!x.has_value()) return {};
  check_device(*x, device);
  Values v{x->const_data_ptr(), kind_of(*x, ScalarType::Float), 0, 0, 0};
  int64_t dim = 0;
  const auto take = [&](int64_t size, int64_t& stride) {
    if (size == kNone) return;
    STD_TORCH_CHECK(dim < x->dim() && x->size(dim) == size, "s0kernels: an input of another shape");
    stride = x->stride(dim++);
  };
  take(rows, v.row);
  take(heads, v.head);
  take(columns, v.column);
  STD_TORCH_CHECK(dim == x->dim(), "s0kernels: an input of another shape");
  return v;
}

// Fills in the arguments that both recurrences have. `channels` is the number of channels of the convolution.
inline void set_common(Token& t, Device device, const Optional& conv_weight, const Optional& conv_bias,
                       const Optional& window, int64_t channels, const Optional& z, const Optional& norm, double eps,
                       const Tensor& state, const Optional& indices, const Tensor& output) {
  check_device(state, device);
  const int64_t size = output.size(2);
  STD_TORCH_CHECK(state.dim() == 4 && state.scalar_type() == ScalarType::Float, "s0kernels: fp32 states expected");
  STD_TORCH_CHECK(t.groups > 0 && t.heads % t.groups == 0, "s0kernels: heads in equal groups expected");
  STD_TORCH_CHECK(state.size(2) <= kMaxHeadSize && state.size(3) <= kMaxHeadSize, "s0kernels: sizes up to ",
                  kMaxHeadSize);
  t.state = {static_cast<float*>(state.mutable_data_ptr()), state.size(0), state.stride(0), state.stride(1),
             state.stride(2), state.stride(3)};
  t.indices = nullptr;
  if (indices.has_value()) {
    check_device(*indices, device);
    STD_TORCH_CHECK(indices->is_contiguous() && indices->numel() == t.rows, "s0kernels: an index for each row");
    t.indices = indices->const_data_ptr();
    t.int64_indices = indices->scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(t.int64_indices || indices->scalar_type() == ScalarType::Int,
                    "s0kernels: int32 or int64 indices expected");
  } else {
    STD_TORCH_CHECK(state.size(0) == t.rows, "s0kernels: a state for each row expected");
  }
  t.z = values_of(device, z, t.rows, t.heads, size);
  t.norm = values_of(device, norm, kNone, kNone, norm.has_value() ? norm->size(0) : kNone);
  t.eps = static_cast<float>(eps);
  t.output = output_data(output, device);
  t.kind = kind_of(output, ScalarType::Float);
  t.convolution = {};
  if (!window.has_value()) return;
  check_device(*window, device);
  Convolution& c = t.convolution;
  STD_TORCH_CHECK(conv_weight.has_value() && window->dim() == 3 && window->size(0) == state.size(0) &&
                      window->size(1) == channels && window->size(2) <= kMaxWindow,
                  "s0kernels: a window for each state expected");
  c = {window->mutable_data_ptr(), kind_of(*window, ScalarType::Float),
       window->stride(0), window->stride(1), window->stride(2), static_cast<int>(window->size(2)),
       values_of(device, conv_weight, kNone, channels, window->size(2)),
       values_of(device, conv_bias, kNone, channels, kNone)};
}

// `run(call, output)` cuts the call into blocks and runs them.
#define S0_GATED_DELTA_RULE_STEP                                                                       \
  "gated_delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor weight, Tensor? A_log, "   \
  "Tensor? dt_bias, Tensor? conv_weight, Tensor? conv_bias, Tensor(a!)? window, Tensor? z, "           \
  "Tensor? norm, float eps, Tensor(b!) state, Tensor? indices, Tensor(c!) output, bool normalise, "    \
  "bool allow_neg_eigval, float scale) -> ()"

template <Device device, void (*run)(Delta&, const Tensor&)>
void gated_delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor weight, Optional A_log, Optional dt_bias,
                           Optional conv_weight, Optional conv_bias, Optional window, Optional z, Optional norm,
                           double eps, Tensor state, Optional indices, Tensor output, bool normalise,
                           bool allow_neg_eigval, double scale) {
  Delta d{};
  const int64_t rows = v.size(0), heads = v.size(1), groups = q.size(1), K = q.size(2), V = v.size(2);
  d.rows = rows;
  d.heads = static_cast<int>(heads);
  d.groups = static_cast<int>(groups);
  STD_TORCH_CHECK(output.dim() == 3 && output.size(0) == rows && output.size(1) == heads && output.size(2) == V &&
                      state.size(1) == heads && state.size(2) == K && state.size(3) == V,
                  "s0kernels: output or states of another shape");
  set_common(d, device, conv_weight, conv_bias, window, 2 * groups * K + heads * V, z, norm, eps, state, indices,
             output);
  if (rows == 0) return;
  d.K = static_cast<int>(K);
  d.V = static_cast<int>(V);
  d.q = values_of(device, q, rows, groups, K);
  d.k = values_of(device, k, rows, groups, K);
  d.v = values_of(device, v, rows, heads, V);
  d.decay = values_of(device, decay, rows, heads, kNone);
  d.weight = values_of(device, weight, rows, heads, kNone);
  d.A_log = values_of(device, A_log, kNone, heads, kNone);
  d.dt_bias = values_of(device, dt_bias, kNone, heads, kNone);
  STD_TORCH_CHECK(A_log.has_value() == dt_bias.has_value(), "s0kernels: A_log and dt_bias go together");
  STD_TORCH_CHECK(!norm.has_value() || norm->size(0) == V, "s0kernels: a norm over V expected");
  d.normalise = normalise;
  d.allow_neg_eigval = allow_neg_eigval;
  d.scale = static_cast<float>(scale);
  run(d, output);
}

#define S0_SSD_STEP                                                                                    \
  "ssd_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, "           \
  "Tensor? conv_weight, Tensor? conv_bias, Tensor(a!)? window, Tensor? z, Tensor? norm, float eps, "   \
  "bool gate_first, Tensor(b!) state, Tensor? indices, Tensor(c!) output, bool logarithm, "            \
  "bool softplus, float low, float high) -> ()"

template <Device device, void (*run)(Ssd&, const Tensor&)>
void ssd_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Optional D, Optional dt_bias, Optional conv_weight,
              Optional conv_bias, Optional window, Optional z, Optional norm, double eps, bool gate_first, Tensor state,
              Optional indices, Tensor output, bool logarithm, bool softplus, double low, double high) {
  Ssd s{};
  const int64_t rows = x.size(0), heads = x.size(1), groups = B.size(1), P = x.size(2), N = B.size(2);
  s.rows = rows;
  s.heads = static_cast<int>(heads);
  s.groups = static_cast<int>(groups);
  STD_TORCH_CHECK(output.dim() == 3 && output.size(0) == rows && output.size(1) == heads && output.size(2) == P &&
                      state.size(1) == heads && state.size(2) == P && state.size(3) == N,
                  "s0kernels: output or states of another shape");
  set_common(s, device, conv_weight, conv_bias, window, heads * P + 2 * groups * N, z, norm, eps, state, indices,
             output);
  if (rows == 0) return;
  s.P = static_cast<int>(P);
  s.N = static_cast<int>(N);
  s.x = values_of(device, x, rows, heads, P);
  s.dt = values_of(device, dt, rows, heads, kNone);
  s.A = values_of(device, A, kNone, heads, kNone);
  s.B = values_of(device, B, rows, groups, N);
  s.C = values_of(device, C, rows, groups, N);
  s.D = values_of(device, D, kNone, heads, kNone);
  s.dt_bias = values_of(device, dt_bias, kNone, heads, kNone);
  STD_TORCH_CHECK(!norm.has_value() || (norm->size(0) == heads * P && window.has_value()),
                  "s0kernels: a mixer's norm over all heads expected");
  s.gate_first = gate_first;
  s.logarithm = logarithm;
  s.softplus = softplus;
  s.low = static_cast<float>(low);
  s.high = static_cast<float>(high);
  run(s, output);
}

}  // namespace s0::steps
