#!/usr/bin/env bash
# Everything that needs a GPU, in one command, on a bare machine without network, in less than nine minutes:
#
#     benchmarks/gpu.sh OUT_DIR
#
# builds for the GPU found, runs the tests that need one, compute-sanitizer, the benchmarks and the profiler. Needs
# Python with torch, pytest, hypothesis, pybind11, numpy, safetensors, tqdm, rich; cmake; nvcc; ninja or make.
# A stage that fails or runs out of time does not keep the later ones from running.
#
#   PYTHON      the interpreter (python3)
#   TGT_PEERS   a folder of wheels: other libraries, for the benchmarks to compare with, and what the machine lacks
#
# OUT_DIR: summary.json, build.log, tests.log, sanitizer.log, bench.log, bench.json, roofline.png, trace.json.gz.
# Exit status: 0 when every stage passed or was skipped with a reason, else 1.
# shellcheck disable=SC2329  # the stages are called by name, through timeout
set -uo pipefail

if [ $# -ne 1 ]; then
  sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 2
PYTHON=${PYTHON:-python3}
cores=$(nproc 2>/dev/null || echo 2)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 CI=true
export PATH="$PATH:/usr/local/cuda/bin"
rm -f "$out"/{summary.json,build.log,tests.log,sanitizer.log,bench.log,bench.json,roofline.png,trace.json.gz}

grace=2                       # seconds between the request to stop and the end
largest=$((15 * 1024 * 1024)) # bytes of a file

record() { # stage, outcome, status, seconds, note
  printf '%s\t%s\t%s\t%s\t%s\n' "$@" >>"$scratch/stages"
  printf '== %-12s %-8s status %-4s %4ss  %s\n' "$@"
}

# stage NAME SECONDS LOG COMMAND...: runs a command within its time and appends what it prints to a log.
stage() {
  local name=$1 seconds=$2 log=$3 began=$SECONDS status=0 note=""
  shift 3
  printf '\n== %s: %s\n' "$name" "$*" >>"$log"
  timeout -k "$grace" "$seconds" "$@" >>"$log" 2>&1 || status=$?
  if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then note="stopped after ${seconds}s"; fi
  if [ "$status" -eq 0 ]; then
    record "$name" passed 0 $((SECONDS - began)) ""
  else
    record "$name" failed "$status" $((SECONDS - began)) "${note:-see the log}"
  fi
  return "$status"
}

skip() { record "$1" skipped 0 0 "$2"; } # stage, reason

environment() {
  local status=0
  date -u
  uname -a
  nvidia-smi || status=1
  nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm,clocks.max.mem,power.limit --format=csv
  nvcc --version || status=1
  "$PYTHON" --version
  "$PYTHON" - <<'PY' || status=1
import importlib.metadata as metadata
for name in ("torch", "triton", "numpy", "pytest", "hypothesis", "pybind11", "cmake", "ninja"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "-")
import torch
print("torch was built for CUDA", torch.version.cuda, "and finds", torch.cuda.device_count(), "devices")
PY
  return "$status"
}

build() {
  local folder=build/gpu generator=()
  if command -v ninja >/dev/null; then generator=(-G Ninja); fi
  mkdir -p "$folder"
  cmake -S . -B "$folder" "${generator[@]}" -DTGT_CUDA=ON -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
    -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" || return
  cmake --build "$folder" --parallel "$cores" || return
  cp "$folder"/_core*.so tgt_fast/
}

# The tests in as many processes as there are groups: the host computes what the device is compared with.
run_tests() {
  local groups=(
    "python_tests/test_cuda.py"
    "python_tests/test_cuda_kernels.py python_tests/test_philox.py"
    "python_tests/test_distill.py python_tests/test_distill_machine.py"
    "python_tests/test_distill_masks.py"
    "python_tests/test_distill_autograd.py python_tests/test_distill_reductions.py python_tests/test_distill_errors.py"
    "python_tests/test_latent.py python_tests/test_latent_ascend.py"
    "python_tests/test_sparse.py python_tests/test_sparse_autograd.py"
    "python_tests/test_linear_autograd.py python_tests/test_linear_record.py python_tests/test_tokens.py"
    "python_tests/test_tokens_soft.py"
    "python_tests/test_triton.py python_tests/test_compile.py python_tests/test_registration.py"
  )
  local i status=0 pids=()
  for i in "${!groups[@]}"; do
    # shellcheck disable=SC2086  # a group is several arguments
    OMP_NUM_THREADS=$((cores / ${#groups[@]} + 1)) TGT_FAST_REQUIRE_CUDA=1 \
      "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider --durations=5 --color=no ${groups[$i]} \
      >"$1/tests.$i" 2>&1 &
    pids+=($!)
  done
  # Half-done groups leave their logs too.
  trap 'kill "${pids[@]}" 2>/dev/null; cat "$1"/tests.?' TERM
  for i in "${pids[@]}"; do
    wait "$i"
    local one=$?
    if [ "$one" -ne 0 ]; then status=1; fi
  done
  cat "$1"/tests.?
  return "$status"
}

sanitize() { # tool
  TGT_FAST_REQUIRE_CUDA=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider python_tests/test_cuda.py -k test_every_kernel_once
}

check_with_sanitizer() {
  if ! command -v compute-sanitizer >/dev/null; then
    skip sanitizer "no compute-sanitizer on the PATH"
    return
  fi
  if ! timeout -k "$grace" 20 compute-sanitizer --error-exitcode 9 \
    "$PYTHON" -c 'import torch; torch.ones(1, device="cuda").add_(1).cpu()' >"$scratch/sanitizer.probe" 2>&1; then
    skip sanitizer "compute-sanitizer does not run here; see sanitizer.log"
    return
  fi
  local tool
  for tool in memcheck racecheck initcheck; do
    stage "$tool" 100 "$scratch/sanitizer.$tool" bash -c "sanitize $tool" &
  done
  wait
}

export -f environment build run_tests sanitize
export PYTHON cores

# The bounds add up to less than nine minutes: 25 + 80 + 8 + 150 + 220 + 20 seconds, and the grace of each.
stage environment 25 "$out/build.log" bash -c environment
if command -v nvcc >/dev/null; then
  stage build 80 "$out/build.log" bash -c build
else
  record build failed 127 0 "no nvcc on the PATH"
fi
if [ -n "${TGT_PEERS:-}" ]; then
  stage peers 8 "$out/build.log" \
    "$PYTHON" -m pip install --no-index --no-deps --quiet --target "$scratch/peers" "$TGT_PEERS"/*.whl
  export PYTHONPATH="$PYTHONPATH:$scratch/peers"
fi
check_with_sanitizer & # beside the tests: neither is timed
sanitizer=$!
# shellcheck disable=SC2016  # expanded by the inner shell
stage tests 150 "$out/tests.log" bash -c 'run_tests "$0"' "$scratch"
wait "$sanitizer"
cat "$scratch"/sanitizer.* >"$out/sanitizer.log" 2>/dev/null
stage bench 220 "$out/bench.log" \
  "$PYTHON" -m tgt_fast.cli bench --device cuda --json "$out/bench.json" --plot "$out/roofline.png"
stage profile 20 "$out/bench.log" "$PYTHON" -m tgt_fast.cli profile --device cuda --out "$scratch/profile"
if [ -s "$scratch/profile/trace.json.gz" ]; then cp "$scratch/profile/trace.json.gz" "$out/"; fi

# No file beyond what travels; of a log the end is worth more.
for file in "$out"/*; do
  size=$(wc -c <"$file")
  if [ "$size" -gt "$largest" ]; then
    case $file in
      *.log) tail -c "$largest" "$file" >"$scratch/tail" && mv "$scratch/tail" "$file" ;;
      *) rm -f "$file" && record "$(basename "$file")" failed 1 0 "larger than $largest bytes, left out" ;;
    esac
  fi
done

failed=0
if grep -q "	failed	" "$scratch/stages"; then failed=1; fi
# Written by awk, so that it is there whatever state Python is in. Names and notes hold nothing that JSON would escape.
awk -F '\t' -v commit="$(git rev-parse --short HEAD 2>/dev/null)" -v seconds="$SECONDS" -v failed="$failed" '
  { stages = stages sprintf("%s\n  {\"stage\": \"%s\", \"outcome\": \"%s\", \"status\": %d, \"seconds\": %d, \"note\": \"%s\"}",
                            NR > 1 ? "," : "", $1, $2, $3, $4, $5) }
  END { printf "{\n \"commit\": \"%s\",\n \"seconds\": %d,\n \"passed\": %s,\n \"stages\": [%s\n ]\n}\n",
               commit, seconds, failed ? "false" : "true", stages }
' "$scratch/stages" >"$out/summary.json"
printf '== %ss in all; results in %s\n' "$SECONDS" "$out"
exit "$failed"
