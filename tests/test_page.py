"""The report: one page with everything in it, whatever the run's texts are, and for any run folder."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

import tiny
import xtokmap
from xtokmap import report as page
from xtokmap.cli import main
from xtokmap.teachers.local import LocalTeacher
from xtokmap.train import run as running
from xtokmap.train.config import Config
from xtokmap.train.loop import train
from xtokmap.train.sampling import Roller
from xtokmap.train.support.samples import KEEP, Samples

pytestmark = pytest.mark.filterwarnings("ignore:fastokens gives other ids")

NASTY = "</title></style><script>alert('x')</script><img src=http://example.org/a.png onerror=alert(1)> {body} & \"'"


class Reader(HTMLParser):
    """Checks that elements are nested, and collects what they are."""

    EMPTY = ("meta", "line", "circle", "path", "br")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.attributes, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs
        # A path is closed by itself or holds its title.
        if tag not in ("meta", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    prompts = path / "prompts.jsonl"
    rows = [{"prompt": NASTY}, {"prompt": "the sky"}, {"prompt": NASTY, "split": "heldout"}]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    config = Config(
        prompts=str(prompts),
        output=str(path / "out"),
        steps=3,
        batch_size=4,
        max_new_tokens=12,
        max_chunk_tokens=0,
        device="cpu",
        plain_template=NASTY + "{prompt}",
    )
    train(config, models=tiny.pair())
    return path / "out"


def test_the_page_needs_nothing_but_itself(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    read = Reader(text)
    assert set(read.elements) & {"script", "img", "link", "iframe", "object", "base", "form", "a"} == set()
    assert not [name for name, _ in read.attributes if name in ("src", "href") or name.startswith("on")]
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "default-src 'none'" in text


def test_texts_of_prompts_and_models_stay_text(folder):
    read = Reader((folder / "report.html").read_text(encoding="utf-8"))
    assert "script" not in read.elements
    shown = "".join(read.text)
    assert shown.count(NASTY) >= 2  # the sample's, and the held-out one's


def test_everything_is_on_the_page(folder):
    read = Reader((folder / "report.html").read_text(encoding="utf-8"))
    shown = " ".join(" ".join(read.text).split())
    for title in ("Warnings", "Curves", "Held-out prompts", "Samples of the run", "Chunks where the two differ most"):
        assert title in shown
    for word in ("Gradient norm", "Entropy of the student", "ONE_TO_ONE", "Time of a step", "Boundary leak"):
        assert word in shown
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["xtokmap"] == xtokmap.__version__
    assert environment["versions"]["torch"] in shown
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert (
        f"{evaluation['before']['kl_per_byte']:.4f} ± {evaluation['before']['kl_error']:.4f}".replace("nan", "–")
        in shown
    )


def test_samples_are_the_runs_own_chunks(folder):
    records = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {r["why"] for r in records} >= {"sample", "gap", "heldout"}
    assert [r["step"] for r in records if r["why"] == "sample"] == [m["step"] for m in metrics]
    for record in records:
        if record["why"] == "heldout":
            continue
        for chunk in record["columns"]:
            sums = [sum(x for _, x in chunk[side]) for side in ("student", "teacher")]
            if chunk["gap"] is not None:
                assert chunk["gap"] == pytest.approx(sums[0] - sums[1], abs=2e-3)
            else:
                assert not (chunk["student"] and chunk["teacher"])
            assert all(x <= 0 for side in ("student", "teacher") for _, x in chunk[side])
        if record["why"] == "gap":
            assert record["gap"] == record["columns"][record["at"]]["gap"]
        if record["why"] == "bytes":
            assert record["columns"][record["at"]]["kind"] in ("REWRITTEN", "UNALIGNED")
    gaps = [abs(r["gap"]) for r in records if r["why"] == "gap"]
    assert gaps == sorted(gaps, reverse=True)


def test_the_samples_of_a_long_run_stay_few(folder, tmp_path, monkeypatch):
    from xtokmap.train.support import samples as module

    student, tokenizer, teacher, teacher_tokenizer = tiny.pair()
    roller = Roller(
        student, tokenizer, LocalTeacher(teacher, teacher_tokenizer), Config(device="cpu", max_new_tokens=6)
    )
    rollouts = roller.roll(["the sky", "the dog"])
    logprobs = roller.all_logprobs(rollouts.batch)
    kept = Samples()
    for step in range(1, 101):
        kept.add(step, roller, rollouts, logprobs - step / 100)
    steps = [r["step"] for r in kept.records["sample"]]
    assert len(steps) <= KEEP["sample"]
    assert steps == list(range(1, 101, steps[1] - 1))
    assert all(len(kept.records[why]) <= KEEP[why] for why in KEEP)
    kept.write(tmp_path / "samples.jsonl")
    again = module.Samples()
    again.read(tmp_path / "samples.jsonl")
    assert again.records == json.loads(json.dumps(kept.records))
    assert again.every == kept.every


def test_a_run_that_is_cut_off_has_its_report(folder, tmp_path, monkeypatch):
    real, calls = running.update, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(running, "update", interrupted)
    prompts = tmp_path / "p.txt"
    prompts.write_text("the sky")
    config = Config(prompts=str(prompts), output=str(tmp_path / "out"), steps=9, batch_size=2, max_new_tokens=8)
    assert train(config, models=tiny.pair()).interrupted
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<b>2 <small>of 9</small></b>" in text
    Reader(text)


def test_the_command_writes_the_page_of_any_run(folder, tmp_path, capsys):
    assert main(["report", str(folder), "--output", str(tmp_path / "a.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text() == (folder / "report.html").read_text()
    assert main(["report", str(tmp_path)]) == 2
    assert "no run in it (no config.json)" in capsys.readouterr().err
    # Before its first step, and from before there were samples.
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text('{"steps": 3}')
    Reader(page.write(old).read_text(encoding="utf-8"))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    new = ("health", "warnings", "entropy", "stops_scored", "boundary_leak")
    cut = [{k: v for k, v in json.loads(line).items() if k not in new} for line in lines]
    (old / "metrics.jsonl").write_text("\n".join(map(json.dumps, cut)))
    Reader(page.write(old).read_text(encoding="utf-8"))
    (old / "metrics.jsonl").write_text(lines[0] + "\n{")
    with pytest.raises(xtokmap.XTokMapError, match=r"metrics\.jsonl, line 2: not JSON"):
        page.write(old)
    (old / "metrics.jsonl").unlink()
    (old / "samples.jsonl").write_text('{"why": "sample", "columns": [{"kind": "STOP"}]}')
    with pytest.raises(xtokmap.XTokMapError, match=r"samples\.jsonl: not a column of tokens"):
        page.write(old)


def test_curves_of_long_runs_and_of_odd_figures_can_be_drawn(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    line = {"grad_norm": 1e-9, "response_length": 0.0, "completed": 0.0, "coverage": {"ONE_TO_ONE": 1.0}}
    rows = [
        {**line, "step": k, "kl_per_byte": float("nan"), "kl_error": 0.1, "time": {"update": 0.0}}
        for k in range(1, 2001)
    ]
    rows[7]["kl_per_byte"], rows[8]["grad_norm"] = 1e30, float("inf")
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = page.write(tmp_path).read_text(encoding="utf-8")
    Reader(text)
    assert not re.search(r"(nan|inf)\b", re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL))
    assert len(text) < 400_000
