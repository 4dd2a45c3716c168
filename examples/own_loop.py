"""A plain PyTorch loop with a teacher of another family: `python examples/own_loop.py STUDENT TEACHER` (ids, paths)."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtokmap.torch import Pair

PROMPTS = ["What is the capital of France?", "Say hello in Spanish.", "Name a prime number.", "What is two plus two?"]


def distill(student, student_tokenizer, teacher, teacher_tokenizer, prompts=PROMPTS, steps=3):
    pair = Pair(student_tokenizer, teacher_tokenizer, loss="transfer_kl")
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    for step in range(steps):
        asked = pair.prompt_inputs(prompts, device=student.device)
        sampled = student.generate(**asked, max_new_tokens=32, do_sample=True, top_k=0)
        batch = pair.prepare(prompts, sampled[:, asked["input_ids"].shape[1] :], device=student.device)
        with torch.no_grad():
            scored = teacher(**batch.teacher_inputs)
        out = pair.loss(student(**batch.student_inputs), scored, batch)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(step, {name: round(value.item(), 3) for name, value in out.metrics.items()})


if __name__ == "__main__":
    paths = sys.argv[1:3]
    loaded = [kind.from_pretrained(path) for path in paths for kind in (AutoModelForCausalLM, AutoTokenizer)]
    distill(*loaded)
