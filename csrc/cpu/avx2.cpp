#define S0_ISA avx2
#define S0_VECTOR_BYTES 32
#define S0_TILE_VECTORS 2
#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/step.h"
#include "cpu/token.h"
