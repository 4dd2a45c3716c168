"""Kills a run at random moments, resumes it, and compares what it leaves with a run that nothing happened to.

    python benches/kills.py --kills 40

Writes benches/results/kills.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent / "tests"))

import killable  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=40, help="at random moments")
    parser.add_argument("--every", type=int, default=9, help="of the moments inside a save: each nth")
    parser.add_argument("--output", type=Path, default=ROOT / "results/kills.md")
    args = parser.parse_args()
    rows: Counter[tuple[str, str, int, bool]] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        values = killable.settings(folder / "whole")
        killable.finish(values)
        want = killable.left(folder / "whole/out")
        lines = (folder / "whole/out/metrics.jsonl").read_text().splitlines()
        whole = sum(json.loads(line)["seconds"] for line in lines)

        def go_on(values: dict[str, object], made: int, moment: str, how: str) -> None:
            start = sum(killable.finish(values))
            same = killable.left(Path(str(values["output"]))) == want
            rows[moment, how, made - start, same] += 1
            print(moment, how, made - start, same, flush=True)

        for k in range(args.kills):
            values = killable.settings(folder / f"random{k}")
            made, how = killable.kill_at_random(values, k, 1.5 * whole)
            names = {"saving": "while it saved", "between": "between saves", "ended": "after its end"}
            go_on(values, made, "random", names[how])
        for at in range(1, 10_000, args.every):
            values = killable.settings(folder / f"at{at}")
            process = killable.start(values, die_at=at)
            process.join()
            if process.exitcode == 0:
                break
            made = (Path(values["output"]) / "metrics.jsonl").read_text().count("\n")
            go_on(values, made, f"each {args.every}th write, flush, rename or removal of a save", "while it saved")
    command = shlex.join(["python", "benches/kills.py", *sys.argv[1:]])
    text = (
        "# Kills\n\n"
        f"Command: `{command}`; Python {platform.python_version()}, torch {torch.__version__}.\n\n"
        "A run of 8 steps with a checkpoint every 2 is killed (SIGKILL), started again with `resume`, and compared "
        "with a run that nothing happened to: metrics but timings, weights, moments and random states, bit for bit.\n\n"
        "| moment | the run was killed | steps made again | as if nothing had happened | times |\n"
        "|---|---|--:|---|--:|\n"
    )
    for (moment, how, lost, same), times in sorted(rows.items()):
        text += f"| {moment} | {how} | {lost} | {'yes' if same else 'NO'} | {times} |\n"
    args.output.write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(same for *_, same in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
