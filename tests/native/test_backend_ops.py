"""Checks that every op in our graphs has a kernel on the device backends of the pinned llama.cpp, without a device. A new
version that drops one fails here."""

from __future__ import annotations

import re
import sys
import tarfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import llama_source  # noqa: E402

#: calls in our own sources that make graph nodes, and the ops that a backend must support for them
OPS = {
    "mul_mat": ["GGML_OP_MUL_MAT"],
    "soft_max_ext": ["GGML_OP_SOFT_MAX"],
    "pool_2d": ["GGML_OP_POOL_2D"],
    "scale": ["GGML_OP_SCALE"],
    "scale_inplace": ["GGML_OP_SCALE"],
    "tanh": ["GGML_OP_UNARY", "GGML_UNARY_OP_TANH"],
    "relu": ["GGML_OP_UNARY", "GGML_UNARY_OP_RELU"],
    "sub": ["GGML_OP_SUB"],
    "add": ["GGML_OP_ADD"],
    "cpy": ["GGML_OP_CPY"],
    "cont": ["GGML_OP_CONT"],
    "reshape_3d": ["GGML_OP_RESHAPE"],
    "permute": ["GGML_OP_PERMUTE"],
    "view_1d": ["GGML_OP_VIEW"],
    "view_2d": ["GGML_OP_VIEW"],
    "view_3d": ["GGML_OP_VIEW"],
    "view_4d": ["GGML_OP_VIEW"],
}
#: where each backend lists its supported ops
SUPPORTS_OP = {
    "cuda": ("ggml-cuda/ggml-cuda.cu", "ggml_backend_cuda_device_supports_op"),
    "metal": ("ggml-metal/ggml-metal-device.m", "ggml_metal_device_supports_op"),
    "vulkan": ("ggml-vulkan/ggml-vulkan.cpp", "ggml_backend_vk_device_supports_op"),
}
#: kernels of the one op that few other graphs use
POOL_2D = {
    "cuda": ("ggml-cuda/pool2d.cu", "pool2d_nchw_kernel"),
    "metal": ("ggml-metal/kernels/pool.metal", "kernel_pool_2d"),
    "vulkan": ("ggml-vulkan/vulkan-shaders/pool2d.comp", "void main"),
}


@cache
def source(path: str) -> str:
    """Returns a file of the pinned llama.cpp's ggml/src."""
    with tarfile.open(llama_source.archive_path(llama_source.read_pin())) as archive:
        member = next(name for name in archive.getnames() if name.endswith(f"vendor/llama.cpp/ggml/src/{path}"))
        file = archive.extractfile(member)
        assert file is not None, member
        return file.read().decode()


@cache
def function(path: str, name: str) -> str:
    """Returns the body of a C function, found by its braces."""
    text = source(path)
    found = re.search(rf"^(static )?bool {name}\([^;{{]*\{{", text, re.MULTILINE)
    assert found, name
    start = found.end()
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    raise AssertionError(f"{name} does not end")


def test_our_graphs_add_these_ops_and_no_others():
    used = set()
    for path in (ROOT / "patches" / "src" / "llama").glob("*.cpp"):
        used |= set(re.findall(r"\bggml_(\w+)\s*\((?:ctx|g\.ctx0), ", path.read_text()))
    assert used - {"new_tensor_2d"} == set(OPS)


@pytest.mark.parametrize("backend", SUPPORTS_OP)
@pytest.mark.parametrize("op", sorted({op for ops in OPS.values() for op in ops}))
def test_the_backend_supports_the_op(backend, op):
    assert re.search(rf"case {op}\b", function(*SUPPORTS_OP[backend])), f"{backend} has no {op}"


@pytest.mark.parametrize("backend", POOL_2D)
def test_pooling_is_a_kernel_and_not_a_promise(backend):
    path, name = POOL_2D[backend]
    assert name in source(path)


def test_an_op_that_does_not_exist_would_be_missed():
    assert not any("case GGML_OP_POOL_7D" in function(*where) for where in SUPPORTS_OP.values())
