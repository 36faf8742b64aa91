// Rows that stay on the chip: the row pair is copied to shared memory once and read from there.
#pragma once

#include "distill_fwd.h"

namespace tgt::cuda {
inline namespace TGT_ISA {

// The element types of a row pair, when they are known to the compiler.
enum Types : int { kAnyTypes, kBothBFloat16 };

// Two blocks to a multiprocessor. What any type takes does not fit into the 80 registers that 384 threads leave.
constexpr int on_chip_threads(int types) { return types == kBothBFloat16 ? 384 : 320; }

template <class Real, int kTypes>
struct OnChipRow {
  using Index = int;       // what fits in shared memory is few
  unsigned char* student;  // shared memory, vector by vector
  unsigned char* teacher;
  int64_t first, count;  // vectors of the row that are here
  DType student_type_, teacher_type_;

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
  for (int c = 0; c < kChunks; ++c) {
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
  TGT_DEVICE float most() const { return larger(low(largest), high(largest)); }
  TGT_DEVICE bool finite() const {
    const float sum = (low(largest) + high(largest) + low(smallest) + high(smallest)) * 0.0f;
    return sum == 0;
  }
};

template <class Row>
TGT_DEVICE void scan_packed(const Row& row, int64_t classes, int begin, int end, int step, Extremes<float>& e) {
  PackedExtremes student, teacher;
  bool any = false;
  for (int k = begin; k < end; k += step) {
    student.add(load16(row.student + k * 2 * kVector));
    teacher.add(load16(row.teacher + k * 2 * kVector));
    any = true;
  }
  if (!any) return;
  if (student.finite() && teacher.finite()) {
    e.student = larger(student.most(), e.student);
    e.teacher = larger(teacher.most(), e.teacher);
  } else {
    scan<float>(row, classes, begin, end, step, e);
  }
}
#endif

template <int kTypes, class Real, class Row>
TGT_DEVICE void scan_chunk(const Row& row, int64_t classes, int begin, int end, int step, Extremes<Real>& e) {
#if defined(TGT_PACKED_EXTREMES)
  if constexpr (kTypes == kBothBFloat16) return scan_packed(row, classes, begin, end, step, e);
#endif
  scan<Real>(row, classes, begin, end, step, e);
}

template <class D, class Team, int kTypes>
__global__ void TGT_BOUNDS(Team::kIsWarp ? kWarpTeamThreads : on_chip_threads(kTypes), 2)
    distill_fwd_kernel(const TGT_GRID_CONSTANT DeviceCall d, const TGT_GRID_CONSTANT int bulk) {
  using Real = float;
  const DistillCall& call = d.call;
  const Team team;
  const int64_t i = Team::kIsWarp ? block_in_grid() * (threads_in_block() / kWarp) + thread_in_block() / kWarp
                                  : block_in_grid() / team.ranks;
  if (i >= call.rows) return;

  // The share of this block: vectors [first, first + count) of the row.
  const Matrix& other = partner(call);
  OnChipRow<Real, kTypes> row;
  row.student_type_ = call.student.type;
  row.teacher_type_ = other.type;
  const int64_t vectors = (call.classes + kVector - 1) / kVector;
  const int room = static_cast<int>(d.vectors_per_block);
  row.first = int64_t(team.rank) * room;
  const int64_t left = vectors - row.first;
  row.count = left < 0 ? 0 : left < room ? left : room;
  const int count = static_cast<int>(row.count);

  const RowHead head = open_row(d, i);
  if (head.flags & kDropped) {
    drop_row<Real>(d, team, i, row.first, row.count);
    return;
  }
  team.begin();

  const int student_bytes = int(element_size(row.student_type())),
            teacher_bytes = int(element_size(row.teacher_type()));
  const int a_pair = room * kVector * (student_bytes + teacher_bytes);
  unsigned char* memory = shared_memory();
  uint64_t* barriers = reinterpret_cast<uint64_t*>(memory + kTeamBytes);
  row.student = Team::kIsWarp ? memory + (thread_in_block() / kWarp) * a_pair : memory + kTeamBytes + kBarrierBytes;
  row.teacher = row.student + room * kVector * student_bytes;
  const char* student = call.student.row(i);
  const char* teacher = other.row(i);
  student += row.first * kVector * student_bytes;
  teacher += row.first * kVector * teacher_bytes;
  const int64_t rest = call.classes - row.first * kVector;
  const int64_t here = rest < 0 ? 0 : rest < row.count * kVector ? rest : row.count * kVector;

  // Whole vectors may arrive in chunks by bulk copies, the rest is copied by threads.
  const bool by_bulk = !Team::kIsWarp && bulk;
  const int whole = by_bulk ? static_cast<int>(here / kVector) : 0;
  const int chunks = by_bulk ? kChunks : 1;
  const int chunk = (count + chunks * team.size - 1) / (chunks * team.size) * team.size;  // same threads later
#if defined(TGT_BULK_COPIES)
  if (by_bulk && team.thread == 0) {
    for (int c = 0; c < kChunks; ++c) copy_barrier_init(barriers + c);
    copy_barriers_ready();
    start_copies(row, student, teacher, whole, chunk, barriers);
  }
#endif
  const int64_t bulk_classes = int64_t(whole) * kVector;
  copy_side(row.student, student, row.student_type(), here, row.count * kVector, bulk_classes, d.student_aligned,
            team.thread, team.size);
  copy_side(row.teacher, teacher, row.teacher_type(), here, row.count * kVector, bulk_classes, d.teacher_aligned,
            team.thread, team.size);
  team.barrier();  // what threads copied is there, and so are the barriers of the rest
  Extremes<Real> mine;
  TGT_NO_UNROLL
  for (int c = 0; c < chunks; ++c) {
#if defined(TGT_BULK_COPIES)
    if (by_bulk) copy_wait(barriers + c);
#endif
    const int end = (c + 1) * chunk < count ? (c + 1) * chunk : count;
    scan_chunk<kTypes>(row, call.classes, c * chunk + team.thread, end, team.size, mine);
  }
  // Read while others wait, and before the first reduction: after it another block may write a gradient over it.
  const double of_label =
      head.flags & kHard ? load_one<double>(call.student.row(i), row.student_type(), head.label) : 0;
  // A warp's reductions are shuffles, which order no memory: with gradients in place, a lane that is ahead could write
  // over the label that another has yet to read.
  if (Team::kIsWarp) team.barrier();
  const Extremes<Real> extremes = merge_all(team, mine, 0, MergeExtremes<Real>());
  if (is_invalid(extremes)) {
    spoil_row<Real>(d, team, i, head, row.first, row.count);
    return;
  }

  const Constants<Real> constants = constants_of<D, Real>(d, extremes.student, extremes.teacher);
  const Terms terms = terms_of<D>(call.options, head.flags & kHard);
  Sums<Real> sums;
  for (int k = team.thread; k < count; k += team.size) {
    Eight<Real> s, t;
    row.load(k, s, t);
    add_sums<D>(s, t, constants, terms, sums);
  }
  const Sums<double> all = add_all(team, sums, 1);
  const Extremes<double> in_double = {extremes.student, extremes.teacher, extremes.masked, extremes.unusual};
  finish_row<Real, D>(d, team, row, i, head, all, in_double, of_label);
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
