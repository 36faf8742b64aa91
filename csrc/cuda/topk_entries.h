// A call of the loss against a top-k teacher on a device: what a row's threads share, and the entries of its top k.
#pragma once

#include "../common/topk.h"
#include "distill_on_chip.h"

namespace tgt::cuda {

// A call as the kernels read it.
struct TopKDeviceCall {
  DeviceCall base;
  TopK topk;
  TopKState* row_state = nullptr;
  bool map = false;  // shared memory has room for a bit a class
};

inline namespace TGT_ISA {

constexpr int kTopKThreads = 256, kTopKStreamThreads = 512;

// What a block's threads tell each other of a row.
template <class Real>
struct TopKShared {
  TopKState state;
  TopKFactors<Real> factors;
  TailSums tail;
  TopKSums topk;
  TailClass rest;
  double of_label;     // the label's logit
  double of_lanes[8];  // what lanes of the first warp evaluate
};
constexpr int kTopKSharedBytes = 640;
constexpr int kTopKBytes = kTeamBytes + kBarrierBytes + kTopKSharedBytes;  // what precedes a row, or its map

template <class Real>
TGT_DEVICE TopKShared<Real>& row_in_shared() {
  static_assert(sizeof(TopKShared<Real>) <= kTopKSharedBytes, "fits its place");
  return *reinterpret_cast<TopKShared<Real>*>(shared_memory() + kTeamBytes + kBarrierBytes);
}

// Evaluates a function at several places, each in a lane of the warp. All lanes have the same places.
struct ByLanes {
  double* memory;  // of the warp
  int lane;

  template <int kCount, class Function>
  TGT_DEVICE void operator()(double (&x)[kCount], Function function) const {
    double mine = x[0];
    TGT_UNROLL
    for (int i = 1; i < kCount; ++i) mine = lane == i ? x[i] : mine;
    mine = function(mine);
    if (lane < kCount) memory[lane] = mine;
    warp_barrier();
    TGT_UNROLL
    for (int i = 0; i < kCount; ++i) x[i] = memory[i];
    warp_barrier();
  }
};

template <class Body>
TGT_DEVICE auto with_topk_divergence(const DistillOptions& options, Body body) {
  if (options.soft_weight == 0) return body(NoDivergence{});
  switch (DivergenceKind(options.divergence)) {
    case DivergenceKind::kReverseKl:
      return body(ReverseKl{});
    case DivergenceKind::kJsd:
      return body(Jsd{});
    case DivergenceKind::kCrossEntropy:
      return body(CrossEntropy{});
    default:  // no others reach the core
      return body(ForwardKl{});
  }
}

// An entry of the top k, in shared memory.
template <class Real>
struct Entry {
  int64_t id;  // -1 where it does not count: padding, out of range, among the top k before, or another block's
  Real s;      // the student's logit, which a gradient in place will overwrite
};
constexpr int kEntryBytes = 16;

TGT_HD int64_t entry_bytes(const TopKDeviceCall& d) { return d.topk.entries * kEntryBytes; }

TGT_DEVICE bool in_topk(const TopK& topk, int64_t i, int64_t j, int64_t classes) {
  const int64_t id = topk.ids[i * topk.id_stride + j];
  return id >= 0 && id < classes && load_one<double>(topk.log_probs.row(i), topk.log_probs.type, j) != -HUGE_VAL;
}

// The entries of a thread: every size-th. No other thread looks at them once it is made.
template <class Real>
struct Own {
  static_assert(sizeof(Entry<Real>) == kEntryBytes, "fits its place");
  Entry<Real>* entries;
  int begin, end, step;
  const char* log_probs;
  DType type;

  // Those of classes [first, last). Of several with one id, the first counts.
  template <class Team>
  TGT_DEVICE Own(const TopKDeviceCall& d, const Team& team, int64_t i, int64_t first, int64_t last)
      : entries(reinterpret_cast<Entry<Real>*>(shared_memory() + kTopKBytes)),
        begin(team.thread),
        end(d.base.call.options.soft_weight == 0 ? 0 : static_cast<int>(d.topk.entries)),  // it may hold anything
        step(team.size),
        log_probs(d.topk.log_probs.row(i)),
        type(d.topk.log_probs.type) {
    const DistillCall& call = d.base.call;
    const int64_t* ids = d.topk.ids + i * d.topk.id_stride;
    for (int j = begin; j < end; j += step) {
      const int64_t id = ids[j];
      const bool mine = id >= first && id < last && in_topk(d.topk, i, j, call.classes);
      entries[j].id = mine ? id : -1;
      slot(2 * j) = slot(2 * j + 1) = kNobody;
    }
    if (end == 0) return;
    team.barrier();
    for (int j = begin; j < end; j += step) {
      if (entries[j].id >= 0) enter(j);
    }
    team.barrier();
    for (int j = begin; j < end; j += step) {
      const int64_t id = entries[j].id;
      if (id >= 0 && slot(find(id)) != j) entries[j].id = -1;
    }
    team.barrier();
    for (int j = begin; j < end; j += step) {
      const int64_t id = entries[j].id;
      entries[j].s = id >= 0 ? load_one<Real>(call.student.row(i), call.student.type, id) : Real(0);
    }
  }

  // A table of ids, twice as many slots as entries: a slot holds the first entry with an id, which lies at the place
  // that the id's hash says or behind it. It takes the place of the logits while there are none.
  static constexpr int kNobody = -1;
  TGT_DEVICE int& slot(int at) const {
    return reinterpret_cast<int*>(reinterpret_cast<unsigned char*>(entries + at / 2) + 8)[at % 2];
  }
  TGT_DEVICE int start(int64_t id) const {
    const uint32_t hash = static_cast<uint32_t>(id ^ id >> 32) * 2654435761u;
    return static_cast<int>(static_cast<uint64_t>(hash) * static_cast<uint32_t>(2 * end) >> 32);
  }
  TGT_DEVICE int next(int at) const { return at + 1 == 2 * end ? 0 : at + 1; }
  TGT_DEVICE void enter(int j) const {
    const int64_t id = entries[j].id;
    for (int at = start(id);; at = next(at)) {
      const int there = exchange_if_equal(&slot(at), kNobody, j);
      if (there == kNobody) return;
      if (entries[there].id == id) return lower(&slot(at), j);  // whoever of that id is there by now
    }
  }
  TGT_DEVICE int find(int64_t id) const {
    int at = start(id);
    while (entries[slot(at)].id != id) at = next(at);
    return at;
  }

  template <class Body>  // body(id, s, log-probability)
  TGT_DEVICE void each(Body body) const {
    for (int j = begin; j < end; j += step) {
      if (entries[j].id >= 0) body(entries[j].id, double(entries[j].s), load_one<double>(log_probs, type, j));
    }
  }
};

TGT_DEVICE double tail_log_prob(const TopKDeviceCall& d, int64_t i) {
  const Matrix& tail = d.topk.tail_log_prob;
  if (!tail.data || d.topk.form == TailForm::kRenormalize || d.base.call.options.soft_weight == 0) return -HUGE_VAL;
  return load_one<double>(tail.row(i), tail.type, 0);
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
