"""What the runs of a comparison come to: accuracy with its band, and the compute that it took."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

Run = dict[str, Any]

#: Two-sided 97.5 % quantiles of Student's t by degrees of freedom; 1.96 beyond.
_T = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

#: Parts of the FLOPs that a run is charged with.
ALL = ("sample", "teacher", "update")
WITHOUT_SAMPLING = ("teacher", "update")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (Student's t over seeds; NaN for one seed)."""
    n = len(values)
    if n < 2:
        return (values[0] if values else math.nan), math.nan
    t = _T[n - 1] if n - 1 < len(_T) else 1.96
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n)


def cost(point: dict[str, Any], parts: Sequence[str]) -> float:
    """FLOPs of some parts up to a point; processor seconds for ("seconds",)."""
    return float(point["seconds"]) if tuple(parts) == ("seconds",) else float(sum(point["flops"][p] for p in parts))


def curves(rows: Iterable[Run]) -> list[Run]:
    """The runs of a method and seed as one, with a point at the end of each: nothing is read in the middle of a run."""
    found: dict[tuple[Any, ...], Run] = {}
    for row in sorted(rows, key=lambda row: row["steps"]):
        name = tuple(row[key] for key in ("task", "arrangement", "ways", "method", "seed"))
        curve = found.setdefault(name, {**row, "points": [row["points"][0]]})
        curve["points"].append(row["points"][-1])
    return list(found.values())


def cost_to_reach(run: Run, target: float, parts: Sequence[str] = ALL, measure: str = "greedy") -> float:
    """Cost at which accuracy first reaches a target, straight between two points; infinite if it never does."""
    before = run["points"][0]
    for point in run["points"]:
        if point[measure] >= target - 1e-9:
            gained = point[measure] - before[measure]
            share = 1.0 if gained <= 0 else (target - before[measure]) / gained
            a, b = cost(before, parts), cost(point, parts)
            return a + share * (b - a)
        before = point
    return math.inf


def best(runs: Sequence[Run], measure: str = "greedy") -> float:
    """The highest point of the seeds' mean curve."""
    steps = set.intersection(*({p["step"] for p in run["points"]} for run in runs))
    by_step = [[p[measure] for run in runs for p in run["points"] if p["step"] == step] for step in steps]
    return float(max(statistics.mean(values) for values in by_step))


class Ratio:
    """How much more one method costs than another to the same accuracy, seed by seed.

    Args:
        slow: runs of the one, usually fine-tuning.
        fast: runs of the other, with the same seeds.
        gain: the accuracy, over what the seed's student starts with.
        parts: of the cost.
        measure: `greedy` or `sampled`.

    Attributes:
        mean: geometric mean over the seeds.
        low: of its 95 % interval (Student's t on the logarithms).
        high: likewise; infinite where `slow` did not get there on some seed, whose whole cost is a lower bound then.
        bounded: on how many seeds `slow` did not get there.
        failed: on how many seeds `fast` did not; there is no ratio then.
    """

    def __init__(
        self,
        slow: Sequence[Run],
        fast: Sequence[Run],
        gain: float,
        parts: Sequence[str] = ALL,
        measure: str = "greedy",
    ) -> None:
        logs = []
        self.bounded = self.failed = 0
        others = {run["seed"]: run for run in fast}
        for run in slow:
            target = run["points"][0][measure] + gain
            a, b = (cost_to_reach(one, target, parts, measure) for one in (run, others[run["seed"]]))
            if math.isinf(a):
                self.bounded += 1
                a = cost(run["points"][-1], parts)
            if math.isinf(b) or b <= 0:
                self.failed += 1
            else:
                logs.append(math.log(a / b))
        mean, half = interval(logs) if logs and not self.failed else (math.nan, math.nan)
        self.mean, self.low, self.high = (math.exp(x) for x in (mean, mean - half, mean + half))
        if self.bounded:
            self.high = math.inf

    def __str__(self) -> str:
        if self.failed:
            return f"- (not there on {self.failed} seed{'s' * (self.failed > 1)})"
        if self.bounded:
            return f"≥ {self.mean:.3g}" + (f" ({self.low:.3g} at the least)" if not math.isnan(self.low) else "")
        return f"{self.mean:.3g} ({self.low:.3g} to {self.high:.3g})"


def _groups(runs: Iterable[Run]) -> dict[tuple[str, str, int], dict[str, list[Run]]]:
    groups: dict[tuple[str, str, int], dict[str, list[Run]]] = {}
    for run in runs:
        cell = groups.setdefault((run["task"], run["arrangement"], run["ways"]), {})
        cell.setdefault(run["method"], []).append(run)
    return groups


def _share(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def _gain(runs: Sequence[Run], step: int, measure: str) -> str:
    """What a method's runs of so many steps gained over their own starts."""
    gained = [p[measure] - run["points"][0][measure] for run in runs for p in run["points"] if p["step"] == step]
    mean, half = interval(gained)
    return f"{mean:+.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def cell_table(cell: dict[str, list[Run]]) -> list[str]:
    """Every budget of every method of a cell: what it gained, beside right answers without a teacher, and its cost."""
    lines = [
        "| method | rate | steps | greedy | T = 1 | gain, greedy | right answers for as many steps | gain, T = 1 "
        "| the same | in the student's way | FLOPs | of these sampling | processor s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    alone = cell.get("right answers", [])
    for method, runs in cell.items():
        for step in sorted({p["step"] for run in runs for p in run["points"][1:]}):
            ends = [p for run in runs for p in run["points"] if p["step"] == step]
            flops = statistics.mean(cost(p, ALL) for p in ends)
            sampling = statistics.mean(p["flops"]["sample"] for p in ends) / flops
            beside = any(p["step"] == step for run in alone for p in run["points"]) and method.startswith("opd")
            greedy, sampled = (_gain(alone, step, m) if beside else "" for m in ("greedy", "sampled"))
            lines.append(
                f"| {method} | {runs[0]['rate']:g} | {step} "
                f"| {_share([p['greedy'] for p in ends])} | {_share([p['sampled'] for p in ends])} "
                f"| {_gain(runs, step, 'greedy')} | {greedy} | {_gain(runs, step, 'sampled')} | {sampled} "
                f"| {statistics.mean(p['plain'] for p in ends):.0%} "
                f"| {flops:.2e} | {sampling:.0%} | {statistics.mean(p['seconds'] for p in ends):.0f} |"
            )
    return lines


def drift_table(cell: dict[str, list[Run]]) -> list[str]:
    """What was tried against drift, seed by seed: right answers, and samples that are still in the student's way."""
    held = {name: runs for name, runs in cell.items() if name.startswith("opd transfer_kl")}
    step = max(p["step"] for runs in held.values() for run in runs for p in run["points"])
    lines = [f"| {step} steps | seed | greedy | T = 1 | in the student's way |", "|---|--:|--:|--:|--:|"]
    seeds = {run["seed"] for name, runs in held.items() if "," in name for run in runs}
    lines += [
        f"| {method} | {run['seed']} | {p['greedy']:.3f} | {p['sampled']:.3f} | {p['plain']:.0%} |"
        for method, runs in held.items()
        for run in sorted(runs, key=lambda run: run["seed"])
        for p in run["points"]
        if run["seed"] in seeds and p["step"] == step
    ]
    return lines


def start_of(cell: dict[str, list[Run]], measure: str = "greedy") -> float:
    """Mean accuracy of the students before anything was done to them."""
    return float(statistics.mean(run["points"][0][measure] for runs in cell.values() for run in runs))


def gains(cell: dict[str, list[Run]], measure: str = "greedy") -> dict[str, float]:
    """How much better to compare at: what fine-tuning gains, if it does, and shares of what `transfer_kl` does."""
    start, sft = start_of(cell, measure), best(cell["sft"], measure) if "sft" in cell else 0.0
    found = {}
    if sft > start + 0.02:
        found["nine tenths of what sft gains"] = 0.9 * (sft - start)
    top = best(cell["opd transfer_kl"], measure)
    if top > start + 0.02:
        for share, name in ((0.25, "a quarter"), (0.5, "half"), (0.75, "three quarters")):
            found[f"{name} of what transfer_kl gains"] = share * (top - start)
    return found


def ratio_table(cell: dict[str, list[Run]]) -> list[str]:
    """What fine-tuning costs over what the others cost, to as many right answers more than at the start."""
    lines = [
        "| more right answers | method | FLOPs, sft / method | without sampling | processor time |",
        "|---|---|--:|--:|--:|",
    ]
    for measure, how in (("greedy", "greedy"), ("sampled", "T = 1")):
        for name, gain in gains(cell, measure).items():
            for method, runs in cell.items():
                if method not in ("opd transfer_kl", "opd prior"):
                    continue
                parts = (ALL, WITHOUT_SAMPLING, ("seconds",))
                columns = [str(Ratio(cell["sft"], runs, gain, part, measure)) for part in parts]
                lines.append(f"| {name}, {how}, {gain:+.3f} | {method} | {' | '.join(columns)} |")
    return lines


def sweep_table(rows: Iterable[Run]) -> list[str]:
    """Right answers at the end of the sweep, greedy / T = 1, by learning rate."""
    rows = list(rows)
    rates = sorted({row["rate"] for row in rows})
    found: dict[tuple[str, str, int, str], dict[float, str]] = {}
    for row in rows:
        last = row["points"][-1]
        name = (row["task"], row["arrangement"], row["ways"], row["method"])
        found.setdefault(name, {})[row["rate"]] = f"{last['greedy']:.2f} / {last['sampled']:.2f} ({last['step']})"
    lines = [
        "| task | arrangement | ways | method | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|---|---|--:|---|" + "--:|" * len(rates),
    ]
    lines += [
        f"| {' | '.join(map(str, name))} | {' | '.join(by.get(rate, '') for rate in rates)} |"
        for name, by in sorted(found.items())
    ]
    return lines


_COLORS = {
    "sft": "black", "right answers": "0.5", "right answers, sft's rate": "0.7", "kd transfer_kl forward": "C5",
    "opd strict": "C1", "opd prior": "C3", "opd full": "C8", "opd cover": "C2", "opd byte_kl": "C4",
    "opd transfer_kl": "C0",
}  # fmt: skip


def plot_cells(cells: dict[tuple[str, str, int], dict[str, list[Run]]], path: Path) -> None:
    """Accuracy against FLOPs (greedy, T = 1) and processor time (greedy), a row of axes a cell, with 95 % bands."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(cells), 3, figsize=(15, 4 * len(cells)), layout="constrained", squeeze=False)
    columns = (("greedy", ALL, "FLOPs"), ("sampled", ALL, "FLOPs"), ("greedy", ("seconds",), "processor seconds"))
    for row, (name, cell) in zip(axes, cells.items(), strict=True):
        for axis, (measure, parts, label) in zip(row, columns, strict=True):
            for method, runs in cell.items():
                if method not in _COLORS:  # the table of drift has it
                    continue
                steps = sorted(set.intersection(*({p["step"] for p in run["points"]} for run in runs)))
                at = [[p for run in runs for p in run["points"] if p["step"] == step] for step in steps]
                x = [statistics.mean(cost(p, parts) for p in points) for points in at]
                bands = [interval([p[measure] for p in points]) for points in at]
                y = [mean for mean, _ in bands]
                # The start is at no cost at all, which a logarithmic axis does not have.
                color = _COLORS[method]
                axis.plot(x[1:], y[1:], color=color, label=method, marker="o", markersize=3)
                low = [max(0.0, m - h) for m, h in bands[1:]]
                high = [min(1.0, m + h) for m, h in bands[1:]]
                axis.fill_between(x[1:], low, high, color=color, alpha=0.12, linewidth=0)
            axis.axhline(start_of(cell, measure), color="0.5", linestyle=":", label="start")
            how = "greedy" if measure == "greedy" else "T = 1"
            task, arrangement, ways = name
            title = f"{task}, {arrangement.replace('_', ' ')}, {ways} way{'s' * (ways > 1)}: {how}"
            axis.set(xscale="log", xlabel=label, ylabel="share right", ylim=(0, 1), title=title)
            axis.grid(alpha=0.25)
    # Below: wherever it stood inside it would hide a curve.
    lines, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=6, fontsize="small")
    figure.savefig(path, dpi=85)
    plt.close(figure)


def write_tables(folder: Path, runs: Sequence[Run], sweep: Iterable[Run], teachers: Sequence[dict[str, Any]]) -> Path:
    """Writes `reproduction.md`, and a PNG for every task and number of ways; returns the folder.

    Args:
        folder: where to.
        runs: what was run, as `Bench.run` gives it.
        sweep: the runs among which the learning rates were chosen.
        teachers: the teachers' own shares of right answers.
    """
    sweep = list(sweep)
    rows, runs = list(runs), curves(runs)
    groups = _groups(runs)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("xtokmap", "torch", "transformers"))
    seeds = len({run["seed"] for run in runs})
    lines = [
        f"{versions}, Python {platform.python_version()}, {platform.machine()}, CPU only, one thread a run; "
        f"{seeds} seeds. ± and intervals are 95 %, over seeds.",
        "",
        "| task | arrangement | ways | teacher, greedy | teacher, T = 1 | student at the start, greedy | T = 1 |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in teachers:
        name = (row["task"], row["arrangement"], row["ways"])
        if name not in groups:
            continue
        start, loose = (start_of(groups[name], measure) for measure in ("greedy", "sampled"))
        right = f"{row['greedy']:.3f} | {row['sampled']:.3f}"
        lines.append(f"| {name[0]} | {name[1]} | {name[2]} | {right} | {start:.3f} | {loose:.3f} |")
    for (task, arrangement, ways), cell in groups.items():
        lines += ["", f"## {task}, {arrangement.replace('_', ' ')}, {ways} way{'s' * (ways > 1)}", ""]
        lines += [*cell_table(cell), ""]
        if "sft" in cell:
            lines += ratio_table(cell)
        if any("anchor" in method for method in cell):
            lines += ["", "### Drift", "", *drift_table(cell)]
    if sweep:
        lines += ["", "## Learning rates, on a seed that is not reported", "", "Greedy / T = 1 (steps).", ""]
        lines += sweep_table(sweep)
    (folder / "reproduction.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pages: dict[str, dict[tuple[str, str, int], dict[str, list[Run]]]] = {}
    for name, cell in groups.items():
        pages.setdefault(f"reproduction-{name[0]}-{name[2]}.png", {})[name] = cell
    for file, cells in pages.items():
        plot_cells(cells, folder / file)
    (folder / "reproduction.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder
