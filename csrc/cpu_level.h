// What is parsed for every level, in this order; see csrc/cpu_levels.h.
#include "csrc/cpu_vector.h"

#include "csrc/cpu_matrix.h"
#include "csrc/cpu_product.h"

#include GVIT_KERNELS

#undef GVIT_LEVEL
#undef GVIT_VECTOR_BYTES
#undef GVIT_VECTOR_REGISTERS
#undef GVIT_BFLOAT_PRODUCTS
