"""``kvcompose doctor`` names the devices that are there, not what the library was compiled for."""

from __future__ import annotations

import ctypes
import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from support import any_arch, tiny
from support.arch_list import COMPRESSED
from support.llamas import F16
from support.processes import free_port, wait_for

from kvcompose_gguf import ConfigError
from kvcompose_gguf.cli import doctor
from kvcompose_gguf.native import about, bindings, library
from kvcompose_gguf.native.devices import Device, find_devices

CPU = Device("CPU", "Some Processor", "CPU", 64_000_000_000, 32_500_000_000)


def printed() -> str:
    out = io.StringIO()
    doctor.doctor(Console(file=out, width=200))
    return out.getvalue()


def test_a_machine_without_a_gpu_is_said_to_have_none_though_rpc_is_compiled_in(monkeypatch):
    assert library.load().llama_supports_rpc()
    found = find_devices(library.load().llama_cpp._lib)
    monkeypatch.setattr(about, "find_devices", lambda lib: [device for device in found if device.kind == "CPU"])
    text = printed()
    assert "GPU offload" not in text
    assert [line.split(maxsplit=1)[1].strip() for line in text.splitlines() if line.startswith("GPU")] == [
        "none: all layers run on the CPU"
    ]


def test_the_processor_is_shown_with_its_memory():
    devices = find_devices(library.load().llama_cpp._lib)
    cpus = [device for device in devices if device.kind == "CPU"]
    assert len(cpus) == 1
    assert cpus[0].name == "CPU"
    assert 0 < cpus[0].n_bytes_free <= cpus[0].n_bytes
    assert f"{cpus[0].n_bytes / 1e9:.1f} GB of memory" in printed()


def test_the_device_of_an_rpc_server_is_listed_by_name():
    port = free_port()
    command = [sys.executable, "-m", "kvcompose_gguf", "rpc-server", "--threads", "1", "--port", str(port)]
    code = (
        "from kvcompose_gguf import add_rpc_server; from kvcompose_gguf.cli import doctor; from rich.console import Console; "
        f"add_rpc_server('127.0.0.1:{port}'); doctor.doctor(Console(width=200))"
    )
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(port)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        finally:
            server.kill()
    gpus = [line for line in done.stdout.splitlines() if line.startswith("GPU")]
    assert len(gpus) == 1, done.stdout + done.stderr
    assert f"127.0.0.1:{port}" in gpus[0]
    assert "GB of memory" in gpus[0]


@pytest.mark.parametrize(
    ("kind", "title"), [("GPU", "GPU"), ("IGPU", "integrated GPU"), ("ACCEL", "accelerator"), ("type 9", "type 9")]
)
def test_every_kind_of_device_has_a_line(kind, title):
    card = Device("X0", "A Card", kind, 24_000_000_000, 23_100_000_000)
    findings = doctor.device_findings([card, CPU])
    assert [(finding.name, finding.value) for finding in findings] == [
        ("CPU", "CPU: Some Processor, 64.0 GB of memory, 32.5 GB free"),
        (title, "X0: A Card, 24.0 GB of memory, 23.1 GB free"),
    ]


def test_a_device_that_does_not_know_its_memory_is_shown_without_it():
    assert str(Device("BLAS", "OpenBLAS", "ACCEL", 0, 0)) == "BLAS: OpenBLAS"


def test_devices_are_read_through_the_c_interface():
    handles = {
        10: (b"CPU", b"Some Processor", 0, 64, 32),
        11: (b"CUDA0", b"Some Card", 1, 24, 23),
        12: (b"?", b"New", 9, 1, 0),
    }

    def memory(handle, free, total):
        free._obj.value, total._obj.value = handles[handle][4], handles[handle][3]

    functions = {
        "ggml_backend_dev_count": lambda: len(handles), "ggml_backend_dev_get": lambda i: 10 + i,
        "ggml_backend_dev_name": lambda h: handles[h][0], "ggml_backend_dev_description": lambda h: handles[h][1],
        "ggml_backend_dev_type": lambda h: handles[h][2], "ggml_backend_dev_memory": memory,
    }  # fmt: skip
    lib = SimpleNamespace(**functions)
    assert find_devices(lib) == [
        Device("CPU", "Some Processor", "CPU", 64, 32), Device("CUDA0", "Some Card", "GPU", 24, 23), Device("?", "New", "type 9", 1, 0)
    ]  # fmt: skip
    assert lib.ggml_backend_dev_get.restype is ctypes.c_void_p  # 64 bits, not the int that ctypes guesses
    assert set(bindings._DEVICE_FUNCTIONS) == set(functions)


def told_of(path: Path) -> tuple[bool, str]:
    out = io.StringIO()
    return doctor.doctor_of(path, Console(file=out, width=200)), out.getvalue()


def test_the_memory_of_a_model_is_known_before_it_is_loaded(make_llama, tiny_model):
    config = tiny.ARCHITECTURES["gemma3"]
    llama = make_llama(config, type_k=F16, type_v=F16)
    n_bytes = sum(layer.n_bytes_row for layer in llama.kv_layers)
    is_fine, text = told_of(tiny_model(config))
    assert is_fine
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "compressed 2 layers: 2, 5; there are also layers with sliding windows, which do not grow" in lines
    assert "architecture gemma3, 6 layers, trained for 4,096 tokens" in lines
    assert f"a token {n_bytes:,} bytes in these layers" in lines
    full, less = n_bytes * 8192 / 1e6, n_bytes * 2048 / 1e6
    assert f"8,192 (longer than it was trained for) {full:.1f} MB {less:.1f} MB" in lines


def test_recurrent_layers_are_told_of(tmp_path):
    _, text = told_of(any_arch.write(COMPRESSED["lfm2"], tmp_path / "lfm2.gguf"))
    assert "2 layers: 0, 2; there are also layers with a recurrent state, which do not grow" in " ".join(text.split())


def test_a_model_that_is_refused_is_told_why(tiny_model):
    is_fine, text = told_of(tiny_model(tiny.REFUSED["bloom"]))
    assert not is_fine
    assert "ALiBi" in text
    assert "MB" not in text


def test_what_is_no_model_is_an_error_in_a_line(tmp_path, capfd):
    (tmp_path / "no.gguf").write_text("no")
    with pytest.raises(ConfigError, match="no model that this llama"):
        told_of(tmp_path / "no.gguf")
    assert capfd.readouterr().err == ""
