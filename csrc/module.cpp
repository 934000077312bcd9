// The import hook: importing effnet_fast._C runs the static registrations of csrc/binding; nothing else is exported.
#include <Python.h>

// The schemas that the bindings were written for, as effnet_fast/ops defines them. torch gives a kernel its arguments by place and
// checks no type: where Python has another schema by now, effnet_fast/ops/native.py does not use this module.
#define NORM "Tensor? norm_weight, Tensor? norm_bias, Tensor norm_mean, Tensor norm_var, float norm_eps"
static const char kSchemas[] =
    "conv_bn_act(Tensor x, Tensor weight, " NORM
    ", Tensor? residual, int stride, SymInt[] padding, str activation, Tensor? pixels) -> (Tensor y)\n"
    "depthwise_conv_bn_act(Tensor x, Tensor weight, " NORM
    ", int stride, SymInt[] padding, str activation, SymInt pieces) -> (Tensor y, Tensor partial)\n"
    "pointwise_conv_bn_act(Tensor x, Tensor weight, " NORM
    ", Tensor? gate, Tensor? residual, str activation) -> (Tensor y)\n"
    "squeeze_excite_gate(Tensor partial, SymInt count, Tensor reduce_weight, Tensor? reduce_bias, Tensor expand_weight,"
    " Tensor? expand_bias, str activation) -> (Tensor gate)\n"
    "global_average_pool(Tensor x) -> (Tensor y)\n"
    "plan_begin(Tensor image, int like) -> int\n"
    "plan_end(int plan, Tensor[] results) -> int[]\n"
    "plan_run(int plan, Tensor images, Tensor[] results) -> ()\n"
    "plan_held(int plan) -> int\n"
    "plan_free(int plan) -> ()";

// The text of a macro's value, which may have commas.
#define TEXT(...) TEXT_OF(__VA_ARGS__)
#define TEXT_OF(...) #__VA_ARGS__

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition{PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
#ifdef EFFNET_FAST_CUDA
  constexpr int cuda_kernels = 1;
  constexpr const char* cuda_architectures = TEXT(EFFNET_FAST_CUDA_ARCHITECTURES);
#else
  constexpr int cuda_kernels = 0;
  constexpr const char* cuda_architectures = "";
#endif
  if (module && (PyModule_AddIntConstant(module, "CUDA_KERNELS", cuda_kernels) < 0 ||
                 PyModule_AddStringConstant(module, "CUDA_ARCHITECTURES", cuda_architectures) < 0 ||
                 PyModule_AddStringConstant(module, "SCHEMAS", kSchemas) < 0)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
