"""What a run shows of its progress."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from xtokmap.train.evaluation import Evaluation


def evaluation_line(name: str, evaluation: Evaluation) -> str:
    """An evaluation in one line of text."""
    kl, error = evaluation.kl_per_byte
    return (
        f"{name}: reverse KL {kl:.4f} +- {error:.4f} nats/byte, {evaluation.length:.1f} tokens, "
        f"{evaluation.completed:.0%} completed"
        + (f"; {evaluation.skipped} answers that the server does not take are left out" if evaluation.skipped else "")
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
