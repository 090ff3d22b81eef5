#!/usr/bin/env bash
# Compile the patched library with CUDA for one architecture, to see that it does; no GPU is needed for that.
#   scripts/build_cuda.sh [ARCHITECTURE, default 86] [JOBS]
# Needs nvcc (CUDA 13). cuBLAS is taken from PyPI if the toolkit has none. About 25 minutes on two cores.
set -euo pipefail
architecture=${1:-86}
jobs=${2:-$(nproc)}
cd "$(dirname "$0")/.."
nvcc=$(command -v nvcc) || { echo "nvcc is needed: install the CUDA toolkit" >&2; exit 1; }
toolkit=$(dirname "$(dirname "$(realpath "$nvcc")")")
flags="-DGGML_CUDA=on -DCMAKE_CUDA_COMPILER=$nvcc -DCUDAToolkit_ROOT=$toolkit -DCMAKE_CUDA_ARCHITECTURES=$architecture -DGGML_CUDA_NCCL=OFF"
if ! ls "$toolkit"/lib64/libcublas.so* >/dev/null 2>&1; then
    folder=${XDG_CACHE_HOME:-$HOME/.cache}/kvcompose-gguf/cublas
    python3 -m pip install -q --target "$folder" --no-deps nvidia-cublas==13.0.2.14
    lib=$folder/nvidia/cu13
    # without a driver there is no libcuda to link, which the virtual memory pool needs
    flags="$flags -DCUDA_cublas_LIBRARY=$lib/lib/libcublas.so.13 -DCUDA_cublasLt_LIBRARY=$lib/lib/libcublasLt.so.13"
    export LD_LIBRARY_PATH="$lib/lib:$toolkit/lib64:${LD_LIBRARY_PATH:-}" # the build loads what it has made, and so will you
    flags="$flags -DCMAKE_CUDA_FLAGS=-I$lib/include -DGGML_CUDA_NO_VMM=ON"
fi
CMAKE_ARGS="$flags" python3 scripts/build_native.py --jobs "$jobs"
