#define S0_ISA avx512
#define S0_VECTOR_BYTES 64
#define S0_TILE_VECTORS 4
#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/step.h"
#include "cpu/token.h"
