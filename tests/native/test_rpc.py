"""Tests device memory that is not host memory: layers spread over two of llama.cpp's RPC servers on loopback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from support import chain, tiny
from support.processes import free_port, wait_for

from kvcompose_gguf import ConfigError, add_rpc_server


@pytest.fixture(scope="module")
def servers() -> Iterator[list[str]]:
    """Returns the endpoints of two servers with one thread each."""
    ports = [free_port() for _ in range(2)]
    command = [sys.executable, "-m", "kvcompose_gguf", "rpc-server", "--threads", "1", "--port"]
    processes = [subprocess.Popen([*command, str(port)], stdout=subprocess.DEVNULL) for port in ports]
    try:
        for port in ports:
            wait_for(port)
        yield [f"127.0.0.1:{port}" for port in ports]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("n_gpu_layers", [-1, 2], ids=["all-layers", "some-layers"])
@pytest.mark.parametrize("options", chain.CACHES)
def test_the_chain_on_two_servers_is_the_chain_in_one_process(tiny_model, servers, options, n_gpu_layers):
    path = tiny_model(tiny.GQA_QUIET)
    local = chain.run(path, options)
    remote = chain.run(path, options | {"n_gpu_layers": n_gpu_layers}, servers)
    on_device = [n_gpu_layers == -1 or il >= 2 for il in range(3)]  # the last layers go first, the output counts as one
    assert remote["device"] == on_device
    assert local["device"] == [False] * 3
    assert len(set(remote["buffers"])) == 2
    # Keys and values of three layers, four composes. A device does not gather transposed values, nor q8_0: the 34 bytes of
    # a head are no whole number of integers
    on_each = 0 if options["type_k"] == 8 else 2 if options["flash_attn"] else 1
    assert local["n_host_gathers"] == 4 * 3 * 2
    assert remote["n_host_gathers"] == 4 * (3 * 2 - on_each * sum(on_device))
    chain.compare(remote, local, score_error=2e-2 if options["type_k"] == 8 else 2e-3, logit_error=1e-2)


@pytest.mark.parametrize("endpoint", ["localhost", ":1", "localhost:", "localhost:x", "127.0.0.1:1", "127.0.0.1:99999"])
def test_a_missing_server_is_an_error_and_does_not_end_the_process(endpoint):
    with pytest.raises(ConfigError, match="endpoint"):
        add_rpc_server(endpoint)
