// The kernels as a GPU runs them, on the host, for tests.
#define S0_ISA emulated
#include "cuda/emulated.h"

#include "cuda/delta.h"
#include "cuda/ssd.h"

namespace s0::emulated {

void delta_token(const Delta& d, int64_t index, void* memory, bool backwards) {
  EmulatedBlock block(d.warps, backwards);
  DeltaShared& shared = *static_cast<DeltaShared*>(memory);
  d.fast ? delta_block<true>(block, shared, d, index) : delta_block<false>(block, shared, d, index);
}

void ssd_token(const Ssd& s, int64_t index, void* memory, bool backwards) {
  EmulatedBlock block(s.warps, backwards);
  SsdShared& shared = *static_cast<SsdShared*>(memory);
  s.fast ? ssd_block<true>(block, shared, s, index) : ssd_block<false>(block, shared, s, index);
}

}  // namespace s0::emulated
