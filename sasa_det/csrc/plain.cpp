// What every processor that the compiler builds for can do.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "kernels.h"

#define LANES 4
#define ROWS 3
#define OFFSETS 4

namespace sasa_det {
namespace {
#include "vector.h"
#include "memory.h"
#include "local_attention_kernels.h"
#include "stem_attention_kernels.h"
}  // namespace

extern const Kernels plain_kernels = {
    {local_forward_tasks, local_forward, local_backward_tasks, local_backward},
    {stem_tasks, stem_forward, stem_backward},
};

}  // namespace sasa_det
