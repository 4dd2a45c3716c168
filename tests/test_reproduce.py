"""The comparison: its tasks, its account of compute, and all of it once, small."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

import reproduce
import xtokmap
from reproduce import families, runs, tables
from reproduce.families import ARRANGEMENTS, STUDENT_TEMPLATE, encode, teacher_template, tokenizer
from reproduce.tasks import TASKS, Addition, Chain, final, is_plain, problem_of, solve
from xtokmap import Aligner

ADDITION = Addition()


@pytest.mark.parametrize("way", range(8))
def test_every_way_ends_in_the_right_answer(way):
    rng = random.Random(way)
    texts = set()
    for _ in range(200):
        problem = ADDITION.draw(rng)
        chain = solve(ADDITION, problem, way, rng)
        assert ADDITION.is_right(problem, chain.text)
        assert not ADDITION.is_right(problem, chain.text + "0")
        assert chain.wrong == []
        texts.add(chain.text)
    assert len(texts) > 190
    assert len({solve(ADDITION, (12, 34, 56), k, rng).text for k in range(8)}) == 8


def test_what_follows_a_mistake_is_consistent_with_it():
    chain = Chain(random.Random(0), mistakes=1.0)
    ADDITION.ways[0](chain, (12, 34, 56))
    (a, b), (c, d) = chain.wrong
    first, second = chain.text[a:b], chain.text[c:d]
    assert chain.text == f"12+34={first};{first}+56={second}#{second}"
    assert first != "46"
    assert int(second) != int(first) + 56
    assert final(chain.text) == second


def test_an_answer_is_what_stands_behind_the_only_mark():
    assert final("1+2=3#3") == "3"
    assert final("3") is None
    assert final("#3#4") is None


def test_the_second_task_is_posed_and_judged_by_its_own_library():
    pytest.importorskip("reasoning_gym")
    task = TASKS["chain_sum"]
    rng = random.Random(0)
    problems = [task.draw(rng) for _ in range(300)]
    assert any(min(problem[1:]) < 0 for problem in problems)
    for problem in problems:
        assert task.is_right(problem, f"#{sum(problem)}")
        assert not task.is_right(problem, f"#{sum(problem) + 1}")
        for way in range(8):
            assert task.is_right(problem, solve(task, problem, way, rng).text)


def test_no_problem_is_both_learnt_from_and_judged_by():
    rng = random.Random(0)
    train = {problem_of(ADDITION, rng) for _ in range(3000)}
    heldout = {problem_of(ADDITION, rng, heldout=True) for _ in range(300)}
    assert not train & heldout
    assert runs.heldout_problems(ADDITION, 5) == runs.heldout_problems(ADDITION, 5)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_the_arrangements_cut_as_they_are_called(arrangement):
    student, teacher = (tokenizer(cut, "addition") for cut in ARRANGEMENTS[arrangement])
    text = "12+34=46;46+56=102#102"
    a = Aligner(student, teacher).align(student(text).input_ids, teacher(text).input_ids)
    shares = a.coverage_by_kind()
    kinds = {"student_finer": "MANY_TO_ONE", "teacher_finer": "ONE_TO_MANY", "crossing": "MANY_TO_MANY"}
    assert a.coverage == 1
    assert shares[getattr(xtokmap.Kind, kinds[arrangement])] > 0.3
    assert student.decode(student(text).input_ids) == text


@pytest.mark.parametrize("cut", ["digits", "numbers", "pairs", "before", "after"])
def test_wrong_numbers_are_not_learnt(cut):
    made = tokenizer(cut, "addition")
    chain = Chain(random.Random(0), mistakes=1.0)
    ADDITION.ways[0](chain, (12, 34, 56))
    ids, labels = encode(made, "addition", [((12, 34, 56), 8, chain)], teacher_template)
    prompt = made("12+34+56?8>").input_ids
    assert labels[0, : len(prompt)].tolist() == [-100] * len(prompt)
    hidden = ids[0, len(prompt) :][labels[0, len(prompt) :] == -100].tolist()
    first, second = (chain.text[a:b] for a, b in chain.wrong)
    for number in (first, second):
        assert number in made.decode(hidden)
    assert labels[0, -1] == made.eos_token_id
    assert made.decode(ids[0, len(prompt) : -1]) == chain.text


def run_of(method, seed, points):
    flops = [{"sample": 0, "teacher": 0, "update": cost} for cost, _ in points]
    found = [
        {"step": k, "flops": f, "seconds": 2.0 * k, "greedy": right, "sampled": right / 2, "plain": 1.0}
        for k, (f, (_, right)) in enumerate(zip(flops, points, strict=True))
    ]
    names = {"task": "addition", "arrangement": "crossing", "ways": 8, "rate": 1e-3, "steps": len(points) - 1}
    return {**names, "method": method, "seed": seed, "points": found}


def test_the_cost_of_an_accuracy_lies_between_the_points_around_it():
    run = run_of("sft", 0, [(0, 0.2), (100, 0.4), (300, 0.8)])
    assert tables.cost_to_reach(run, 0.3) == pytest.approx(50)
    assert tables.cost_to_reach(run, 0.5) == pytest.approx(150)
    assert tables.cost_to_reach(run, 0.5, ("seconds",)) == pytest.approx(2.5)
    assert tables.cost_to_reach(run, 0.1) == 0
    assert math.isinf(tables.cost_to_reach(run, 0.9))
    assert tables.cost_to_reach(run, 0.3, measure="sampled") == pytest.approx(200)


def test_ratios_pair_the_seeds_and_say_what_they_do_not_know():
    fast = [run_of("opd", seed, [(0, 0.2), (10, 0.6)]) for seed in (0, 1)]
    slow = [run_of("sft", 0, [(0, 0.2), (100, 0.6)]), run_of("sft", 1, [(0, 0.2), (400, 0.6)])]
    ratio = tables.Ratio(slow, fast, 0.4)
    assert ratio.mean == pytest.approx(20)
    assert tables.Ratio(slow, fast, 0.2, measure="sampled").mean == pytest.approx(20)
    assert tables.gains({"sft": slow, "opd transfer_kl": fast}) == pytest.approx(
        {
            "nine tenths of what sft gains": 0.36,
            "a quarter of what transfer_kl gains": 0.1,
            "half of what transfer_kl gains": 0.2,
            "three quarters of what transfer_kl gains": 0.3,
        }
    )
    half = 12.706 * math.log(2)  # one degree of freedom; the logarithms are log 20 -+ log 2
    assert ratio.low == pytest.approx(20 / math.exp(half))
    assert ratio.high == pytest.approx(20 * math.exp(half))
    stuck = [run_of("sft", 0, [(0, 0.2), (100, 0.3)]), slow[1]]
    bounded = tables.Ratio(stuck, fast, 0.4)
    assert bounded.bounded == 1
    assert bounded.mean == pytest.approx(20)
    assert math.isinf(bounded.high)
    assert str(bounded).startswith("≥ 20")
    failed = tables.Ratio(slow, [run_of("opd", seed, [(0, 0.2), (10, 0.3)]) for seed in (0, 1)], 0.4)
    assert failed.failed == 2
    assert str(failed) == "- (not there on 2 seeds)"


def test_intervals_are_students():
    mean, half = tables.interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(tables.interval([1.0])[1])


def test_a_curve_has_the_ends_of_runs_and_nothing_from_their_middle():
    short, long = (run_of("sft", 0, [(0, 0.2), (cost, right)]) for cost, right in ((10, 0.3), (90, 0.7)))
    short, long = {**short, "steps": 5}, {**long, "steps": 50}
    (curve,) = tables.curves([long, short])
    assert [(p["greedy"], tables.cost(p, tables.ALL)) for p in curve["points"]] == [(0.2, 0), (0.3, 10), (0.7, 90)]
    assert len(tables.curves([short, {**long, "seed": 1}])) == 2


def test_a_gain_stands_beside_that_of_right_answers_alone():
    cell = {
        "right answers": [run_of("right answers", seed, [(0, 0.2), (10, 0.3)]) for seed in (0, 1)],
        "opd transfer_kl": [run_of("opd transfer_kl", seed, [(0, 0.2), (10, 0.6)]) for seed in (0, 1)],
    }
    alone, taught = tables.cell_table(cell)[2:]
    assert "| +0.400 ± 0.000 | +0.100 ± 0.000 | +0.200 ± 0.000 | +0.050 ± 0.000 | 100% |" in taught
    assert "| +0.100 ± 0.000 |  | +0.050 ± 0.000 |  | 100% |" in alone


def test_the_drift_table_has_the_longest_runs_of_the_seeds_that_were_held():
    def run(method, seed, right):
        return {**run_of(method, seed, [(0, 0.2), (10, right)]), "steps": 1}

    cell = {
        "opd transfer_kl": [run("opd transfer_kl", seed, 0.6 + seed / 10) for seed in (0, 1)],
        "opd transfer_kl, anchor .1": [run("opd transfer_kl, anchor .1", 0, 0.9)],
        "sft": [run("sft", 0, 0.1)],
    }
    assert tables.drift_table(cell)[2:] == [
        "| opd transfer_kl | 0 | 0.600 | 0.300 | 100% |",
        "| opd transfer_kl, anchor .1 | 0 | 0.900 | 0.450 | 100% |",
    ]


@pytest.mark.parametrize("name", TASKS)
def test_the_students_own_way_is_known_by_its_looks(name):
    if name == "chain_sum":
        pytest.importorskip("reasoning_gym")
    task, rng = TASKS[name], random.Random(3)
    for _ in range(100):
        problem = task.draw(rng)
        assert is_plain(solve(task, problem, 0, rng).text, problem)
        assert is_plain(solve(task, problem, 0, rng, mistakes=1.0).text, problem)
    found = [is_plain(solve(task, (12, 34, 56), way, rng).text, (12, 34, 56)) for way in range(8)]
    assert found == [True] + [False] * 7
    assert not is_plain("12+34=46;46+56=102#103", (12, 34, 56))


def test_the_sweep_takes_the_rate_with_the_most_right_answers():
    curves = {1e-4: 0.4, 1e-3: 0.7, 3e-3: 0.6}
    rows = [{**run_of("sft", 100, [(0, 0.2), (10, last)]), "rate": rate} for rate, last in curves.items()]
    assert reproduce.choose_rates(rows) == {("addition", 8, "sft"): 1e-3}


def test_what_is_held_beside_another_method_has_its_rate_and_is_not_swept():
    swept = list(reproduce._sweep(reproduce.FULL))
    assert {s.method for s in swept}.isdisjoint(reproduce.SAME_RATE)
    assert {s.arrangement for s in swept} == {"student_finer"}
    rates = {(s.task, s.ways, s.method): float(len(s.method)) for s in swept}
    made = list(reproduce._settings(reproduce.FULL, rates))
    cells = [(s.task, s.arrangement, s.ways) for s in made]
    assert list(dict.fromkeys(cells)) == [cell for k, cell in enumerate(cells) if k == 0 or cell != cells[k - 1]]
    for s in made:
        assert s.rate == len(reproduce.SAME_RATE.get(s.method, s.method))
    longest = {s.steps for s in made if "anchor" in s.method}
    assert longest == {400}
    assert {s.seed for s in made if "anchor" in s.method} == {0, 1, 2}


@pytest.mark.slow
def test_a_student_is_annealed_and_judged_as_such(monkeypatch):
    monkeypatch.setattr(families, "ANNEALED", 3)
    trained, judged = [], []
    real = families.fit

    def fit(model, draw, **how):
        trained.append((how["seed"], how["steps"], how["rate"](0), how["rate"](2)))
        real(model, draw, **how)

    def share(model):
        judged.append(model)
        return len(judged) / 10

    monkeypatch.setattr(families, "fit", fit)
    made = families.fit_student("addition", "digits", seed=0, judged=share, target=0.5, steps=100)
    # .1 is too far off to try; .2 and .3 annealed; .4 and .5 annealed.
    assert len(judged) == 5
    assert [steps for _, steps, *_ in trained] == [100, 3, 3]
    rate = families.STUDENT_RATE
    assert [k for *_, first, third in trained for k in (first, third)] == pytest.approx(
        [rate / 50, rate * 3 / 50, rate, rate / 3, rate, rate / 3]
    )
    assert made is judged[-1]
    assert made is not judged[-2]


@pytest.fixture
def small(monkeypatch):
    """Everything of the comparison, too small to learn much; in this process, so that it is as small there."""
    monkeypatch.setattr(reproduce, "TEACHER_STEPS", dict.fromkeys(TASKS, 3))
    monkeypatch.setattr(reproduce, "RATES", dict.fromkeys(("opd", "kd", "sft"), (1e-3,)))
    monkeypatch.setattr(families, "ANNEALED", 2)
    for name, value in (("BATCH", 8), ("MAX_NEW_TOKENS", 12), ("JUDGED", 8), ("POOL", 24)):
        monkeypatch.setattr(runs, name, value)
    real = families.fit_student
    monkeypatch.setattr(families, "fit_student", lambda *args, **how: real(*args, **{**how, "steps": 20}))
    reproduce.bench.cache_clear()
    yield
    reproduce.bench.cache_clear()


class HereExecutor:
    """Runs what it is given at once."""

    def __init__(self, *_) -> None:
        self.jobs = 0

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass

    def submit(self, function, *arguments):
        future = reproduce.Future()
        future.set_result(function(*arguments))
        self.jobs += 1
        return future


@pytest.mark.slow
def test_all_of_it_once_and_going_on_where_it_was(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reproduce, "ProcessPoolExecutor", HereExecutor)
    first = dict.fromkeys(runs.METHODS, (1,)) | {"sft": (1, 2), "right answers": (2,)}
    cells = (
        reproduce.Cell("addition", "crossing", 8, first),
        reproduce.Cell("addition", "crossing", 1, {"sft": (1,), "opd transfer_kl": (1,)}, seeds=1),
    )
    monkeypatch.setattr(reproduce, "FULL", reproduce.Plan(cells, seeds=(0,), sweep_seeds=(100,)))
    threads = torch.get_num_threads()
    folder = reproduce.reproduce(tmp_path / "out")
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert len(rows) == len(first) + 3
    for row in rows:
        before, after = row["points"]
        assert (before["step"], after["step"]) == (0, row["steps"])
        assert sum(before["flops"].values()) == 0 < after["flops"]["update"]
        assert (after["flops"]["teacher"] == 0) == (row["method"] == "sft" or row["method"] in runs.TEACHERLESS)
        assert (after["flops"]["sample"] == 0) == (row["method"] in runs.TEACHERLESS)
        assert after["seconds"] > 0
    # The second batch asks for other problems than the first: 24 in all, 8 a step.
    sampled = {
        row["steps"]: row["points"][1]["flops"]["sample"]
        for row in rows
        if (row["method"], row["ways"], row["seed"]) == ("sft", 8, 0)
    }
    assert sampled[2] > sampled[1]
    text = (folder / "reproduction.md").read_text()
    assert "## addition, crossing, 8 ways" in text
    assert "## addition, crossing, 1 way\n" in text
    assert "### Drift" in text
    assert all(f"| {method} |" in text for method in runs.METHODS)
    assert (folder / "reproduction-addition-8.png").read_bytes().startswith(b"\x89PNG")

    # One run is lost, and only that is made again, with the same result but for its time.
    lost = rows.pop(3)
    (folder / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    reproduce.reproduce(tmp_path / "out")
    assert "runs: 1 to do" in capsys.readouterr().out
    again = json.loads((folder / "runs.jsonl").read_text().splitlines()[-1])
    for row in (lost, again):
        for point in row["points"]:
            del point["seconds"]
    assert again == lost
    assert torch.get_num_threads() == threads


def test_right_answers_are_whole_turns_in_the_students_way(monkeypatch):
    monkeypatch.setattr(runs, "POOL", 24)
    made = {cut: tokenizer(cut, "addition") for cut in ("digits", "numbers")}
    teacher = families.teacher_model(len(made["numbers"]))
    bench = runs.Bench("addition", "student_finer", teacher, lambda seed: families.student_model(len(made["digits"])))
    roller = bench._roller(bench.student(0), runs.Setting("addition", "student_finer", 8, "right answers", 1e-3, 0, 1))
    rollouts = roller.roll(bench.prompts[:4])
    for prompt, ids in zip(bench.prompts, rollouts.batch.student_ids, strict=False):
        assert ids[-1] == made["digits"].eos_token_id
        text = made["digits"].decode(ids[:-1])
        problem = tuple(map(int, prompt.split("+")))
        assert is_plain(text, problem)
        assert ADDITION.is_right(problem, text)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(xtokmap.XTokMapError, match=r"chain_sum needs pip install 'xtokmap\[reproduce\]'"):
        reproduce.reproduce(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "cut"), [("addition", "numbers"), ("addition", "digits"), ("addition", "after"), ("chain_sum", "numbers")]
)
def test_the_stored_teachers_can_do_their_task(name, cut):
    if name == "chain_sum":
        pytest.importorskip("reasoning_gym")
    made, task = tokenizer(cut, name), TASKS[name]
    path = reproduce.teacher_path(Path(__file__).parents[1] / "benches" / "teachers", name, cut)
    teacher = reproduce._load(families.teacher_model(len(made)), path)
    problems = runs.heldout_problems(task, 64)
    assert runs.judge(teacher, made, task, teacher_template(1), problems, greedy=True).right > 0.95


def test_the_student_and_the_teacher_are_asked_the_same_problem():
    assert STUDENT_TEMPLATE.replace("{prompt}", "1+2+3") == "1+2+3>"
    assert teacher_template(8).replace("{prompt}", "1+2+3") == "1+2+3?8>"
