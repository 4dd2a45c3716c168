"""TRL's trainer with a teacher of another family: `python examples/trl_distill.py STUDENT TEACHER` (ids or paths)."""

import sys

import torch
from datasets import Dataset
from trl import DistillationConfig

from xtokmap.integrations.trl import DistillationTrainer

PROMPTS = ["What is the capital of France?", "Say hello in Spanish.", "Name a prime number.", "What is two plus two?"]


def distill(student, teacher, args):
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in PROMPTS]}),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    settings = DistillationConfig(
        "runs/trl",
        per_device_train_batch_size=4,
        max_completion_length=64,
        logging_steps=1,
        bf16=torch.cuda.is_available(),  # TRL's default is True, which transformers refuses without a GPU
    )
    distill(*sys.argv[1:3], settings).save_model()
