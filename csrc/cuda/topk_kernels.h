// The kernels of the loss against a top-k teacher.
//
//   topk_fwd_kernel          a block or a cluster a row; the student's row is copied to shared memory and read there
//   topk_fwd_stream_kernel   a block a row; the row is read again for its sums and for its gradient
//   topk_bwd_kernel          a block a row; the gradient from a row state
#pragma once

#include "topk_row.h"

namespace tgt::cuda {
inline namespace TGT_ISA {

template <int kTypes>
struct TopKOnChip {
  unsigned char* student;  // shared memory
  int64_t first, count;    // vectors of the row that are here
  DType type_;

  TGT_DEVICE DType type() const { return kTypes == kBothBFloat16 ? DType::kBFloat16 : type_; }
  TGT_DEVICE DType gradient_type(const DistillCall&) const { return type(); }
  TGT_DEVICE Eight<float> load(int64_t k) const {
    const int at = static_cast<int>(k) * kVector * static_cast<int>(element_size(type()));
    return load_eight<float>(reinterpret_cast<const char*>(student) + at, type());
  }
  TGT_DEVICE void take(int64_t at) const {  // a class, counted from the first that is here
    const uint64_t nothing = minus_infinity_bits(type());
    if (element_size(type()) == 2) {
      reinterpret_cast<uint16_t*>(student)[at] = static_cast<uint16_t>(nothing);
    } else {
      reinterpret_cast<uint32_t*>(student)[at] = static_cast<uint32_t>(nothing);
    }
  }
};

// Takes the thread's top-k classes out of vectors [begin, end) of what is on the chip.
template <int kTypes>
TGT_DEVICE void take_topk(const TopKOnChip<kTypes>& row, const Own<float>& own, int64_t begin, int64_t end) {
  own.each([&](int64_t id, double, double) {
    const int64_t at = id - row.first * kVector;
    if (at >= begin * kVector && at < end * kVector) row.take(at);
  });
}

template <int kTypes>
TGT_DEVICE void scan_tail(const TopKOnChip<kTypes>& row, int begin, int end, int step, TailMaximum<float>& most) {
#if defined(TGT_PACKED_EXTREMES)
  if constexpr (kTypes == kBothBFloat16) {  // by pairs; a NaN wins
    uint32_t largest = 0xff80ff80u;
    for (int k = begin; k < end; k += step) {
      const Bytes16 raw = load16(row.student + k * 2 * kVector);
      TGT_UNROLL
      for (int j = 0; j < 4; ++j) largest = packed_max_bf16(largest, raw.words[j]);
    }
    for (const uint32_t bits : {largest << 16, largest & 0xffff0000u}) {
      const float value = bit_cast<float>(bits);
      most.most = larger(value, most.most);
      most.number &= value < HUGE_VALF;
    }
  } else
#endif
  {
    for (int k = begin; k < end; k += step) most.add(row.load(k));
  }
}

template <int kTypes>
__global__ void TGT_BOUNDS(kTopKThreads, 2)
    topk_fwd_kernel(const TGT_GRID_CONSTANT TopKDeviceCall d, const TGT_GRID_CONSTANT int bulk) {
  const DistillCall& call = d.base.call;
  const BlockTeam team;
  const int64_t i = block_in_grid() / team.ranks;

  // The share of this block: vectors [first, first + count) of the row.
  TopKOnChip<kTypes> row;
  row.type_ = call.student.type;
  const int64_t vectors = (call.classes + kVector - 1) / kVector, room = d.base.vectors_per_block;
  row.first = int64_t(team.rank) * room;
  const int64_t left = vectors - row.first;
  row.count = left < 0 ? 0 : left < room ? left : room;
  const int count = static_cast<int>(row.count);
  const RowHead head = open_row(d.base, i);
  if (head.flags & kDropped) {
    TopKState state{};
    state.flags = kDropped;
    end_without_gradient(d, team, i, state, 0, row.first, row.count, 0.0f);
    return;
  }
  team.begin();

  uint64_t* barriers = reinterpret_cast<uint64_t*>(shared_memory() + kTeamBytes);
  row.student = shared_memory() + kTopKBytes + entry_bytes(d);
  const int bytes = static_cast<int>(element_size(row.type()));
  const char* student = call.student.row(i) + row.first * kVector * bytes;
  const int64_t rest = call.classes - row.first * kVector;
  const int64_t here = rest < 0 ? 0 : rest < row.count * kVector ? rest : row.count * kVector;

  TailMaximum<float> most;
  const int whole = static_cast<int>(here / kVector), copied = bulk ? whole * kVector : 0;
  const int chunk = (count + kChunks * team.size - 1) / (kChunks * team.size) * team.size;
#if defined(TGT_BULK_COPIES)
  if (bulk && team.thread == 0) {
    for (int c = 0; c < kChunks; ++c) copy_barrier_init(barriers + c);
    copy_barriers_ready();
    for (int c = 0; c < kChunks; ++c) {
      const int from = c * chunk, left_of_row = whole - from;
      const int now = left_of_row < 0 ? 0 : left_of_row < chunk ? left_of_row : chunk;
      const uint32_t size = static_cast<uint32_t>(now * kVector * bytes);
      copy_expect(barriers + c, size);
      if (now == 0) continue;
      copy_start(row.student + from * kVector * bytes, student + int64_t(from) * kVector * bytes, size, barriers + c);
    }
  }
#endif
  copy_side(row.student, student, row.type(), here, row.count * kVector, copied, !bulk && d.base.student_aligned,
            team.thread, team.size);
  const Own<float> own(d, team, i, row.first * kVector, row.first * kVector + here);
  block_barrier();  // the barriers are ready, and so is what threads copied
  for (int c = 0; c < kChunks; ++c) {
    const int begin = c * chunk, end = begin + chunk < count ? begin + chunk : count;
#if defined(TGT_BULK_COPIES)
    if (bulk) copy_wait(barriers + c);
#endif
    take_topk(row, own, begin, end);
    block_barrier();
    scan_tail(row, begin + team.thread, end, team.size, most);
  }
  finish_topk_row(d, team, row, i, head, own, most);
}

// A row in global memory. Which classes are among the top k: a byte a vector in shared memory, where there is room for
// that. A byte is written and read by one thread, the one that has the vector.
template <class Real>
struct TopKStream {
  const TopKDeviceCall* d;
  unsigned char* map;
  int64_t i;
  int64_t first, count;

  TGT_DEVICE DType gradient_type(const DistillCall& call) const { return call.d_student.type; }
  TGT_DEVICE unsigned topk_in(int64_t k) const {
    unsigned bits = 0;
    const TopK& topk = d->topk;
    for (int64_t j = 0; j < topk.entries; ++j) {
      const int64_t id = topk.ids[i * topk.id_stride + j];
      if (id >= k * kVector && id < (k + 1) * kVector && in_topk(topk, i, j, d->base.call.classes)) {
        bits |= 1u << (id % kVector);
      }
    }
    return bits;
  }
  template <class Team>
  TGT_DEVICE void open(const Team& team) {
    const TopK& topk = d->topk;
    const bool soft = d->base.call.options.soft_weight != 0;
    if (!soft || !d->map) return;
    map = shared_memory() + kTopKBytes + entry_bytes(*d);
    for (int64_t k = team.thread; k < count; k += team.size) map[k] = 0;
    for (int64_t j = 0; j < topk.entries; ++j) {
      const int64_t id = topk.ids[i * topk.id_stride + j], k = id / kVector;
      if (id < 0 || (k & (team.size - 1)) != team.thread) continue;
      if (in_topk(topk, i, j, d->base.call.classes)) map[k] |= 1u << (id % kVector);
    }
  }
  TGT_DEVICE Eight<Real> load(int64_t k) const {
    const DistillCall& call = d->base.call;
    Eight<Real> s = load_padded(call.student.row(i), call.student.type, k * kVector, call.classes,
                                d->base.student_aligned, minus_infinity<Real>());
    const unsigned bits = map ? map[k] : call.options.soft_weight != 0 ? topk_in(k) : 0;
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) s.v[j] = bits >> j & 1 ? minus_infinity<Real>() : s.v[j];
    return s;
  }
};

template <class Real, class Team>
TGT_DEVICE TopKStream<Real> topk_stream(const TopKDeviceCall& d, const Team& team, int64_t i) {
  TopKStream<Real> row{&d, nullptr, i, 0, (d.base.call.classes + kVector - 1) / kVector};
  row.open(team);
  return row;
}

template <class Real>
__global__ void TGT_BOUNDS(kTopKStreamThreads, 1) topk_fwd_stream_kernel(const TGT_GRID_CONSTANT TopKDeviceCall d) {
  const DistillCall& call = d.base.call;
  const BlockTeam team;
  const int64_t i = block_in_grid();
  const RowHead head = open_row(d.base, i);
  if (head.flags & kDropped) {
    TopKState state{};
    state.flags = kDropped;
    end_without_gradient(d, team, i, state, 0, 0, (call.classes + kVector - 1) / kVector, Real(0));
    return;
  }
  const TopKStream<Real> row = topk_stream<Real>(d, team, i);
  const Own<Real> own(d, team, i, 0, call.classes);
  TailMaximum<Real> most;
  for (int64_t k = team.thread; k < row.count; k += team.size) most.add(row.load(k));
  finish_topk_row(d, team, row, i, head, own, most);
}

template <class Real>
__global__ void TGT_BOUNDS(kTopKStreamThreads, 1) topk_bwd_kernel(const TGT_GRID_CONSTANT TopKDeviceCall d) {
  const DistillCall& call = d.base.call;
  const BlockTeam team;
  const int64_t i = block_in_grid();
  const TopKState state = d.row_state[i];
  const int flags = state.coefficient == 0 ? int(kDropped) : static_cast<int>(state.flags);
  if (flags & (kDropped | kInvalid)) {
    fill_gradients(d.base, team, i, 0, (call.classes + kVector - 1) / kVector, flags & kDropped ? Real(0) : Real(NAN));
    return;
  }
  const TopKStream<Real> row = topk_stream<Real>(d, team, i);
  const Own<Real> own(d, team, i, 0, call.classes);
  if (team.thread < kWarp) {
    TopKShared<Real>& shared = row_in_shared<Real>();
    const double upstream = static_cast<const Real*>(call.upstream)[call.upstream_per_row ? i : 0];
    const TailClass rest = tail_class(state, call.options, tail_log_prob(d, i), ByLanes{shared.of_lanes, team.thread});
    if (team.thread == 0) {
      shared.state = state;
      with_topk_divergence(call.options, [&](auto divergence) {
        shared.factors = topk_factors<decltype(divergence), Real>(state, rest, call.options, d.topk.form, upstream);
      });
    }
  }
  team.barrier();
  write_topk_gradient(d, team, row, i, own);
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
