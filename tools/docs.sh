#!/usr/bin/env bash
# The documentation site: tools/docs.sh OUT_DIR. It needs python3 with pip, makes an environment of its own from the
# extra [docs], and fails on a warning. The package itself is read, not imported, so neither torch nor a compiler is needed.
set -euo pipefail
if [ $# -ne 1 ]; then
  echo "usage: tools/docs.sh OUT_DIR" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" - >"$scratch/requirements.txt" <<'PY'
import pathlib
try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
print(*project["optional-dependencies"]["docs"], sep="\n")
PY
"$scratch/venv/bin/pip" install -q --no-compile -c constraints.txt -r "$scratch/requirements.txt"
export PYTHONDONTWRITEBYTECODE=1 NO_MKDOCS_2_WARNING=1
"$scratch/venv/bin/mkdocs" build --quiet --strict --clean --site-dir "$scratch/site"
cp -R "$scratch/site/." "$out/"
test -s "$out/index.html"
test -s "$out/search/search_index.js" # what the search reads in a folder
if grep -rlE '<(script|link|img)[^>]*(src|href)="(https?:)?//' --include='*.html' "$out" | grep .; then
  echo "tools/docs.sh: these pages load something from the net" >&2
  exit 1
fi
