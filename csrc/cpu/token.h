// One token of a mixer on a CPU, with one thread per head.
#pragma once

#include "cpu/block.h"
#include "token/gated_delta_rule.h"
#include "token/ssd.h"

namespace s0::S0_ISA {

void delta_token(const Delta& d, int64_t index, void* memory) {
  OneThreadBlock block;
  DeltaShared& shared = *static_cast<DeltaShared*>(memory);
  d.fast ? delta_block<true>(block, shared, d, index) : delta_block<false>(block, shared, d, index);
}

void ssd_token(const Ssd& s, int64_t index, void* memory) {
  OneThreadBlock block;
  SsdShared& shared = *static_cast<SsdShared*>(memory);
  s.fast ? ssd_block<true>(block, shared, s, index) : ssd_block<false>(block, shared, s, index);
}

}  // namespace s0::S0_ISA
