// The kernels for one instruction set: included once by each source that has set KERNELS, their
// name, LANES and OFFSETS, behind the standard headers, whose functions must run everywhere.

namespace sasa_det {
namespace {
#include "vector.h"
#include "memory.h"
#include "shuffles.h"
#include "local_attention_kernels.h"
#include "stem_attention_kernels.h"
#include "product_kernels.h"
#include "pooled_norm_kernels.h"
#include "vector_aggregation_kernels.h"
#include "patchwise_kernels.h"
#include "pairwise_kernels.h"
#include "max_pool_kernels.h"
}  // namespace

extern const Kernels KERNELS = {
    {local_vectors, local_forward_tasks, local_forward, local_backward_bands,
     local_backward_tasks, local_backward},
    {stem_tasks, stem_forward, stem_backward, pooled_norm, pooled_norm_backward},
    {groups, group_size, product_tasks, run_product, gradient_parts, gradient_tasks,
     weight_gradient, combination_tasks, combine},
    {vector_aggregation::tasks, vector_aggregation::forward, vector_aggregation::backward},
    {patchwise::forward_tasks, patchwise::forward, patchwise::backward_tasks, patchwise::backward},
    {pairwise::band, pairwise::tasks, pairwise::moments, pairwise::forward, pairwise::backward},
    {max_pool::forward, max_pool::backward, max_pool::pointwise_tasks, max_pool::pointwise,
     max_pool::pointwise_backward},
};

}  // namespace sasa_det
