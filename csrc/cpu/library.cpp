// The compiled kernels as torch operators, on LibTorch's stable ABI: one binary for every torch from 2.10 on.
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/scan.h"
#include "token/operators.h"

namespace s0 {

int64_t units(const Scan& s) {
  const int64_t of_group = s.heads / s.groups;
  return s.sequences * s.groups * ((of_group + s.head_block - 1) / s.head_block);
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

// The best instruction set of this machine, or the one that S0KERNELS_CPU names.
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

Rows rows_of(const Tensor& x, ScalarType arithmetic) {
  check_device(x, Device::kCpu);
  STD_TORCH_CHECK(x.dim() == 4, "s0kernels: [B, T, heads, columns] expected");
  return {x.const_data_ptr(), kind_of(x, arithmetic), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// [*, heads, K, V], or [*, heads, V, K] if `transposed`
States states_of(const Optional& x, bool transposed, ScalarType type, bool written = false) {
  if (!x.has_value()) return {nullptr, 0, 0, 0, 0};
  check_device(*x, Device::kCpu);
  STD_TORCH_CHECK(x->scalar_type() == type, "s0kernels: a state has another dtype");
  void* data = written ? x->mutable_data_ptr() : const_cast<void*>(x->const_data_ptr());
  const int64_t shared = x->dim() == 3 ? 0 : 1;
  const int64_t key = transposed ? 2 : 1, value = transposed ? 1 : 2;
  return {data, shared ? x->stride(0) : 0, x->stride(shared), x->stride(shared + key), x->stride(shared + value)};
}

const void* contiguous_data(const Optional& x, ScalarType type) {
  if (!x.has_value()) return nullptr;
  check_device(*x, Device::kCpu);
  STD_TORCH_CHECK(x->is_contiguous() && x->scalar_type() == type, "s0kernels: contiguous gates expected");
  return x->const_data_ptr();
}

void* writable_data(const Optional& x, ScalarType type) { return const_cast<void*>(contiguous_data(x, type)); }

Scan scan_of(const Tensor& q, const Tensor& k, int64_t heads, int64_t value, const Tensor& decay, const Tensor& weight,
             const Optional& state, const Optional& indices, const Optional& boundaries, bool delta, bool normalise,
             double scale, int64_t chunk, int64_t head_block) {
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
  s.head_block = head_block;
  s.scale = scale;
  constexpr int64_t most = 16384;  // products of two sizes must fit into int
  STD_TORCH_CHECK(s.key <= most && s.value <= most && chunk <= most, "s0kernels: sizes up to ", most, " expected");
  s.q = rows_of(q, type);
  s.k = rows_of(k, type);
  s.decay = contiguous_data(decay, type);
  s.weight = contiguous_data(weight, type);
  s.sequences = q.size(0);
  if (boundaries.has_value()) {
    s.boundaries = static_cast<const int64_t*>(contiguous_data(boundaries, ScalarType::Long));
    s.sequences = boundaries->numel() - 1;
  }
  s.initial = states_of(state, !delta, type);
  if (indices.has_value()) {
    s.indices = static_cast<const int64_t*>(contiguous_data(indices, ScalarType::Long));
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

// Halves the blocks of heads until every thread has two units of work. Only used if nothing is summed over a block, so
// that the result has the same bits.
void split_head_blocks(Scan& s) {
  const int64_t threads = torch::stable::get_num_threads();
  while (s.head_block > 1 && units(s) < 2 * threads) s.head_block /= 2;
}

void scan_forward(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor weight, Optional skip, Optional state,
                  Optional indices, Optional boundaries, Tensor output, Optional final, bool delta, bool normalise,
                  double scale, int64_t chunk, int64_t head_block) {
  Scan s = scan_of(q, k, v.size(2), v.size(3), decay, weight, state, indices, boundaries, delta, normalise, scale,
                   chunk, head_block);
  const ScalarType type = decay.scalar_type();
  s.v = rows_of(v, type);
  s.skip = contiguous_data(skip, type);
  split_head_blocks(s);
  const Forward f{output_data(output, Device::kCpu), kind_of(output, type), states_of(final, !delta, type, true)};
  const bool fp64 = type == ScalarType::Double;
  run(units(s), 1, entries().forward_bytes(s, fp64),
      [&](int64_t unit, void* memory) { entries().forward(s, f, fp64, unit, memory); });
}

void scan_backward(Optional doutput, Optional dfinal, Tensor q, Tensor k, Optional v, int64_t value, Tensor decay,
                   Tensor weight, Optional skip, Optional state, Optional indices, Optional boundaries,
                   Optional dinitial, Optional dq, Optional dk, Optional dv, Optional ddecay, Optional dweight,
                   bool delta, bool normalise, double scale, int64_t chunk, int64_t head_block) {
  const ScalarType type = decay.scalar_type();
  Scan s = scan_of(q, k, decay.size(2), value, decay, weight, state, indices, boundaries, delta, normalise, scale,
                   chunk, head_block);
  if (v.has_value()) s.v = rows_of(*v, type);
  s.skip = contiguous_data(skip, type);
  Backward b{};
  if (doutput.has_value()) b.doutput = rows_of(*doutput, type);
  b.dfinal = states_of(dfinal, !delta, type);
  b.dinitial = states_of(dinitial, !delta, type, true);
  b.dq = writable_data(dq, type);
  b.dk = writable_data(dk, type);
  b.dv = writable_data(dv, type);
  b.ddecay = writable_data(ddecay, type);
  b.dweight = writable_data(dweight, type);
  if (b.ddecay == nullptr) split_head_blocks(s);
  const bool fp64 = type == ScalarType::Double;
  run(units(s), 1, entries().backward_bytes(s, b, fp64),
      [&](int64_t unit, void* memory) { entries().backward(s, b, fp64, unit, memory); });
}

void scan_step(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor weight, Optional skip, Tensor state, Optional indices,
               Tensor output, bool delta, bool normalise, double scale) {
  const ScalarType type = decay.scalar_type();
  Scan s = scan_of(q, k, v.size(2), v.size(3), decay, weight, std::nullopt, indices, std::nullopt, delta, normalise,
                   scale, 1, 1);
  s.v = rows_of(v, type);
  s.skip = contiguous_data(skip, type);
  STD_TORCH_CHECK(state.is_contiguous(), "s0kernels: contiguous states expected");
  const Step step{states_of(state, !delta, type, true), output_data(output, Device::kCpu), kind_of(output, type)};
  const bool fp64 = type == ScalarType::Double;
  run(s.sequences * s.heads, 4, entries().step_bytes(s, fp64),
      [&](int64_t unit, void* memory) { entries().step(s, step, fp64, unit, memory); });
}

// One token of a mixer, with one thread per head. A GPU would cut `size` into tiles; `columns` is the number of columns
// of a state.
template <class Call, class Entry>
void run_heads(Call& call, int size, int columns, Entry entry) {
  call.fast = aligned(call.state, columns, kTokenVectorSize);
  call.tile = size;
  call.tiles = call.warps = 1;
  call.members = call.heads / call.groups;
  std::vector<unsigned> arrivals(counters(call));
  call.arrivals = arrivals.empty() ? nullptr : arrivals.data();
  run(blocks(call), 4, kSharedBytes, [&](int64_t index, void* memory) { entry(call, index, memory); });
}

void run_delta(Delta& d, const Tensor&) { run_heads(d, d.V, d.V, entries().delta_token); }

void run_ssd(Ssd& s, const Tensor&) { run_heads(s, s.P, s.N, entries().ssd_token); }

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
      "float scale, int chunk, int head_block) -> ()");
  m.def(
      "scan_backward(Tensor? doutput, Tensor? dfinal, Tensor q, Tensor k, Tensor? v, int value, Tensor decay, "
      "Tensor weight, Tensor? skip, Tensor? state, Tensor? indices, Tensor? boundaries, Tensor(a!)? dinitial, "
      "Tensor(b!)? dq, Tensor(c!)? dk, Tensor(d!)? dv, Tensor(e!)? ddecay, Tensor(f!)? dweight, bool delta, "
      "bool normalise, float scale, int chunk, int head_block) -> ()");
  m.def(
      "scan_step(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor weight, Tensor? skip, Tensor(a!) state, "
      "Tensor? indices, Tensor(b!) output, bool delta, bool normalise, float scale) -> ()");
  m.def(S0_GATED_DELTA_RULE_STEP);
  m.def(S0_SSD_STEP);
  m.def("instructions() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(s0kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("scan_forward", TORCH_BOX(&s0::scan_forward));
  m.impl("scan_backward", TORCH_BOX(&s0::scan_backward));
  m.impl("scan_step", TORCH_BOX(&s0::scan_step));
  m.impl("gated_delta_rule_step", TORCH_BOX((&s0::steps::gated_delta_rule_step<s0::Device::kCpu, s0::run_delta>)));
  m.impl("ssd_step", TORCH_BOX((&s0::steps::ssd_step<s0::Device::kCpu, s0::run_ssd>)));
  m.impl("instructions", TORCH_BOX(&s0::instructions));
}
