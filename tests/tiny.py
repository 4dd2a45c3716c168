"""A tiny pair of model families, made in the test: byte-level BPE for the student, byte fallback for the teacher."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = [
    "the quick brown fox jumps over the lazy dog and runs away",
    "what is the colour of the sky? the sky is blue, the grass is green",
    "naïve café, schöne Grüße, 你好 世界, 1234567890 + 42 = ?",
    "def add(a, b):\n    return a + b\n",
]


@functools.cache
def student_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return fast


@functools.cache
def teacher_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    pieces = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*special, *pieces], show_progress=False)
    tokenizer.train_from_iterator([t.replace(" ", "▁") for t in TEXT[:2]], trainer)
    # The byte pieces are ordinary tokens of the model, not special ones.
    model = Tokenizer.from_str(tokenizer.to_str()).model
    plain = Tokenizer(model)
    plain.normalizer, plain.decoder = tokenizer.normalizer, tokenizer.decoder
    plain.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


SIZE: dict[str, int] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def student_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(student_tokenizer()),
        **SIZE,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def teacher_model(seed: int = 1) -> Gemma2ForCausalLM:
    """Gemma 2: another architecture, with capped logits."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=len(teacher_tokenizer()),
        **SIZE,
        head_dim=8,
        final_logit_softcapping=3.0,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config)


def pair() -> tuple[Any, Any, Any, Any]:
    return student_model(), student_tokenizer(), teacher_model(), teacher_tokenizer()
