"""How far each loss points from where it should, by enumeration, in one run: python benches/bias.py

A teacher scores its own encoding of a finished text, and the boundaries of that encoding say what did not come next.
Here the texts are all strings of a and b to five bytes, so that everything is known: what the teacher thinks of the
student's own tokens, q*, is a sum over texts, and the expected gradient of a loss is one over the student's samples.
Prints tables and writes them to benches/results/bias.md, beside a plot, and the pictures of docs/ (`--pictures`).
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import xtokmap
from enumeration import Model, Pair, cosine
from oracle import Floats, Side, prefix_closed

HERE = Path(__file__).parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs"

LEGEND = """\
The texts are all strings of a and b to five bytes, closed by an end of text on both sides, in each tokenizer's own
encoding. Teachers and students are next-token tables, every row of them drawn uniformly from all distributions over
what can stand there{sparse}, {models} pairs of them for each column. `drawn`: every pair has vocabularies of its own
({drawn}).

The other columns' vocabularies were picked by hand, the easier one of two of a kind (the other is called "deep") after
a look at how `cover` does: `drawn` says what to expect.

The exact gradient is that of sum over starts h of a text of P_S(h) `KL(p(.|h) || q*(.|h))` by the student's logits at
every h, P_S(h) held; `q*(u|h)` is the mass of all texts whose student encoding goes on from h with u, over that of
those with h. A loss's expected gradient is the mean of what it gives for every text, weighted by the probability that
the student writes it. Cosine: 1 is right, 0 is no use, below 0 is away from the teacher. A forward KL is another
objective, whose gradient points elsewhere also where both tokenizers are the same. Credits have no clamp; `byte_kl` is
as published (with spanning tokens), forward and reverse; `transfer_kl` has its defaults and the sampled tokens'
`log q*`, but for `alone` (without those), `floor 1e-5`, and `floor 1e-30` (so low that log 0 counts in full; no
clamp)."""

#: The vocabularies; the student's first.
LONGEST_MATCH = {
    "student finer": ("a b", "a b aa ab ba aab"),
    "teacher finer": ("a b aa ab ba aab", "a b"),
    "crossing": ("a b ab abb", "a b ba baa"),
    "crossing, deep": ("a b ab bb bba", "a b aa ba aab"),
    "overlapping": ("a b ab bb", "a b aa ab"),
    "overlapping, deep": ("a b ab aba", "a b ab bb abb"),
    "nested": ("a b ab", "a b ab aba abab"),
    "same": ("a b aa ab aab", "a b aa ab aab"),
}
#: Merges in order of rank.
BPE = {
    "student = bytes": ((), ("a b", "ab a")),
    "teacher = bytes": (("a b", "ab a"), ()),
    "student = bytes, deep": ((), ("a b", "a a", "ab a", "b b")),
    "teacher = bytes, deep": (("a b", "a a", "ab a", "b b"), ()),
    "overlapping": (("a b", "ab a"), ("a b", "b b", "a bb")),
    "crossing, hostile": (("a b", "b b", "bb a"), ("b a", "a a", "aa b")),
    "nested": (("a b", "a a"), ("a b", "a a", "ab a", "aa b")),
    "same": (("a b", "a a", "ab a"), ("a b", "a a", "ab a")),
}

Gradients = Callable[[Model], Floats]
LOSSES: dict[str, Gradients] = {
    **{
        f"`{credit}`": lambda m, credit=credit: m.score_gradients(credit)
        for credit in ("strict", "prior", "shift", "uniform", "bytes", "full", "cover")
    },
    "`byte_kl`, forward": lambda m: m.loss_gradients("byte_kl", 0.0),
    "`byte_kl`, reverse": lambda m: m.loss_gradients("byte_kl", 1.0),
    "`transfer_kl`": lambda m: m.loss_gradients("transfer_kl", **m.sampled()),
    "`transfer_kl`, alone": lambda m: m.loss_gradients("transfer_kl"),
    "`transfer_kl`, floor 1e-5": lambda m: m.loss_gradients("transfer_kl", **m.sampled(), floor=1e-5),
    "`transfer_kl`, floor 1e-30": lambda m: m.loss_gradients("transfer_kl", **m.sampled(), clamp=1e9, floor=1e-30),
}
#: Against the gradient of the forward KL; what is known of several tokens together stays so.
FORWARD: dict[str, Gradients] = {
    "`byte_kl`, forward": LOSSES["`byte_kl`, forward"],
    "`transfer_kl`, forward, alone": lambda m: m.loss_gradients("transfer_kl", 0.0),
}
SHOWN = ("`prior`", "`full`", "`cover`", "`byte_kl`, forward", "`byte_kl`, reverse", "`transfer_kl`")


class Figures(NamedTuple):
    """Of one loss in one model: see LEGEND."""

    cosine: float
    norm: float
    variance: float


#: By column, then by loss.
Study = dict[str, dict[str, list[Figures]]]


def draw_longest_match(rng: np.random.Generator) -> Side:
    longer = [bytes(rng.choice([97, 98], rng.integers(2, 4)).tolist()) for _ in range(2)]
    return Side(prefix_closed([b"a", b"b", *longer]))


def draw_bpe(rng: np.random.Generator) -> Side:
    tokens, merges = ["a", "b"], []
    while len(merges) < 3:
        left, right = rng.choice(tokens, 2)
        if len(left + right) <= 3 and left + right not in tokens:
            merges.append(f"{left} {right}")
            tokens.append(left + right)
    return Side.bpe(*merges)


def pairs(kind: str, models: int, seed: int) -> Iterator[tuple[str, Pair]]:
    """Every column's tokenizers, `models` times."""
    longest = kind == "longest match"
    for name, (student, teacher) in (LONGEST_MATCH if longest else BPE).items():
        sides = [Side(tuple(x.encode() for x in v.split())) if longest else Side.bpe(*v) for v in (student, teacher)]
        pair = Pair(*sides)
        for _ in range(models):
            yield name, pair
    rng = np.random.default_rng(seed)
    draw = draw_longest_match if longest else draw_bpe
    for _ in range(models):
        yield "drawn", Pair(draw(rng), draw(rng))


def study(
    kind: str,
    models: int,
    seed: int,
    losses: dict[str, Gradients] = LOSSES,
    *,
    concentration: float = 1.0,
    leak: float = 0.0,
    exact: Gradients = lambda m: m.exact,
) -> Study:
    found: Study = {}
    rng, last = np.random.default_rng(seed), ""
    for name, pair in pairs(kind, models, seed):
        if name != last:
            rng, last = np.random.default_rng(seed), name
        model = pair.model(rng, concentration, leak)
        right = exact(model)
        size = (right**2).sum()
        for loss, gradients_of in losses.items():
            gradients = gradients_of(model)
            mean = model.expected(gradients)
            norm = ((mean**2).sum() / size) ** 0.5
            figures = Figures(cosine(mean, right), norm, model.variance(gradients) / size)
            found.setdefault(name, {}).setdefault(loss, []).append(figures)
    return found


def table(found: Study, cell: Callable[[list[Figures]], str]) -> Iterator[str]:
    yield "| loss | " + " | ".join(found) + " |"
    yield "|---|" + "--:|" * len(found)
    for loss in next(iter(found.values())):
        yield f"| {loss} | " + " | ".join(cell(column[loss]) for column in found.values()) + " |"


def cosines(figures: list[Figures]) -> str:
    values = [f.cosine for f in figures]
    return f"{shortened(np.mean(values))} ({min(values):.2f})"


def shortened(value: float) -> str:
    """Never rounded up to 1."""
    return f"{value:.3f}" if value > 1 - 1e-6 else f"{np.floor(value * 1000) / 1000:.3f}"


def ratios(figures: list[Figures]) -> str:
    return f"{np.median([f.norm for f in figures]):.2f}"


def variances(figures: list[Figures]) -> str:
    return f"{np.median([f.variance for f in figures]):.3g}"


def report(models: int, seed: int, concentration: float) -> tuple[list[str], dict[str, Study]]:
    drawn = {
        "longest match": "closed under prefixes, two tokens of two or three bytes and what begins them",
        "BPE": "three merges to at most three bytes",
    }
    same = {"concentration": concentration}
    found = {kind: study(kind, models, seed, **same) for kind in drawn}
    sparse = "" if concentration == 1 else f" (a Dirichlet of concentration {concentration:g})"
    both = "; ".join(f"{kind}: {what}" for kind, what in drawn.items())
    lines = [LEGEND.format(models=models, drawn=both, sparse=sparse)]
    for kind, columns in found.items():
        vocabularies = LONGEST_MATCH if kind == "longest match" else BPE
        lines += ["", f"## {kind.capitalize() if kind != 'BPE' else kind} on both sides", ""]
        for name, sides in vocabularies.items():
            student, teacher = (s if isinstance(s, str) else ", ".join(s) or "bytes" for s in sides)
            lines.append(f"- {name}: student {student}; teacher {teacher}")
        lines += [
            "",
            "Cosine to the exact gradient: mean, and in brackets the worst model.",
            "",
            *table(columns, cosines),
        ]
        lines += ["", "Norm of the expected gradient over that of the exact one: median.", "", *table(columns, ratios)]
        lines += [
            "",
            "Variance of one sample's gradient: mean squared distance from its own mean, over the squared norm of the "
            "exact gradient; median.",
            "",
            *table(columns, variances),
        ]
    lines += ["", "## A teacher that is less sure", ""]
    lines += [
        "Above, a teacher gives exactly nothing to tokens that cannot stand in its encoding; a model leaves them a",
        "little. The same with a ten-thousandth on each of them: cosine, mean and worst.",
    ]
    whole = {name: gradients for name, gradients in LOSSES.items() if "kl`" in name}
    for kind in drawn:
        lines += ["", f"{kind}:", "", *table(study(kind, models, seed, whole, leak=1e-4, **same), cosines)]
    lines += ["", "## Forward KL", ""]
    lines += ["Cosine to the gradient of sum over h of P_S(h) `KL(q*(.|h) || p(.|h))`, mean and worst."]
    for kind in drawn:
        found_forward = study(kind, models, seed, FORWARD, exact=lambda m: m.exact_forward, **same)
        lines += ["", f"{kind}:", "", *table(found_forward, cosines)]
    return lines, found


# ---- pictures ----------------------------------------------------------------------------------------------------


def plot(found: dict[str, Study], path: Path) -> None:
    """Cosine and variance by column, for the losses that one would choose among."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 7), sharex="col", sharey="row", constrained_layout=True)
    for column, kind in enumerate(("longest match", "BPE")):
        names = list(found[kind])
        for k, loss in enumerate(SHOWN):
            at = np.arange(len(names)) + (k - (len(SHOWN) - 1) / 2) * 0.13
            values = [np.array(found[kind][name][loss]) for name in names]
            upper, lower = axes[0, column], axes[1, column]
            mean = np.array([v[:, 0].mean() for v in values])
            worst = np.array([v[:, 0].min() for v in values])
            upper.errorbar(at, mean, [mean - worst, 0 * mean], fmt="o", ms=4, lw=1, label=loss.replace("`", ""))
            lower.plot(at, [np.median(v[:, 2]) for v in values], "o", ms=4)
        axes[0, column].axhline(0, color="0.7", lw=0.8)
        axes[0, column].set_title(f"{kind} on both sides")
        axes[1, column].set_yscale("log")
        axes[1, column].set_xticks(range(len(names)), [wrapped(name) for name in names], fontsize=8)
        for row in axes[:, column]:
            row.grid(axis="y", color="0.92")
            row.set_axisbelow(True)
    axes[0, 0].set_ylabel("cosine to the exact gradient\nmean, down to the worst model")
    axes[1, 0].set_ylabel("variance of one sample\nover the exact gradient's squared norm")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SHOWN), fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def wrapped(name: str) -> str:
    return name.replace(", ", ",\n").replace(" finer", "\nfiner").replace(" = ", "\n= ")


class Vector(NamedTuple):
    """A text of two student tokens, "1" and "+", whose advantages can be worked out by hand."""

    title: str
    #: What the teacher can go on with, how likely it is, and who counts it for the student's "1": a credit, `cover`.
    ways: tuple[tuple[str, float, bool, bool], ...]
    #: The student's probability of its "1" and of its "+", and what a credit and `cover` hold against them.
    student: tuple[float, float]
    credit: tuple[float, float]
    cover: tuple[float, float]


VECTORS = {
    "boundary-bias-student-finer.png": Vector(
        'The teacher has "1", "12" and "121"; the student splits digits and writes "1" "+"',
        (
            ('"121"', 0.68, False, True),
            ('"12"', 0.29, False, True),
            ('"1" "+"', 0.0098, True, True),
            ('"1", other', 0.0002, True, True),
            ("other", 0.02, False, False),
        ),
        (0.9, 0.02),
        (0.01, 0.98),
        (0.98, 0.0098 / 0.98),
    ),
    "boundary-bias-teacher-finer.png": Vector(
        'The teacher splits digits; the student, which has "12", writes "1" "+"',
        (('"1" "2"', 0.63, True, False), ('"1" "+"', 0.27, True, True), ("other", 0.1, False, False)),
        (0.27, 0.95),
        (0.9, 0.3),
        (0.27, 1.0),
    ),
}
CREDIT, COVER = "#d95f02", "#1b9e77"


def draw_vectors(folder: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    for name, vector in VECTORS.items():
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.3), width_ratios=(1.3, 1), constrained_layout=True)
        rows = np.arange(len(vector.ways))
        left.barh(rows, [p for _, p, _, _ in vector.ways], 0.55, color="0.6")
        for row, (_, p, by_credit, by_cover) in enumerate(vector.ways):
            left.text(p + 0.015, row, f"{p:.4f}".rstrip("0"), va="center", fontsize=9)
            for x, counted, color in ((1.0, by_credit, CREDIT), (1.25, by_cover, COVER)):
                if counted:
                    left.plot(x, row, "o", color=color, ms=8)
        left.axhline(len(rows) - 0.5, color="0.3", lw=0.8)
        left.text(0, len(rows), f'the student\'s "1": {vector.student[0]:.2f}', va="center", fontsize=9)
        for x, word, p, color in ((1.0, "a credit", vector.credit[0], CREDIT), (1.25, "cover", vector.cover[0], COVER)):
            left.text(x, -0.9, word, ha="center", va="center", fontsize=9, color=color)
            left.text(x, len(rows), f"{p:.2f}", ha="center", va="center", fontsize=9, color=color, weight="bold")
        left.set_yticks(rows, [label for label, *_ in vector.ways])
        left.set_xticks([])
        left.set(xlim=(0, 1.4), ylim=(len(rows) + 0.5, -1.3))
        left.spines[:].set_visible(False)
        left.tick_params(length=0)
        left.set_title('what the teacher goes on with, and who counts it for "1"', fontsize=9, loc="left")
        for k, (label, taken, color) in enumerate(
            (("a credit of its own logprobs", vector.credit, CREDIT), ("cover", vector.cover, COVER))
        ):
            values = [np.log(q / p) for q, p in zip(taken, vector.student, strict=True)]
            drawn = right.bar(np.arange(2) + (k - 0.5) * 0.36, values, 0.34, label=label, color=color)
            right.bar_label(drawn, [f"{v + 0:+.2f}" for v in values], padding=3, fontsize=9)
        right.axhline(0, color="0.3", lw=0.8)
        right.set_xticks([0, 1], ['token "1"', 'token "+"'])
        right.set_title("advantage, nats: log(teacher / student)", fontsize=9, loc="left")
        right.margins(y=0.28)
        right.legend(fontsize=8)
        figure.suptitle(vector.title, fontsize=11)
        figure.savefig(folder / name, dpi=120)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=20, help="of each arrangement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--concentration", type=float, default=1.0, help="of the rows; below 1: most mass on few tokens"
    )
    parser.add_argument("--pictures", action="store_true", help="draw the pictures of docs/ and nothing else")
    args = parser.parse_args()
    if args.pictures:
        return draw_vectors(DOCS)
    torch.set_num_threads(1)
    start = time.perf_counter()
    lines, found = report(args.models, args.seed, args.concentration)
    seconds = time.perf_counter() - start
    versions = {"numpy": np.__version__, "torch": torch.__version__, "tokenizers": tokenizers.__version__}
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    command = shlex.join(["python", "benches/bias.py", *sys.argv[1:]])
    head = [
        "# The boundary bias, and what each loss makes of it",
        "",
        f"Command: `{command}`; {seconds:.0f} s on one thread; Python {platform.python_version()}, {named}, "
        f"xtokmap {xtokmap.__version__}.",
        "",
    ]
    text = "\n".join([*head, *lines, "", "![cosine and variance of each loss](bias.png)"])
    print(text)
    if len(sys.argv) > 1:  # what is kept is the plain command's
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "bias.md").write_text(text + "\n", encoding="utf-8")
    plot(found, RESULTS / "bias.png")
    draw_vectors(DOCS)


if __name__ == "__main__":
    main()
