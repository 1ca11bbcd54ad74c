// The choice of an instruction set at run time, and the extension module.
#include "kernels.h"

#include <ATen/ATen.h>
#include <Python.h>
#include <torch/library.h>

namespace sasa_det {

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
    names.push_back("avx512");
  if (avx2) names.push_back("avx2");
#endif
  names.push_back("plain");
  return names;
}

const Kernels& choose_kernels(const std::string& name) {
  static const std::vector<std::string> runnable = instruction_sets();
  const std::string chosen = name.empty() ? runnable.front() : name;
  bool can_run = false;
  for (const std::string& other : runnable) can_run |= other == chosen;
  TORCH_CHECK_VALUE(can_run, "instructions must be one of ", runnable, ", got ", name, ".");
#if defined(__x86_64__)
  if (chosen == "avx512") return avx512_kernels;
  if (chosen == "avx2") return avx2_kernels;
#endif
  return plain_kernels;
}

const LocalAttentionKernels& choose_kernels(const std::string& name, const LocalAttention& call) {
  const LocalAttentionKernels& widest = choose_kernels(name).local_attention;
#if defined(__x86_64__)
  // Where vectors of 16 stay half empty, those of 8 are about as few, and cheaper.
  const LocalAttentionKernels& narrower = avx2_kernels.local_attention;
  if (name.empty() && &widest == &avx512_kernels.local_attention &&
      narrower.vectors(call) * 4 <= widest.vectors(call) * 5)
    return narrower;
#endif
  return widest;
}

const StemAttentionKernels& choose_kernels(const std::string& name, const StemAttention& call) {
  const StemAttentionKernels& widest = choose_kernels(name).stem_attention;
#if defined(__x86_64__)
  // Heads of 8 channels leave half of a vector of 16 empty.
  if (name.empty() && &widest == &avx512_kernels.stem_attention &&
      call.channels / call.heads <= 8)
    return avx2_kernels.stem_attention;
#endif
  return widest;
}

const VectorAggregationKernels& choose_kernels(const std::string& name,
                                               const VectorAggregation& call) {
  const Kernels& widest = choose_kernels(name);
#if defined(__x86_64__)
  // Rows that leave most of a last vector of 16 empty.
  if (name.empty() && &widest == &avx512_kernels &&
      (call.width + 7) / 8 * 4 <= (call.width + 15) / 16 * 5)
    return avx2_kernels.vector_aggregation;
#endif
  return widest.vector_aggregation;
}

TORCH_LIBRARY(sasa_det_cpu, library) {
  library.def("instruction_sets", [] { return instruction_sets(); });
}

}  // namespace sasa_det

#define JOIN_NAMES(a, b) a##b
#define INIT_OF(name) JOIN_NAMES(PyInit_, name)

// Importing the module loads the library, and with it the operators of torch.ops.sasa_det_cpu.
PyMODINIT_FUNC INIT_OF(TORCH_EXTENSION_NAME)() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, C10_STRINGIZE(TORCH_EXTENSION_NAME), nullptr,
                               -1, nullptr};
  return PyModule_Create(&module);
}
