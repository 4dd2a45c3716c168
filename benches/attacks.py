"""What hostile clients cost `serve-teacher`: python benches/attacks.py

The command itself, with a small model; each attack goes over raw sockets to a server of its own. A table: what the
attacker is told, how long the server gave it, the server's memory at its peak above what it had before, and how long an
honest request waits right after; printed and written to benches/results/attacks.md.
"""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import httpx2  # noqa: E402
import torch  # noqa: E402

import tiny  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "attacks.md"
KEY = "sk-of-the-server"
PATIENCE = 20.0  # seconds that an attack lasts at most
SERVE = [sys.executable, "-m", "xtokmap", "serve-teacher", "--port", "0", "--name", "t"]


@dataclass
class Server:
    port: int
    pid: int

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def peak(self) -> int:
        """MiB that the process has had at most."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) // 1024


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    options = (
        ["--max-seconds", "5"] if "--max-seconds" in subprocess.check_output([*SERVE, "--help"], text=True) else []
    )
    command = [*SERVE, "--model", str(folder), *options]
    environment = {**os.environ, "XTOKMAP_TEACHER_KEY": KEY}
    # What an old server prints of its own errors is not for the table.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout
        try:
            yield Server(int(process.stdout.readline().split()[3].rpartition(":")[2]), process.pid)
        finally:
            process.send_signal(signal.SIGKILL)


def head(request: str, *headers: str) -> bytes:
    return "\r\n".join([f"{request} HTTP/1.1", "Host: x", *headers, "", ""]).encode("latin-1")


def post(content: bytes, *headers: str, path: str = "/v1/completions", key: str = KEY) -> bytes:
    own = (f"Authorization: Bearer {key}", f"Content-Length: {len(content)}", "Connection: close")
    return head(f"POST {path}", *own, *headers) + content


def said(answer: bytes) -> str:
    """The status of each answer that came, and the words of the first."""
    if not answer:
        return "cut, no answer"
    statuses = [part[:3].decode() for part in answer.split(b"HTTP/1.1 ")[1:]]
    return ", ".join(statuses) or f"{answer[:20]!r}"


def sends(content: Callable[[], bytes]) -> Callable[[Server], str]:
    """Sends all of it, and waits for the answer."""

    def attack(server: Server) -> str:
        with server.connect() as connection:
            found = b""
            with suppress(OSError):  # cut while it sends; there may be an answer all the same
                connection.sendall(content())
            try:
                while piece := connection.recv(2**16):
                    found += piece
            except TimeoutError:
                return said(found) + ", kept open" if found else "kept open, no answer"
            except OSError:
                pass
            return said(found)

    return attack


def drips(first: bytes) -> Callable[[Server], str]:
    """A byte five times a second, after these."""

    def attack(server: Server) -> str:
        end = time.monotonic() + PATIENCE
        with server.connect() as connection:
            connection.sendall(first)
            connection.settimeout(0.2)
            with suppress(ConnectionError):
                while time.monotonic() < end:
                    connection.sendall(b"a")
                    with suppress(TimeoutError):
                        return said(connection.recv(2**16))
                return "kept open"
        return "cut, no answer"

    return attack


def leaves(server: Server) -> str:
    with server.connect() as connection:
        rows = ",".join(["[" + ",".join(["7"] * 1000) + "]"] * 200)
        connection.sendall(post(b'{"prompt": [' + rows.encode() + b"]}"))
        time.sleep(1)
    return "gone"


def idles(server: Server) -> str:
    kept.extend(server.connect() for _ in range(300))
    return f"{len(kept)} open"


kept: list[socket.socket] = []  # as long as the honest request takes
SECOND = head("GET /v1/models", f"Authorization: Bearer {KEY}", "Connection: close")
ATTACKS: dict[str, Callable[[Server], str]] = {
    "64 MiB of `[],` without the key": sends(lambda: post(b"[" + b"[]," * (64 * 2**20 // 3 - 1) + b"1]", key="no")),
    "64 MiB of `[],` with the key": sends(lambda: post(b"[" + b"[]," * (64 * 2**20 // 3 - 1) + b"1]")),
    "4 MiB of `[],` with the key": sends(lambda: post(b"[" + b"[]," * (4 * 2**20 // 3 - 1) + b"1]")),
    "headers in drops": drips(b"GET /health HTTP/1.1\r\nHost: "),
    "a body in drops, without the key": drips(head("POST /v1/completions", "Content-Length: 99999")),
    "a body in drops, with the key": drips(
        head("POST /v1/completions", "Content-Length: 99999", f"Authorization: Bearer {KEY}")
    ),
    "300 idle connections": idles,
    "200 rows, and gone": leaves,
    "1,025 rows, queue of 1,024": sends(lambda: post(b'{"prompt": [' + b"[1]," * 1024 + b"[1]]}")),
    "a model of NaN": sends(lambda: post(b'{"prompt": [1, 2], "return_logprob": true, "logprob_start_len": 0}')),
    "`Content-Length: ²`": sends(
        lambda: head("POST /v1/completions", f"Authorization: Bearer {KEY}", "Content-Length: \xb2")
    ),
    "Content-Length and Transfer-Encoding": sends(
        lambda: (
            head(
                "POST /v1/completions",
                f"Authorization: Bearer {KEY}",
                f"Content-Length: {17 + 5}",
                "Transfer-Encoding: chunked",
            )
            + b'{"prompt":[1]}     '
            + SECOND
        )
    ),
    "a second request in the body's place": sends(
        lambda: (
            head(
                "GET /v1/models", f"Authorization: Bearer {KEY}", f"Content-Length: {len(SECOND)}", "Connection: close"
            )
            + SECOND
        )
    ),
    "garbage after a request": sends(
        lambda: post(b'{"prompt": [1]}').replace(b"Connection: close\r\n", b"") + b"\0 \0\r\n"
    ),
    "half a character": sends(lambda: post(b'{"text": "\\ud800"}')),
    "half a character, raw": sends(lambda: post(b'{"text": "\xed\xa0\x80"}')),
    "100,000 times `[`": sends(lambda: post(b"[" * 100_000)),
    "an integer of 5,000 digits": sends(lambda: post(b'{"prompt": [' + b"1" * 5000 + b"]}")),
    "9,000 headers": sends(lambda: head("GET /health", *["a: b"] * 9000)),
}


def main() -> None:
    out = [
        "# What hostile clients cost `serve-teacher`",
        "",
        f"`python benches/attacks.py`, {platform.machine()}, {os.cpu_count()} cores. A small model behind the command, "
        "one server for each attack, with a key and, of what can be set, `--max-seconds 5`. Told: the status of each "
        "answer that came. After: how long the attacker had the server. Memory: the peak of the process above its peak "
        "before.",
        "",
        "| attack | what it is told | after, s | memory, MiB | next honest request, s |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(out), flush=True)
    with tempfile.TemporaryDirectory() as name:
        sound, broken = Path(name, "sound"), Path(name, "broken")
        for folder in (sound, broken):
            model = tiny.teacher_model()
            if folder is broken:
                with torch.no_grad():
                    model.get_input_embeddings().weight.fill_(torch.nan)
            model.save_pretrained(folder)
            tiny.teacher_tokenizer().save_pretrained(folder)
        for what, attack in ATTACKS.items():
            with serving(broken if "NaN" in what else sound) as server:
                honest = {"headers": {"Authorization": f"Bearer {KEY}"}, "timeout": 120.0}
                url = f"http://127.0.0.1:{server.port}"
                httpx2.post(url + "/v1/completions", json={"prompt": [1, 2, 3]}, **honest)  # type: ignore[arg-type]
                before, start = server.peak(), time.monotonic()
                found = attack(server)
                took, start = time.monotonic() - start, time.monotonic()
                try:
                    if "NaN" in what:
                        status = httpx2.get(url + "/v1/models", **honest).status_code  # type: ignore[arg-type]
                    else:
                        body = {"prompt": [1, 2, 3]}
                        status = httpx2.post(url + "/v1/completions", json=body, **honest).status_code  # type: ignore[arg-type]
                    next_one = f"{time.monotonic() - start:.2f}" + ("" if status == 200 else f" ({status})")
                except httpx2.HTTPError as error:
                    next_one = f"none in {time.monotonic() - start:.0f} ({type(error).__name__})"
                out.append(f"| {what} | {found} | {took:.1f} | {server.peak() - before} | {next_one} |")
                print(out[-1], flush=True)
                while kept:
                    kept.pop().close()
    RESULTS.write_text("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
