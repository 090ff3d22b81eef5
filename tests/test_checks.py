"""Sizes with units, in checks and in methods."""

from __future__ import annotations

from typing import Any

import pytest

from kvcompose_gguf import ConfigError, KVCompose
from kvcompose_gguf.methods import make_method
from kvcompose_gguf.support.checks import parse_bytes


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("0", 0), ("123", 123), (123, 123), ("1B", 1), ("512MB", 512_000_000), ("512 mb", 512_000_000), (" 2kB ", 2000),
        ("1.5GiB", 1_610_612_736), ("0.1GB", 100_000_000), ("1KiB", 1024), ("3TB", 3 * 10**12), ("1TiB", 1 << 40),
        ("2mIb", 2 << 20), ("0.0001kB", 0), ("90071992547409930001", 90071992547409930001), ("1.1GB", 1_100_000_000),
    ],
)  # fmt: skip
def test_a_size_is_a_number_of_bytes_or_has_a_unit(text: Any, n_bytes: int) -> None:
    assert parse_bytes("size", text) == n_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "MB",
        "much",
        "1.5",
        "-1",
        "-1MB",
        "1e6",
        "inf",
        "nan",
        "1,5GB",
        "1 M B",
        "1XB",
        "512M",
        "1..5GB",
        ".5GB",
        "٣MB",
        "0x10",
        True,
        1.5,
        None,
    ],
)
def test_what_is_not_a_size_is_refused_with_what_is_allowed(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"size=.* is not a size: give a whole number of bytes.* 512MB or 1.5GiB"):
        parse_bytes("size", text)


def test_a_method_takes_a_size_as_text() -> None:
    assert KVCompose(max_kv_bytes="1.5GiB") == KVCompose(max_kv_bytes=1_610_612_736)
    assert make_method("snapkv,max_kv_bytes=512MB").max_kv_bytes == 512_000_000
    assert make_method("snapkv", max_kv_bytes="2 kB").max_kv_bytes == 2000
    for wrong in ("much", "0MB"):
        with pytest.raises(ConfigError, match="max_kv_bytes="):
            KVCompose(max_kv_bytes=wrong)
    with pytest.raises(ConfigError, match="exactly one"):
        KVCompose(max_kv_bytes="1GB", compression_ratio=0.5)
