// The compiled kernels as torch operators, on LibTorch's stable ABI: one binary for every torch from 2.10 on.
//
// What these operators are given has been validated by s0kernels/ops; they check the little that memory safety needs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>

#include "cpu/scan.h"
#include "cuda/operators.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

namespace s0 {

namespace emulated {  // cuda/emulated.cpp
void delta_token(const Delta&, int64_t index, void*, bool backwards);
void ssd_token(const Ssd&, int64_t index, void*, bool backwards);
}  // namespace emulated

int64_t units(const Scan& s) {
  const int64_t of_group = s.heads / s.groups;
  return s.sequences * s.groups * ((of_group + s.block - 1) / s.block);
}

namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

struct Scratch {
  std::unique_ptr<void, Free> memory;
  int64_t bytes = 0;
};

const bool kPoison = std::getenv("S0KERNELS_POISON") != nullptr;

}  // namespace

void* scratch(int64_t bytes) {
  thread_local Scratch mine;
  if (mine.bytes < bytes) {
    mine.memory.reset();
    mine.memory.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    STD_TORCH_CHECK(mine.memory != nullptr, "s0kernels: no memory for ", bytes, " bytes of scratch");
    mine.bytes = bytes;
  }
  if (kPoison) std::memset(mine.memory.get(), 0xff, bytes);  // a NaN in every format
  return mine.memory.get();
}

namespace {

struct Entries {
  const char* name;
  decltype(&portable::forward_bytes) forward_bytes;
  decltype(&portable::backward_bytes) backward_bytes;
  decltype(&portable::forward) forward;
  decltype(&portable::backward) backward;
  decltype(&portable::step_bytes) step_bytes;
  decltype(&portable::step) step;
  decltype(&portable::delta_token) delta_token;
  decltype(&portable::ssd_token) ssd_token;
};

#define S0_TABLE(isa) \
  Entries{#isa, isa::forward_bytes, isa::backward_bytes, isa::forward, isa::backward, isa::step_bytes, isa::step, \
          isa::delta_token, isa::ssd_token}

// The widest instructions that this machine has, or those that S0KERNELS_CPU names.
Entries choose() {
  const char* wanted = std::getenv("S0KERNELS_CPU");
  auto asked = [&](const char* name) { return wanted == nullptr || std::strcmp(wanted, name) == 0; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (asked("avx512") && fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return S0_TABLE(avx512);
  if (asked("avx2") && fma) return S0_TABLE(avx2);
#endif
  STD_TORCH_CHECK(asked("portable"), "S0KERNELS_CPU is ", wanted, ": unknown, or not on this machine");
  return S0_TABLE(portable);
}

const Entries& entries() {
  static const Entries chosen = choose();
  return chosen;
}

Kind kind_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Kind::kFloat;
    case ScalarType::Double: return Kind::kDouble;
    case ScalarType::Half: return Kind::kHalf;
    case ScalarType::BFloat16: return Kind::kBFloat16;
    default: STD_TORCH_CHECK(false, "s0kernels: unsupported dtype");
  }
}

// Arithmetic in fp64 reads and writes fp64 and nothing else; that in fp32 the other three.
Kind kind_beside(const Tensor& x, ScalarType arithmetic) {
  const Kind kind = kind_of(x);
  STD_TORCH_CHECK((kind == Kind::kDouble) == (arithmetic == ScalarType::Double),
                  "s0kernels: tensors of fp64 and of other dtypes do not mix");
  return kind;
}

Rows rows_of(const Tensor& x, ScalarType arithmetic) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "s0kernels: [B, T, heads, columns] on a CPU expected");
  return {x.const_data_ptr(), kind_beside(x, arithmetic), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// [*, heads, K, V], or [*, heads, V, K] where `turned`
States states_of(const Optional& x, bool turned, ScalarType type, bool writable = false) {
  if (!x.has_value()) return {nullptr, 0, 0, 0, 0};
  STD_TORCH_CHECK(x->is_cpu() && x->scalar_type() == type, "s0kernels: a state has another dtype");
  void* data = writable ? x->mutable_data_ptr() : const_cast<void*>(x->const_data_ptr());
  const int64_t shared = x->dim() == 3 ? 0 : 1;
  const int64_t key = turned ? 2 : 1, value = turned ? 1 : 2;
  return {data, shared ? x->stride(0) : 0, x->stride(shared), x->stride(shared + key), x->stride(shared + value)};
}

const void* plain(const Optional& x, ScalarType type) {
  if (!x.has_value()) return nullptr;
  STD_TORCH_CHECK(x->is_cpu() && x->is_contiguous() && x->scalar_type() == type, "s0kernels: contiguous gates expected");
  return x->const_data_ptr();
}

void* target(const Optional& x, ScalarType type) { return const_cast<void*>(plain(x, type)); }

Scan scan_of(const Tensor& q, const Tensor& k, int64_t heads, int64_t value, const Tensor& decay, const Tensor& weight,
             const Optional& state, const Optional& indices, const Optional& boundaries, bool delta, bool normalise,
             double scale, int64_t chunk, int64_t block) {
  const ScalarType type = decay.scalar_type();
  Scan s{};
  s.delta = delta;
  s.normalise = normalise;
  s.tokens = q.size(1);
  s.heads = heads;
  s.groups = q.size(2);
  s.key = q.size(3);
  s.value = value;
  s.chunk = chunk;
  s.block = block;
  s.scale = scale;
  constexpr int64_t most = 16384;  // products of two sizes are counted in int
  STD_TORCH_CHECK(s.key <= most && s.value <= most && chunk <= most, "s0kernels: sizes up to ", most, " expected");
  s.q = rows_of(q, type);
  s.k = rows_of(k, type);
  s.decay = plain(decay, type);
  s.weight = plain(weight, type);
  s.sequences = q.size(0);
  if (boundaries.has_value()) {
    s.boundaries = static_cast<const int64_t*>(plain(boundaries, ScalarType::Long));
    s.sequences = boundaries->numel() - 1;
  }
  s.initial = states_of(state, !delta, type);
  if (indices.has_value()) {
    s.indices = static_cast<const int64_t*>(plain(indices, ScalarType::Long));
    s.bank = state.has_value() ? state->size(0) : 0;
  }
  return s;
}

template <class Work>
void run(int64_t units, int64_t grain, int64_t bytes, const Work& work) {
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) work(unit, scratch(bytes));
  });
}

// Smaller blocks of heads until every thread has two units. Only where nothing is summed over a block: the result keeps
// its bits.
void spread(Scan& s) {
  const int64_t threads = torch::stable::get_num_threads();
  while (s.block > 1 && units(s) < 2 * threads) s.block /= 2;
}

void scan_forward(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor weight, Optional skip, Optional state,
                  Optional indices, Optional boundaries, Tensor output, Optional final, bool delta, bool normalise,
                  double scale, int64_t chunk, int64_t block) {
  Scan s = scan_of(q, k, v.size(2), v.size(3), decay, weight, state, indices, boundaries, delta, normalise, scale,
                   chunk, block);
  const ScalarType type = decay.scalar_type();
  s.v = rows_of(v, type);
  s.skip = plain(skip, type);
  spread(s);
  STD_TORCH_CHECK(output.is_contiguous(), "s0kernels: a contiguous output expected");
  const Forward f{output.mutable_data_ptr(), kind_beside(output, type), states_of(final, !delta, type, true)};
  const bool wide = type == ScalarType::Double;
  run(units(s), 1, entries().forward_bytes(s, wide),
      [&](int64_t unit, void* memory) { entries().forward(s, f, wide, unit, memory); });
}

void scan_backward(Optional doutput, Optional dfinal, Tensor q, Tensor k, Optional v, int64_t value, Tensor decay,
                   Tensor weight, Optional skip, Optional state, Optional indices, Optional boundaries,
                   Optional dinitial, Optional dq, Optional dk, Optional dv, Optional ddecay, Optional dweight,
                   bool delta, bool normalise, double scale, int64_t chunk, int64_t block) {
  const ScalarType type = decay.scalar_type();
  Scan s = scan_of(q, k, decay.size(2), value, decay, weight, state, indices, boundaries, delta, normalise, scale,
                   chunk, block);
  if (v.has_value()) s.v = rows_of(*v, type);
  s.skip = plain(skip, type);
  Backward b{};
  if (doutput.has_value()) b.doutput = rows_of(*doutput, type);
  b.dfinal = states_of(dfinal, !delta, type);
  b.dinitial = states_of(dinitial, !delta, type, true);
  b.dq = target(dq, type);
  b.dk = target(dk, type);
  b.dv = target(dv, type);
  b.ddecay = target(ddecay, type);
  b.dweight = target(dweight, type);
  if (b.ddecay == nullptr) spread(s);
  const bool wide = type == ScalarType::Double;
  run(units(s), 1, entries().backward_bytes(s, b, wide),
      [&](int64_t unit, void* memory) { entries().backward(s, b, wide, unit, memory); });
}

void scan_step(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor weight, Optional skip, Tensor state, Optional indices,
               Tensor output, bool delta, bool normalise, double scale) {
  const ScalarType type = decay.scalar_type();
  Scan s = scan_of(q, k, v.size(2), v.size(3), decay, weight, std::nullopt, indices, std::nullopt, delta, normalise,
                   scale, 1, 1);
  s.v = rows_of(v, type);
  s.skip = plain(skip, type);
  STD_TORCH_CHECK(state.is_contiguous() && output.is_contiguous(), "s0kernels: contiguous states and output expected");
  const Step step{states_of(state, !delta, type, true), output.mutable_data_ptr(), kind_beside(output, type)};
  const bool wide = type == ScalarType::Double;
  run(s.sequences * s.heads, 4, entries().step_bytes(s, wide),
      [&](int64_t unit, void* memory) { entries().step(s, step, wide, unit, memory); });
}

// A mixer's token. Emulated (1, or 2 with the warps last to first), it runs in the blocks that a GPU would run.
void run_delta(Delta& d, const steps::Site& site, const Tensor&, const Optional& tickets, int64_t emulated) {
  emulated ? plan(d) : plan_whole(d, d.V, d.V);
  hand_out(d, site, tickets);
  run(blocks(d), 4, kSharedBytes, [&](int64_t index, void* memory) {
    emulated ? emulated::delta_token(d, index, memory, emulated == 2) : entries().delta_token(d, index, memory);
  });
}

void run_ssd(Ssd& s, const steps::Site& site, const Tensor&, const Optional& tickets, int64_t emulated) {
  emulated ? plan(s) : plan_whole(s, s.P, s.N);
  hand_out(s, site, tickets);
  run(blocks(s), 4, kSharedBytes, [&](int64_t index, void* memory) {
    emulated ? emulated::ssd_token(s, index, memory, emulated == 2) : entries().ssd_token(s, index, memory);
  });
}

int64_t instructions() {
  const char* name = entries().name;
  return std::strcmp(name, "avx512") == 0 ? 512 : std::strcmp(name, "avx2") == 0 ? 256 : 128;
}

}  // namespace
}  // namespace s0

STABLE_TORCH_LIBRARY(s0kernels_cpu, m) {
  m.def(
      "scan_forward(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor weight, Tensor? skip, Tensor? state, "
      "Tensor? indices, Tensor? boundaries, Tensor(a!) output, Tensor(b!)? final, bool delta, bool normalise, "
      "float scale, int chunk, int block) -> ()");
  m.def(
      "scan_backward(Tensor? doutput, Tensor? dfinal, Tensor q, Tensor k, Tensor? v, int value, Tensor decay, "
      "Tensor weight, Tensor? skip, Tensor? state, Tensor? indices, Tensor? boundaries, Tensor(a!)? dinitial, "
      "Tensor(b!)? dq, Tensor(c!)? dk, Tensor(d!)? dv, Tensor(e!)? ddecay, Tensor(f!)? dweight, bool delta, "
      "bool normalise, float scale, int chunk, int block) -> ()");
  m.def(
      "scan_step(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor weight, Tensor? skip, Tensor(a!) state, "
      "Tensor? indices, Tensor(b!) output, bool delta, bool normalise, float scale) -> ()");
  m.def(S0_DELTA_STEP);
  m.def(S0_SSD_STEP);
  m.def("instructions() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(s0kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("scan_forward", TORCH_BOX(&s0::scan_forward));
  m.impl("scan_backward", TORCH_BOX(&s0::scan_backward));
  m.impl("scan_step", TORCH_BOX(&s0::scan_step));
  m.impl("delta_step", TORCH_BOX((&s0::steps::delta_step<s0::run_delta, false>)));
  m.impl("ssd_step", TORCH_BOX((&s0::steps::ssd_step<s0::run_ssd, false>)));
  m.impl("instructions", TORCH_BOX(&s0::instructions));
}
