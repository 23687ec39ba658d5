#!/usr/bin/env bash
# What is too slow for every commit: the slow tests, then every benchmark, one JSON file each.
#
#   deploy/nightly.sh [FOLDER]      (by default out/nightly/<date>)
#
# From a clone with polyray[quickstart,dev] installed. Runs everything, and fails in the end if anything did.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-out/nightly/$(date +%F)}
mkdir -p "$folder"
failed=()

echo "== slow tests"
python -m pytest -m slow --junitxml="$folder/slow.xml"
status=$?
# pytest says 5 where nothing is marked.
((status == 0 || status == 5)) || failed+=("pytest -m slow")

for benchmark in tests/benchmarks/bench_*.py; do
  name=$(basename "$benchmark" .py)
  echo "== $name"
  if python "$benchmark" --json >"$folder/$name.json"; then
    cat "$folder/$name.json"
  else
    failed+=("$name")
  fi
done

if ((${#failed[@]})); then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
echo "all of it passed; results in $folder"
