#!/usr/bin/env bash
# On a bare machine with an NVIDIA GPU, in nine minutes: build for that GPU, run the gpu tests, measure its ceilings, the kernels
# and the nets. Installs nothing and needs no network.
#
#   bash benchmarks/gpu.sh OUTDIR
#
# Every part has a limit and is skipped, with a line, when the nine minutes are over. JSON and logs go to OUTDIR, the tables come
# last. Fails only where the build does, or where there is no GPU.
set -uo pipefail
[ $# -eq 1 ] || { echo "usage: bash benchmarks/gpu.sh OUTDIR" >&2; exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.."
end=$((SECONDS + 530))
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
command -v nvcc >/dev/null || PATH="/usr/local/cuda/bin:$PATH"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" TRITON_CACHE_DIR="$scratch/triton"

# part NAME LIMIT COMMAND...: LIMIT in seconds, cut to what is left. LEFT in the command becomes that, less ten to end in.
part() {
  local name=$1 limit=$2 left=$((end - SECONDS)) began=$SECONDS rc
  shift 2
  [ "$limit" -lt "$left" ] || limit=$left
  if [ "$limit" -lt 20 ]; then echo "== $name: skipped, $left s are left"; return 1; fi
  echo "== $name (at most $limit s)"
  timeout -k 10 "$limit" "${@/#LEFT/$((limit - 10))}" >"$out/$name.log" 2>&1
  rc=$?
  echo "== $name: rc $rc after $((SECONDS - began)) s"
  [ $rc -eq 0 ] || tail -n 12 "$out/$name.log"
  return $rc
}

arch=$(python3 -c 'import torch; p = torch.cuda.get_device_properties(0); print(f"{p.major}.{p.minor}")') || {
  echo "gpu.sh: torch finds no CUDA device" >&2
  exit 1
}
part build 180 env TORCH_CUDA_ARCH_LIST="$arch" EFFNET_FAST_CUDA=1 MAX_JOBS="$(nproc)" \
  python3 setup.py -q build_ext --inplace --build-temp "$scratch/temp" --build-lib "$scratch/lib" || exit 1
part tests 90 python3 -m pytest tests -m gpu -q -p no:cacheprovider --continue-on-collection-errors --maxfail=30
part ceilings 60 python3 -m benchmarks.ceilings --out "$out/ceilings.json"
run=(python3 -m benchmarks.run --device cuda)
part kernels 110 "${run[@]}" --suite kernels --out "$out/kernels-cuda.json" --only 'ours|eager' --seconds LEFT
part model 170 "${run[@]}" --suite model --out "$out/model-cuda.json" --only ': (?!compile max)' --seconds LEFT
part model-autotuned 150 "${run[@]}" --suite model --out "$out/model-autotuned-cuda.json" \
  --only ': (ours|timm channels_last|compile max)' --seconds LEFT
part kernels-compiled 120 "${run[@]}" --suite kernels --out "$out/kernels-compiled-cuda.json" \
  --only ': (ours|eager channels_last|compile default)' --seconds LEFT

echo
echo "== tests"
tail -n 4 "$out/tests.log"
for file in ceilings kernels-cuda model-cuda model-autotuned-cuda kernels-compiled-cuda; do
  [ ! -f "$out/$file.json" ] || { echo && echo "== $file"; python3 -m benchmarks.report "$out/$file.json"; }
done
exit 0
