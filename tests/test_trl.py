"""TRL's DistillationTrainer with a teacher of another family: real steps of tiny models."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import real_tokenizers as real
import several
import tiny
from fake_server import TeacherServer
from xtokmap import XTokMapError
from xtokmap.chat import render
from xtokmap.integrations.versions import Hook, UnsupportedVersionError, check_hooks
from xtokmap.losses import LOSSES
from xtokmap.teachers import LocalTeacher, ServerTeacher
from xtokmap.teachers.head import Head
from xtokmap.teachers.scorer import Limits
from xtokmap.torch import Pair
from xtokmap.train.config import Config
from xtokmap.train.sampling import Roller
from xtokmap.train.step import update

trl = pytest.importorskip("trl", reason="pip install 'xtokmap[trl]' (Python 3.11 or later)")
datasets = pytest.importorskip("datasets")
integration: Any = importlib.import_module("xtokmap.integrations.trl")

pytestmark = [
    pytest.mark.filterwarnings("ignore:fastokens gives other ids"),
    # transformers', peft's and torch's own, about what TRL calls.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
]

ASKED = ["the dog", "a fox?", "what is the colour of the sky?", "1 + 2"]
ANSWERS = ["the dog and runs away", "the sky is blue", "over", "naïve café, 42"]
#: Messages, the third of two turns.
CONVERSATIONS = [[{"role": "user", "content": text}] for text in ASKED]
CONVERSATIONS[2] = [
    {"role": "user", "content": "the grass?"},
    {"role": "assistant", "content": "is green"},
    *CONVERSATIONS[2],
]


def rows(prompts: Any = CONVERSATIONS, **columns: Any) -> Any:
    return datasets.Dataset.from_dict({"prompt": prompts, **columns})


def settings(folder: Path, **changes: Any) -> Any:
    values = {
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "max_completion_length": 8,
        "logging_steps": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return trl.DistillationConfig(str(folder), **{**values, **changes})


def trainer(folder: Path, teacher: Any = None, *, student: Any = None, data: Any = None, **changes: Any) -> Any:
    """With TRL's settings and the trainer's own arguments in one."""
    own = ("loss", "loss_settings", "peft_config", "teacher_processing_class", "eval_dataset", "tools")
    arguments = {name: changes.pop(name) for name in own if name in changes}
    if teacher is None:
        teacher = tiny.teacher_model()
        arguments.setdefault("teacher_processing_class", tiny.teacher_tokenizer())
    return integration.DistillationTrainer(
        student or tiny.student_model(),
        teacher,
        settings(folder, **changes),
        data or rows(),
        processing_class=tiny.student_tokenizer(),
        **arguments,
    )


@cache
def answers() -> dict[tuple[int, ...], list[int]]:
    """To every prompt an answer of another length, as sampled."""
    tokenizer = tiny.student_tokenizer()
    texts = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in ANSWERS]
    return dict(zip(map(tuple, render(tokenizer, CONVERSATIONS)), texts, strict=True))


def with_answers(made: Any) -> Any:
    """Where TRL's rollouts come from, vLLM's among them."""
    made._generate_single_turn = lambda prompt_ids, *_: [answers()[tuple(row)] for row in prompt_ids]
    return made


def weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def loss_of(made: Any, **columns: Any) -> torch.Tensor:
    """Of one batch, as TRL computes it in a training step."""
    made.model.train()
    inputs = made._prepare_inputs([{"prompt": c, **columns} for c in CONVERSATIONS])
    return made.compute_loss(made.model, inputs)


# ---- what TRL refuses --------------------------------------------------------------------------------------------


@cache
def real_pair() -> tuple[Any, Any]:
    """A ByteLevel student and a teacher with SentencePiece pieces and byte fallback, as Gemma's and Llama 2's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges

    student = PreTrainedTokenizerFast(tokenizer_file=str(real.path("deepseek")), eos_token="<｜end▁of▁sentence｜>")
    student.chat_template = "{% for m in messages %}<｜User｜>{{ m.content }}{% endfor %}<｜Assistant｜>"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(real.path("mistral-v1")))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    merges = generate_merges(vocab, {piece: pieces.get_score(i) for piece, i in vocab.items()})
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    teacher = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    teacher.chat_template = "<s>{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    return student, teacher


def test_steps_of_real_tokenizers_that_trl_refuses(tmp_path: Path) -> None:
    tokenizer, teacher_tokenizer = real_pair()

    def model(vocabulary: Any, seed: int) -> Any:
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **tiny.SIZE, tie_word_embeddings=True))

    student, teacher = model(tokenizer, 0), model(teacher_tokenizer, 1)
    args = settings(tmp_path, per_device_train_batch_size=2, optim="adamw_torch", learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"vocab_size 129280 but the teacher model has vocab_size 32000.*shared"):
        trl.DistillationTrainer(student, teacher, args, rows(), processing_class=tokenizer)
    before = weights(student)
    made = integration.DistillationTrainer(
        student, teacher, args, rows(), processing_class=tokenizer, teacher_processing_class=teacher_tokenizer
    )
    made.train()
    (line,) = [line for line in made.state.log_history if "loss" in line]
    assert math.isfinite(line["loss"])
    assert line["scored"] > 0.5
    assert line["entropy"] == pytest.approx(math.log(129280), rel=0.01)
    assert not torch.equal(weights(student), before)


def test_trls_trainer_across_tokenizers_refuses_such_a_teacher() -> None:
    gold = pytest.importorskip("trl.experimental.gold.gold_trainer")
    with pytest.raises(NotImplementedError, match="only ByteLevel"):
        gold.encode_with_byte_offsets(real_pair()[1].backend_tokenizer, ["the sky"])


# ---- the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["transfer_kl", "byte_kl", "cover", "prior", "strict_kl", "alm", "uld_hybrid"])
def test_it_is_the_loops_loss(tmp_path: Path, loss: str) -> None:
    """On the same batch: of the project's own step, and of `Pair` with what the models return."""
    made = with_answers(trainer(tmp_path, loss=loss, beta=0.5 if loss == "transfer_kl" else 1.0))
    found = loss_of(made)
    found.backward()
    gradient = torch.cat([p.grad.flatten() for p in made.model.parameters()])

    student, tokenizer, teacher, teacher_tokenizer = tiny.pair()
    config = Config(loss=loss, beta=made.beta, device="cpu")
    roller = Roller(student, tokenizer, LocalTeacher(teacher, teacher_tokenizer), config)
    taken = [answers()[tuple(row)] for row in render(tokenizer, CONVERSATIONS)]
    rollouts = roller.score(roller.take(CONVERSATIONS, taken, [True] * len(taken)))
    result = update(roller, rollouts, torch.optim.SGD(student.parameters(), lr=0.0))
    torch.testing.assert_close(found.detach(), result.loss, rtol=1e-4, atol=1e-6)

    pair = Pair(tokenizer, teacher_tokenizer, loss, beta=made.beta)
    batch = pair.prepare(CONVERSATIONS, taken)
    out = pair.loss(student(**batch.student_inputs), teacher(**batch.teacher_inputs), batch)
    torch.testing.assert_close(found, out.loss, rtol=1e-3, atol=1e-5)
    out.loss.backward()
    wanted = torch.cat([p.grad.flatten() for p in student.parameters()])
    torch.testing.assert_close(gradient, wanted, rtol=1e-2, atol=1e-4)

    logs: dict[str, float] = {}
    made.log(logs)
    assert {name: logs[name] for name in out.metrics} == pytest.approx(
        {name: value.item() for name, value in out.metrics.items()}, rel=1e-3, abs=1e-5
    )


def test_gradient_accumulation_is_one_batch(tmp_path: Path) -> None:
    found = {}
    for size in (4, 2, 1):
        made = with_answers(
            trainer(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, loss="cover")
        )
        before = weights(made.model)
        made.train()
        (line,) = [line for line in made.state.log_history if "loss" in line]
        found[size] = weights(made.model) - before, line
    assert found[4][0].abs().max() > 1e-4
    for size in (2, 1):
        torch.testing.assert_close(found[size][0], found[4][0], rtol=1e-3, atol=1e-6)
        timed = {"step_time", "grad_norm"}
        assert {k: v for k, v in found[size][1].items() if k not in timed} == pytest.approx(
            {k: v for k, v in found[4][1].items() if k not in timed}, rel=1e-3, abs=1e-5
        )


def test_no_row_of_the_students_logits_is_made(tmp_path: Path) -> None:
    """Also in mixed precision, where accelerate has put something over the model's `forward`."""
    made = trainer(tmp_path, bf16=True)
    made.train()

    def refuse(*_: Any) -> None:
        raise AssertionError("the output head was called")

    made.model.lm_head.register_forward_pre_hook(refuse)
    with_answers(made)
    made._step = 0
    loss_of(made).backward()
    assert made.model.lm_head.weight.grad is not None


def test_a_student_that_scales_its_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=len(tiny.student_tokenizer()), **tiny.SIZE, logit_scale=0.3, pad_token_id=2, eos_token_id=1
    )
    student = CohereForCausalLM(config)
    found = loss_of(with_answers(trainer(tmp_path, student=student)))
    teacher = LocalTeacher(tiny.teacher_model(), tiny.teacher_tokenizer())
    pair = Pair(tiny.student_tokenizer(), teacher.tokenizer)
    batch = pair.prepare(CONVERSATIONS, list(answers().values()))
    want = pair.loss(student(**batch.student_inputs), teacher, batch).loss
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_an_adapter_alone_is_trained(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    made = with_answers(
        trainer(tmp_path, peft_config=peft.LoraConfig(r=2, target_modules="all-linear"), max_steps=3, learning_rate=1.0)
    )
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    changed = {name for name, p in made.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    losses = [line["loss"] for line in made.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]


# ---- prompts -----------------------------------------------------------------------------------------------------


def prompts_of(made: Any, row: dict[str, Any]) -> tuple[str, str]:
    """What student and teacher are told of a row."""
    made.model.train()
    made._buffered_inputs, made._step = None, 0
    batch = made._prepare_inputs([row] * 4)[integration._ROWS][0].scored[0].batch
    return (
        tiny.student_tokenizer().decode(batch.student_prompt_ids[0]),
        tiny.teacher_tokenizer().decode(batch.teacher_prompt_ids[0]),
    )


def test_each_side_is_told_by_its_own_template(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny.teacher_tokenizer().backend_tokenizer, eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if quiet %}quiet {% endif %}assistant: "
    )
    made = trainer(
        tmp_path, tiny.teacher_model(), teacher_processing_class=tokenizer, chat_template_kwargs={"quiet": True}
    )
    two_turns = CONVERSATIONS[2]
    student, teacher = prompts_of(made, {"prompt": two_turns})
    assert student == (
        "<|im_start|>user\nthe grass?<|im_end|>\n<|im_start|>assistant\nis green<|im_end|>\n"
        "<|im_start|>user\nwhat is the colour of the sky?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert teacher == (
        "user: the grass?<eos>assistant: is green<eos>user: what is the colour of the sky?<eos>quiet assistant: "
    )
    answered = [*two_turns, {"role": "assistant", "content": "the sky is blue"}]
    for messages in (two_turns, answered):
        assert prompts_of(made, {"messages": messages}) == (student, teacher)
    assert prompts_of(made, {"prompt": "the sky is"}) == ("the sky is", "the sky is")
    with pytest.raises(XTokMapError, match='neither "prompt" nor "messages", but text'):
        prompts_of(made, {"text": "the sky"})


def test_evaluation_is_logged_by_itself(tmp_path: Path) -> None:
    made = with_answers(trainer(tmp_path, eval_dataset=rows(), per_device_eval_batch_size=3))
    found = made.evaluate()
    pair = Pair(tiny.student_tokenizer(), tiny.teacher_tokenizer())
    batch = pair.prepare(CONVERSATIONS, list(answers().values()))
    out = pair.loss(made.model(**batch.student_inputs), tiny.teacher_model()(**batch.teacher_inputs), batch)
    assert math.isfinite(found["eval_loss"])
    logged = made.state.log_history[-1]
    assert logged["eval_kl_per_byte"] == pytest.approx(out.metrics["kl_per_byte"].item(), rel=1e-3)
    assert logged["eval_scored"] == pytest.approx(out.metrics["scored"].item())
    assert "kl_per_byte" not in logged


# ---- teachers ----------------------------------------------------------------------------------------------------


def test_a_served_teacher(tmp_path: Path) -> None:
    server = TeacherServer(tiny.teacher_model(), tiny.teacher_tokenizer(), limits=Limits(max_logprobs=400))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        teacher = ServerTeacher(server.url, tiny.teacher_tokenizer(), topk=380)
        made = with_answers(trainer(tmp_path, teacher))
        found = loss_of(made)
        assert made._teachers[0][2].rule is LOSSES["cover"]
        want = loss_of(with_answers(trainer(tmp_path, loss="cover")))
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)
        assert server.scorer.batches > 0
        with pytest.raises(XTokMapError, match="gives no whole rows"):
            loss_of(with_answers(trainer(tmp_path, teacher, loss="transfer_kl")))
    finally:
        server.close()


def test_a_served_teacher_with_hidden_states_is_asked_for_whole_rows(tmp_path: Path) -> None:
    local = tiny.teacher_model()
    head = Head(local.get_output_embeddings().weight.detach(), softcap=local.config.final_logit_softcapping)
    server = TeacherServer(local, tiny.teacher_tokenizer())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        teacher = ServerTeacher(server.url, tiny.teacher_tokenizer(), rows=("hidden", "sums", "top"), head=head)
        made = with_answers(trainer(tmp_path, teacher))
        assert made._teachers[0][2].rule is LOSSES["transfer_kl"]
        want = loss_of(with_answers(trainer(tmp_path)))
        torch.testing.assert_close(loss_of(made), want, rtol=1e-4, atol=1e-5)
    finally:
        server.close()


@pytest.mark.parametrize(
    ("rows", "topk", "loss"),
    [("sums", 20, "cover"), ("top", 20, "cover"), ("top", 0, "prior"), ("none", 20, "prior")],
)
def test_a_served_teacher_has_the_loss_that_its_rows_allow(rows: str, topk: int, loss: str) -> None:
    teacher = ServerTeacher("http://127.0.0.1:9", tiny.teacher_tokenizer(), topk=topk)
    teacher.rows = rows
    assert integration._default_loss(teacher) == loss


def test_several_teachers_weighted_by_prompt(tmp_path: Path) -> None:
    """Of two families; the second one is asked about one domain alone, and the third about nothing."""
    others = [tiny.student_model(seed) for seed in (5, 6)]
    teachers = [
        (tiny.teacher_model(), 0.5),
        (LocalTeacher(others[0], tiny.student_tokenizer()), lambda row: 2.0 if row["domain"] == "sky" else 0),
        (LocalTeacher(others[1], tiny.student_tokenizer()), 0),
    ]
    domains = ["animals", "animals", "sky", "sums"]
    made = with_answers(
        trainer(
            tmp_path,
            teachers,
            teacher_processing_class=[tiny.teacher_tokenizer(), None, None],
            data=rows(domain=domains),
        )
    )
    made.model.train()
    data = [{"prompt": c, "domain": d} for c, d in zip(CONVERSATIONS, domains, strict=True)]
    found = made.compute_loss(made.model, made._prepare_inputs(data))

    taken = list(answers().values())
    tokens = sum(map(len, taken))
    want = torch.zeros(())
    for rows_of, tokenizer, teacher, weight in (
        (range(4), tiny.teacher_tokenizer(), tiny.teacher_model(), 0.5),
        ([2], tiny.student_tokenizer(), others[0], 2.0),
    ):
        pair = Pair(tiny.student_tokenizer(), tokenizer)
        batch = pair.prepare([CONVERSATIONS[b] for b in rows_of], [taken[b] for b in rows_of])
        out = pair.loss(
            made.model(**batch.student_inputs), teacher(**batch.teacher_inputs), batch, denominator=float(tokens)
        )
        want = want + weight * out.loss
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-5)
    logs: dict[str, float] = {}
    made.log(logs)
    assert logs["teacher_0/scored"] > 0.5
    assert logs["teacher_1/coverage/ONE_TO_ONE"] > 0.5
    assert logs["teacher_2/scored"] == 0


def test_rows_that_no_teacher_is_asked_about_change_nothing(tmp_path: Path) -> None:
    """But every parameter has a gradient: DDP waits for it."""
    made = with_answers(trainer(tmp_path, [(LocalTeacher(tiny.teacher_model(), tiny.teacher_tokenizer()), 0)]))
    found = loss_of(made)
    found.backward()
    assert found.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in made.model.parameters())


def test_a_teacher_from_a_folder(tmp_path: Path) -> None:
    tiny.teacher_model().save_pretrained(tmp_path / "teacher")
    tiny.teacher_tokenizer().save_pretrained(tmp_path / "teacher")
    found = loss_of(with_answers(trainer(tmp_path, str(tmp_path / "teacher"))))
    torch.testing.assert_close(found, loss_of(with_answers(trainer(tmp_path))), rtol=1e-4, atol=1e-6)


# ---- processes ---------------------------------------------------------------------------------------------------


def steps_of(rank: int, folder: str, size: int) -> Any:
    """Two steps in this process, as one of however many: the weights, and what was logged.

    There is a second teacher, of one prompt, which one of two processes does not have.
    """
    teachers = [
        (LocalTeacher(tiny.teacher_model(), tiny.teacher_tokenizer()), 1.0),
        (LocalTeacher(tiny.student_model(5), tiny.student_tokenizer()), lambda row: row["domain"] == "sky"),
    ]
    data = rows(domain=["animals", "animals", "sky", "sums"])
    made = with_answers(trainer(Path(folder), teachers, data=data, per_device_train_batch_size=size, max_steps=2))
    made.train()
    lines = [line for line in made.state.log_history if "loss" in line]
    return weights(made.model).tolist(), lines


def test_two_processes_are_one(tmp_path: Path) -> None:
    (first, lines), (second, _) = several.launch(steps_of, tmp_path, str(tmp_path), 2)
    alone, wanted = steps_of(0, str(tmp_path), 4)
    assert first == second
    torch.testing.assert_close(torch.tensor(first), torch.tensor(alone), rtol=1e-3, atol=1e-5)
    assert max(line["teacher_1/scored"] for line in lines) > 0.05
    for line, want in zip(lines, wanted, strict=True):
        left_out = ("step_time", "grad_norm")
        assert {k: v for k, v in line.items() if k not in left_out} == pytest.approx(
            {k: v for k, v in want.items() if k not in left_out}, rel=1e-3, abs=1e-5
        )


# ---- what is refused, and the example ----------------------------------------------------------------------------


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(XTokMapError, match="teacher_model is int: expected a hub id"):
        trainer(tmp_path, 3)
    with pytest.raises(XTokMapError, match=r"teacher_model\[1\]: expected \(teacher, weight\), got int"):
        trainer(tmp_path, [(LocalTeacher(tiny.teacher_model(), tiny.teacher_tokenizer()), 1.0), 3])
    with pytest.raises(XTokMapError, match="from nowhere: pass its tokenizer as teacher_processing_class"):
        trainer(tmp_path, tiny.teacher_model())
    with pytest.raises(XTokMapError, match="loss='kl': use one of transfer_kl"):
        trainer(tmp_path, loss="kl")
    with pytest.raises(XTokMapError, match="aggregate: TRL divides by all tokens"):
        trainer(tmp_path, loss_settings={"aggregate": "scored"})
    distillation = importlib.import_module("trl.trainer.distillation_trainer")
    monkeypatch.setattr(distillation, "supports_tool_calling", lambda *_: True)
    monkeypatch.setattr(distillation, "add_response_schema", lambda processing: processing)
    monkeypatch.setattr(distillation, "is_chat_template_prefix_preserving", lambda *_: True)
    with pytest.raises(XTokMapError, match="tools: calls and answers inside a completion"):
        trainer(tmp_path, tools=[max])


def test_another_trl_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version("trl")
    with monkeypatch.context() as patch:
        patch.setattr(trl.DistillationTrainer, "_compute_loss", lambda self, model, inputs: None)
        with pytest.raises(UnsupportedVersionError) as found:
            importlib.reload(integration)
    assert str(found.value) == (
        f"trl {version} is installed, which this version of xtokmap does not fit into: "
        "DistillationTrainer._compute_loss takes (self, model, inputs), not (self, unwrapped_student, inputs, "
        "num_items_in_batch); it was written for trl 1.16.*: pip install 'trl==1.16.*'"
    )
    with monkeypatch.context() as patch:
        patch.delattr(trl.DistillationTrainer, "_get_last_hidden_state")
        with pytest.raises(UnsupportedVersionError, match=r"there is no DistillationTrainer\._get_last_hidden_state"):
            importlib.reload(integration)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "trl.trainer.utils", None)
        with pytest.raises(UnsupportedVersionError, match="it has no DistillationTrainer as known here"):
            importlib.reload(integration)
    importlib.reload(integration)


def test_a_hook_that_is_called_may_have_more_that_need_not_be_given() -> None:
    class Engine:
        def called(self, ids: Any, more: Any = None) -> None: ...
        def asking(self, ids: Any, more: Any) -> None: ...

    check_hooks("torch", "*", [Hook(Engine, "called", "self ids", overridden=False)])
    for hook in (Hook(Engine, "called", "self ids"), Hook(Engine, "asking", "self ids", overridden=False)):
        with pytest.raises(UnsupportedVersionError, match=r"torch 2\S* is installed.* takes \(self, ids, more\)"):
            check_hooks("torch", "*", [hook])


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parents[1] / "examples" / "trl_distill.py"
    assert len(path.read_text().splitlines()) < 40
    student, tokenizer, teacher, teacher_tokenizer = tiny.pair()
    for name, model, own in (("student", student, tokenizer), ("teacher", teacher, teacher_tokenizer)):
        model.save_pretrained(tmp_path / name)
        own.save_pretrained(tmp_path / name)
    spec = importlib.util.spec_from_file_location("trl_distill", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.distill(str(tmp_path / "student"), str(tmp_path / "teacher"), settings(tmp_path / "out", max_steps=2))
    lines = [line for line in made.state.log_history if "kl_per_byte" in line]
    assert len(lines) == 2
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert not torch.equal(weights(made.model), weights(student))
