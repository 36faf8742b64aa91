// The calls of the ops as Python packs them: kernels/native/abi.py names the same fields in the same order, and
// compares sizes, kinds and places with the digests here before it packs a first call.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "../common/adjust.h"
#include "../common/listwise.h"
#include "../common/tokens.h"
#include "../common/topk.h"

namespace tgt::bind {

// Calls visit(name, field) for each of the names, which are separated by commas.
template <class Visit, class... Fields>
void visit_each(const std::string& names, Visit visit, const Fields&... fields) {
  size_t at = 0;
  const auto next = [&](const auto& field) {
    const size_t end = names.find(',', at);
    visit(names.substr(at, end - at), field);
    at = names.find_first_not_of(", ", end);
  };
  (next(fields), ...);
}

// All fields of a struct, in their order. It does not compile when one is missing.
#define TGT_FIELDS(Call, ...)                      \
  template <class Visit>                           \
  void each_field(const Call& call, Visit visit) { \
    const auto& [__VA_ARGS__] = call;              \
    visit_each(#__VA_ARGS__, visit, __VA_ARGS__);  \
  }
TGT_FIELDS(DistillOptions, divergence, reduction, beta, temperature, teacher_temperature, soft_weight, hard_weight,
           label_smoothing, ignore_index, unlabeled_index)
TGT_FIELDS(Matrix, data, stride, type)
TGT_FIELDS(DistillCall, options, rows, classes, student, teacher, target, soft_target, weight, divisor, divisor_at,
           workspace, loss, row_loss, d_student, d_teacher, row_state, stats, upstream, upstream_per_row, bad_row)
TGT_FIELDS(Adjustments, student_bias, teacher_bias, label_margin, student_temperature, teacher_temperature, of_label,
           of_others, skew, lead, standardize)
TGT_FIELDS(AdjustedCall, base, adjust)
TGT_FIELDS(ScaleCall, rows, classes, grad, factor, factor_per_row)
TGT_FIELDS(TopK, ids, id_stride, entries, log_probs, tail_log_prob, form)
TGT_FIELDS(TopKCall, base, topk, row_state)
TGT_FIELDS(NoiseKey, seed, ids, step, replica, op, truncation)
TGT_FIELDS(Factor, value, values)
TGT_FIELDS(PerturbCall, samples, size, type, z, out, sigma, scale, noise, sphere_radius)
TGT_FIELDS(AscendCall, samples, size, z_type, grad_type, anchor_type, z, grad, anchor, out, step_size, sigma, radius,
           scale, norm, radius_norm, noise)
TGT_FIELDS(SampleCall, rows, classes, positions, logits, temperature, top_k, top_p, log_min_p, noise, tokens)
TGT_FIELDS(SoftCall, first, rows, classes, positions, is_fp64, logits, tau, gumbel, noise, largest, sum, weights,
           chosen, slope, d_logits)
TGT_FIELDS(ListwiseCall, rows, classes, student, teacher, temperature, ids, id_stride, entries, others, label, factor,
           loss, d_student)
#undef TGT_FIELDS

// Those that a kernel takes.
#define TGT_CALLS(X) \
  X(DistillCall)     \
  X(AdjustedCall) X(ScaleCall) X(TopKCall) X(PerturbCall) X(AscendCall) X(SampleCall) X(SoftCall) X(ListwiseCall)

// Python's letter for a kind of field (struct.Struct).
template <class T>
constexpr char letter_of() {
  if (std::is_pointer<T>::value) return 'P';
  if (std::is_same<T, bool>::value) return '?';
  if (std::is_floating_point<T>::value) return 'd';
  if (std::is_unsigned<T>::value) return sizeof(T) == 8 ? 'Q' : 'I';
  return sizeof(T) == 8 ? 'q' : 'i';  // enumerations too
}

// A digest of a struct: its size, then name, letter and place of each field.
template <class Call>
std::string layout_of() {
  const Call call{};
  std::string text = std::to_string(sizeof(Call));
  const auto add = [&](const auto& self, const std::string& name, const auto& field) -> void {
    using Field = std::decay_t<decltype(field)>;
    if constexpr (std::is_class<Field>::value) {
      each_field(field, [&](const std::string& part, const auto& value) {
        self(self, name.empty() ? part : name + "." + part, value);
      });
    } else {
      const auto place = reinterpret_cast<const char*>(&field) - reinterpret_cast<const char*>(&call);
      text += "; " + name + " " + letter_of<Field>() + " " + std::to_string(place);
    }
  };
  add(add, "", call);
  return text;
}

}  // namespace tgt::bind
