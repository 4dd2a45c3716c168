"""What a run shows: its progress, and its curves."""

from __future__ import annotations

import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from xtokmap.rollouts import Evaluation


def evaluation_line(name: str, evaluation: Evaluation) -> str:
    """An evaluation in one line of text."""
    kl, error = evaluation.kl_per_byte
    return (
        f"{name}: reverse KL {kl:.4f} +- {error:.4f} nats/byte, {evaluation.length:.1f} tokens, "
        f"{evaluation.completed:.0%} completed"
    )


class Progress:
    """A rich progress bar on a terminal, one plain line a step otherwise."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stdout.isatty():
            with suppress(ImportError):
                from rich import progress as rich

                columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn())
                self.bar = rich.Progress(*columns, rich.TimeElapsedColumn(), rich.TimeRemainingColumn())
                self.bar.start()
                self.task = self.bar.add_task("distilling", total=self.steps)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def step(self, m: dict[str, Any]) -> None:
        """The figures of one more step."""
        text = f"KL {m['kl_per_byte']:.3f} +- {m['kl_error']:.3f} nats/byte"
        if self.bar is not None:
            self.bar.update(self.task, advance=1, description=text)
            return
        split = " ".join(f"{name} {value:.2f}" for name, value in m["time"].items())
        print(
            f"step {m['step']}/{self.steps}  {text}  scored {m['scored']:.1%}  "
            f"length {m['response_length']:.0f}  completed {m['completed']:.0%}  grad {m['grad_norm']:.2f}  "
            f"{m['tokens_per_second']:.0f} tokens/s  [{split} s]",
            flush=True,
        )


def plot(
    history: list[dict[str, Any]], path: Path, before: Evaluation | None = None, after: Evaluation | None = None
) -> None:
    """The curves of a run as a PNG; needs matplotlib, without which a warning says so."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        warnings.warn("no curves.png: matplotlib is not installed", stacklevel=2)
        return
    steps = [m["step"] for m in history]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    kl, error = ([m[name] for m in history] for name in ("kl_per_byte", "kl_error"))
    low, high = ([k + sign * e for k, e in zip(kl, error, strict=True)] for sign in (-1, 1))
    axes[0, 0].plot(steps, kl, color="C0", label="training samples")
    axes[0, 0].fill_between(steps, low, high, color="C0", alpha=0.2, linewidth=0)
    for evaluation, at, label in ((before, 0, "held-out"), (after, steps[-1], None)):
        if evaluation is not None:
            value, bar = evaluation.kl_per_byte
            axes[0, 0].errorbar([at], [value], [bar], fmt="o", color="C3", capsize=3, label=label)
    axes[0, 0].set(title="Reverse KL to the teacher", ylabel="nats per byte", xlabel="step")
    axes[0, 0].legend()
    axes[0, 1].plot(steps, [m["response_length"] for m in history], color="C1", label="tokens")
    axes[0, 1].set(title="Responses", ylabel="mean length, tokens", xlabel="step", ylim=(0, None))
    share = axes[0, 1].twinx()
    share.plot(steps, [m["completed"] for m in history], color="C2", label="completed")
    share.set(ylabel="share completed", ylim=(0, 1))
    lines = [*axes[0, 1].get_lines(), *share.get_lines()]
    axes[0, 1].legend(lines, [line.get_label() for line in lines])
    names = [name for name in history[0]["coverage"] if any(m["coverage"][name] > 0 for m in history)]
    stack = [[max(0.0, m["coverage"][name]) for m in history] for name in names]
    axes[1, 0].stackplot(steps, stack, labels=[name.lower() for name in names])
    axes[1, 0].set(title="Response tokens by kind of chunk", ylabel="share", xlabel="step", ylim=(0, 1))
    axes[1, 0].legend(loc="lower left", fontsize="small")
    parts = list(history[0]["time"])
    axes[1, 1].stackplot(steps, [[m["time"][name] for m in history] for name in parts], labels=parts)
    axes[1, 1].set(title="Time of a step", ylabel="seconds", xlabel="step")
    axes[1, 1].legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
