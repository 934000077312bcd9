#!/usr/bin/env bash
# On a bare machine with an NVIDIA GPU, in nine minutes: build for that GPU, run the gpu tests, measure its ceilings, the kernels,
# the nets and a training step. Installs nothing and needs no network.
#
#   bash benchmarks/gpu.sh OUTDIR
#
# Every part has a limit and is skipped, with a line, when the nine minutes are over; what fails is reported and the rest goes on
# (without the build: Triton's kernels and the peers). The parts stand in order of worth: a training step and the nets, B0 first,
# beside eager peers and torch.compile; the kernels on five shapes of each op of B0, B5 and B7 at a batch that fills the chip; the
# ceilings; and last B0 against its max-autotune, of which an H200 with 16 cores did not finish one in 112 s, nor beside other work
# in 527 s.
#
# Max-autotune of other nets, with one image and in training does not fit: it compiles each anew. Nor do the kernels against
# torch.compile. Where a machine is to be had for longer, they are (of each the other nets with --nets):
#   python3 -m benchmarks.run --device cuda --suite model --nets b0 --only ' n1 .*: (ours|timm|compile)' --out model-one-cuda.json
#   python3 -m benchmarks.run --device cuda --suite train --nets b0 --only ': (ours|timm|compile)' --out train-autotuned-cuda.json
#   python3 -m benchmarks.run --device cuda --suite kernels --nets b0,b5 --most 5 --out kernels-compiled-cuda.json
#
# OUTDIR gets five JSON files, table.txt and logs.tar.gz. In a copy of the tree without its history set EFFNET_FAST_COMMIT, which the
# JSON then states as the commit. Fails only where there is no GPU.
set -uo pipefail
[ $# -eq 1 ] || { echo "usage: bash benchmarks/gpu.sh OUTDIR" >&2; exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.."
end=$((SECONDS + 530))
export PYTHONPATH="$PWD:$PWD/tests/shim${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
command -v nvcc >/dev/null || PATH="/usr/local/cuda/bin:$PATH"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" TRITON_CACHE_DIR="$scratch/triton"
work=$scratch/work && mkdir "$work"

keep() {  # what a part leaves goes out at once: this script may itself be ended
  cp "$work"/*.json "$out" 2>/dev/null
  tar -czf "$out/logs.tar.gz" -C "$work" --exclude '*.json' .
}

# part NAME LIMIT COMMAND...: LIMIT in seconds, cut to what is left. LEFT in the command becomes that, less ten to end in.
part() {
  local name=$1 limit=$2 left=$((end - SECONDS)) began=$SECONDS rc
  shift 2
  [ "$limit" -lt "$left" ] || limit=$left
  if [ "$limit" -lt 20 ]; then echo "== $name: skipped, $left s are left"; return 1; fi
  echo "== $name (at most $limit s)"
  timeout -k 10 "$limit" "${@/#LEFT/$((limit - 10))}" >"$work/$name.log" 2>&1
  rc=$?
  echo "== $name: rc $rc after $((SECONDS - began)) s"
  [ $rc -eq 0 ] || tail -n 12 "$work/$name.log"
  keep
  return $rc
}

# The gpu tests in as many processes as there are cores for: what takes them long is Triton compiling hundreds of kernels. 2150 tests
# took 230 s of an H200 and 16 cores. At the limit each process is interrupted, as from a keyboard, so that pytest tells how far it
# came.
gpu_tests() {
  local limit=$1 shards=$(($(nproc) - 1)) pids=() lost=0 i
  [ "$shards" -le 15 ] || shards=15
  [ "$shards" -ge 1 ] || shards=1
  # A file that needs what is not installed here loses its own tests alone.
  local collect=(python3 -m pytest --collect-only -q -p no:cacheprovider --continue-on-collection-errors)
  TRITON_INTERPRET=0 "${collect[@]}" tests/triton_kernels.py tests/triton_training.py >"$scratch/triton.ids" 2>&1 &
  "${collect[@]}" tests -m gpu --deselect tests/test_triton.py::test_on_a_gpu >"$scratch/gpu.ids" 2>&1
  wait $!
  grep -h '^ERROR' "$scratch"/*.ids | sort -u
  # In an order that is the same each time but not that of the files: neighbours are of one kernel, and take equally long.
  grep -h '^tests/.*::' "$scratch/gpu.ids" "$scratch/triton.ids" | sort -R --random-source=<(yes) >"$scratch/ids"
  [ -s "$scratch/ids" ] || { cat "$scratch"/*.ids; return 1; }
  for ((i = 0; i < shards; i++)); do
    mapfile -t ids < <(awk -v i=$i -v n=$shards 'NR % n == i' "$scratch/ids")
    [ ${#ids[@]} -gt 0 ] || continue
    TRITON_INTERPRET=0 timeout -s INT -k 10 $((limit - 15)) env --default-signal=INT \
      python3 -m pytest -v -rf -p no:cacheprovider "${ids[@]}" >"$work/tests-$i.log" 2>&1 &
    pids+=($!)
  done
  for i in "${pids[@]}"; do wait "$i" || lost=$((lost + 1)); done
  echo "$(wc -l <"$scratch/ids") tests in ${#pids[@]} processes, $lost of which failed or came to the limit"
  grep -hE "^(FAILED|ERROR)|^tests/.* (FAILED|ERROR) " "$work"/tests-*.log | cut -c1-200 | head -n 30  # also of who was interrupted
  tail -qn 1 "$work"/tests-*.log
  [ "$lost" -eq 0 ]
}
export -f gpu_tests
export work scratch

arch=$(python3 -c 'import torch; p = torch.cuda.get_device_properties(0); print(f"{p.major}.{p.minor}")') || {
  echo "gpu.sh: torch finds no CUDA device" >&2
  exit 1
}
part build 110 env TORCH_CUDA_ARCH_LIST="$arch" EFFNET_FAST_CUDA=1 MAX_JOBS="$(nproc)" \
  python3 setup.py -q build_ext --inplace --build-temp "$scratch/temp" --build-lib "$scratch/lib" ||
  echo "== without the native kernels"
# Meanwhile torch.compile fills its cache with a step of B0, which alone would take longer than its part.
timeout -k 5 200 python3 -m benchmarks.run --device cuda --suite train --nets b0 --seconds 190 --out "$scratch/cached/train.json" \
  --only ': (ours, )?compile (?!max)' >"$work/cached.log" 2>&1 &
part tests 200 bash -c 'gpu_tests "$1"' bash LEFT
wait
# Limits up to here and down to model add up to 525 s; the last parts take what the others left.
run=(python3 -m benchmarks.run --device cuda --seconds LEFT)
large=' n(?!1 ).*'
part train 150 "${run[@]}" --suite train --out "$work/train-cuda.json" --only ': (ours, |timm channels_last, |compile (?!max))'
part model 65 "${run[@]}" --suite model --out "$work/model-cuda.json" --only ': (?!compile max|timm nchw|torchvision)'
part kernels 70 "${run[@]}" --suite kernels --out "$work/kernels-cuda.json" --nets b0,b5,b7 --most 5 \
  --only "$large: (ours|eager channels_last)"
part ceilings 30 python3 -m benchmarks.ceilings --out "$work/ceilings.json"
part model-autotuned 160 "${run[@]}" --suite model --out "$work/model-autotuned-cuda.json" --nets b0 \
  --only "$large: (ours|timm channels_last$|compile max)"

{
  files=()
  for file in train-cuda model-cuda kernels-cuda ceilings model-autotuned-cuda; do
    [ ! -f "$work/$file.json" ] || files+=("$work/$file.json")
  done
  [ ${#files[@]} -eq 0 ] || python3 -m benchmarks.report "${files[@]}"
  echo
  echo "== tests"
  tail -n 40 "$work/tests.log"
} >"$out/table.txt" 2>&1
cat "$out/table.txt"
keep
exit 0
