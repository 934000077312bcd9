// The import hook: importing effnet_fast._C runs the static registrations of csrc/binding; nothing else is exported.
#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition{PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
#ifdef EFFNET_FAST_CUDA
  constexpr int cuda_kernels = 1;
#else
  constexpr int cuda_kernels = 0;
#endif
  if (module && PyModule_AddIntConstant(module, "CUDA_KERNELS", cuda_kernels) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
