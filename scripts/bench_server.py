#!/usr/bin/env python3
"""Compares ``kvcompose serve`` with llama-server: token rates of one client, and latencies under load.

    python scripts/bench_server.py rate MODEL --llama-server BIN [--n-tokens 512,8000] [--repeats 5]
    python scripts/bench_server.py load MODEL [--llama-server BIN] [--clients 8] [--minutes 10]

``rate``: both servers run, one request at a time, with alternating sides. A prompt is read once, then continued by
``--n-predict`` tokens in every repeat. The client's clock gives the tokens per second, from the first to the last
token. The time to the first token is that of ``--first`` other prompts, which are new to both, after a first one that
does not count.
``load``: one server after the other. Every client sends its own seeded sequence of requests, the same to both servers:
prompts of 40 to 3,000 tokens, some of which continue an earlier one, and answers of 8 to 128 tokens. Memory is the
process's resident set. The last line is one JSON document. Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
from bench_speed import cpu_name

from kvcompose_gguf.models.resolve import resolve_model
from kvcompose_gguf.tasks.texts import load_texts

#: the mix of requests under load: tokens of the prompt, tokens of the answer
LENGTHS = ((40, 128), (40, 32), (300, 64), (300, 16), (1000, 32), (1000, 96), (3000, 8), (3000, 64))
#: how often a request continues the client's previous one, as in a conversation
P_CONTINUE = 0.3


@dataclass
class Running:
    """A running server."""

    url: str
    process: psutil.Process

    def rss(self) -> int:
        return int(self.process.memory_info().rss)


@contextlib.contextmanager
def running(command: Sequence[str]) -> Iterator[Running]:
    """Starts a server for the duration of the ``with`` block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            while not _is_healthy(url):
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(f"{command[0]} ended: {log.read().decode(errors='replace')[-2000:]}")
                time.sleep(0.1)
            yield Running(url, psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(30)


def _is_healthy(url: str) -> bool:
    with contextlib.suppress(httpx2.HTTPError):
        return bool(httpx2.get(f"{url}/health").status_code == 200)
    return False


@dataclass
class Answer:
    """Arrival times of an answer's tokens in seconds after the request, and its final event."""

    times: list[float] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


def ask(client: httpx2.Client, url: str, **body: Any) -> Answer:
    """Returns a streamed completion; raises RuntimeError if it fails."""
    answer, start = Answer(), time.perf_counter()
    with client.stream("POST", f"{url}/completion", json={"stream": True, "ignore_eos": True, **body}) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code} {response.read()[:200]!r}")
        for line in response.iter_lines():
            if not line.startswith("data: "):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            if event["stop"]:
                answer.end = event
            else:
                answer.times.append(time.perf_counter() - start)
    if not answer.end:
        raise RuntimeError("the stream ended without its last event")
    return answer


def tokens_of(url: str, n: int) -> list[int]:
    """Returns prose in which no sentence repeats."""
    text = " ".join(load_texts("generated").prose(n))  # a word is at least one token
    return list(httpx2.post(f"{url}/tokenize", json={"content": text}, timeout=60).json()["tokens"][:n])


def ours(args: argparse.Namespace, n_parallel: int, n_ctx: int) -> list[str]:
    return [
        sys.executable, "-m", "kvcompose_gguf", "serve", "-m", str(args.path), "-c", str(n_ctx), "-np", str(n_parallel),
        "--threads", str(args.threads), "--compression-ratio", str(args.ratio), "--cache-ram", str(args.cache_ram),
    ]  # fmt: skip


def theirs(args: argparse.Namespace, n_parallel: int, n_ctx: int) -> list[str]:
    return [
        args.llama_server, "-m", str(args.path), "-c", str(n_ctx), "-np", str(n_parallel), "-t", str(args.threads),
        "-tb", str(args.threads), "-fa", "on", "-b", "512", "--no-ui", "--cache-ram", str(args.cache_ram),
    ]  # fmt: skip


#
# rate
#


def rate(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    sizes = [int(n) for n in args.n_tokens.split(",")]
    n_slot = max(sizes) + args.n_predict + 32
    with (
        running(theirs(args, 1, n_slot)) as other,
        running(ours(args, 2, 2 * n_slot)) as mine,
        httpx2.Client(timeout=3600) as client,
    ):
        prose = tokens_of(other.url, max(sizes) * (args.first + 2))
        sides: dict[str, tuple[str, dict[str, Any]]] = {
            "llama-server": (other.url, {}),
            "ratio 0": (mine.url, {"id_slot": 0, "kv_compress": False}),
            f"ratio {args.ratio}": (mine.url, {"id_slot": 1}),
        }
        for n in sizes:
            rates: dict[str, list[float]] = {name: [] for name in sides}
            first: dict[str, list[float]] = {name: [] for name in sides}
            for repeat in range(args.first + 1):
                prompt = prose[(repeat + 1) * n : (repeat + 2) * n]
                for name, (url, more) in sides.items():
                    seconds = ask(client, url, prompt=prompt, n_predict=2, **more).times[0]
                    first[name] += [seconds] if repeat else []
            for repeat in range(args.repeats + 1):
                for name, (url, more) in sides.items():
                    answer = ask(client, url, prompt=prose[:n], n_predict=args.n_predict, seed=repeat, **more)
                    rates[name] += [answer.rate] if repeat else []  # the prompt is in the cache from the second on
            result[str(n)] = {
                name: {
                    "tokens_per_second": statistics.median(samples), "range": (min(samples), max(samples)),
                    "over_llama_server": _ratio(samples, rates["llama-server"]),
                    "first_token_seconds": statistics.median(first[name]),
                    "first_token_over_llama_server": _ratio(first[name], first["llama-server"]),
                }
                for name, samples in rates.items()
            }  # fmt: skip
            print(n, json.dumps(result[str(n)]), flush=True)
    return result


def _ratio(samples: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(samples, others, strict=True))


#
# load
#


@dataclass
class Load:
    """Measurements of many clients."""

    first: list[tuple[int, float]] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    n_tokens: int = 0
    rss: list[int] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def client_of(number: int, url: str, prose: list[int], end: float, load: Load) -> None:
    random_ = random.Random(number)
    prompt: list[int] = []
    # one connection per request: llama-server closes idle connections, which clients may see as an error
    with httpx2.Client(timeout=3600, limits=httpx2.Limits(max_keepalive_connections=0)) as client:
        while time.monotonic() < end:
            n_prompt, n_predict = random_.choice(LENGTHS)
            at = random_.randrange(len(prose) - n_prompt)
            fresh = prose[at : at + n_prompt]
            follows = random_.random() < P_CONTINUE and 0 < len(prompt) < 3000
            prompt = prompt + fresh[:40] if follows else fresh
            try:
                answer = ask(client, url, prompt=prompt, n_predict=n_predict)
            except (RuntimeError, httpx2.HTTPError) as error:
                with load.lock:
                    load.errors.append(repr(error))
                continue
            with load.lock:
                load.first.append((len(prompt), answer.times[0]))
                load.gaps += [b - a for a, b in itertools.pairwise(answer.times)]
                load.n_tokens += len(answer.times)


def loaded(command: list[str], args: argparse.Namespace) -> dict[str, Any]:
    load = Load()
    with running(command) as server:
        prose = tokens_of(server.url, 60_000)
        start = time.monotonic()
        end = start + 60 * args.minutes
        threads = [
            threading.Thread(target=client_of, args=(n, server.url, prose, end, load)) for n in range(args.clients)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(5)
            load.rss.append(server.rss())
        seconds = time.monotonic() - start
    third = len(load.rss) // 3
    return {
        "requests": len(load.first),
        "errors": len(load.errors),
        "first_errors": load.errors[:3],
        "tokens": load.n_tokens,
        "tokens_per_second": load.n_tokens / seconds,
        "seconds": seconds,
        "first_token": _percentiles([wait for _, wait in load.first]),
        "first_token_of_short_prompts": _percentiles([wait for n, wait in load.first if n <= 100]),
        "between_tokens": _percentiles(load.gaps),
        "rss_mb_of_thirds": [max(load.rss[k * third : (k + 1) * third]) / 1e6 for k in range(3)],
        "rss_mb": [round(n / 1e6) for n in load.rss[:: max(1, len(load.rss) // 24)]],
    }


def _percentiles(samples: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(samples, n=20, method="inclusive")
    return {"p50": cuts[9], "p95": cuts[18], "max": max(samples)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rate", "load"))
    parser.add_argument("model", help="a fetched model's name or a .gguf file")
    parser.add_argument("--llama-server", help="llama-server executable, built from the pinned source")
    parser.add_argument("--ratio", type=float, default=0.75)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cache-ram", type=int, default=1024, help="MiB for copies of what slots held, for both servers"
    )
    parser.add_argument("--n-tokens", default="512,8000", help="rate: prompt lengths")
    parser.add_argument("--n-predict", type=int, default=128, help="rate: answer length")
    parser.add_argument("--repeats", type=int, default=5, help="rate")
    parser.add_argument("--first", type=int, default=3, help="rate: prompts for the time to the first token")
    parser.add_argument("--clients", type=int, default=8, help="load")
    parser.add_argument("--parallel", type=int, default=4, help="load: number of slots, 4,096 tokens each")
    parser.add_argument("--minutes", type=float, default=10, help="load")
    args = parser.parse_args()
    args.path = Path(resolve_model(args.model))
    result: dict[str, Any] = {"model": args.path.name, "cpu": cpu_name(), "threads": args.threads}
    if args.what == "rate":
        result |= rate(args)
    else:
        sides = {"kvcompose serve": ours(args, args.parallel, 4096 * args.parallel)}
        if args.llama_server:
            sides["llama-server"] = theirs(args, args.parallel, 4096 * args.parallel)
        for name, command in sides.items():
            result[name] = loaded(command, args)
            print(name, json.dumps(result[name]), flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
