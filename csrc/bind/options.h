// The options of the distill ops as a Python class.
#pragma once

#include <pybind11/pybind11.h>

#include "../common/distill.h"

namespace tgt::bind {

inline void add_options(pybind11::module_& m) {
  pybind11::class_<DistillOptions>(m, "DistillOptions", pybind11::module_local())
      .def(pybind11::init<>())
      .def_readwrite("divergence", &DistillOptions::divergence)
      .def_readwrite("reduction", &DistillOptions::reduction)
      .def_readwrite("beta", &DistillOptions::beta)
      .def_readwrite("temperature", &DistillOptions::temperature)
      .def_readwrite("teacher_temperature", &DistillOptions::teacher_temperature)
      .def_readwrite("soft_weight", &DistillOptions::soft_weight)
      .def_readwrite("hard_weight", &DistillOptions::hard_weight)
      .def_readwrite("label_smoothing", &DistillOptions::label_smoothing)
      .def_readwrite("ignore_index", &DistillOptions::ignore_index)
      .def_readwrite("unlabeled_index", &DistillOptions::unlabeled_index);
}

}  // namespace tgt::bind
