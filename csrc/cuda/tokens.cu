// Tokens drawn from rows of logits, a block a row.
#include <algorithm>
#include <cmath>

#include "chip.h"
#include "tokens.h"

namespace tgt::cuda {
inline namespace TGT_ISA {
namespace {

// A multiprocessor's registers: 64 a thread, or 128 where pairs of them hold a number.
template <class Real>
constexpr int kSampleThreads = sizeof(Real) == 8 ? 512 : 1024;
// Shared memory: reductions, a sum a warp, a histogram, survivors, and the row if it fits.
constexpr int kHistogramAt = kTeamBytes + kMostWarps * 8, kSurvivorsAt = kHistogramAt + Histogram::kBytes;
template <class Real>
constexpr int kTokenBytes = kSurvivorsAt + kSurvivors * static_cast<int>(sizeof(Survivor<Real>));

template <class Real>
TGT_DEVICE void keep_row_on_chip(TokenRow<Real>& row, const BlockTeam& team) {
  unsigned char* here = shared_memory() + kTokenBytes<Real>;
  const int64_t bytes = row.size * element_size(row.type);
  const int64_t whole = row.aligned ? bytes / 16 : 0;
  for (int64_t k = team.thread; k < whole; k += team.size) store16(here + 16 * k, load16(row.data + 16 * k));
  const int64_t words = bytes / 2;  // every type is made of them
  for (int64_t k = whole * 8 + team.thread; k < words; k += team.size) {
    reinterpret_cast<uint16_t*>(here)[k] = reinterpret_cast<const uint16_t*>(row.data)[k];
  }
  row.data = reinterpret_cast<const char*>(here);
  row.aligned = true;
  block_barrier();
}

// The first token, in the order of the ids, whose cumulated weight exceeds `uniform` of the whole: the row is cut into
// a piece a warp, the piece that holds the target again, until a piece is a warp's worth of tokens.
template <class Real>
TGT_DEVICE int64_t draw(const TokenRow<Real>& row, const BlockTeam& team,
                        const Border<typename TokenRow<Real>::Order>& kept, double uniform) {
  double* sums = reinterpret_cast<double*>(shared_memory() + kTeamBytes);
  const int lane = team.thread % kWarp, warp = team.thread / kWarp, warps = team.size / kWarp;
  const auto weight = [&](int64_t id) { return row.weight(load_one<Real>(row.data, row.type, id), id, kept); };
  int64_t begin = 0, end = row.size;
  double mass = 0, target = -1;
  do {
    const int64_t piece = (end - begin + warps - 1) / warps;
    const int64_t from = begin + warp * piece, to = from + piece < end ? from + piece : end;
    double sum = 0;
    for (int64_t id = from + lane; id < to; id += kWarp) sum += weight(id);
    sum = merge_lanes<kWarp / 2>(sum, [](double a, double b) { return a + b; });
    block_barrier();
    if (lane == 0) sums[warp] = sum;
    block_barrier();
    if (target < 0) {
      double total = 0;
      for (int w = 0; w < warps; ++w) total += sums[w];
      target = uniform * total;
    }
    int chosen = 0;  // the last with any mass, should rounding leave the target unreached
    double before = mass;
    for (int w = 0; w < warps; ++w) {
      if (sums[w] == 0) continue;
      chosen = w;
      before = mass;
      if (mass + sums[w] > target) break;
      mass += sums[w];
    }
    mass = before;
    begin += chosen * piece;
    end = begin + piece < end ? begin + piece : end;
  } while (end - begin > kWarp);
  int64_t token = begin;
  for (int64_t id = begin; id < end; ++id) {
    const double here = weight(id);
    if (here == 0) continue;
    token = id;
    mass += here;
    if (mass > target) break;
  }
  return token;
}

// What is the same in all rows, and takes no registers as an argument.
struct TokenScale {
  double temperature, inverse;
  double unit;  // 1 in fixed point
};

template <class Real>
__global__ void TGT_BOUNDS(kSampleThreads<Real>, 1)
    tokens_sample_kernel(const TGT_GRID_CONSTANT SampleCall call, const TGT_GRID_CONSTANT DeviceKey device,
                         const TGT_GRID_CONSTANT TokenScale scale, const TGT_GRID_CONSTANT bool aligned,
                         const TGT_GRID_CONSTANT bool fits) {
  using Order = typename TokenRow<Real>::Order;
  const BlockTeam team;
  const int64_t i = block_in_grid();
  TokenRow<Real> row{call.logits.row(i), call.logits.type, call.classes,   aligned,   0,
                     scale.temperature,  scale.inverse,    call.log_min_p, scale.unit};
  if (fits) keep_row_on_chip(row, team);

  Real largest = minus_infinity<Real>();
  bool odd = false;
  row.each(team, [&](Real x, int64_t) {
    largest = larger(x, largest);
    odd |= !(x < Real(HUGE_VAL));
  });
  Extent extent{static_cast<double>(largest), odd ? 1.0 : 0.0};
  extent = merged(team, extent, MergeExtents());
  if (extent.odd > 0 || !(extent.largest > -HUGE_VAL)) {
    if (team.leads()) call.tokens[i] = -1;
    return;
  }
  row.largest = Real(extent.largest);

  const Histogram histogram(shared_memory() + kHistogramAt);
  Tokens<Real> tokens{row};
  if (call.top_k > 0 && call.top_k < call.classes) {
    const uint64_t wanted = static_cast<uint64_t>(call.top_k);
    tokens.kept = tokens.border(team, histogram, [](Real) { return uint64_t{1}; }, [&](uint64_t) { return wanted; });
    if (call.top_p < 1 && call.top_k <= kSurvivors && call.classes <= INT32_MAX) {
      tokens.compact(team, shared_memory() + kSurvivorsAt, histogram.low);
    }
  }
  if (call.top_p < 1) {
    const Border<Order> border = tokens.border(
        team, histogram, [&](Real x) { return row.weight_in_units(x); },
        [&](uint64_t all) {
          const uint64_t wanted = static_cast<uint64_t>(ceil(call.top_p * static_cast<double>(all)));
          return wanted < 1 ? 1 : wanted < all ? wanted : all;
        });
    const bool all_equals = border.last == INT64_MAX && border.key == tokens.kept.key;
    tokens.kept = {border.key, all_equals ? tokens.kept.last : border.last};
  }
  const Border<Order> kept = tokens.kept;

  const int64_t position = i % call.positions;
  const Key key = key_of(call.noise, device, i / call.positions);
  const Block<uint32_t> counter{static_cast<uint32_t>(position / 4), key.id_low, key.id_high, key.op_step};
  const Block<uint32_t> w = philox4x32(counter, key.seed_low, key.seed_high);
  const int word = static_cast<int>(position % 4);
  const double uniform = exact_uniform(word == 0 ? w.x0 : word == 1 ? w.x1 : word == 2 ? w.x2 : w.x3);
  const int64_t token = draw(row, team, kept, uniform);
  if (team.leads()) call.tokens[i] = token;
}

template <class Real>
cudaError_t launch_sample(const SampleCall& call, const DeviceKey& key, cudaStream_t stream) {
  Chip chip;
  const cudaError_t error = find_chip(reinterpret_cast<const void*>(tokens_sample_kernel<Real>), chip);
  if (error != cudaSuccess) return error;
  const int64_t bytes = kTokenBytes<Real> + (call.classes * element_size(call.logits.type) + 15) / 16 * 16;
  const bool fits = bytes <= chip.shared_bytes;
  int bits = 0;
  while (int64_t{1} << bits < call.classes) ++bits;
  // Differences of floats over a temperature beyond these are as good as infinite, or as 0.
  const double temperature = sizeof(Real) == 8 ? call.temperature : std::clamp(call.temperature, 1e-290, 1e290);
  const TokenScale scale{temperature, 1 / temperature, std::ldexp(1.0, 62 - bits)};
  int threads = 4 * kWarp;
  while (threads < kSampleThreads<Real> && threads * kVector < call.classes) threads *= 2;
  return launch(tokens_sample_kernel<Real>, call.rows, threads, static_cast<int>(fits ? bytes : kTokenBytes<Real>), 1,
                stream, call, key, scale, aligned_rows(call.logits), fits);
}

}  // namespace
}  // namespace TGT_ISA

Failure sample(const SampleCall& call, const DeviceKey& key, cudaStream_t stream) {
  if (call.rows == 0) return {};
  const cudaError_t error = call.logits.type == DType::kFloat64 ? launch_sample<double>(call, key, stream)
                                                                : launch_sample<float>(call, key, stream);
  return {error, "tokens_sample_kernel"};
}

}  // namespace tgt::cuda
