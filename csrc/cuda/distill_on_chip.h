// Rows that stay on the chip: the row pair is copied to shared memory once and read from there.
#pragma once

#include "distill_fwd.h"

namespace tgt::cuda {
inline namespace TGT_ISA {

// The element types of a row pair, when they are known to the compiler.
enum Types : int { kAnyTypes, kBothBFloat16 };

// In which a row arrives: few, as each is waited for, and other blocks compute meanwhile.
constexpr int kPieces = 2;

// Three blocks to a multiprocessor, where shared memory has room for them. What any type takes does not fit into the 80
// registers that are left then.
constexpr int kPairThreads = 256, kAnyThreads = 320;
template <class Team, int kTypes>
constexpr int kOnChipThreads = Team::kIsWarp             ? kWarpTeamThreads
                               : kTypes == kBothBFloat16 ? kPairThreads
                                                         : kAnyThreads;
template <class Team, int kTypes>
constexpr int kOnChipBlocks = !Team::kIsWarp && kTypes == kBothBFloat16 ? 3 : 2;

template <class Real, int kTypes>
struct OnChipRow {
  using Index = int;       // what fits in shared memory is few
  unsigned char* student;  // shared memory, vector by vector
  unsigned char* teacher;
  int64_t first, count;  // vectors of the row that are here
  DType student_type_, teacher_type_;

  template <class D>
  static constexpr bool kLeanSums = kTypes == kBothBFloat16 && D::kProbabilities;
  template <class D>
  static constexpr bool kLean = kLeanSums<D> && (D::kShiftedSums || D::kMixture);

  TGT_DEVICE DType student_type() const { return kTypes == kBothBFloat16 ? DType::kBFloat16 : student_type_; }
  TGT_DEVICE DType teacher_type() const { return kTypes == kBothBFloat16 ? DType::kBFloat16 : teacher_type_; }
  TGT_DEVICE DType student_gradient_type(const DistillCall&) const { return student_type(); }
  TGT_DEVICE DType teacher_gradient_type(const DistillCall& call) const {
    return kTypes == kBothBFloat16 ? DType::kBFloat16 : call.d_teacher.type;
  }
  TGT_DEVICE void load(int k, Eight<Real>& s, Eight<Real>& t) const {
    const int at = k * kVector;
    s = load_eight<Real>(reinterpret_cast<const char*>(student) + at * int(element_size(student_type())),
                         student_type());
    t = load_eight<Real>(reinterpret_cast<const char*>(teacher) + at * int(element_size(teacher_type())),
                         teacher_type());
  }
  TGT_DEVICE void one(int at, Real& s, Real& t) const {
    s = load_one<Real>(reinterpret_cast<const char*>(student), student_type(), at);
    t = load_one<Real>(reinterpret_cast<const char*>(teacher), teacher_type(), at);
  }
};

TGT_DEVICE uint64_t minus_infinity_bits(DType type) {
  return type == DType::kBFloat16  ? 0xff80u
         : type == DType::kFloat16 ? 0xfc00u
         : type == DType::kFloat32 ? 0xff800000u
                                   : 0xfff0000000000000u;
}

// Copies elements [begin, end) of one side of a row to shared memory, one by one.
template <class Word>
TGT_DEVICE void copy_elements(unsigned char* to, const char* from, int64_t begin, int64_t end, int thread, int size) {
  const Word* source = reinterpret_cast<const Word*>(from);
  Word* target = reinterpret_cast<Word*>(to);
  TGT_UNROLL4
  for (int64_t j = begin + thread; j < end; j += size) target[j] = source[j];
}
template <class Word>
TGT_DEVICE void fill_elements(unsigned char* to, int64_t begin, int64_t end, Word value, int thread, int size) {
  Word* target = reinterpret_cast<Word*>(to);
  for (int64_t j = begin + thread; j < end; j += size) target[j] = value;
}

// One side of a row: `size` elements from `from` on, padded with -inf to `room`. `bulk` of them arrive by other means.
TGT_DEVICE void copy_side(unsigned char* to, const char* from, DType type, int64_t size, int64_t room, int64_t bulk,
                          bool aligned, int thread, int threads) {
  const int bytes = static_cast<int>(element_size(type));
  int64_t done = bulk;
  if (aligned) {
    const int64_t units = size * bytes / 16;
    TGT_UNROLL4
    for (int64_t u = bulk * bytes / 16 + thread; u < units; u += threads) store16(to + 16 * u, load16(from + 16 * u));
    done = units * 16 / bytes;
  }
  const uint64_t nothing = minus_infinity_bits(type);
  if (bytes == 2) {
    copy_elements<uint16_t>(to, from, done, size, thread, threads);
    fill_elements<uint16_t>(to, size, room, static_cast<uint16_t>(nothing), thread, threads);
  } else {
    copy_elements<uint32_t>(to, from, done, size, thread, threads);
    fill_elements<uint32_t>(to, size, room, static_cast<uint32_t>(nothing), thread, threads);
  }
}

#if defined(TGT_BULK_COPIES)
// Starts the copies of the row pair's whole vectors, a barrier a chunk of `chunk` vectors.
template <class Row>
TGT_DEVICE void start_copies(const Row& row, const char* student, const char* teacher, int whole, int chunk,
                             uint64_t* barriers) {
  const int student_bytes = kVector * int(element_size(row.student_type()));
  const int teacher_bytes = kVector * int(element_size(row.teacher_type()));
  for (int c = 0; c < kPieces; ++c) {
    const int from = c * chunk, left = whole - from;
    const int count = left < 0 ? 0 : left < chunk ? left : chunk;
    copy_expect(barriers + c, static_cast<uint32_t>(count * (student_bytes + teacher_bytes)));
    if (count == 0) continue;
    copy_start(row.student + from * student_bytes, student + int64_t(from) * student_bytes,
               static_cast<uint32_t>(count * student_bytes), barriers + c);
    copy_start(row.teacher + from * teacher_bytes, teacher + int64_t(from) * teacher_bytes,
               static_cast<uint32_t>(count * teacher_bytes), barriers + c);
  }
}
#endif

// Extremes of a thread's vectors in [begin, end).
template <class Real, class Row>
TGT_DEVICE void scan(const Row& row, int64_t classes, int begin, int end, int step, Extremes<Real>& e) {
  for (int k = begin; k < end; k += step) {
    Eight<Real> s, t;
    row.load(k, s, t);
    if (!add_extremes(s, t, e)) inspect(s, t, classes - (row.first + k) * kVector, e);
  }
}

#if defined(TGT_PACKED_EXTREMES)
// The same from packed pairs, a quarter of the instructions; rows with a NaN or an infinity are looked at again.
struct PackedExtremes {
  uint32_t largest = 0xff80ff80u, smallest = 0x7f807f80u;

  TGT_DEVICE void add(const Bytes16& raw) {
    TGT_UNROLL
    for (int i = 0; i < 4; ++i) {
      largest = packed_max_bf16(largest, raw.words[i]);
      smallest = packed_min_bf16(smallest, raw.words[i]);
    }
  }
  TGT_DEVICE float low(uint32_t pair) const { return bit_cast<float>(pair << 16); }
  TGT_DEVICE float high(uint32_t pair) const { return bit_cast<float>(pair & 0xffff0000u); }
  // Of finite numbers.
  TGT_DEVICE float most() const { return largest_of(low(largest), high(largest)); }
  TGT_DEVICE float least() const { return smaller_of(low(smallest), high(smallest)); }
  TGT_DEVICE bool finite() const {
    const float sum = (low(largest) + high(largest) + low(smallest) + high(smallest)) * 0.0f;
    return sum == 0;
  }
};

// Of a thread's vectors, chunk by chunk.
template <class Row>
struct PackedScan {
  PackedExtremes student, teacher;

  TGT_DEVICE void add(const Row& row, int64_t, int begin, int end, int step) {
    TGT_NO_UNROLL  // a thread has few vectors of a chunk
        for (int k = begin; k < end; k += step) {
      student.add(load16(row.student + k * 2 * kVector));
      teacher.add(load16(row.teacher + k * 2 * kVector));
    }
  }
  // `ordinary`: what the logits of ordinary rows stay within. Without a vector there is nothing to tell.
  TGT_DEVICE Extremes<float> result(const Row& row, int64_t classes, int begin, int end, int step,
                                    float ordinary) const {
    Extremes<float> e;
    if (begin >= end) return e;
    if (student.finite() && teacher.finite()) {
      e.student = student.most();
      e.teacher = teacher.most();
      const float most = largest_of(e.student, e.teacher), least = smaller_of(student.least(), teacher.least());
      if (largest_of(most, -least) > ordinary) e.unusual = kFar;
    } else {
      scan<float>(row, classes, begin, end, step, e);
    }
    return e;
  }
};
#endif

template <class Real, class Row>
struct PlainScan {
  Extremes<Real> e;

  TGT_DEVICE void add(const Row& row, int64_t classes, int begin, int end, int step) {
    scan<Real>(row, classes, begin, end, step, e);
  }
  TGT_DEVICE Extremes<Real> result(const Row&, int64_t, int, int, int, float) const { return e; }
};

template <int kTypes, class Real, class Row>
TGT_DEVICE auto new_scan(const Row&) {
#if defined(TGT_PACKED_EXTREMES)
  if constexpr (kTypes == kBothBFloat16) {
    return PackedScan<Row>();
  } else
#endif
  {
    return PlainScan<Real, Row>();
  }
}

template <class D, class Team, int kTypes>
__global__ void TGT_BOUNDS((kOnChipThreads<Team, kTypes>), (kOnChipBlocks<Team, kTypes>))
    distill_fwd_kernel(const TGT_GRID_CONSTANT DeviceCall d, const TGT_GRID_CONSTANT int bulk) {
  using Real = float;
  const DistillCall& call = d.call;
  Team team;
  team.size = Team::kIsWarp ? kWarp : kOnChipThreads<Team, kTypes>;
  const int64_t i = Team::kIsWarp ? block_in_grid() * (kWarpTeamThreads / kWarp) + thread_in_block() / kWarp
                                  : int64_t(cluster_in_grid());
  if (Team::kIsWarp && i >= call.rows) return;

  // The share of this block: vectors [first, first + count) of the row.
  const Matrix& other = partner(call);
  OnChipRow<Real, kTypes> row;
  row.student_type_ = call.student.type;
  row.teacher_type_ = other.type;
  const int classes = static_cast<int>(call.classes), vectors = (classes + kVector - 1) / kVector;
  const int room = static_cast<int>(d.vectors_per_block), first = team.rank * room;
  const int left = vectors - first, count = left < 0 ? 0 : left < room ? left : room;
  const int rest = classes - first * kVector, here = rest < 0 ? 0 : rest < count * kVector ? rest : count * kVector;
  row.first = first;
  row.count = count;

  const int student_bytes = int(element_size(row.student_type())),
            teacher_bytes = int(element_size(row.teacher_type()));
  const int a_pair = room * kVector * (student_bytes + teacher_bytes);
  unsigned char* memory = shared_memory();
  uint64_t* barriers = reinterpret_cast<uint64_t*>(memory + kTeamBytes);
  row.student = Team::kIsWarp ? memory + (thread_in_block() / kWarp) * a_pair : memory + kTeamBytes + kBarrierBytes;
  row.teacher = row.student + room * kVector * student_bytes;
  const auto of_student = [&] { return call.student.row(i) + first * kVector * student_bytes; };
  const auto of_teacher = [&] { return other.row(i) + first * kVector * teacher_bytes; };

  // Whole vectors may arrive in chunks by bulk copies, the rest is copied by threads. The copies start before anything
  // else is read, and end before the block does.
  const bool by_bulk = !Team::kIsWarp && bulk;
  const int whole = by_bulk ? here / kVector : 0;
  const int chunks = by_bulk ? kPieces : 1;
#if defined(TGT_BULK_COPIES)
  if (by_bulk && team.thread == 0) {
    for (int c = 0; c < kPieces; ++c) copy_barrier_init(barriers + c);
    copy_barriers_ready();
    start_copies(row, of_student(), of_teacher(), whole, d.chunk, barriers);
  }
#endif
  const RowHead head = look_at_row(d, i);
  if (head.flags & kDropped) {
#if defined(TGT_BULK_COPIES)
    if (by_bulk) {
      team.barrier();
      for (int c = 0; c < kPieces; ++c) copy_wait(barriers + c);
    }
#endif
    drop_row<Real>(d, team, i, row.first, row.count);
    return;
  }
  team.begin();
  if (!by_bulk || here % kVector != 0) {
    const int64_t bulk_classes = int64_t(whole) * kVector;
    copy_side(row.student, of_student(), row.student_type(), here, row.count * kVector, bulk_classes, d.student_aligned,
              team.thread, team.size);
    copy_side(row.teacher, of_teacher(), row.teacher_type(), here, row.count * kVector, bulk_classes, d.teacher_aligned,
              team.thread, team.size);
  }
  team.barrier();  // what threads copied is there, and so are the barriers of the rest
  auto scanned = new_scan<kTypes, Real>(row);
  TGT_NO_UNROLL
  for (int c = 0; c < chunks; ++c) {
#if defined(TGT_BULK_COPIES)
    if (by_bulk) copy_wait(barriers + c);
#endif
    const int begin = c * d.chunk, end = begin + d.chunk < count ? begin + d.chunk : count;
    scanned.add(row, call.classes, begin + team.thread, end, team.size);
  }
  const Extremes<Real> mine = scanned.result(row, call.classes, team.thread, count, team.size, d.ordinary);
  // Read by whom it concerns, and before the first reduction: after it another block may write a gradient over it.
  const bool hard = head.flags & kHard;
  const double of_label =
      hard && team.in_first_warp() ? load_one<double>(call.student.row(i), row.student_type(), head.label) : 0;
  // A warp's reductions are shuffles, which order no memory: with gradients in place, a lane that is ahead could write
  // over the label that another has yet to read.
  if (Team::kIsWarp) team.barrier();
  const MergeExtremes<Real> merge_extremes;
  const Extremes<Real> extremes =
      team.template tell<Extremes<Real>>(extremes_of_warp(mine, merge_extremes), 0, Same(), merge_extremes, Same());
  if (is_invalid(extremes)) {
    spoil_row<Real>(d, team, i, head, row.first, row.count);
    return;
  }

  const Terms terms = terms_of<D>(d, hard);
  const bool ordinary = OnChipRow<Real, kTypes>::template kLeanSums<D> && (extremes.unusual | extremes.masked) == 0 &&
                        classes % kVector == 0 && !terms.smoothed && (!hard || terms.power != 0);
  Sums<Real> sums;
  if (ordinary) {
    if constexpr (OnChipRow<Real, kTypes>::template kLeanSums<D>) {
      with_power(hard ? terms.power : 0, [&](auto of) {
        lean_sums<D, decltype(of)::kPower>(d, row, team.thread, count, team.size, extremes, sums);
      });
    }
  } else {
    const Constants<Real> constants = constants_of<D, Real>(d, extremes.student, extremes.teacher);
    for (int k = team.thread; k < count; k += team.size) {
      Eight<Real> s, t;
      row.load(k, s, t);
      add_sums<D>(s, t, constants, terms, sums);
    }
  }
  const bool lean = OnChipRow<Real, kTypes>::template kLean<D> && ordinary && (!D::kMixture || d.even) &&
                    call.d_student.data && d.d_student_aligned && (!call.d_teacher.data || d.d_teacher_aligned);
  const Sums<Real> of_warp = sums_of_warp<D>(sums, hard && !terms.same(), terms.smoothed);
  const Extremes<double> in_double = {extremes.student, extremes.teacher, extremes.masked, extremes.unusual};
  finish_row<Real, D>(d, team, row, i, head, of_warp, in_double, of_label, ordinary, lean, WidenSums<Real>(),
                      AddSums<double>(), [](const Sums<double>& all) { return all; });
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
