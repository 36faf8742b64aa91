// How a call reaches the core: as the bytes of its struct, whose layout both sides have compared.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>
#include <tuple>
#include <type_traits>

#include "layout.h"

namespace tgt::bind {

template <class Call>
Call read(const pybind11::bytes& from) {
  static_assert(std::is_trivially_copyable<Call>::value, "a call is its bytes");
  if (PyBytes_GET_SIZE(from.ptr()) != sizeof(Call)) throw std::invalid_argument("these are not the bytes of the call");
  Call call;
  std::memcpy(&call, PyBytes_AS_STRING(from.ptr()), sizeof(Call));
  return call;
}

// m.name(call, rest...) is run(call, rest...), without the interpreter's lock.
template <class Given, class Result, class... Rest>
void define(pybind11::module_& m, const char* name, Result (*run)(Given, Rest...)) {
  m.def(name, [run](const pybind11::bytes& from, Rest... rest) {
    const auto call = read<std::decay_t<Given>>(from);
    const pybind11::gil_scoped_release unlocked;
    return run(call, rest...);
  });
}

inline void add_layouts(pybind11::module_& m) {
  m.attr("ROW_STATE") = kRowState;
  pybind11::dict layouts;
#define TGT_LAYOUT(Call) layouts[#Call] = layout_of<Call>();
  TGT_CALLS(TGT_LAYOUT)
#undef TGT_LAYOUT
  m.attr("LAYOUTS") = layouts;
}

}  // namespace tgt::bind
