// The one-token operators, the same in the library for a CPU and in the one for GPUs, on LibTorch's stable ABI.
//
// What they are given has been validated by s0kernels/ops; they check the little that memory safety needs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "cuda/plan.h"

namespace s0::steps {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Where a call runs.
struct Site {
  bool cuda;
  void here(const Tensor& x) const {
    STD_TORCH_CHECK(cuda ? x.is_cuda() : x.is_cpu(), "s0kernels: a tensor on another device");
  }
};

inline Kind kind_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Kind::kFloat;
    case ScalarType::Half: return Kind::kHalf;
    case ScalarType::BFloat16: return Kind::kBFloat16;
    default: STD_TORCH_CHECK(false, "s0kernels: fp32, fp16 or bf16 expected");
  }
}

constexpr int64_t kNone = -1;

// [rows, heads, columns], of which a dimension may be kNone: not there.
inline Values values_of(const Site& site, const Optional& x, int64_t rows, int64_t heads, int64_t columns) {
  if (!x.has_value()) return {};
  site.here(*x);
  Values v{x->const_data_ptr(), kind_of(*x), 0, 0, 0};
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

inline void fill(Token& t, const Site& site, const Optional& conv_weight, const Optional& conv_bias,
                 const Optional& window, int64_t channels, const Optional& z, const Optional& norm, double eps,
                 const Tensor& state, const Optional& indices, const Tensor& output) {
  site.here(state);
  site.here(output);
  const int64_t size = output.size(2);
  STD_TORCH_CHECK(state.dim() == 4 && state.scalar_type() == ScalarType::Float, "s0kernels: fp32 states expected");
  STD_TORCH_CHECK(output.is_contiguous(), "s0kernels: a contiguous output expected");
  STD_TORCH_CHECK(t.groups > 0 && t.heads % t.groups == 0, "s0kernels: heads in equal groups expected");
  STD_TORCH_CHECK(state.size(2) <= kLargest && state.size(3) <= kLargest, "s0kernels: sizes up to ", kLargest);
  t.state = {static_cast<float*>(state.mutable_data_ptr()), state.size(0), state.stride(0), state.stride(1),
             state.stride(2), state.stride(3)};
  t.indices = nullptr;
  if (indices.has_value()) {
    site.here(*indices);
    STD_TORCH_CHECK(indices->is_contiguous() && indices->numel() == t.rows, "s0kernels: an index for each row");
    t.indices = indices->const_data_ptr();
    t.wide = indices->scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(t.wide || indices->scalar_type() == ScalarType::Int, "s0kernels: int32 or int64 indices expected");
  } else {
    STD_TORCH_CHECK(state.size(0) == t.rows, "s0kernels: a state for each row expected");
  }
  t.z = values_of(site, z, t.rows, t.heads, size);
  t.norm = values_of(site, norm, kNone, kNone, norm.has_value() ? norm->size(0) : kNone);
  t.eps = static_cast<float>(eps);
  t.output = output.mutable_data_ptr();
  t.kind = kind_of(output);
  t.convolution = {};
  if (!window.has_value()) return;
  site.here(*window);
  Convolution& c = t.convolution;
  STD_TORCH_CHECK(conv_weight.has_value() && window->dim() == 3 && window->size(0) == state.size(0) &&
                      window->size(1) == channels && window->size(2) <= kWidest,
                  "s0kernels: a window for each state expected");
  c = {window->mutable_data_ptr(), kind_of(*window), window->stride(0), window->stride(1), window->stride(2),
       static_cast<int>(window->size(2)), values_of(site, conv_weight, kNone, channels, window->size(2)),
       values_of(site, conv_bias, kNone, channels, kNone)};
}

// After `plan`: tickets where blocks have to wait for each other.
inline void hand_out(Token& t, const Site& site, const Optional& tickets) {
  t.tickets = nullptr;
  const bool waits = t.members > 1 && t.rows > 0 && t.convolution.window != nullptr;
  if (!waits) return;
  STD_TORCH_CHECK(tickets.has_value() && tickets->is_contiguous() && tickets->scalar_type() == ScalarType::Int &&
                      tickets->numel() >= t.rows * t.groups,
                  "s0kernels: an int32 ticket for each row and group expected");
  site.here(*tickets);
  t.tickets = static_cast<unsigned*>(tickets->mutable_data_ptr());
}

#define S0_DELTA_STEP                                                                                             \
  "delta_step(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor weight, Tensor? A_log, Tensor? dt_bias, "        \
  "Tensor? conv_weight, Tensor? conv_bias, Tensor(a!)? window, Tensor? z, Tensor? norm, float eps, "              \
  "Tensor(b!) state, Tensor? indices, Tensor(c!)? tickets, Tensor(d!) output, bool normalise, float scale, "      \
  "int emulated) -> ()"

template <void (*Run)(Delta&, const Site&, const Tensor&, const Optional&, int64_t), bool kCuda>
void delta_step(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor weight, Optional A_log, Optional dt_bias,
                Optional conv_weight, Optional conv_bias, Optional window, Optional z, Optional norm, double eps,
                Tensor state, Optional indices, Optional tickets, Tensor output, bool normalise, double scale,
                int64_t emulated) {
  const Site site{kCuda};
  Delta d{};
  const int64_t rows = v.size(0), heads = v.size(1), groups = q.size(1), K = q.size(2), V = v.size(2);
  d.rows = rows;
  d.heads = static_cast<int>(heads);
  d.groups = static_cast<int>(groups);
  STD_TORCH_CHECK(output.dim() == 3 && output.size(0) == rows && output.size(1) == heads && output.size(2) == V &&
                      state.size(1) == heads && state.size(2) == K && state.size(3) == V,
                  "s0kernels: output or states of another shape");
  fill(d, site, conv_weight, conv_bias, window, 2 * groups * K + heads * V, z, norm, eps, state, indices, output);
  if (rows == 0) return;
  d.K = static_cast<int>(K);
  d.V = static_cast<int>(V);
  d.q = values_of(site, q, rows, groups, K);
  d.k = values_of(site, k, rows, groups, K);
  d.v = values_of(site, v, rows, heads, V);
  d.decay = values_of(site, decay, rows, heads, kNone);
  d.weight = values_of(site, weight, rows, heads, kNone);
  d.A_log = values_of(site, A_log, kNone, heads, kNone);
  d.dt_bias = values_of(site, dt_bias, kNone, heads, kNone);
  STD_TORCH_CHECK(A_log.has_value() == dt_bias.has_value(), "s0kernels: A_log and dt_bias go together");
  STD_TORCH_CHECK(!norm.has_value() || norm->size(0) == V, "s0kernels: a norm over V expected");
  d.normalise = normalise;
  d.scale = static_cast<float>(scale);
  Run(d, site, v, tickets, emulated);
}

#define S0_SSD_STEP                                                                                                \
  "ssd_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? conv_weight, "  \
  "Tensor? conv_bias, Tensor(a!)? window, Tensor? z, Tensor? norm, float eps, bool gate_first, Tensor(b!) state, " \
  "Tensor? indices, Tensor(c!)? tickets, Tensor(d!) output, bool logarithm, bool softplus, float low, "            \
  "float high, int emulated) -> ()"

template <void (*Run)(Ssd&, const Site&, const Tensor&, const Optional&, int64_t), bool kCuda>
void ssd_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Optional D, Optional dt_bias, Optional conv_weight,
              Optional conv_bias, Optional window, Optional z, Optional norm, double eps, bool gate_first, Tensor state,
              Optional indices, Optional tickets, Tensor output, bool logarithm, bool softplus, double low, double high,
              int64_t emulated) {
  const Site site{kCuda};
  Ssd s{};
  const int64_t rows = x.size(0), heads = x.size(1), groups = B.size(1), P = x.size(2), N = B.size(2);
  s.rows = rows;
  s.heads = static_cast<int>(heads);
  s.groups = static_cast<int>(groups);
  STD_TORCH_CHECK(output.dim() == 3 && output.size(0) == rows && output.size(1) == heads && output.size(2) == P &&
                      state.size(1) == heads && state.size(2) == P && state.size(3) == N,
                  "s0kernels: output or states of another shape");
  fill(s, site, conv_weight, conv_bias, window, heads * P + 2 * groups * N, z, norm, eps, state, indices, output);
  if (rows == 0) return;
  s.P = static_cast<int>(P);
  s.N = static_cast<int>(N);
  s.x = values_of(site, x, rows, heads, P);
  s.dt = values_of(site, dt, rows, heads, kNone);
  s.A = values_of(site, A, kNone, heads, kNone);
  s.B = values_of(site, B, rows, groups, N);
  s.C = values_of(site, C, rows, groups, N);
  s.D = values_of(site, D, kNone, heads, kNone);
  s.dt_bias = values_of(site, dt_bias, kNone, heads, kNone);
  STD_TORCH_CHECK(!norm.has_value() || (norm->size(0) == heads * P && window.has_value()),
                  "s0kernels: a mixer's norm over all heads expected");
  s.gate_first = gate_first;
  s.logarithm = logarithm;
  s.softplus = softplus;
  s.low = static_cast<float>(low);
  s.high = static_cast<float>(high);
  Run(s, site, x, tickets, emulated);
}

}  // namespace s0::steps
