#!/usr/bin/env bash
# Builds csrc/cpu without Python under AddressSanitizer + UndefinedBehaviorSanitizer and under ThreadSanitizer, and runs
# the checks of this folder on every instruction set of the machine. Any report ends it with an error.
#   CXX=g++ (or clang++)
set -euo pipefail
cd "$(dirname "$0")/../.."
CXX=${CXX:-g++}
BUILD=$(mktemp -d)  # of its own, so that two runs do not meet
trap 'rm -rf "$BUILD"' EXIT
JOBS=$(nproc)

# -O0: the kernels are deep templates, which sanitized builds optimise for minutes.
FLAGS="-std=c++20 -O0 -g -fopenmp -ffp-contract=off -Icsrc/include -Icsrc/cpu -Icsrc/testing"
FLAGS="$FLAGS -Wall -Wextra -fno-omit-frame-pointer"
AVX2="-mavx2 -mfma -mf16c -mbmi -mbmi2 -mpopcnt"
AVX512="$AVX2 -mavx512f -mavx512bw -mavx512dq -mavx512vl"
ASAN="-fsanitize=address,undefined -fno-sanitize-recover=all"
TSAN="-fsanitize=thread"

compile() {  # sanitizer name, source -> object
  local name=$1 source=$2 sanitize=$ASAN machine=""
  [ "$name" = tsan ] && sanitize=$TSAN
  case $source in
    *_avx2.cpp) machine=$AVX2 ;;
    *_avx512.cpp) machine=$AVX512 ;;
  esac
  # shellcheck disable=SC2086
  $CXX $FLAGS $sanitize $machine -c "$source" -o "$BUILD/$name/$(basename "$source").o"
}
export -f compile
export CXX BUILD FLAGS AVX2 AVX512 ASAN TSAN

mkdir -p "$BUILD/asan" "$BUILD/tsan"
for source in $(ls -S csrc/cpu/*.cpp) csrc/testing/*.cpp; do
  echo "asan $source"
  echo "tsan $source"
done | xargs -P "$JOBS" -L 1 bash -c 'set -e; compile "$0" "$1"'

# Linked without -fopenmp: gomp_threads.cpp stands in for libgomp.
$CXX -fsanitize=address,undefined "$BUILD"/asan/*.o -o "$BUILD/asan/checks" -pthread
$CXX -fsanitize=thread "$BUILD"/tsan/*.o -o "$BUILD/tsan/checks" -pthread

for isa in portable avx2 avx512; do
  echo "asan+ubsan, $isa:"
  PAIKERN_CPU_ISA=$isa "$BUILD/asan/checks"
done
echo "tsan:"
TSAN_OPTIONS=halt_on_error=1 "$BUILD/tsan/checks" 6
echo "sanitizers: no reports"
