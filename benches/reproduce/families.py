"""Two model families, small enough to be trained here: other tokenizers, and other architectures.

Three arrangements of the tokenizers: the student splits numbers into digits and the teacher merges them; the student
takes pairs of digits together and the teacher splits them; and crossing, where the student joins a sign with the digit
behind it and the teacher with the digit before it.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reproduce.tasks import TASKS, Chain, Problem, problem_of, solve
from xtokmap._core import XTokMapError

#: How the student's and the teacher's tokenizer cut.
ARRANGEMENTS = {
    "student_finer": ("digits", "numbers"),
    "teacher_finer": ("pairs", "digits"),
    "crossing": ("before", "after"),
}

#: What a pre-tokenizer keeps together beside words, and how many tokens the vocabulary has.
_CUTS: dict[str, tuple[str, int]] = {
    "digits": (r"[0-9]", 102),
    "numbers": (r"[0-9]+", 400),
    "pairs": (r"[0-9]{1,2}", 188),
    "before": (r"[-+=;#]?[0-9]", 160),
    "after": (r"[0-9][-+=;#]?", 160),
}

#: The learning rate of a student before it is handed over, and over how many steps it then falls to nothing.
STUDENT_RATE, ANNEALED = 2e-3, 50

#: Behind the problem; a teacher is told in how many ways it may answer.
STUDENT_TEMPLATE = "{prompt}>"


def teacher_template(ways: int) -> str:
    """The prompt format of a teacher that writes in so many ways, the student's own among them."""
    return f"{{prompt}}?{ways}>"


@cache
def tokenizer(cut: str, task: str) -> Any:
    """A BPE tokenizer learned from solutions in all ways: a transformers fast tokenizer whose end of turn is `<end>`.

    Args:
        cut: `digits`, `numbers` (merged, up to whole ones), `pairs` of digits, counted from the left, `before` (a sign
            joins the digit behind it), `after`.
        task: name of the task.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pattern, size = _CUTS[cut]
    rng = random.Random(f"tokenizer {task}")
    texts = []
    for k in range(4000):
        problem = TASKS[task].draw(rng)
        template = teacher_template((1, 2, 8)[k % 3]) if k % 2 else STUDENT_TEMPLATE
        prompt = template.replace("{prompt}", TASKS[task].prompt(problem))
        texts.append(prompt + solve(TASKS[task], problem, k % 8, rng).text)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"{pattern}| ?[a-z]+|[^0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<end>"], show_progress=False)
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")


def student_model(vocab: int) -> Any:
    """GPT-2's architecture: 2 layers, width 64, learned positions, LayerNorm."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocab, n_positions=192, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.1,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def teacher_model(vocab: int) -> Any:
    """GPT-NeoX's architecture: 3 layers, width 128, rotary positions, parallel residuals."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=vocab, max_position_embeddings=192, hidden_size=128, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=4, rotary_pct=1.0, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
        initializer_range=0.06,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


Example = tuple[Problem, int, Chain]


def encode(
    tokenizer: Any, task: str, examples: Sequence[Example], template: Callable[[int], str]
) -> tuple[Tensor, Tensor]:
    """Ids and labels of worked examples: int64 `[B, T]`; labels are -100 on prompts, on wrong numbers and on padding.

    Args:
        tokenizer: of the model that learns.
        task: name of the task.
        examples: problem, in how many ways its writer might have answered, and the answer.
        template: the prompt format for a number of ways.
    """
    stop = tokenizer.eos_token_id
    prompts = [template(ways).replace("{prompt}", TASKS[task].prompt(problem)) for problem, ways, _ in examples]
    prompt_ids = tokenizer(prompts).input_ids
    answers = tokenizer([chain.text for *_, chain in examples], return_offsets_mapping=True)
    rows, labels = [], []
    for p, ids, offsets, (*_, chain) in zip(
        prompt_ids, answers.input_ids, answers.offset_mapping, examples, strict=True
    ):
        wrong = chain.wrong
        rows.append([*p, *ids, stop])
        learned = [
            -100 if any(a < end and start < b for start, end in wrong) else i
            for i, (a, b) in zip(ids, offsets, strict=True)
        ]
        labels.append([-100] * len(p) + learned + [stop])
    width = max(map(len, rows))
    ids = torch.tensor([row + [stop] * (width - len(row)) for row in rows])
    return ids, torch.tensor([row + [-100] * (width - len(row)) for row in labels])


def fit(
    model: Any,
    draw: Callable[[random.Random], tuple[Tensor, Tensor]],
    *,
    steps: int,
    rate: Callable[[int], float],
    seed: str,
    muon: bool = False,
    until: Callable[[int], bool] | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Supervised training from `draw`'s batches with AdamW.

    Args:
        model: what is trained; left in evaluation mode.
        draw: makes ids and labels from a random generator.
        steps: updates, at most.
        rate: the learning rate of a step, by how many there were before it.
        seed: of the generator.
        muon: train the matrices with Muon (Keller Jordan, 2024; in PyTorch from 2.9), which takes fewer steps.
        until: asked after every step; ends the training when it says so.
        say: hears of the progress, every 250 steps.
    """
    rng = random.Random(seed)
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    matrices = [p for p in model.parameters() if muon and p.ndim == 2 and id(p) not in embeddings]
    own = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in own]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.01)]
    if muon:
        if not hasattr(torch.optim, "Muon"):
            raise XTokMapError(f"torch {torch.__version__} has no Muon, which trains these models: 2.9 has it")
        optimizers.append(torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    model.train()
    began = time.perf_counter()
    for step in range(steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate(step)
        ids, labels = draw(rng)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if say is not None and (step + 1) % 250 == 0:
            rest = (time.perf_counter() - began) * (steps - step - 1) / (step + 1)
            say(f"step {step + 1} of {steps}, loss {float(loss.detach()):.3f}, {rest:.0f} s to go")
        if until is not None and until(step + 1):
            break
    model.eval()


def fit_teacher(task: str, cut: str, *, steps: int, say: Callable[[str], None] | None = None) -> Any:
    """A teacher that writes in 1, 2 or 8 ways as its prompt says.

    The last two fifths of its training have mistakes in them, one computed number in four, and what follows consistent
    with these. It learns what follows, and not the mistake: a teacher of clean chains alone has nothing to say
    to a student that went wrong.
    """
    made = tokenizer(cut, task)
    torch.manual_seed(0)
    model = teacher_model(len(made))
    clean = steps - steps * 2 // 5
    seen = 0

    def draw(rng: random.Random) -> tuple[Tensor, Tensor]:
        nonlocal seen
        seen += 1
        mistakes = 0.25 if seen > clean else 0.0
        examples = []
        for _ in range(96):
            problem, ways = problem_of(TASKS[task], rng), rng.choice((1, 2, 8, 8))
            examples.append((problem, ways, solve(TASKS[task], problem, rng.randrange(ways), rng, mistakes)))
        return encode(made, task, examples, teacher_template)

    def rate(step: int) -> float:
        return 3e-3 * min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / steps))

    fit(model, draw, steps=steps, rate=rate, seed=f"teacher {task} {cut}", muon=True, say=say)
    return model


def fit_student(
    task: str,
    cut: str,
    *,
    seed: int,
    judged: Callable[[Any], float],
    target: float = 0.5,
    steps: int = 4000,
    say: Callable[[str], None] | None = None,
) -> Any:
    """A student that knows one way of writing, from right answers, and does not compute well.

    Its training ends with a decay to nothing. A student that is stopped at a constant rate gets better from any
    training at a small rate, by losing the noise of its own, and that would be taken for something it has learnt. So
    the training goes on at a constant rate, and every 20 steps a copy of the model is annealed and judged.

    Args:
        task: name of the task.
        cut: of its tokenizer.
        seed: of its weights and of the answers.
        judged: a model's share of right answers.
        target: the share that the annealed student is to reach.
        steps: at most, before the decay.
        say: hears of the progress.
    """
    made = tokenizer(cut, task)
    torch.manual_seed(seed)
    model = student_model(len(made))
    annealed: Any = None

    def draw(rng: random.Random) -> tuple[Tensor, Tensor]:
        problems = [problem_of(TASKS[task], rng) for _ in range(64)]
        return encode(made, task, [(p, 1, solve(TASKS[task], p, 0, rng)) for p in problems], lambda _: STUDENT_TEMPLATE)

    def enough(step: int) -> bool:
        nonlocal annealed
        # What is far from the target will not get there by the decay.
        if step % 20 or (step < steps and judged(model) < target / 3):
            return False
        annealed = copy.deepcopy(model)
        own = f"student {task} {cut} {seed} {step}"
        fit(annealed, draw, steps=ANNEALED, rate=lambda k: STUDENT_RATE * (1 - k / ANNEALED), seed=own)
        return judged(annealed) >= target

    def rate(step: int) -> float:
        return STUDENT_RATE * min(1.0, (step + 1) / 50)

    fit(model, draw, steps=steps, rate=rate, seed=f"student {task} {cut} {seed}", until=enough, say=say)
    return annealed
