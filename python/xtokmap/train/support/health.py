"""Is a run still well? Figures of every step that show what goes wrong, and warnings that name the likely cause.

`measure` takes what a step has anyway: the student's logprobs and hidden states of its update, the teacher's scores,
and the alignment. `Monitor` reads nothing but lines of `metrics.jsonl`, so that it can judge a run from its file, too.

The limits were set on small models and held against two steps of SmolLM2 135M with Gemma 3 270M, which warned of
nothing: there the logprobs of the two on ONE_TO_ONE chunks correlate at .85, and at .17 and .19 with those one chunk
earlier and later; the teacher's tokens have mean logprob -3.3 in their own rows and -10.4 and -12.9 in those beside; a
response is 40.7 nats likelier to the student after its own prompt than after another's, 22.7 to the teacher. Not found
reliably: a teacher that gets the prompts of other rows. Not said: responses that have run to `max_new_tokens` from the
start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from xtokmap.alignment import Kind
from xtokmap.losses.queries import boundary_leak
from xtokmap.torch.completions import batched_logprobs
from xtokmap.torch.logits import _SLICE, Logits, blocks, entropy_of, softmax_and_sums
from xtokmap.train.config import Config
from xtokmap.train.rollouts import Rollouts
from xtokmap.train.sampling import Roller
from xtokmap.train.step import StepResult

#: Rows of the student whose entropy counts in a step, evenly spaced over its tokens: each costs a head pass, unless
#: the loss has come by it.
ENTROPY_ROWS = 1024
#: Rows of the teacher looked at in a step, likewise: `boundary_leak` and the fit of neighbors.
TEACHER_ROWS = 64
#: Responses whose prompt is exchanged for another's, in the first step.
PROMPT_ROWS = 8


class Entropy:
    """The student's mean entropy in a step, from some of the rows of its micro-batches.

    Args:
        tokens: of the step.

    Attributes:
        total: float64 `[2]`; the sum in nats, and how many places it is of.
    """

    def __init__(self, tokens: int) -> None:
        self.every = max(1, math.ceil(tokens / ENTROPY_ROWS))
        self.total: Tensor | None = None

    def __call__(self, rows: Logits, known: Tensor | None) -> None:
        """Looks at the flat rows of one more micro-batch, whose entropies its loss may know."""
        found = entropy_sum(rows, self.every, known)
        self.total = found if self.total is None else self.total + found


@torch.no_grad()
def entropy_sum(rows: Logits, every: int, known: Tensor | None = None) -> Tensor:
    """The entropies of every so manieth of the flat rows: float64 `[2]`, sum in nats and number.

    Args:
        rows: N, flat.
        every: see above.
        known: `[N]`, of a loss that came by them (`PairLoss.entropy`): only what is NaN in it is worked out.
    """
    device = rows.rows.device
    at = torch.arange(0, rows.shape.numel(), every, device=device)
    found = [torch.zeros(0, dtype=torch.float64, device=device)]
    if known is not None:
        found.append(known[at].double())
        # Which are missing can be asked of the CPU alone; elsewhere a loss knows all or says nothing.
        at = at[known[at].isnan()] if device.type == "cpu" else at[:0]
    picked = rows.detach().at(at)
    n, size = len(at), max(1, _SLICE // rows.vocab_size)
    for a in range(0, n, size):
        logits = picked.made(a, min(n, a + size))
        for c, d in blocks(min(n, a + size) - a, rows.vocab_size, device):
            x = logits.slice(c, d)
            p, log_sum = softmax_and_sums(x)
            found.append(entropy_of(p, x, log_sum).double())
    entropy = torch.cat(found)
    finite = torch.isfinite(entropy)
    return torch.stack([torch.where(finite, entropy, 0).sum(), finite.sum().double()])


#: Figures of some rows, numbers or lists of them, and how many things each is the mean of.
Figures: TypeAlias = "dict[str, tuple[Any, float]]"
#: Figures whose number of things is a figure as well.
_COUNTED = {"student_nats": "pairs", "lag": "lag_pairs"}


@torch.no_grad()
def measure(roller: Roller, result: StepResult, entropy: Entropy, *, probe: bool = False) -> Figures:
    """What some rows of a step show of its health, for `together`.

    Args:
        roller: student and teacher.
        result: of the step.
        entropy: that watched it.
        probe: whether to exchange prompts, which costs forward passes of `PROMPT_ROWS` rows: one of the teacher, two of
            the student.
    """
    rollouts = result.rollouts
    total, n = (0.0, 0.0) if entropy.total is None else entropy.total.tolist()
    stop = rollouts.batch.index.kind_of_student() == int(Kind.STOP)
    met = rollouts.batch.index.to_student((rollouts.batch.index.teacher_count > 0).long()) > 0
    ended = sum(done for b, done in enumerate(rollouts.completed) if b not in rollouts.skipped)
    scored = int((stop & met).sum()) if roller.config.score_stop else 0
    figures: Figures = {
        "entropy": (total / max(n, 1), n),
        "stops_scored": (scored / max(ended, 1), ended),
        "broken_text": (_broken_text(roller, rollouts), len(rollouts.prompts)),
    }
    if rollouts.teacher is not None:
        figures |= _pairs(rollouts, result.logprobs)
        if isinstance(rollouts.teacher.rows, Logits):
            figures |= _teacher_rows(roller, rollouts, rollouts.teacher.rows)
        if probe and roller.config.method == "opd":
            figures |= _prompt_gain(roller, rollouts)
    return figures


def together(parts: Sequence[Figures]) -> dict[str, Any]:
    """Figures of all rows of a step from those of its parts, for its line of `metrics.jsonl`.

    Args:
        parts: what `measure` gave for each rank's rows.

    Returns:
        None where there is nothing to measure. `entropy`: of the student where it sampled, nats, mean over
        `ENTROPY_ROWS` places a process. `stops_scored`: of the turns that ended, the share whose end of turn is scored.
        `boundary_leak`: nats, mean over `TEACHER_ROWS` places a process. `health`, for `Monitor`: `broken_text`, share
        of the responses that are not UTF-8 before their last character; of ONE_TO_ONE chunks `pairs`, their number,
        `student_nats` and `teacher_nats`, mean negative logprobs, `lag`, the correlations of the student's logprobs
        with the teacher's one chunk earlier, at the same and one later, and `lag_pairs`, how many neighbors these are
        of; `row_fit`, mean logprobs of the teacher's tokens in the row before their own, in their own and in the row
        after (not of a response's first and last token), and `row_fit_error`, the standard error of the difference of
        own and better neighbor; `prompt_gain`, how many nats a response is likelier after its own prompt than after
        another's, to student and teacher, and `prompt_gain_error` of both.
    """
    figures: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        some = [part[name] for part in parts if name in part]
        n = sum(weight for _, weight in some)
        shares = np.array([np.multiply(value, weight / n) for value, weight in some]) if n else np.zeros(0)
        if name in _COUNTED:
            figures[_COUNTED[name]] = n
        if n and name.endswith("_error"):  # of independent means
            figures[name] = np.sqrt((shares**2).sum(0)).tolist()
        elif n:
            figures[name] = shares.sum(0).tolist()
    seen = {name: figures.pop(name, None) for name in ("entropy", "stops_scored", "boundary_leak")}
    return {**seen, "health": figures}


def _broken_text(roller: Roller, rollouts: Rollouts) -> float:
    texts = [roller.aligner.student.decode(ids).decode(errors="replace") for ids in rollouts.batch.student_ids]
    return sum("\ufffd" in text.rstrip("\ufffd") for text in texts) / max(len(texts), 1)


def _pairs(rollouts: Rollouts, student_logprobs: Tensor) -> Figures:
    assert rollouts.teacher is not None
    index = rollouts.batch.index
    s = index.sum_student(student_logprobs)
    t = index.sum_teacher(rollouts.teacher.logprobs.to(s.device))
    good = (index.kind == int(Kind.ONE_TO_ONE)) & torch.isfinite(s) & torch.isfinite(t)
    near = good[:, 1:] & good[:, :-1]
    correlations = [
        _correlation(s[:, 1:][near], t[:, :-1][near]),
        _correlation(s[good], t[good]),
        _correlation(s[:, :-1][near], t[:, 1:][near]),
    ]
    n = int(good.sum())
    nats = {name: (-float(x[good].sum()) / max(n, 1), n) for name, x in (("student_nats", s), ("teacher_nats", t))}
    return {**nats, "lag": (correlations, int(near.sum()))}


def _correlation(x: Tensor, y: Tensor) -> float:
    if len(x) < 2:
        return 0.0
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 0 else 0.0


def _teacher_rows(roller: Roller, rollouts: Rollouts, rows: Logits) -> Figures:
    """Rows lie flat, one more for each response than it has tokens."""
    assert rollouts.teacher is not None
    own, logprobs = rollouts.batch.teacher_ids, rollouts.teacher.logprobs
    device = rows.rows.device
    places = [(b, i) for b, ids in enumerate(rollouts.batch.teacher_ids) for i in range(1, len(ids))]
    places = places[:: max(1, math.ceil(len(places) / TEACHER_ROWS))]
    if len(places) < 2:
        return {}
    first, before = [], 0
    for row in rollouts.batch.teacher_ids:
        first.append(before)
        before += len(row) + 1
    at = torch.tensor([first[b] + i for b, i in places], device=device)
    ids = torch.tensor([own[b][i] for b, i in places], device=device)

    def near(b: int, i: int, k: int) -> Tensor:
        """The logprob of token i in the row of token k, where there is one, from that of token k."""
        if k == len(own[b]):
            return logprobs.new_tensor(torch.nan)
        x = rows.some(first[b] + k, torch.tensor([own[b][i], own[b][k]], device=device))
        return logprobs[b, k] + x[0] - x[1]

    fit = torch.stack([torch.stack([near(b, i, i + step) for b, i in places]) for step in (-1, 0, 1)]).double()
    fit = fit[:, torch.isfinite(fit).all(0)]
    found: Figures = {}
    if (n := fit.shape[1]) > 1:
        means = fit.mean(1)
        better = 0 if means[0] > means[2] else 2
        error = float((fit[better] - fit[1]).std()) / math.sqrt(n)
        found = {"row_fit": (means.tolist(), n), "row_fit_error": (error, n)}
    leak = boundary_leak(replace(rows, rows=rows.rows[at]), ids, roller.aligner.vocab_map)
    leak = leak[torch.isfinite(leak)]
    return {**found, "boundary_leak": (float(leak.sum()) / max(len(leak), 1), len(leak))}


def _prompt_gain(roller: Roller, rollouts: Rollouts) -> Figures:
    assert rollouts.teacher is not None
    n = len(rollouts.prompts)
    pairs: list[tuple[int, int]] = []
    for b in range(n):
        other = next((c % n for c in range(b + 1, b + n) if rollouts.prompts[c % n] != rollouts.prompts[b]), None)
        if other is not None and rollouts.batch.teacher_ids[b] and len(pairs) < PROMPT_ROWS:
            pairs.append((b, other))
    if len(pairs) < 4:
        return {}
    rows, others = ([pair[side] for pair in pairs] for side in (0, 1))
    config = roller.config
    completions = [rollouts.batch.student_ids[b] for b in rows]
    # Both by the policy as it is after the update.
    student, theirs = (
        batched_logprobs(roller.student, p, completions, config.micro_batch, temperature=config.temperature).sum(1)
        for p in (
            [rollouts.batch.student_prompt_ids[b] for b in rows],
            [rollouts.batch.student_prompt_ids[b] for b in others],
        )
    )
    student = student - theirs
    prompts = roller.teacher.render([rollouts.prompts[b] for b in others])
    scores = roller.teacher.score(prompts, [rollouts.batch.teacher_ids[b] for b in rows])
    own = rollouts.teacher.logprobs[rows]
    teacher = own.sum(1) - scores.logprobs.to(own).sum(1)
    gains = [x[torch.isfinite(x)].double() for x in (student, teacher)]
    if (least := min(map(len, gains))) < 4:
        return {}
    errors = [float(x.std()) / math.sqrt(len(x)) for x in gains]
    return {"prompt_gain": ([float(x.mean()) for x in gains], least), "prompt_gain_error": (errors, least)}


class Monitor:
    """Watches a run by its lines of `metrics.jsonl`, and says once what is wrong until it is well again.

    After a resume, `check` the lines of the earlier steps again.

    Args:
        config: of the run.
        vocab_sizes: of student and teacher.

    Attributes:
        active: names of the warnings that hold now.
    """

    #: Steps without its cause after which a warning may come again.
    CLEARS_AFTER = 3

    def __init__(self, config: Config, vocab_sizes: tuple[int, int]) -> None:
        self.config, self.vocab_sizes = config, vocab_sizes
        self.lines: list[dict[str, Any]] = []
        self.active: dict[str, int] = {}

    def check(self, line: dict[str, Any]) -> list[dict[str, str]]:
        """The new warnings after one more step: `name` and `text`, with the figures and what to do."""
        self.lines.append(line)
        new = []
        for name, rule in _RULES.items():
            text = rule(self)
            if text is not None:
                if name not in self.active:
                    new.append({"name": name, "text": f"step {line['step']}: {text}"})
                self.active[name] = 0
            elif name in self.active:
                self.active[name] += 1
                if self.active[name] >= self.CLEARS_AFTER:
                    del self.active[name]
        return new

    def _values(self, key: str, lines: Sequence[dict[str, Any]] | None = None) -> list[float]:
        """A figure of every step that has it."""
        values = ((m | m.get("health", {})).get(key) for m in (self.lines if lines is None else lines))
        return [v for v in values if v is not None and math.isfinite(v)]

    def _then_and_now(self, key: str) -> tuple[float, float] | None:
        """Means over the first steps and over the last three, where these do not overlap."""
        values = self._values(key)
        if len(values) < 5:
            return None
        return fmean(values[: min(5, len(values) - 3)]), fmean(values[-3:])


def _length(m: Monitor) -> str | None:
    if m.config.method != "opd":  # the teacher's samples
        return None
    length, completed = m._then_and_now("response_length"), m._then_and_now("completed")
    if length is None or completed is None or length[1] < 0.9 * m.config.max_new_tokens:
        return None
    if not (length[1] > 1.5 * length[0] or (completed[0] >= 0.5 and completed[1] < 0.5 * completed[0])):
        return None
    scored = m._values("stops_scored")
    if not m.config.score_stop:
        cause = "ends of turns are not scored (score_stop=False): score them, if the teacher knows when to stop"
    elif scored and scored[-1] < 0.5:
        cause = (
            f"only {scored[-1]:.0%} of the ends of turns are scored: no end of turn of the teacher corresponds; set "
            "its tokenizer's eos_token, or give it its chat template"
        )
    else:
        cause = (
            "the teacher gives the end of turn little probability: is it a base model, or its chat template missing? "
            "Use one that ends its turns, or score_stop=False with a lower learning_rate"
        )
    return (
        f"responses run on: length {length[0]:.0f} -> {length[1]:.0f} of max_new_tokens={m.config.max_new_tokens}, "
        f"completed {completed[0]:.0%} -> {completed[1]:.0%}; {cause}"
    )


def _entropy(m: Monitor) -> str | None:
    if m.config.method != "opd":  # it is not what is sampled from
        return None
    pair = m._then_and_now("entropy")
    if pair is None or pair[1] > max(0.25 * pair[0], 0.02) or pair[0] < 0.04:
        return None
    return (
        f"the student's entropy collapses: {pair[0]:.3f} -> {pair[1]:.3f} nats a token, its samples repeat themselves; "
        "lower learning_rate, or beta (toward the forward KL, which keeps all that the teacher says)"
    )


def _coverage(m: Monitor) -> str | None:
    lost = [c["UNALIGNED"] + c["REWRITTEN"] for c in (line["coverage"] for line in m.lines)]
    broken = m._values("broken_text")
    first, now = fmean(lost[: min(5, max(1, len(lost) - 3))]), fmean(lost[-3:])
    if len(lost) >= 5 and now > first + 0.15:
        if broken and fmean(broken[-3:]) > 0.5:
            cause = "the student writes bytes that are no UTF-8 text: has it collapsed? Lower learning_rate"
        else:
            cause = "the student now writes what the teacher's tokenizer spells otherwise: see the report's chunks"
        return f"coverage drops: {first:.0%} -> {now:.0%} of the tokens are REWRITTEN or unaligned; {cause}"
    if len(lost) >= 3 and min(lost[-3:]) > 0.25 and (not broken or max(broken[-3:]) < 0.2):
        last = m.lines[-1]["coverage"]
        return (
            f"{now:.0%} of the tokens are REWRITTEN ({last['REWRITTEN']:.0%}) or unaligned ({last['UNALIGNED']:.0%}): "
            "the teacher's tokenizer changes the text (a normalizer, a lossy decoder), or one side adds text of its "
            "own (a chat template); `xtokmap align` shows where"
        )
    return None


def _shift(m: Monitor) -> str | None:
    line = m.lines[-1].get("health", {})
    if "row_fit" in line:
        before, own, after = line["row_fit"]
        better = max(before, after)
        half = -0.5 * math.log(m.vocab_sizes[1])  # a neighbor that fits no better than this is none
        if own < half < better and better - own > max(1.0, 4 * line["row_fit_error"]):
            return (
                f"the teacher's rows look shifted by one: its tokens have mean logprob {own:.2f} in their own rows, "
                f"{better:.2f} in the row {'before' if before > after else 'after'}; row i must score token i given "
                "what precedes it"
            )
    lines = [h for h in (x.get("health", {}) for x in m.lines[-5:]) if h.get("lag_pairs", 0) > 1]
    n = sum(h["lag_pairs"] for h in lines)
    if n < 300:
        return None
    early, same, late = (sum(h["lag"][k] * h["lag_pairs"] for h in lines) / n for k in range(3))
    best = max(early, late)
    # The Fisher transforms' difference in standard errors.
    z = (math.atanh(min(best, 0.999)) - math.atanh(max(-0.999, min(same, 0.999)))) / math.sqrt(2 / (n - 3))
    if best < 0.3 or best - same < 0.2 or z < 5:
        return None
    return (
        f"the teacher's logprobs look shifted by one: over {n} ONE_TO_ONE chunks the student's correlate with them at "
        f"{same:.2f}, with those one chunk {'earlier' if early > late else 'later'} at {best:.2f}; logprobs[i] must "
        "score ids[i] given ids[<i]"
    )


def _lost(m: Monitor) -> str | None:
    lines = [h for h in (x.get("health", {}) for x in m.lines[-3:]) if h.get("pairs")]
    n = sum(h["pairs"] for h in lines)
    if n < 50:
        return None
    student, teacher = (sum(h[k] * h["pairs"] for h in lines) / n for k in ("student_nats", "teacher_nats"))
    log_s, log_t = map(math.log, m.vocab_sizes)
    if teacher < 0.75 * log_t or student > 0.5 * log_s:
        return None
    return (
        f"the teacher is near uniform: {teacher:.1f} nats a token on ONE_TO_ONE chunks (log of its vocabulary: "
        f"{log_t:.1f}), the student {student:.1f}; are its weights loaded, are the ids those of its tokenizer, are its "
        "logprobs shifted by one?"
    )


def _prompt(m: Monitor) -> str | None:
    gain = m.lines[-1].get("health", {}).get("prompt_gain")
    if gain is None:
        return None
    (student, teacher), (error, _) = gain, m.lines[-1]["health"]["prompt_gain_error"]
    if student < max(1.0, 2 * error) or teacher > 0.1 * student:
        return None
    return (
        f"the teacher seems to see another prompt: a response is {student:.1f} nats likelier to the student after its "
        f"own prompt than after another's, and {teacher:.1f} to the teacher; look at what its chat template or "
        "plain_template makes of a prompt (LocalTeacher.render)"
    )


def _clamped(m: Monitor) -> str | None:
    values = m._values("clamped")[-3:]
    if len(values) < 3 or min(values) < 0.5:
        return None
    return (
        f"{fmean(values):.0%} of the scored tokens have clamped advantages (clamp={m.config.clamp:g}): the teacher "
        "finds the student's text nearly impossible; is it the right teacher, prompt format and tokenizer? A distant "
        "pair starts better with method=kd or sft"
    )


def _nonfinite(m: Monitor) -> str | None:
    n = m.lines[-1]["nonfinite_tokens"]
    if not n:
        return None
    return (
        f"{n} tokens have a logprob that is NaN or infinite, and are unscored: a half-precision teacher or student "
        "that overflows (dtype=bfloat16 or float32), or a served teacher that leaves tokens out"
    )


def _gradient(m: Monitor) -> str | None:
    line = m.lines[-1]
    if line["skipped_updates"]:
        return "the loss or the gradient is not finite, the update was skipped: lower learning_rate, or dtype=float32"
    # One batch with a large gradient is what clipping is for.
    earlier = m._values("grad_norm", m.lines[-52:-2])
    norm = min(m._values("grad_norm", m.lines[-2:]), default=0.0)
    if len(earlier) < 4 or not norm > max(10 * median(earlier), m.config.grad_clip):
        return None
    return (
        f"the gradient norm explodes: {norm:.3g}, before {median(earlier):.3g} (median), clipped to "
        f"grad_clip={m.config.grad_clip:g}; lower learning_rate, or look at the report's worst chunks"
    )


def _scored(m: Monitor) -> str | None:
    if m.lines[-1]["scored"] > 0 or m.lines[-1]["coverage"].get("STOP", 0) == 1:
        return None
    coverage = {name: share for name, share in m.lines[-1]["coverage"].items() if share > 0}
    shares = ", ".join(f"{name} {share:.0%}" for name, share in coverage.items())
    cause = "the teacher's logprobs are not finite" if m.lines[-1]["nonfinite_tokens"] else "no chunk can be scored"
    return (
        f"nothing is scored, so nothing is learned: {cause} ({shares or 'no tokens'}; "
        f"max_chunk_tokens={m.config.max_chunk_tokens}, score_stop={m.config.score_stop})"
    )


def _kl(m: Monitor) -> str | None:
    pair = m._then_and_now("kl_per_byte")
    errors = m._values("kl_error")
    if pair is None or not errors or pair[0] <= 0 or pair[1] < 2 * pair[0] + 4 * errors[-1]:
        return None
    return f"the KL grows: {pair[0]:.3f} -> {pair[1]:.3f} nats/byte; lower learning_rate"


def _missing(m: Monitor) -> str | None:
    values = m._values("missing")[-3:]
    if len(values) < 3 or min(values) < 0.02:
        return None
    return (
        f"the {m.config.teacher_topk} likeliest tokens of a row leave out {fmean(values):.1%} of the teacher's mass: "
        "`cover` is then far from what whole rows give (measured: a cosine of .91 between the advantages at 13 %, and "
        "hardly more of ten times as many tokens). Hidden states and sums are exact: `xtokmap serve-teacher` has both, "
        "vLLM's pooling runner (teacher_states_url) and SGLang (--enable-return-hidden-states) the first; else raise "
        "teacher_topk and the server's limit"
    )


def _sampler(m: Monitor) -> str | None:
    """Weights that are partly not the student's: logprobs of fresh samples go away from where they were."""
    first, now = (line.get("sampler", {}) for line in (m.lines[0], m.lines[-1]))
    if not first or not now or now["staleness"] or first["staleness"] or now["gap"] <= 5 * first["gap"] + 1e-3:
        return None
    return (
        f"the server that samples is {now['gap']:.2g} nats a token from the student (at the start "
        f"{first['gap']:.2g}), with weights that it was just given: does it keep some of the old ones? (A vLLM of a "
        "CPU keeps a tied output head: see docs/sampling.md)"
    )


#: What is looked for, in the order in which it is said.
_RULES: dict[str, Callable[[Monitor], str | None]] = {
    "nothing_scored": _scored,
    "nonfinite": _nonfinite,
    "teacher_shifted": _shift,
    "teacher_lost": _lost,
    "teacher_prompt": _prompt,
    "coverage": _coverage,
    "gradient": _gradient,
    "kl": _kl,
    "length": _length,
    "entropy": _entropy,
    "clamped": _clamped,
    "missing": _missing,
    "sampler": _sampler,
}
