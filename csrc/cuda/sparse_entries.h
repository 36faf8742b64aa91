// A call of the loss against a top-k record on a device: what a row's threads share, and the entries of its record.
#pragma once

#include "../common/sparse.h"
#include "distill_on_chip.h"

namespace tgt::cuda {

// A call as the kernels read it.
struct SparseDeviceCall {
  DeviceCall base;
  Record record;
  SparseState* state = nullptr;
  bool map = false;  // shared memory has room for a bit a class
};

inline namespace TGT_ISA {

constexpr int kSparseThreads = 320, kSparseStreamThreads = 512;

// What a block's threads tell each other of a row.
template <class Real>
struct SparseShared {
  SparseState state;
  SparseFactors<Real> factors;
  TailSums tail;
  ListedSums listed;
  double of_label;  // the label's logit
};
constexpr int kSparseSharedBytes = 384;
constexpr int kSparseBytes = kTeamBytes + kBarrierBytes + kSparseSharedBytes;  // what precedes a row, or its map

template <class Real>
TGT_DEVICE SparseShared<Real>& row_in_shared() {
  static_assert(sizeof(SparseShared<Real>) <= kSparseSharedBytes, "fits its place");
  return *reinterpret_cast<SparseShared<Real>*>(shared_memory() + kTeamBytes + kBarrierBytes);
}

template <class Body>
TGT_DEVICE auto with_sparse_divergence(const DistillOptions& options, Body body) {
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

// An entry of the record, in shared memory.
template <class Real>
struct Entry {
  int64_t id;  // -1 where it does not count: padding, out of range, listed before, or another block's
  Real s;      // the student's logit, which a gradient in place will overwrite
};
constexpr int kEntryBytes = 16;

TGT_HD int64_t entry_bytes(const SparseDeviceCall& d) { return d.record.entries * kEntryBytes; }

TGT_DEVICE bool is_listed(const Record& record, int64_t i, int64_t j, int64_t classes) {
  const int64_t id = record.ids[i * record.id_stride + j];
  return id >= 0 && id < classes && load_one<double>(record.log_probs.row(i), record.log_probs.type, j) != -HUGE_VAL;
}

// The entries of a thread: every size-th. No other thread looks at them.
template <class Real>
struct Own {
  static_assert(sizeof(Entry<Real>) == kEntryBytes, "fits its place");
  Entry<Real>* entries;
  int begin, end, step;
  const char* log_probs;
  DType type;

  // Those of classes [first, last).
  template <class Team>
  TGT_DEVICE Own(const SparseDeviceCall& d, const Team& team, int64_t i, int64_t first, int64_t last)
      : entries(reinterpret_cast<Entry<Real>*>(shared_memory() + kSparseBytes)),
        begin(team.thread),
        end(d.base.call.options.soft_weight == 0 ? 0 : static_cast<int>(d.record.entries)),  // it may hold anything
        step(team.size),
        log_probs(d.record.log_probs.row(i)),
        type(d.record.log_probs.type) {
    const DistillCall& call = d.base.call;
    const int64_t* ids = d.record.ids + i * d.record.id_stride;
    for (int j = begin; j < end; j += step) {
      const int64_t id = ids[j];
      bool mine = id >= first && id < last && is_listed(d.record, i, j, call.classes);
      if (mine) {
        TGT_UNROLL4
        for (int m = 0; m < j; ++m) {
          if (ids[m] == id && is_listed(d.record, i, m, call.classes)) mine = false;
        }
      }
      entries[j].id = mine ? id : -1;
      entries[j].s = mine ? load_one<Real>(call.student.row(i), call.student.type, id) : Real(0);
    }
  }

  template <class Body>  // body(id, s, log-probability)
  TGT_DEVICE void each(Body body) const {
    for (int j = begin; j < end; j += step) {
      if (entries[j].id >= 0) body(entries[j].id, double(entries[j].s), load_one<double>(log_probs, type, j));
    }
  }
};

TGT_DEVICE double tail_log_prob(const SparseDeviceCall& d, int64_t i) {
  const Matrix& tail = d.record.tail_log_prob;
  if (!tail.data || d.record.form == TailForm::kRenormalize || d.base.call.options.soft_weight == 0) return -HUGE_VAL;
  return load_one<double>(tail.row(i), tail.type, 0);
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
