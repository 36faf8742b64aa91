// The table of one instruction set's kernels. Compiled once per set, beside *_rows.cpp.
#include "isa.h"

#define TGT_NAME_(x) #x
#define TGT_NAME(x) TGT_NAME_(x)

namespace tgt {
inline namespace TGT_ISA {

void distill_forward_rows(const DistillRows& call, int64_t begin, int64_t end);
void distill_backward_rows(const DistillRows& call, int64_t begin, int64_t end);
void perturb_rows(const PerturbCall& call, int64_t begin, int64_t end);
void ascend_rows(const AscendCall& call, int64_t begin, int64_t end);
void topk_forward_rows(const TopKCall& call, int64_t begin, int64_t end);
void topk_backward_rows(const TopKCall& call, int64_t begin, int64_t end);
void sample_rows(const SampleCall& call, int64_t begin, int64_t end);
void soft_forward_rows(const SoftCall& call, int64_t begin, int64_t end);
void soft_backward_rows(const SoftCall& call, int64_t begin, int64_t end);
void listwise_rows(const ListwiseCall& call, int64_t begin, int64_t end);

extern const cpu::Kernels kKernels;
const cpu::Kernels kKernels = {TGT_NAME(TGT_ISA), distill_forward_rows, distill_backward_rows, perturb_rows,
                               ascend_rows,       topk_forward_rows,    topk_backward_rows,    sample_rows,
                               soft_forward_rows, soft_backward_rows,   listwise_rows};

}  // namespace TGT_ISA
}  // namespace tgt
