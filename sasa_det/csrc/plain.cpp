// What every processor that the compiler builds for can do.
#include "kernels.h"

#define KERNELS plain_kernels
#define LANES 4
#define OFFSETS 4
#include "instruction_set.h"
