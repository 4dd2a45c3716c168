"""One training step, part by part, beside what else there is: python benches/step.py [--threads 1] [--wall]

The same models, prompts, completions, dtype and threads for all: xtokmap's loop (`train.run.Run`, as a run is by
default), xtokmap's trainer in TRL, and TRL's GOLDTrainer with its defaults for other tokenizers (ULD: all
probabilities sorted) and with its hybrid loss. Of GOLD its own code runs, from the batch to the optimizer; only what
`generate` returns is replaced, by completions that are the same for all. The base is what any method has to do: both
models' passes with their heads, and the backward pass of a cross entropy through the student's.

Each has a process of its own, all are alive at once and make their steps in turns; the first step, that makes the
optimizer's state, does not count. Writes benches/results/step.md.
"""

from __future__ import annotations

import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import base64
import ctypes
import functools
import importlib.metadata
import json
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from torch import Tensor

from memory import resident

RESULTS = Path(__file__).parent / "results"
NAMES = {
    "base": "the passes that any method needs",
    "loop": "xtokmap's loop",
    "trl": "xtokmap in TRL",
    "gold": "TRL GOLD, ULD",
    "gold-hybrid": "TRL GOLD, hybrid",
}
LEGEND = """\
Sampling is in a row of its own. Memory is the peak of a step's process above what is resident before it, the weights
and the optimizer's state; the gradient of all weights, that every method has, is taken off in the row below. The loss
is all that is left of a step without sampling, optimizer and the bodies' passes (of their backward pass, what it takes
by itself): retokenizing, heads, what is compared, the gradient in the heads, health. `health` is what the trainers log
beside: the loop's page, the entropy of every row in TRL. xtokmap forms the gradient in the heads together with the
loss; the others do it in `backward`."""
#: Parts that are looked at as a whole, whatever runs inside them.
WHOLE = ("sample", "health")
#: What is neither sampling nor the optimizer, in the order of the table.
PARTS = ("retokenize", "student's body", "teacher's body", "heads and loss", "backward", "health", "rest")


class Clock:
    """Time by part; a part that begins inside another is not counted in that one."""

    def __init__(self, wall: bool) -> None:
        self.now = time.perf_counter if wall else time.process_time
        self.parts: dict[str, float] = {}
        self._open: list[list[Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if any(part in WHOLE for part, _ in self._open):
            yield
            return
        start = self.now()
        self._open.append([name, 0.0])
        try:
            yield
        finally:
            took = self.now() - start
            inside = self._open.pop()[1]
            self.parts[name] = self.parts.get(name, 0.0) + took - inside
            if self._open:
                self._open[-1][1] += took

    def on(self, owner: Any, name: str, part: str) -> None:
        """Counts the calls of a function of a module, a class or an object as a part."""
        fn = getattr(owner, name)

        @functools.wraps(fn)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(part):
                return fn(*args, **kwargs)

        setattr(owner, name, timed)


class Turns:
    """Steps that are made when they are asked for, and what each took."""

    def __init__(self, clock: Clock, answer: Any) -> None:
        self.clock, self.answer = clock, answer
        self._start = self._resident = 0.0

    def tell(self, **found: Any) -> None:
        print(json.dumps(found), file=self.answer, flush=True)

    def begin(self) -> str:
        """Waits for the turn, and says what it was asked for. What is resident then is not the step's memory."""
        asked = sys.stdin.readline()
        if not asked:
            sys.exit(0)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
        self._resident = resident("VmRSS")
        self.clock.parts.clear()
        self._start = self.clock.now()
        return asked.strip()

    def end(self, **more: float) -> None:
        seconds = self.clock.now() - self._start
        parts = dict(self.clock.parts)
        parts["rest"] = seconds - sum(parts.values())
        self.tell(parts=parts, peak=resident("VmHWM") - self._resident, **more)


# ---- what is trained ---------------------------------------------------------------------------------------------


def made(hidden: int, layers: int) -> tuple[Any, Any, Any, Any]:
    """Qwen's vocabulary learns from DeepSeek V3's, both ByteLevel: small bodies, tied heads, random weights."""
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.convert_slow_tokenizer import TikTokenConverter

    import families
    import real_tokenizers as real

    pattern, special = real.ENCODINGS["qwen"]
    with tempfile.NamedTemporaryFile("wb", suffix=".tiktoken") as file:
        file.write(b"".join(base64.b64encode(t) + b" %d\n" % rank for t, rank in real.ranks("qwen").items()))
        file.flush()
        qwen = TikTokenConverter(file.name, pattern=pattern, extra_special_tokens=list(special)).converted()
    student = families.of_family(qwen, "qwen3")
    teacher = families.of_family(Tokenizer.from_file(str(real.path("deepseek"))), "deepseek-v3.1")
    student.pad_token, teacher.pad_token = "<|endoftext|>", teacher.eos_token
    models = []
    for seed, (tokenizer, vocabulary) in enumerate(((student, 151_936), (teacher, 129_280))):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=max(len(tokenizer), vocabulary),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
        models.append(LlamaForCausalLM(config))
    return models[0], student, models[1], teacher


def trained(args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """Student, its tokenizer, teacher, its tokenizer."""
    if args.pair == "made":
        return made(args.hidden, args.layers)
    from xtokmap import demo
    from xtokmap.models import load

    sides = [load(str(demo.fetch(which)), torch.device("cpu")) for which in (demo.GEMMA, demo.SMOLLM2)]
    first, second = sides if args.pair == "demo" else sides[::-1]
    return *first, *second


def prompts(count: int) -> list[str]:
    text = (resources.files("xtokmap") / "data" / "prompts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["prompt"] for line in text.splitlines()[:count]]


def completions(tokenizer: Any, rows: int, tokens: int) -> list[list[int]]:
    """English prose and code, cut at the longest length of an answer."""
    import corpus

    text = "\n".join(corpus.KINDS[kind] for kind in ("prose", "code"))
    ids = tokenizer(text * (1 + rows * tokens // 300), add_special_tokens=False).input_ids
    return [ids[k * tokens : (k + 1) * tokens] for k in range(rows)]


def answering(model: Any, clock: Clock, answers: list[list[int]]) -> None:
    """Has a model sample as it would, and answer something else."""
    generate = model.generate

    def answered(input_ids: Tensor, **options: Any) -> Any:
        with clock("sample"):
            generate(input_ids=input_ids, **options)
        found = torch.cat([input_ids, torch.tensor(answers)], 1)
        return SimpleNamespace(sequences=found) if options.get("return_dict_in_generate") else found

    model.generate = answered


# ---- who trains it -----------------------------------------------------------------------------------------------


def base(args: argparse.Namespace, turns: Turns, pair: tuple[Any, ...], answers: list[list[int]]) -> None:
    from xtokmap.chat import render
    from xtokmap.torch import Pair
    from xtokmap.torch.completions import completion_rows, flat_ids

    student, tokenizer, teacher, teacher_tokenizer = pair
    asked = [[{"role": "user", "content": text}] for text in prompts(args.rows)]
    batch = Pair(tokenizer, teacher_tokenizer).prepare(
        (render(tokenizer, asked), render(teacher_tokenizer, asked)), answers
    )
    ids, clock = flat_ids(answers, torch.device("cpu")), turns.clock
    while True:
        turns.begin()
        with torch.no_grad():
            rows = completion_rows(teacher, batch.teacher_prompt_ids, batch.teacher_ids)
            with clock("heads and loss"):
                rows.slice(0, rows.shape[0])
        rows = completion_rows(student, batch.student_prompt_ids, batch.student_ids)
        with clock("heads and loss"):
            loss = torch.nn.functional.cross_entropy(rows.slice(0, rows.shape[0]), ids)
        with clock("backward"):
            loss.backward()
        found = dict(clock.parts)
        # Of the backward pass the body's part, which is no loss's, by itself; outside of the step.
        student.zero_grad()
        hidden = completion_rows(student, batch.student_prompt_ids, batch.student_ids).rows
        start = clock.now()
        hidden.backward(torch.full_like(hidden, 1e-3))
        body = clock.now() - start
        student.zero_grad()
        clock.parts.clear()
        clock.parts.update(found)
        turns.tell(parts=found, peak=resident("VmHWM") - turns._resident, body=body)


def loop(args: argparse.Namespace, turns: Turns, pair: tuple[Any, ...], answers: list[list[int]]) -> None:
    from xtokmap.teachers.local import LocalTeacher
    from xtokmap.torch.pair import Pair
    from xtokmap.train import step
    from xtokmap.train.config import Config
    from xtokmap.train.run import Run
    from xtokmap.train.sampling import Roller
    from xtokmap.train.support import health

    student, tokenizer, teacher, teacher_tokenizer = pair
    config = Config(
        batch_size=args.rows,
        micro_batch=args.rows,
        max_new_tokens=args.tokens,
        score_stop=False,
        device="cpu",
        steps=10**6,
        output=tempfile.mkdtemp(),
    )
    local = LocalTeacher(teacher, teacher_tokenizer, micro_batch=args.rows)
    run = Run(Roller(student, tokenizer, local, config), prompts(args.rows))
    _xtokmap_parts(turns.clock)
    for owner, name, part in (
        (health.Entropy, "__call__", "health"),
        (Run, "_watched", "health"),
        (Pair, "aligned", "retokenize"),
        (step.Gradients, "clip", "optimizer"),
        (run.optimizer, "step", "optimizer"),
    ):
        turns.clock.on(owner, name, part)
    while turns.begin() != "profile":
        run.step()
        turns.end()
    rollouts = run.rollouts()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        step.update(run.roller, rollouts, run.optimizer)
    turns.tell(ops={op.key: op.self_cpu_time_total for op in seen.key_averages()})


def _xtokmap_parts(clock: Clock) -> None:
    from xtokmap.aligner import Aligner
    from xtokmap.torch.pair import Pair

    clock.on(Aligner, "_answers", "retokenize")
    clock.on(Pair, "queries", "retokenize")
    clock.on(Pair, "scores", "heads and loss")
    clock.on(Pair, "loss", "heads and loss")
    clock.on(torch.Tensor, "backward", "backward")


def _trainer(kind: Any, turns: Turns, *given: Any, **options: Any) -> Any:
    from transformers import TrainerCallback

    class Asked(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end()

    found = kind(*given, callbacks=[Asked()], **options)
    turns.clock.on(found.accelerator, "clip_grad_norm_", "optimizer")
    found.create_optimizer()
    turns.clock.on(found.optimizer, "step", "optimizer")
    return found


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What both of TRL's trainers are told; all else is their default."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": args.rows,
        "max_steps": 10**6,
        "max_completion_length": args.tokens,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def trl(args: argparse.Namespace, turns: Turns, pair: tuple[Any, ...], answers: list[list[int]]) -> None:
    import datasets
    from trl import DistillationConfig

    from xtokmap.integrations import trl as integration
    from xtokmap.torch.pair import Pair

    student, tokenizer, teacher, teacher_tokenizer = pair
    asked = [[{"role": "user", "content": text}] for text in prompts(args.rows)] * 64
    _xtokmap_parts(turns.clock)
    turns.clock.on(Pair, "prepare", "retokenize")
    turns.clock.on(integration, "entropy_sum", "health")
    _trainer(
        integration.DistillationTrainer,
        turns,
        student,
        teacher,
        DistillationConfig(**_settings(args)),
        datasets.Dataset.from_dict({"prompt": asked}),
        processing_class=tokenizer,
        teacher_processing_class=teacher_tokenizer,
        loss_settings={"score_stop": False},
    ).train()


def gold(args: argparse.Namespace, turns: Turns, pair: tuple[Any, ...], answers: list[list[int]]) -> None:
    import datasets
    from trl.experimental.gold import GOLDConfig, GOLDTrainer, gold_trainer

    student, tokenizer, teacher, teacher_tokenizer = pair
    folder = tempfile.mkdtemp()
    teacher_tokenizer.save_pretrained(folder)
    config = GOLDConfig(
        **_settings(args),
        lmbda=1.0,
        use_uld_loss=True,
        uld_use_hybrid_loss=args.only == "gold-hybrid",
        teacher_tokenizer_name_or_path=folder,
    )
    said = [{"role": "assistant", "content": "x"}]
    data = [([{"role": "user", "content": text}], said) for text in prompts(args.rows)] * 64
    columns = dict(zip(("prompt", "completion"), map(list, zip(*data, strict=True)), strict=True))
    for owner, name, part in (
        (gold_trainer, "build_teacher_inputs_from_texts", "retokenize"),
        (GOLDTrainer, "_maybe_add_completion_byte_offsets", "retokenize"),
        (gold_trainer.ULDLoss, "__call__", "heads and loss"),
        (student, "forward", "heads and loss"),
        (teacher, "forward", "heads and loss"),
        (torch.Tensor, "backward", "backward"),
    ):
        turns.clock.on(owner, name, part)
    _trainer(
        GOLDTrainer,
        turns,
        student,
        teacher,
        config,
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=tokenizer,
    ).train()


SUBJECTS: dict[str, Callable[..., None]] = {"base": base, "loop": loop, "trl": trl, "gold": gold, "gold-hybrid": gold}


def work(args: argparse.Namespace) -> None:
    """One of them in this process: a line on stdin is a turn, a line on stdout what it took."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # trainers print there
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    pair = trained(args)
    turns = Turns(Clock(args.wall), answer)
    answers = completions(pair[1], args.rows, args.tokens)
    answering(pair[0], turns.clock, answers)
    for model, whose in ((pair[0], "student's body"), (pair[2], "teacher's body")):
        turns.clock.on(model.base_model, "forward", whose)
    turns.tell(weights=sum(p.numel() * 4 for p in pair[0].parameters()))
    SUBJECTS[args.only](args, turns, pair, answers)


# ---- the table ---------------------------------------------------------------------------------------------------


class Worker:
    """A process of one of them."""

    def __init__(self, name: str, pair: str, args: argparse.Namespace) -> None:
        options = [f"--{key}={getattr(args, key)}" for key in ("rows", "tokens", "hidden", "layers", "threads")]
        command = [
            sys.executable,
            __file__,
            *options,
            f"--only={name}",
            f"--pair={pair}",
            *["--wall"] * args.wall,
        ]
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.weights: int = self._line()["weights"]

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise SystemExit(f"{self.name}: {self._errors.read()[-3000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def turn(self, asked: str = "step") -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{asked}\n")
        self._process.stdin.flush()
        return self._line()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measured(pair: str, names: list[str], args: argparse.Namespace) -> list[str]:
    """Has everyone make steps in turns; the table, and the profile of the loop's update."""
    workers = [Worker(name, pair, args) for name in names]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(1 + args.rounds):
        for worker in workers:
            taken = worker.turn()
            print(pair, worker.name, turn, json.dumps(taken), file=sys.stderr, flush=True)
            if turn:
                found[worker.name].append(taken)
    ops = workers[names.index("loop")].turn("profile")["ops"]
    for worker in workers:
        worker.close()
    medians = {}
    for name, turns in found.items():
        known = dict.fromkeys(part for t in turns for part in t["parts"])
        parts = {part: statistics.median(t["parts"].get(part, 0.0) for t in turns) for part in known}
        medians[name] = {
            **parts,
            "sample": parts.get("sample", 0.0),
            "step": statistics.median(sum(t["parts"].values()) - t["parts"].get("sample", 0.0) for t in turns),
            "peak": statistics.median(t["peak"] for t in turns),
            "body": statistics.median(t.get("body", 0.0) for t in turns),
        }
    return [*table(workers[0].weights, medians, args.rows * args.tokens), "", by_operator(ops)]


def table(weights: int, found: dict[str, dict[str, float]], tokens: int) -> list[str]:
    """Times in seconds; of each part, and what follows from them."""
    names = list(found)
    back = found["base"]["body"]

    def loss(x: dict[str, float]) -> float:
        bodies = x.get("student's body", 0.0) + x.get("teacher's body", 0.0) + back
        return x["step"] - x.get("optimizer", 0.0) - bodies

    def row(title: str, value: Callable[[dict[str, float]], float], form: str = ".2f", but: str = "") -> str:
        cells = ["" if name == but else format(value(found[name]), form) for name in names]
        return f"| {title} | " + " | ".join(cells) + " |"

    least, first = found["base"], found["loop"]
    return [
        "| | " + " | ".join(NAMES[name] for name in names) + " |",
        "|---|" + "--:|" * len(names),
        *(row(part, lambda x, part=part: x.get(part, 0.0)) for part in PARTS),
        row("optimizer", lambda x: x.get("optimizer", 0.0), but="base"),
        row("**step without sampling**", lambda x: x["step"]),
        row("sample", lambda x: x["sample"], but="base"),
        row("tokens/s without sampling", lambda x: tokens / x["step"], ".0f", "base"),
        row("tokens/s with it", lambda x: tokens / (x["step"] + x["sample"]), ".0f", "base"),
        row("**loss: all but bodies and optimizer**", loss),
        row("peak, MiB", lambda x: x["peak"] / 2**20, ",.0f"),
        row("**peak less the gradient, MiB**", lambda x: (x["peak"] - weights) / 2**20, ",.0f"),
        row("step less optimizer, against the base", lambda x: (x["step"] - x.get("optimizer", 0)) / least["step"]),
        row("time of the loss, against the loop's", lambda x: loss(x) / loss(first)),
        row("its memory, against the loop's", lambda x: (x["peak"] - weights) / (first["peak"] - weights)),
    ]


def by_operator(ops: dict[str, float]) -> str:
    """Shares of an update's time, the largest first."""
    total = sum(ops.values())
    most = sorted(ops, key=ops.__getitem__, reverse=True)[:16]
    shares = [f"`{name.removeprefix('aten::')}` {ops[name] / total:.0%}" for name in most if ops[name] > 0.005 * total]
    return "The loop's update by operator (`torch.profiler`, their own time): " + ", ".join(shares) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of each completion")
    parser.add_argument("--hidden", type=int, default=256, help="size of the made models")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wall", action="store_true", help="wall time instead of the processes' own")
    parser.add_argument("--pairs", nargs="+", choices=("made", "demo", "swapped"), default=["made", "demo", "swapped"])
    parser.add_argument("--only", choices=SUBJECTS, help=argparse.SUPPRESS)
    parser.add_argument("--pair", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        work(args)
        return
    titles = {
        "made": f"Qwen's vocabulary (151,936 logits) from DeepSeek V3's (129,280); hidden size {args.hidden}, "
        f"{args.layers} layers, random weights",
        "demo": "Gemma 3 270M (262,144) from SmolLM2 135M (49,152), as `xtokmap demo`",
        "swapped": "SmolLM2 135M (49,152) from Gemma 3 270M (262,144)",
    }
    packages = ("xtokmap", "torch", "transformers", "trl")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    clock = "wall time" if args.wall else "processor time, as others were at work on the machine"
    setup = (
        f"`{shlex.join(['python', 'benches/step.py', *sys.argv[1:]])}`; {versions}, Python "
        f"{platform.python_version()}, {platform.machine()}; float32, {args.threads} thread(s); {args.rows} "
        f"completions of {args.tokens} tokens; {clock}, in seconds, medians of {args.rounds} steps, made in turns."
    )
    for pair in args.pairs:
        names = list(SUBJECTS) if pair == "made" else ["base", "loop"]  # GOLD takes no pair with Gemma's tokenizer
        write(titles[pair], [setup, "", *measured(pair, names, args)])


def write(title: str, lines: list[str]) -> None:
    """A section of the results, in place of the one that there is of this title; the others stay."""
    path = RESULTS / "step.md"
    _, *others = path.read_text(encoding="utf-8").split("\n## ") if path.exists() else [""]
    section = "\n".join([title, "", *lines, ""])
    print(section)
    sections = [other for other in others if other.partition("\n")[0] != title] + [section]
    head = "\n".join(["# One training step", "", *textwrap.wrap(LEGEND, 118), ""])
    path.write_text("\n## ".join([head, *sections]), encoding="utf-8")


if __name__ == "__main__":
    main()
