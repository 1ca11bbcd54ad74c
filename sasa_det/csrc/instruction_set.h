// The kernels for one instruction set: included once by each source that has set KERNELS, their
// name, LANES and OFFSETS, behind the standard headers, whose functions must run everywhere.

namespace sasa_det {
namespace {
#include "vector.h"
#include "memory.h"
#include "local_attention_kernels.h"
#include "stem_attention_kernels.h"
}  // namespace

extern const Kernels KERNELS = {
    {local_vectors, local_forward_tasks, local_forward, local_backward_bands,
     local_backward_tasks, local_backward},
    {stem_tasks, stem_forward, stem_backward},
};

}  // namespace sasa_det
