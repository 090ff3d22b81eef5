"""The whole chain on a Vulkan device; Mesa's lavapipe, which computes on the CPU, is one (scripts/setup_vulkan.sh)."""

from __future__ import annotations

import os

import pytest
from support import chain, tiny

from kvcompose_gguf.native import library


def has_vulkan() -> bool:
    lib = library.load().llama_cpp._lib
    return hasattr(lib, "ggml_backend_vk_reg") and lib.ggml_backend_vk_get_device_count() > 0


os.environ.setdefault("GGML_VK_VISIBLE_DEVICES", "0")  # ggml leaves CPU devices out unless they are named
pytestmark = pytest.mark.skipif(not has_vulkan(), reason="the library has no Vulkan device (scripts/setup_vulkan.sh)")


@pytest.mark.parametrize("n_gpu_layers", [-1, 2], ids=["all-layers", "some-layers"])
@pytest.mark.parametrize("options", chain.CACHES)
def test_the_chain_on_a_vulkan_device_is_the_chain_on_the_cpu(tiny_model, options, n_gpu_layers):
    path = tiny_model(tiny.GQA_QUIET)
    local = chain.run(path, options | {"n_gpu_layers": 0, "offload_kqv": False, "op_offload": False})
    device = chain.run(path, options | {"n_gpu_layers": n_gpu_layers})
    assert device["device"] == [n_gpu_layers == -1 or il >= 2 for il in range(3)]
    # products of float16 on the device
    chain.compare(device, local, score_error=3e-2 if options["type_k"] == 8 else 1e-2, logit_error=3e-2)
