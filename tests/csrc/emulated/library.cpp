// The one-token kernels in the GPU's version, run on the host for tests. The operators are those of the libraries, in
// one namespace for each order of warps.
#define S0_ISA emulated
#include "block.h"

#include <cstring>
#include <vector>

#include "cuda/plan.h"
#include "token/gated_delta_rule.h"
#include "token/operators.h"
#include "token/ssd.h"

namespace s0::emulated {
namespace {

void run_block(EmulatedBlock& block, void* shared, const Delta& d, int64_t index) {
  DeltaShared& mine = *static_cast<DeltaShared*>(shared);
  d.fast ? delta_block<true>(block, mine, d, index) : delta_block<false>(block, mine, d, index);
}

void run_block(EmulatedBlock& block, void* shared, const Ssd& s, int64_t index) {
  SsdShared& mine = *static_cast<SsdShared*>(shared);
  s.fast ? ssd_block<true>(block, mine, s, index) : ssd_block<false>(block, mine, s, index);
}

template <class Call, bool backwards>
void run(Call& call, const Tensor&) {
  plan(call);
  std::vector<unsigned> arrivals(counters(call));
  call.arrivals = arrivals.empty() ? nullptr : arrivals.data();
  std::vector<float> shared(kSharedBytes / sizeof(float));
  for (int64_t index = 0; index < blocks(call); ++index) {
    std::memset(shared.data(), 0xff, kSharedBytes);  // NaN
    EmulatedBlock block(call.warps, backwards);
    run_block(block, shared.data(), call, index);
  }
  for (const unsigned count : arrivals) STD_TORCH_CHECK(count == 0, "s0kernels: an arrival counter is not back at zero");
}

template <bool backwards, class Library>
void implement(Library& m) {
  m.impl("gated_delta_rule_step",
         TORCH_BOX((&steps::gated_delta_rule_step<Device::kCpu, run<Delta, backwards>>)));
  m.impl("ssd_step", TORCH_BOX((&steps::ssd_step<Device::kCpu, run<Ssd, backwards>>)));
}

}  // namespace
}  // namespace s0::emulated

STABLE_TORCH_LIBRARY(s0kernels_warps_up, m) {
  m.def(S0_GATED_DELTA_RULE_STEP);
  m.def(S0_SSD_STEP);
}

STABLE_TORCH_LIBRARY(s0kernels_warps_down, m) {
  m.def(S0_GATED_DELTA_RULE_STEP);
  m.def(S0_SSD_STEP);
}

STABLE_TORCH_LIBRARY_IMPL(s0kernels_warps_up, CompositeExplicitAutograd, m) { s0::emulated::implement<false>(m); }
STABLE_TORCH_LIBRARY_IMPL(s0kernels_warps_down, CompositeExplicitAutograd, m) { s0::emulated::implement<true>(m); }
