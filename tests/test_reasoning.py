"""Thoughts and tool calls: one family's turn as another's, aligned by role and by bytes, and learned from."""

from __future__ import annotations

import base64
import importlib.util
import pickle
import re
import tempfile
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

import families
import real_tokenizers
import tiny
import xtokmap
from xtokmap import Aligner, Kind, XTokMapError
from xtokmap.markers import Format, parsed
from xtokmap.torch import Pair

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.filterwarnings("ignore:fastokens gives other ids"),
]

THOUGHT, ANSWER, ARGUMENTS = "I need the sky.\nWhat is it?", "The sky is blue.", '{"city": "Paris", "days": 2}'
#: A turn that thinks, answers and calls, as each family writes it.
CALL = {
    "qwen3": f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>',
    "deepseek-r1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    f"{ARGUMENTS}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek-v3.1": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{ARGUMENTS}"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "gpt-oss": "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>" + ARGUMENTS,
    "llama3.1": f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}',
    "gemma": "",
    "smollm2": "",
}
CALL["text"] = CALL["qwen3"]
THINK = {
    "qwen3": ("<think>\n", "\n</think>\n\n"),
    "deepseek-v3.1": ("<think>", "</think>"),
    "gpt-oss": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
}
THINK["deepseek-r1"] = THINK["text"] = THINK["qwen3"]
END = {"gpt-oss": "<|return|>"} | {name: families.FAMILIES[name][2] for name in families.FAMILIES}
NAMES = list(families.FAMILIES)


def written(name: str, *, thought: bool, answer: bool, call: bool) -> str:
    """A turn as a family writes it, with what it has no form for left out."""
    text, oss = "", name == "gpt-oss"
    if thought and name in THINK:
        text += THOUGHT.join(THINK[name])
    if answer:
        text += "<|channel|>final<|message|>" * oss + ANSWER
    if call:
        glue = "<|end|><|start|>assistant" * oss + "\n" * (name in ("qwen3", "text"))
        text += glue * answer + CALL[name]
    return text + ("<|call|>" if oss and call else END[name])


@cache
def tokenizer(side: str, name: str) -> PreTrainedTokenizerFast:
    source = tiny.student_tokenizer() if side == "student" else tiny.teacher_tokenizer()
    return families.of_family(source.backend_tokenizer, name)


def decoded(tok: PreTrainedTokenizerFast, ids) -> str:
    return spaced(tok.decode(list(ids)))


def spaced(text: str) -> str:
    """The names of DeepSeek's tokens have a space's sign in them, which a decoder makes a space."""
    return text.replace("▁", " ")


def ids_of(tok: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tok(text, add_special_tokens=False).input_ids


@cache
def aligner(one: str, other: str) -> Aligner:
    return Aligner(tokenizer("student", one), tokenizer("teacher", other), markers=True)


TURNS = [dict(zip(("thought", "answer", "call"), what, strict=True)) for what in product([False, True], repeat=3)]


@pytest.mark.parametrize("other", ["deepseek-v3.1", "gemma"])
@pytest.mark.parametrize("left", [False, True])
def test_padded_turns_are_written_as_their_tokens(other: str, left: bool) -> None:
    al, student = aligner("qwen3", other), tokenizer("student", "qwen3")
    turns = [THOUGHT + THINK["qwen3"][1] + ANSWER + END["qwen3"], THOUGHT, ""]  # a thought that the prompt opened
    rows = [ids_of(student, turn) for turn in turns]
    width = max(map(len, rows)) + 2
    ids, mask = np.full((3, width), rows[0][-1]), np.zeros((3, width), np.bool_)
    for k, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(len(row))
        ids[k, place], mask[k, place] = row, True
    thinking = [True] * 3, [False] * 3
    want, batch = al.retokenize(rows, thinking=thinking)
    got, padded = al.retokenize(ids, mask, thinking=thinking)
    assert [row.tolist() for row in got] == [row.tolist() for row in want]
    assert bool(len(want[1])) == (other in THINK)  # else all of it is what is left out
    assert padded.student_chunk.tolist() == batch.student_chunk.tolist()


@pytest.mark.parametrize(("one", "other"), [*product(NAMES, NAMES)])
def test_a_turn_is_written_in_the_teachers_format(one, other):
    student, teacher = tokenizer("student", one), tokenizer("teacher", other)
    al = aligner(one, other)
    for wanted in TURNS:
        turn = {**wanted, "thought": wanted["thought"] and one in THINK, "call": wanted["call"] and bool(CALL[one])}
        if "llama3.1" in (one, other) and turn["call"] and (turn["answer"] or not CALL[other]):
            continue  # its call is a turn of its own, and text
        given, want = written(one, **turn), written(other, **turn)
        (ids,), batch = al.retokenize([ids_of(student, given)], stop_id=ids_of(teacher, END[other])[0])
        assert decoded(teacher, ids) == spaced(want), turn
        a = batch[0]
        assert (a.kind == Kind.STOP).sum() == 1
        # Markers that both have, and no others.
        roles = 2 * (turn["thought"] and other in THINK)
        if turn["call"] and CALL[other] and "llama3.1" not in (one, other):
            roles += 2 - ("gpt-oss" in (one, other))  # whose call ends with the turn
        assert (a.kind == Kind.MARKER).sum() == roles + (one == other == "gpt-oss") * leading(turn), turn
        for chunk in a:  # law 2, on real text
            if chunk.kind not in (Kind.MARKER, Kind.STOP, Kind.REWRITTEN):
                assert al.teacher.decode(ids[chunk.teacher.start : chunk.teacher.stop]) == chunk.text
        spelled = b"".join(c.text for c in a if c.kind not in (Kind.MARKER, Kind.STOP, Kind.REWRITTEN))
        if turn["thought"] and other in THINK:
            assert THOUGHT.encode()[:-1] in spelled
        if turn["answer"]:
            assert ANSWER.encode()[:-1] in spelled
        if one == other:
            assert student.decode(ids_of(student, given)) == given
            assert not (a.kind == Kind.REWRITTEN).any()


def leading(turn: dict[str, bool]) -> int:
    """What opens a final answer, and what closes one before a call, is a marker too."""
    return turn["answer"] + (turn["answer"] and turn["call"]) + (turn["call"] and not turn["call"])


@pytest.mark.parametrize("name", NAMES)
def test_a_family_is_written_as_it_was(name):
    """Ids of the format itself come back as they are, whatever is in them and wherever they end."""
    tok = tokenizer("teacher", name)
    al = Aligner(tok, tok, markers=True)
    think, close = THINK.get(name, ("", ""))
    said = "<|channel|>final<|message|>" if name == "gpt-oss" else ""
    texts = [
        written(name, thought=True, answer=name != "llama3.1", call=True),
        f"{think}I think" if think else said + "the",
        f"{think}{close}{said}the",
        f"{think}\n\n the\n\n{close}\n\n\n{said}sky\n\n{END[name]}",
        CALL[name].partition('"Paris')[0],
        CALL[name].partition(', "days')[0],
        "",
    ]
    if name == "qwen3":
        texts.append(f"{CALL[name]}\n{CALL[name]}\n{CALL[name]}{END[name]}")
    for text in texts:
        ids = ids_of(tok, text)
        (found,), batch = al.retokenize([ids], stop_id=ids_of(tok, END[name])[0])
        assert found.tolist() == ids, text
        assert (batch[0].student_chunk == batch[0].teacher_chunk).all()
        assert set(batch[0].kind.tolist()) <= {Kind.ONE_TO_ONE, Kind.MARKER, Kind.STOP}


@pytest.mark.parametrize(
    ("one", "other", "text", "thinking", "want"),
    [
        # Both prompts have opened the thought, one has, the other has; answered at once.
        ("deepseek-r1", "qwen3", "so\n</think>\n\nblue", (True, False), "<think>\nso\n</think>\n\nblue"),
        ("deepseek-r1", "deepseek-v3.1", "so\n</think>\n\nblue", (True, True), "so</think>blue"),
        ("qwen3", "deepseek-r1", "<think>\nso\n</think>\n\nblue", (False, True), "so\n</think>\n\nblue"),
        ("qwen3", "deepseek-r1", "blue", (False, True), "\n</think>\n\nblue"),
        ("deepseek-r1", "gpt-oss", "so", (True, False), "<|channel|>analysis<|message|>so"),
        # What a teacher has no form for is left out, up to its end.
        ("deepseek-r1", "gemma", "so\n</think>\n\nblue<｜end▁of▁sentence｜>", (True, False), "blue<end_of_turn>"),
        ("deepseek-r1", "gemma", "so", (True, False), ""),
        ("qwen3", "smollm2", "<think>\nso", (False, False), ""),
        # Ended inside of a thought; after one; an empty one.
        ("qwen3", "gpt-oss", "<think>\nso<|im_end|>", (False, False), "<|channel|>analysis<|message|>so<|return|>"),
        ("qwen3", "deepseek-v3.1", "<think>\nso\n</think>\n\n", (False, False), "<think>so</think>"),
        ("qwen3", "deepseek-v3.1", "<think>\n\n</think>\n\nblue", (False, False), "<think></think>blue"),
        # A call that is none stays text; several calls; a call and more.
        (
            "qwen3",
            "deepseek-v3.1",
            "<tool_call>\na\n</tool_call>",
            (False, False),
            "CALLSaEND<｜tool▁calls▁end｜>",
        ),
        (
            "qwen3",
            "deepseek-r1",
            '<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>\n'
            '<tool_call>\n{"name": "b", "arguments": {}}\n</tool_call><|im_end|>',
            (False, False),
            "CALLSfunction<｜tool▁sep｜>a\n```json\n{}\n```END\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>b\n```json\n"
            "{}\n```END<｜tool▁calls▁end｜><｜end▁of▁sentence｜>",
        ),
        (
            "qwen3",
            "gpt-oss",
            '<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>\nthe sky',
            (False, False),
            "<|channel|>commentary to=functions.a <|constrain|>json<|message|>{}<|call|><|start|>assistant"
            "<|channel|>final<|message|>the sky",
        ),
    ],
)
def test_turns_that_are_not_whole(one, other, text, thinking, want):
    want = want.replace("CALLS", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>").replace("END", "<｜tool▁call▁end｜>")
    teacher = tokenizer("teacher", other)
    ids = ids_of(tokenizer("student", one), text)
    (found,), batch = aligner(one, other).retokenize(
        [ids], stop_id=ids_of(teacher, END[other])[0], thinking=([thinking[0]], [thinking[1]])
    )
    assert decoded(teacher, found) == spaced(want)
    if other in ("gemma", "smollm2"):
        assert (batch[0].student_chunk >= 0).sum() == len(re.findall("blue", text)) * len(
            ids_of(tokenizer("student", one), "blue")
        ) + text.endswith("｜>")


@pytest.mark.parametrize("foreign", ["omit", "text"])
def test_an_aligner_keeps_its_markers_when_it_is_pickled_and_swapped(foreign):
    """Also a byte table by itself: by its arrays."""
    student, teacher = tokenizer("student", "qwen3"), tokenizer("teacher", "gemma" if foreign == "text" else "gpt-oss")
    al = Aligner(student, teacher, markers=True, foreign=foreign)
    copy = pickle.loads(pickle.dumps(al))
    assert bool(copy.student.markers) == (foreign == "omit")
    assert copy.student.markers == al.student.markers == pickle.loads(pickle.dumps(al.student)).markers
    ids = [ids_of(student, written("qwen3", thought=True, answer=True, call=True))]
    (want,), batch = al.retokenize(ids)
    (found,), again = copy.retokenize(ids)
    assert found.tolist() == want.tolist()
    assert again[0].kind.tolist() == batch[0].kind.tolist()
    assert (int(Kind.MARKER) in batch[0].kind) == (foreign == "omit")
    back = copy.swapped()
    assert (back.student.markers, back.teacher.markers) == (al.teacher.markers, al.student.markers)
    assert back.foreign == foreign


# ---- through Pair ------------------------------------------------------------------------------------------------

TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "the sky", "parameters": {"type": "object"}},
    }
]
CALLED = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
CONVERSATION = {
    "messages": [
        {"role": "user", "content": "what is the sky?"},
        {"role": "assistant", "content": None, "reasoning_content": "I look.", "tool_calls": [CALLED]},
        {"role": "tool", "content": "blue"},
        {"role": "assistant", "content": "blue", "reasoning_content": "So it is."},
        {"role": "user", "content": "and the grass?"},
    ],
    "tools": TOOLS,
}
ASKED = {"messages": [{"role": "user", "content": "what is the sky?"}]}


def model(tok: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), **tiny.SIZE))


def opened(name: str, *, told: bool = True) -> dict:
    """A conversation that asks for a thought where that is a variable."""
    conversation = CONVERSATION if told else ASKED
    return {**conversation, "chat_template_kwargs": {"thinking": True}} if name == "deepseek-v3.1" else conversation


THINKING = ["qwen3", "deepseek-v3.1", "gpt-oss"]
PAIRS = [*product(THINKING, THINKING), ("qwen3", "llama3.1"), ("llama3.1", "qwen3"), ("gpt-oss", "llama3.1")]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_thinking_conversation_with_a_call_trains(one, other):
    student, teacher = tokenizer("student", one), tokenizer("teacher", other)
    pair = Pair(student, teacher)
    call = written(one, thought=True, answer=False, call=True)
    answer = written(one, thought=True, answer=True, call=False)
    if one == "deepseek-v3.1":  # its prompt has opened the thought
        call, answer = call.removeprefix("<think>"), answer.removeprefix("<think>")
    kwargs = {"chat_template_kwargs": {"thinking": True}}
    batch = pair.prepare([{**CONVERSATION, **kwargs}] * 2, [ids_of(student, call), ids_of(student, answer)])
    # History is each template's own: none keeps the thought before the user's last turn.
    for tok, rows in ((student, batch.student_prompt_ids), (teacher, batch.teacher_prompt_ids)):
        assert "So it is" not in decoded(tok, rows[0])
        assert "get_weather" in decoded(tok, rows[0])
        assert "and the grass?" in decoded(tok, rows[0])
    for ids, what in zip(
        batch.teacher_ids, ({"answer": False, "call": True}, {"answer": True, "call": False}), strict=True
    ):
        want = written(other, thought=one in THINK, **what)
        assert decoded(teacher, ids) == spaced(want.removeprefix("<think>") if other == "deepseek-v3.1" else want)
    a, b = model(student, 0), model(teacher, 1)
    with torch.no_grad():
        theirs = b(**batch.teacher_inputs)
    out = pair.loss(a(**batch.student_inputs), theirs, batch)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(p.grad).all() for p in a.parameters())
    assert float(out.metrics["scored"]) > 0
    if other in THINK and one in THINK:
        assert float(out.metrics["coverage/MARKER"]) > 0
    for loss in ("prior", "cover", "byte_kl", "strict_kl", "alm", "uld_hybrid"):
        found = pair.with_loss(loss).loss(a(**batch.student_inputs), theirs, batch)
        assert torch.isfinite(found.loss), loss


@pytest.mark.parametrize(("one", "other"), [("qwen3", "gpt-oss"), ("gpt-oss", "qwen3"), ("qwen3", "deepseek-v3.1")])
def test_a_marker_is_scored_as_the_same_event(one, other):
    """A thought ends with one token on either side: its target is the teacher's own probability of ending it there."""
    student, teacher = tokenizer("student", one), tokenizer("teacher", other)
    pair = Pair(student, teacher)
    text = written(one, thought=True, answer=True, call=False)
    batch = pair.prepare([opened(other, told=False)], [ids_of(student, text)])
    with torch.no_grad():
        scores = pair.scores(model(teacher, 1)(**batch.teacher_inputs), batch)
    index = batch.index
    marker = (index.kind_of_student()[0] == int(Kind.MARKER)).nonzero()[:, 0].tolist()
    close = ids_of(student, THINK[one][1].strip("\n"))[0]
    at = batch.student_ids[0].index(close)
    assert at in marker
    place = int(index.teacher_pos[0, at])
    assert batch.teacher_ids[0][place] == ids_of(teacher, THINK[other][1].strip("\n"))[0]
    torch.testing.assert_close(scores.transferred[0, at], scores.logprobs[0, place])
    q, places = scores.target, scores.target.places()[0].tolist()
    target, *_ = q.slice(places.index(at), places.index(at) + 1)
    torch.testing.assert_close(target[0, close].log(), scores.logprobs[0, place])
    # What opens a thought in gpt-oss opens an answer too: nothing is said about it but by whole chunks.
    if "gpt-oss" in (one, other):
        assert int(index.teacher_pos[0, marker[0]]) == -1
        assert not torch.isfinite(scores.transferred[0, marker[0]])


def test_markers_are_scored_only_if_they_shall_be():
    student, teacher = tokenizer("student", "qwen3"), tokenizer("teacher", "gpt-oss")
    ids = ids_of(student, written("qwen3", thought=True, answer=True, call=True))
    a, b = model(student, 0), model(teacher, 1)
    for loss in ("transfer_kl", "prior", "alm", "byte_kl", "strict_kl", "uld_hybrid"):
        scored = []
        for wanted in (True, False):
            pair = Pair(student, teacher, loss, score_markers=wanted, max_chunk_tokens=0)
            batch = pair.prepare([ASKED], [ids])
            with torch.no_grad():
                out = pair.loss(a(**batch.student_inputs), b(**batch.teacher_inputs), batch)
            scored.append(int(out.sums["scored"]))
        assert scored[0] > scored[1], loss


def test_what_a_teacher_has_no_form_for():
    student, teacher = tokenizer("student", "qwen3"), tokenizer("teacher", "gemma")
    ids = ids_of(student, written("qwen3", thought=True, answer=True, call=True))
    left_out = Pair(student, teacher).prepare([ASKED], [ids])
    assert decoded(teacher, left_out.teacher_ids[0]) == ANSWER + "<end_of_turn>"
    chunk = left_out.index.student_chunk[0].tolist()
    first = ids.index(ids_of(student, "</think>")[0])
    assert set(chunk[: first + 1]) == {-1}
    text = Pair(student, teacher, foreign="text").prepare([ASKED], [ids])
    assert decoded(teacher, text.teacher_ids[0]) == written("qwen3", thought=True, answer=True, call=True).replace(
        "<|im_end|>", "<end_of_turn>"
    )
    assert min(text.index.student_chunk[0].tolist()) == 0
    # Also where the student's prompt has opened the thought.
    r1 = tokenizer("student", "deepseek-r1")
    batch = Pair(r1, teacher, foreign="text").prepare([ASKED], [ids_of(r1, "I need")])
    assert decoded(teacher, batch.teacher_ids[0]) == "I need"
    with pytest.raises(XTokMapError, match='foreign=\'score\': use "omit" or "text"'):
        Pair(student, teacher, foreign="score")
    with pytest.raises(XTokMapError, match="leaves out the tools"):  # as ever: a model must be told all of a prompt
        Pair(student, teacher).prepare([CONVERSATION], [ids])


def test_a_call_is_found_in_linear_time():
    for body in (
        '{"name": "a"' + " " * 100_000,
        "a" + " " * 100_000 + "b",
        '{"name": "a", "arguments": {' + "}" * 100_000 + "a",
    ):
        assert parsed(body) is None or not parsed(body)[2]


# ---- markers as text ----------------------------------------------------------------------------------------------


def test_special_tokens_can_be_text(tmp_path, monkeypatch):
    """For those who align rendered text: then every id spells what it is called, and no turn ends."""
    monkeypatch.setenv("XTOKMAP_CACHE", str(tmp_path / "cache"))
    source = tiny.student_tokenizer()
    source.save_pretrained(tmp_path / "saved")
    text = "<|im_start|>user\nthe sky<|im_end|>"
    ids = source(text, add_special_tokens=False).input_ids
    for tokenizer in (source, source.backend_tokenizer, tmp_path / "saved", tmp_path / "saved" / "tokenizer.json"):
        for _ in range(2):  # from the cache, too
            bt = xtokmap.byte_table(tokenizer, special="text")
            assert (bt.decode(ids), bt.stop_ids, bt.is_special.any()) == (text.encode(), (), False)
            plain = xtokmap.byte_table(tokenizer)
            assert plain.decode(ids) == b"user\nthe sky"
            assert plain.stop_ids
    a = xtokmap.Aligner(bt, bt).align(ids, ids)
    assert (a.kind == Kind.ONE_TO_ONE).all()
    with pytest.raises(XTokMapError, match='special=\'name\': use "none" or "text"'):
        xtokmap.byte_table(source, special="name")
    with pytest.raises(XTokMapError, match="a ByteTable has no names"):
        xtokmap.byte_table(plain, special="text")


# ---- real tokenizers ---------------------------------------------------------------------------------------------


@cache
def real(name: str) -> PreTrainedTokenizerFast:
    """A family's template on its own vocabulary, or on the one that it was made from, out of a package."""
    if name.startswith("deepseek"):
        return families.of_family(Tokenizer.from_file(str(real_tokenizers.path("deepseek"))), name)
    encoding = {"qwen3": "qwen", "gpt-oss": "o200k"}[name]
    with tempfile.NamedTemporaryFile("wb", suffix=".tiktoken") as file:
        ranks = real_tokenizers.ranks(encoding)
        file.write(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
        file.flush()
        converter = TikTokenConverter(file.name, pattern=real_tokenizers.ENCODINGS[encoding][0])
        return families.of_family(converter.converted(), name)


@pytest.mark.parametrize(("one", "other"), [("qwen3", "deepseek-r1"), ("deepseek-r1", "qwen3")])
def test_real_tokenizers_get_the_ids_that_they_would_make(one, other):
    student, teacher = real(one), real(other)
    al = Aligner(student, teacher, markers=True)
    turn = {"thought": True, "answer": True, "call": True}
    (ids,), batch = al.retokenize([ids_of(student, written(one, **turn))], stop_id=ids_of(teacher, END[other])[0])
    assert ids.tolist() == ids_of(teacher, written(other, **turn))
    kinds = Counter(batch[0].kind.tolist())
    assert kinds[Kind.MARKER] == 4
    assert kinds[Kind.ONE_TO_ONE] >= 20
    assert batch[0].coverage > 0.9


@pytest.mark.slow
def test_the_picture_of_the_page_is_what_the_example_prints():
    spec = importlib.util.spec_from_file_location("reasoning", ROOT / "examples" / "reasoning.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    page = (ROOT / "docs" / "reasoning.md").read_text(encoding="utf-8")
    assert f"```text\n{example.picture(real('qwen3'), real('gpt-oss'))}\n```" in page
    assert len((ROOT / "examples" / "reasoning.py").read_text(encoding="utf-8").splitlines()) < 40


def test_smollm2_neither_thinks_nor_calls_by_its_own_template():
    path = real_tokenizers.path("smollm2")
    pytest.importorskip("gguf")
    tok = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    assert Format.of(tok) == Format.of(tokenizer("student", "smollm2")) == Format()
