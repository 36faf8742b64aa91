#!/usr/bin/env bash
# Everything that needs a GPU, on a bare machine without network, in one call or in two:
#
#     benchmarks/gpu.sh OUT [--only tests|bench] [--commit HASH] [--seconds N] [--dry]
#
# --only tests (less than five minutes): the core is built for the GPU found, unless one of these sources is there
# already; every kernel runs once, in a process with a limit; then the tests, and beside them the cases of the
# benchmarks with hardly any timing, which checks results at full shapes. --only bench (less than ten): the benchmarks,
# first without rivals, then compute-sanitizer and the profiler. Without --only all of it.
#
# What hangs or faults is ended, named and left out, and the rest goes on. What an earlier call has proven for the same
# sources is skipped: it is looked for in OUT, in build/gpu-kept and in benchmarks/results. OUT holds at most 8 files:
# gpu-cuda.json, NOUN-cuda.json for benchmarks/results, and logs.
#
# Needs Python with torch, pytest, pytest-xdist, hypothesis, pybind11, numpy, safetensors, tqdm, rich; cmake; nvcc;
# ninja or make.
#
#   PYTHON      the interpreter (python3)
#   TGT_PEERS   a folder of wheels: other libraries, for the benchmarks to compare with, and what the machine lacks
#
# --commit names what is measured where the copy has no git; --dry does a little of each stage on the CPU.
# Exit status: 0 when every stage passed or was skipped with a reason, else 1.
set -uo pipefail

if [ $# -eq 0 ]; then
  sed -n '2,24s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu/call.py" "$@"
