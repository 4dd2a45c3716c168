"""Several teachers of several families: weighted row by row, and what a run makes of them."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch

import tiny
import xtokmap
from xtokmap.teachers import LocalTeacher
from xtokmap.torch import Pair
from xtokmap.torch.mixture import View, mixed, shares
from xtokmap.train import Config
from xtokmap.train.loop import train
from xtokmap.train.several import named_teachers, shares_by_domain

pytestmark = pytest.mark.filterwarnings("ignore:fastokens gives other ids")

PROMPTS = ["the dog", "the sky", "a fox", "thirteen", "the"]


def test_names_and_domains_are_read():
    assert named_teachers("math=a/b, code=c@http://host:80") == {"math": ("a/b", ""), "code": ("c", "http://host:80")}
    assert named_teachers("") == {}
    names = ("teacher", "math")
    assert shares_by_domain("sums: math; chat: teacher=1 math=3", names) == {
        "sums": {"teacher": 0.0, "math": 1.0},
        "chat": {"teacher": 0.25, "math": 0.75},
    }


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (named_teachers, "math", "'math' is no NAME=MODEL"),
        (named_teachers, "a b=c", "'a b=c' is no NAME=MODEL"),
        (named_teachers, "teacher=x", "'teacher' is another teacher's name already"),
        (named_teachers, "a=x, a=y", "'a' is another teacher's name already"),
        (lambda text: shares_by_domain(text, ("teacher",)), "chat", "'chat' is no new"),
        (lambda text: shares_by_domain(text, ("teacher",)), "a: teacher; a: teacher", "'a: teacher' is no new"),
        (
            lambda text: shares_by_domain(text, ("teacher",)),
            "a: nobody",
            "'nobody' is no weight of a teacher; there are",
        ),
        (lambda text: shares_by_domain(text, ("teacher",)), "a: teacher=-1", "weights are at least 0"),
        (lambda text: shares_by_domain(text, ("teacher",)), "a: teacher=x", "'teacher=x' is no weight"),
        (lambda text: shares_by_domain(text, ("teacher",)), "a: teacher=0", "no teacher counts in 'a'"),
    ],
)
def test_what_cannot_be_is_named(read, text, message):
    with pytest.raises(xtokmap.XTokMapError, match=message):
        read(text)


@pytest.fixture(scope="module")
def views():
    """Two teachers of one student on one batch; the second is asked about some rows only."""
    student, tokenizer, teacher, teacher_tokenizer = tiny.pair()
    torch.manual_seed(3)
    first = LocalTeacher(teacher, teacher_tokenizer)
    second = LocalTeacher(copy.deepcopy(student), tokenizer)
    ids = [tokenizer(text).input_ids for text in ("cat runs", "is blue over", "fox", "lazy dogs are", "x")]
    one = Pair(tokenizer, teacher_tokenizer)
    other = Pair(tokenizer, tokenizer)
    batch = one.prepare(PROMPTS, ids)
    rows = [0, 2, 3]
    some = other.prepare([PROMPTS[b] for b in rows], [ids[b] for b in rows])
    found = [
        View(one, batch, one.scores(first, batch), [1.0, 1.0, 0.25, 0.0, 0.5], {b: b for b in range(5)}, "teacher"),
        View(other, some, other.scores(second, some), [0.0, 0.0, 0.75, 1.0, 0.0], {0: 0, 2: 1, 3: 2}, "second"),
    ]
    return student, found


def rows_of(student, batch):
    from xtokmap.torch.completions import completion_rows

    return completion_rows(student, batch.student_prompt_ids, batch.student_ids)


def test_the_loss_is_the_weighted_sum_of_the_rows(views):
    """Against each row by itself, and its gradient."""
    student, (one, other) = views
    denominator = one.batch.completion_mask.sum()
    found = list(shares((one, other), rows_of(student, one.batch), range(5),
                        denominator=denominator))  # fmt: skip
    total = mixed(found, one.batch.completion_mask.shape[1], 5)
    student.zero_grad()
    total.loss.backward()
    got = student.get_output_embeddings().weight.grad.clone()
    student.zero_grad()
    want, nats = 0.0, torch.zeros(5)
    for view in (one, other):
        for b, weight in enumerate(view.weights):
            if weight:
                alone = view.batch.select([view.at[b]])
                part = view.pair.loss(rows_of(student, alone), view.scores, alone, denominator=denominator)
                (weight * part.loss).backward()
                want += weight * part.loss.item()
                nats[b] += weight * part.sums["nats"].item()
    assert total.loss.item() == pytest.approx(want, rel=1e-5)
    torch.testing.assert_close(got, student.get_output_embeddings().weight.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(total.sums["nats"], nats, atol=1e-4, rtol=1e-4)
    assert {"teacher/nats", "second/nats", "second/bytes"} <= set(total.sums)
    # Row 0 counts for the first alone, though the second was asked about it.
    assert total.sums["tokens"] < denominator


def test_micro_batches_add_up(views):
    student, both = views
    denominator = 7.0
    whole = mixed(list(shares(both, rows_of(student, both[0].batch), range(5), denominator=denominator)), 9, 5)
    loss = 0.0
    for rows in ([4, 0], [3], [1, 2]):
        flat = rows_of(student, both[0].batch.select(rows))
        found = list(shares(both, flat, rows, denominator=denominator))
        loss += mixed(found, 9, len(rows)).loss.item()
    assert loss == pytest.approx(whole.loss.item(), rel=1e-5)


def saved(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    student, tokenizer, teacher, teacher_tokenizer = tiny.pair()
    torch.manual_seed(9)
    rows = [
        {"prompt": p, "domain": d} for p, d in zip(PROMPTS * 2, ["sums", "chat", "", "sums", "chat"] * 2, strict=True)
    ]
    rows += [{"prompt": "the fox", "split": "heldout", "domain": "sums"}]
    (base / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return base, saved(base / "student", student, tokenizer), saved(base / "teacher", teacher, teacher_tokenizer)


@pytest.mark.parametrize("loss", ["auto", "prior"])
def test_a_run_learns_from_all_of_them(folders, tmp_path, loss):
    base, student, teacher = folders
    config = Config(
        student=student,
        teacher=teacher,
        more_teachers=f"other={student}",
        domains="sums: other; chat: teacher=1 other=3",
        prompts=str(base / "prompts.jsonl"),
        output=str(tmp_path / "run"),
        steps=3,
        batch_size=4,
        micro_batch=3,
        max_new_tokens=10,
        learning_rate=1e-3,
        loss=loss,
        save_every=2,
        device="cpu",
    )
    result = train(config)
    for line in result.metrics:
        assert set(line["kl_by_teacher"]) == {"teacher", "other"}
        assert line["flops"]["teacher"] > 0
        assert all(map(math.isfinite, line["kl_by_teacher"].values()))
    # The held-out prompt is of a domain in which the other one counts alone.
    alone = dataclasses.replace(
        config, teacher=student, more_teachers="", domains="", steps=1, output=str(tmp_path / "alone")
    )
    want = train(alone).before
    assert result.before is not None
    assert want is not None
    assert result.before.nats == pytest.approx(want.nats, rel=1e-4)
    assert result.before.nbytes == want.nbytes
    again = train(dataclasses.replace(config, steps=4, resume=True))
    assert len(again.metrics) == 4
    assert "all 2 teachers count the same" not in json.dumps(again.metrics)


def test_a_config_names_what_does_not_go_together():
    for values, message in (
        ({"more_teachers": "x=y", "method": "sft"}, "method='sft' with more_teachers"),
        ({"domains": "a: teacher"}, "domains without more_teachers"),
        ({"domains": "a: x"}, "'x' is no weight of a teacher"),
        ({"more_teachers": "=y"}, "is no NAME=MODEL"),
    ):
        with pytest.raises(xtokmap.XTokMapError, match=message):
            Config(**values)
