// The import hook: importing effnet_fast._C runs the static registrations of csrc/binding; nothing else is exported.
#include <Python.h>

// The schemas that the bindings were written for, as effnet_fast/ops defines them. torch gives a kernel its arguments by place and
// checks no type: where Python has another schema by now, effnet_fast/ops/native.py does not use this module.
#define NORM "Tensor? norm_weight, Tensor? norm_bias, Tensor norm_mean, Tensor norm_var, float norm_eps"
#define EXPAND_NORM                                                                                               \
  "Tensor? expand_norm_weight, Tensor? expand_norm_bias, Tensor expand_norm_mean, Tensor expand_norm_var, float " \
  "expand_norm_eps"
#define STATS                                                                                                                      \
  "Tensor x, Tensor weight, Tensor? norm, str activation, Tensor? gate, int stride, SymInt[] padding) -> (Tensor y, Tensor mean, " \
  "Tensor var)\n"
#define BACKWARD                                                                                                             \
  "Tensor grad, Tensor y, Tensor y_norm, Tensor y_coefficients, str y_activation, Tensor? y_gate, Tensor? y_pool, Tensor x," \
  " Tensor weight, Tensor? norm, str activation, Tensor? gate, Tensor? residual, int stride, SymInt[] padding, bool need_x," \
  " bool need_weight) -> (Tensor grad_x, Tensor grad_weight, Tensor sums)\n"
static const char kSchemas[] =
    "conv_bn_act(Tensor x, Tensor weight, " NORM
    ", Tensor? residual, int stride, SymInt[] padding, str activation, Tensor? pixels) -> (Tensor y)\n"
    "depthwise_conv_bn_act(Tensor x, Tensor weight, " NORM
    ", int stride, SymInt[] padding, str activation, SymInt pieces) -> (Tensor y, Tensor partial)\n"
    "expand_depthwise_conv_bn_act(Tensor x, Tensor expand_weight, " EXPAND_NORM ", Tensor weight, " NORM
    ", int stride, SymInt[] padding, str activation, SymInt pieces) -> (Tensor y, Tensor partial)\n"
    "pointwise_conv_bn_act(Tensor x, Tensor weight, " NORM
    ", Tensor? gate, Tensor? residual, str activation) -> (Tensor y)\n"
    "squeeze_excite_gate(Tensor partial, SymInt count, Tensor reduce_weight, Tensor? reduce_bias, Tensor expand_weight,"
    " Tensor? expand_bias, str activation) -> (Tensor gate)\n"
    "global_average_pool(Tensor x) -> (Tensor y)\n"
    "pointwise_conv_stats(" STATS "pointwise_conv_backward(" BACKWARD "depthwise_conv_stats(" STATS
    "depthwise_conv_backward(" BACKWARD "conv_stats(" STATS "conv_backward(" BACKWARD
    "norm_act(Tensor y, Tensor norm, str activation, Tensor? gate, Tensor? residual) -> (Tensor out)\n"
    "norm_act_mean(Tensor y, Tensor norm, str activation) -> (Tensor mean)\n"
    "norm_act_sums(Tensor grad, Tensor y, Tensor norm, str activation, Tensor? gate) -> (Tensor sums)\n"
    "norm_act_image_sums(Tensor grad, Tensor x, Tensor norm, str activation) -> (Tensor sums)\n"
    "norm_act_backward(Tensor grad, Tensor x, Tensor norm, str activation, Tensor? residual) -> (Tensor grad_x, Tensor sums)\n"
    "norm_gradient(Tensor grad, Tensor y, Tensor norm, Tensor coefficients, str activation, Tensor? gate, Tensor? pool)"
    " -> (Tensor grad_y)\n"
    "batch_stats(Tensor y) -> (Tensor mean, Tensor var)\n"
    "plan_begin(int plan, int like) -> ()\n"
    "plan_input(int plan, Tensor given) -> ()\n"
    "plan_stop(int plan) -> ()\n"
    "plan_end(int plan, Tensor[] results) -> int[]\n"
    "plan_run(int plan, int images, Tensor[] given, Tensor[] results) -> ()\n"
    "plan_held(int plan) -> int\n"
    "plan_free(int plan) -> ()\n"
    "chain_begin(Tensor barrier) -> ()\n"
    "chain_launch() -> ()\n"
    "chain_end() -> int\n"
    "return_memory() -> ()";

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
