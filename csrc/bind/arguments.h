// How Python hands over pointers and what travels with them.
#pragma once

#include <cstdint>
#include <tuple>

#include "../common/distill.h"
#include "../common/latent.h"
#include "../common/tokens.h"
#include "../common/topk.h"

namespace tgt::bind {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (pointer, row stride, dtype code)
using MatrixTuple = std::tuple<uintptr_t, int64_t, int>;

inline Matrix matrix(const MatrixTuple& from) {
  return {pointer<void>(std::get<0>(from)), std::get<1>(from), static_cast<DType>(std::get<2>(from))};
}

// (pointer to ids, their row stride, entries a row, log-probabilities, tail or zeros, its form)
using TopKTuple = std::tuple<uintptr_t, int64_t, int64_t, MatrixTuple, MatrixTuple, int>;

inline TopK topk_of(const TopKTuple& from) {
  return {pointer<int64_t>(std::get<0>(from)), std::get<1>(from),         std::get<2>(from),
          matrix(std::get<3>(from)),           matrix(std::get<4>(from)), static_cast<TailForm>(std::get<5>(from))};
}

// (number, pointer to one a sample or 0)
using FactorTuple = std::tuple<double, uintptr_t>;

inline Factor factor(const FactorTuple& from) { return {std::get<0>(from), pointer<void>(std::get<1>(from))}; }

// (seed, pointer to ids, step, replica, op)
using NoiseTuple = std::tuple<uint64_t, uintptr_t, uint32_t, uint32_t, uint32_t>;

inline NoiseKey noise(const NoiseTuple& from) {
  NoiseKey key;
  key.seed = std::get<0>(from);
  key.ids = pointer<int64_t>(std::get<1>(from));
  key.step = std::get<2>(from);
  key.replica = std::get<3>(from);
  key.op = std::get<4>(from);
  return key;
}

// (temperature, k or 0, p or 1, logarithm of the least ratio to the largest probability)
using FilterTuple = std::tuple<double, int64_t, double, double>;

inline SampleCall sample_call(int64_t rows, int64_t classes, int64_t positions, const MatrixTuple& logits,
                              const FilterTuple& filter, const NoiseTuple& key, uintptr_t tokens) {
  SampleCall call;
  call.rows = rows;
  call.classes = classes;
  call.positions = positions;
  call.logits = matrix(logits);
  std::tie(call.temperature, call.top_k, call.top_p, call.log_min_p) = filter;
  call.noise = noise(key);
  call.tokens = pointer<int64_t>(tokens);
  return call;
}

}  // namespace tgt::bind
