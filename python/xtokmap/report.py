"""`report.html`: a run on one page, made from the files in its folder.

The page needs nothing but itself: curves are inline SVG, there is no script, and a content security policy forbids
both scripts and requests. All text of models and prompts is escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from xtokmap._core import XTokMapError
from xtokmap.columns import Column
from xtokmap.files import replacing
from xtokmap.view import chunk

#: Points of a curve; longer runs are shown by means of neighboring steps.
_POINTS = 300
#: Kinds of chunks in the order in which they are stacked.
_KINDS = ("ONE_TO_ONE", "ONE_TO_MANY", "MANY_TO_ONE", "MANY_TO_MANY", "STOP", "MARKER", "REWRITTEN", "UNALIGNED")


def write(folder: str | Path, path: str | Path | None = None) -> Path:
    """Writes the report of a run folder; returns its path (`report.html` in the folder where none is given).

    Raises:
        XTokMapError: no run in that folder, or a damaged file, by line.
    """
    folder = Path(folder)
    path = Path(path) if path is not None else folder / "report.html"
    with replacing(path) as part:
        part.write_text(render(folder), encoding="utf-8")
    return path


def render(folder: Path) -> str:
    """The page itself; see `write`."""
    if not (folder / "config.json").is_file():
        raise XTokMapError(f"{folder}: no run in it (no config.json); give the folder that `xtokmap train` wrote")
    config, environment = _object(folder / "config.json"), _object(folder / "environment.json")
    metrics, samples = _lines(folder / "metrics.jsonl"), _sampled(folder / "samples.jsonl")
    evaluation = _object(folder / "evaluation.json")
    parts = [
        _header(folder, config, environment, metrics),
        _warnings(metrics),
        _curves(metrics, evaluation),
        _evaluations(evaluation),
        _heldout([s for s in samples if s["why"] == "heldout"]),
        _worst([s for s in samples if s["why"] == "gap"], [s for s in samples if s["why"] == "bytes"]),
        _samples([s for s in samples if s["why"] == "sample"]),
        _settings(config, environment),
    ]
    title = escape(f"{folder.resolve().name} · xtokmap")
    style = (resources.files("xtokmap") / "data" / "report.css").read_text(encoding="utf-8")
    return _PAGE.format(title=title, style=style, body="\n".join(filter(None, parts)))


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise XTokMapError(f"{path}: not a JSON object; is the file damaged?")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise XTokMapError(f"{path}, line {number}: not JSON, or no object; is the file damaged?")
        rows.append(row)
    return rows


def _sampled(path: Path) -> list[dict[str, Any]]:
    """The records of a run's samples, their columns as `Column`s."""
    rows = _lines(path)
    try:
        for row in rows:
            row["columns"] = [Column.of(record) for record in row.get("columns") or []]
    except XTokMapError as error:
        raise XTokMapError(f"{path}: {error}; is the file damaged?") from None
    return rows


# ---- figures and words -------------------------------------------------------------------------------------------


def _figure(x: Any, form: str = ".3f") -> str:
    return format(x, form) if isinstance(x, int | float) and math.isfinite(x) else "–"


def _header(folder: Path, config: dict[str, Any], environment: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    names = (config.get(side) or environment.get(side, "?").split(",")[0] for side in ("student", "teacher"))
    pair = " ← ".join(escape(Path(str(name)).name) for name in names)
    how = f"{config.get('method', 'opd')} · {config.get('loss', 'auto')}"
    started = f" · {environment['started']}" if "started" in environment else ""
    tiles = [("steps", f"{len(metrics)} <small>of {escape(str(config.get('steps', '?')))}</small>")]
    if metrics:
        last = metrics[-1]
        scored = last.get("scored")
        tiles += [
            (
                "reverse KL, nats/byte",
                f"{_figure(last.get('kl_per_byte'))} <small>± {_figure(last.get('kl_error'))}</small>",
            ),
            ("scored tokens", _figure(scored, ".1%")),
            ("length, tokens", _figure(last.get("response_length"), ".0f")),
            ("completed", _figure(last.get("completed"), ".0%")),
            ("a step", f"{_figure(last.get('seconds'), '.1f')} <small>s</small>"),
            ("warnings", str(sum(len(m.get("warnings", ())) for m in metrics))),
        ]
    shown = "".join(f"<div class=tile><span>{name}</span><b>{value}</b></div>" for name, value in tiles)
    return (
        f"<header><h1>{escape(folder.resolve().name)}</h1><p>{pair} "
        f"<span class=dim>· {escape(how + started)}</span></p></header>"
        f"<section class=tiles aria-label='last step'>{shown}</section>"
    )


def _warnings(metrics: list[dict[str, Any]]) -> str:
    found = [w for m in metrics for w in m.get("warnings", ())]
    if not found:
        return "<section><h2>Warnings</h2><p class=good>None.</p></section>" if metrics else ""
    rows = "".join(f"<li><b>{escape(w['name'])}</b> {escape(w['text'])}</li>" for w in found)
    return f"<section><h2>Warnings</h2><ul class=warnings>{rows}</ul></section>"


def _evaluations(evaluation: dict[str, Any]) -> str:
    before, after = evaluation.get("before"), evaluation.get("after")
    if not (before or after):
        return ""
    before, after = before or {}, after or {}
    rows = [
        (
            "reverse KL, nats per byte",
            *(f"{_figure(e.get('kl_per_byte'), '.4f')} ± {_figure(e.get('kl_error'), '.4f')}" for e in (before, after)),
        ),
        ("response length, tokens", *(_figure(e.get("length"), ".1f") for e in (before, after))),
        ("completed turns", *(_figure(e.get("completed"), ".1%") for e in (before, after))),
    ]
    for kind in _KINDS:
        shares = [e.get("coverage", {}).get(kind) for e in (before, after)]
        if any(share and share > 5e-5 for share in shares):
            rows.append((f"tokens {kind}", *(_figure(share, ".2%") for share in shares)))
    body = "".join(f"<tr><th scope=row>{name}</th><td>{a}</td><td>{b}</td></tr>" for name, a, b in rows)
    return (
        "<section><h2>Held-out prompts</h2><div class=scroll><table>"
        "<thead><tr><th></th><th>before</th><th>after</th></tr>"
        f"</thead><tbody>{body}</tbody></table></div></section>"
    )


def _heldout(rows: list[dict[str, Any]]) -> str:
    shown = "".join(
        f"<article><p class=prompt>{escape(row['prompt'])}</p><dl>"
        + "".join(
            f"<dt>{name}</dt><dd>{escape(row[name]) if row[name] else '<i>empty</i>'}</dd>"
            for name in ("before", "after")
            if row.get(name) is not None
        )
        + "</dl></article>"
        for row in rows
    )
    return f"<section><h2>Answers to held-out prompts</h2><div class=cards>{shown}</div></section>" if rows else ""


def _settings(config: dict[str, Any], environment: dict[str, Any]) -> str:
    flat = {k: v for k, v in environment.items() if not isinstance(v, dict)}
    flat |= environment.get("versions", {})
    tables = []
    for name, values in (("Config", config), ("Environment", flat)):
        rows = "".join(
            f"<tr><th scope=row>{escape(str(k))}</th><td>{escape(str(v))}</td></tr>" for k, v in values.items()
        )
        tables.append(f"<div class=scroll><h3>{name}</h3><table class=left><tbody>{rows}</tbody></table></div>")
    inside = f"<summary><h2>Config and versions</h2></summary><div class=two>{''.join(tables)}</div>"
    return f"<section><details>{inside}</details></section>"


# ---- alignments --------------------------------------------------------------------------------------------------


def _samples(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    shown = "".join(_sample(row, opened=False) for row in reversed(rows))
    return f"<section><h2>Samples of the run</h2><p class=dim>The latest first.</p>{shown}</section>"


def _worst(gaps: list[dict[str, Any]], changed: list[dict[str, Any]]) -> str:
    if not (gaps or changed):
        return ""
    legend = (
        "<p class=dim>Student over teacher, a column for each chunk, the logprob under each token. "
        "<span class=key style='--g:.8;--h:var(--red)'>red</span> the student finds it likelier than the teacher does, "
        "<span class=key style='--g:.8;--h:var(--blue)'>blue</span> the other way round; the stronger, the more nats. "
        "<span class='key rewritten'>dashed</span> REWRITTEN: the bytes differ; "
        "<span class='key unaligned'>dotted</span> in no chunk.</p>"
    )
    out = [f"<section><h2>Chunks where the two differ most</h2>{legend}"]
    out += [_sample(row, opened=k < 4) for k, row in enumerate(gaps)]
    if changed:
        out.append("<h3>Bytes that the two spell differently</h3>")
        out += [_sample(row, opened=k < 2) for k, row in enumerate(reversed(changed))]
    return "".join(out) + "</section>"


def _sample(row: dict[str, Any], *, opened: bool) -> str:
    columns = row["columns"]
    marked = row["why"] != "sample"
    what = ""
    if marked and columns:
        column = columns[row["at"]]
        texts = " / ".join(text or "∅" for text in column.texts)
        gap = f" · L<sub>S</sub> − L<sub>T</sub> = {_figure(column.gap, '+.1f')} nats" if column.gap is not None else ""
        what = f" · <code>{escape(texts)}</code> {escape(column.kind)}{gap}"
    ends = "completed" if row["completed"] else "cut off"
    cut = row.get("cut") or [False, False]
    dots = "<span class=dots>…</span>"
    view = "".join(chunk(column, marked=marked and k == row["at"], by_gap=True) for k, column in enumerate(columns))
    return (
        f"<details{' open' if opened else ''}><summary>step {int(row['step'])}{what} "
        f"<span class=dim>{escape(_short(row['prompt']))} · {ends}</span></summary>"
        f"<p class=prompt>{escape(row['prompt'])}</p><p class=response>{escape(row['response'])}</p>"
        f"<div class=alignment>{dots if cut[0] else ''}{view}{dots if cut[1] else ''}</div></details>"
    )


def _short(text: str, n: int = 70) -> str:
    line = " ".join(text.split())
    return line if len(line) <= n else line[: n - 1] + "…"


# ---- curves ------------------------------------------------------------------------------------------------------

#: Inside of a curve's frame, in its own units.
_W, _H, _LEFT, _RIGHT, _TOP, _BOTTOM = 460, 210, 46, 12, 10, 26

Series = tuple[str, list[float], str]


def _curves(metrics: list[dict[str, Any]], evaluation: dict[str, Any]) -> str:
    if not metrics:
        return ""

    def of(key: str) -> list[float]:
        return [_number(m.get(key)) for m in metrics]

    steps = [float(m["step"]) for m in metrics]
    kl, error = of("kl_per_byte"), of("kl_error")
    points = [
        (steps[0] - 1 if name == "before" else steps[-1], _number(e["kl_per_byte"]), _number(e.get("kl_error")))
        for name in ("before", "after")
        if (e := evaluation.get(name))
    ]
    band = ([a - b for a, b in zip(kl, error, strict=True)], [a + b for a, b in zip(kl, error, strict=True)])
    charts = [
        _lines_chart(
            "Reverse KL to the teacher, nats per byte",
            steps,
            [("training samples", kl, "c0")],
            band=band,
            points=points,
        ),
        _lines_chart("Response length, tokens", steps, [("length", of("response_length"), "c1")], low=0),
        _lines_chart(
            "Ends of turns",
            steps,
            [("completed", of("completed"), "c2"), ("of these scored", of("stops_scored"), "c4")],
            low=0,
            high=1,
            percent=True,
        ),
        _lines_chart("Entropy of the student, nats a token", steps, [("entropy", of("entropy"), "c3")], low=0),
    ]
    kinds = [k for k in _KINDS if any(m.get("coverage", {}).get(k, 0) > 1e-6 for m in metrics)]
    shares: list[Series] = [
        (k, [_number(m.get("coverage", {}).get(k, 0.0)) for m in metrics], _KIND_COLOR[k]) for k in kinds
    ]
    charts.append(_stack_chart("Response tokens by kind of chunk", steps, shares, high=1, percent=True))
    charts.append(_lines_chart("Gradient norm", steps, [("before clipping", of("grad_norm"), "c5")], low=0))
    optional: list[tuple[str, list[Series], bool]] = [
        ("Clamped advantages, share of scored tokens", [("clamped", of("clamped"), "c6")], True),
        ("Boundary leak of the teacher, nats a token", [("leak", of("boundary_leak"), "c4")], False),
        (
            "Mass that the target leaves open",
            [(name, of(name), color) for name, color in (("undetermined", "c0"), ("shared", "c1"), ("rest", "c3"))],
            True,
        ),
    ]
    for title, series, percent in optional:
        there = [s for s in series if any(map(math.isfinite, s[1]))]
        if there:
            charts.append(_lines_chart(title, steps, there, low=0, percent=percent))
    times: list[Series] = [
        (name, [_number(m.get("time", {}).get(name, 0.0)) for m in metrics], f"c{k}")
        for k, name in enumerate(metrics[-1].get("time", {}))
    ]
    if times:
        charts.append(_stack_chart("Time of a step, seconds", steps, times))
    return f"<section><h2>Curves</h2><div class=charts>{''.join(charts)}</div></section>"


_KIND_COLOR = dict(zip(_KINDS, ("c2", "c4", "c0", "c5", "c6", "c7", "c1", "c3"), strict=True))


def _number(x: Any) -> float:
    return float(x) if isinstance(x, int | float) else math.nan


def _thin(steps: list[float], values: list[list[float]]) -> tuple[list[float], list[list[float]]]:
    size = math.ceil(len(steps) / _POINTS)

    def means(x: list[float]) -> list[float]:
        groups = ([v for v in x[a : a + size] if math.isfinite(v)] for a in range(0, len(x), size))
        return [sum(g) / len(g) if g else math.nan for g in groups]

    return (steps, values) if size == 1 else (means(steps), [means(x) for x in values])


def _ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 4
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * k for k in (1, 2, 2.5, 5, 10) if base * k >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * k for k in range(first, math.floor(high / step + 1e-9) + 1)]


class _Frame:
    """Places of a curve's figures, and its axes."""

    def __init__(self, steps: list[float], low: float, high: float, percent: bool) -> None:
        if not high > low:
            low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
        self.low, self.high, self.percent = low, high, percent
        self.first, self.last = steps[0], max(steps[-1], steps[0] + 1)

    def x(self, step: float) -> float:
        return _LEFT + (step - self.first) / (self.last - self.first) * (_W - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return _H - _BOTTOM - share * (_H - _TOP - _BOTTOM)

    def axes(self) -> str:
        out = []
        for v in _ticks(self.low, self.high):
            text = f"{v:.0%}" if self.percent else f"{v:.4g}"
            out.append(f"<line class=grid x1={_LEFT} x2={_W - _RIGHT} y1={self.y(v):.1f} y2={self.y(v):.1f} />")
            out.append(f"<text x={_LEFT - 6} y={self.y(v) + 3.5:.1f} text-anchor=end>{text}</text>")
        marks = [v for v in _ticks(self.first, self.last) if abs(v - round(v)) < 1e-9]
        out += [f"<text x={self.x(v):.1f} y={_H - 8} text-anchor=middle>{v:g}</text>" for v in marks]
        return "".join(out)


def _path(xy: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in xy)


def _lines_chart(
    title: str,
    steps: list[float],
    series: list[Series],
    *,
    low: float | None = None,
    high: float | None = None,
    percent: bool = False,
    band: tuple[list[float], list[float]] | None = None,
    points: Sequence[tuple[float, float, float]] = (),
) -> str:
    at, thin = _thin(steps, [*(values for _, values, _ in series), *(band or ())])
    finite = [v for values in thin for v in values if math.isfinite(v)]
    finite += [v + s * (e if math.isfinite(e) else 0) for _, v, e in points for s in (-1, 1) if math.isfinite(v)]
    if not finite:
        return ""
    span = max(finite) - min(finite)
    frame = _Frame(
        [*(x for x, _, _ in points if x < at[0]), *at],
        low if low is not None else min(finite) - 0.05 * span,
        high if high is not None else max(finite) + 0.05 * span,
        percent,
    )
    out = [frame.axes()]
    if band is not None:
        around = [(x, a, b) for x, a, b in zip(at, *thin[-2:], strict=True) if math.isfinite(a + b)]
        if len(around) > 1:
            outline = [(frame.x(x), frame.y(b)) for x, _, b in around] + [
                (frame.x(x), frame.y(a)) for x, a, _ in reversed(around)
            ]
            out.append(f"<path class=band d='{_path(outline)}Z' fill='var(--{series[0][2]})' />")
    for (name, _, color), values in zip(series, thin, strict=False):
        run: list[tuple[float, float]] = []
        dots = []
        for x, v in [*zip(at, values, strict=True), (0.0, math.nan)]:
            if math.isfinite(v):
                run.append((frame.x(x), frame.y(v)))
                radius = 2.5 if len(at) <= 40 else 1.2
                dots.append(
                    f"<circle cx={run[-1][0]:.1f} cy={run[-1][1]:.1f} r={radius} fill='var(--{color})'>"
                    f"<title>step {x:g}: {escape(name)} {v:.4g}</title></circle>"
                )
            elif run:
                out.append(f"<path class=curve d='{_path(run)}' stroke='var(--{color})' />")
                run = []
        out += dots
    for x, v, e in points:
        if math.isfinite(v):
            up, down = (frame.y(v + s * (e if math.isfinite(e) else 0)) for s in (1, -1))
            out.append(
                f"<line class=error x1={frame.x(x):.1f} x2={frame.x(x):.1f} y1={down:.1f} y2={up:.1f} />"
                f"<circle class=held cx={frame.x(x):.1f} cy={frame.y(v):.1f} r=4>"
                f"<title>held-out: {v:.4g} ± {e:.2g}</title></circle>"
            )
    legend = [(name, f"var(--{color})") for name, _, color in series] + ([("held-out", "var(--red)")] if points else [])
    return _figure_of(title, "".join(out), legend)


def _stack_chart(
    title: str, steps: list[float], series: list[Series], *, high: float | None = None, percent: bool = False
) -> str:
    at, thin = _thin(steps, [[v if math.isfinite(v) else 0.0 for v in values] for _, values, _ in series])
    if len(at) == 1:
        at, thin = [at[0], at[0] + 1], [values * 2 for values in thin]
    top = [sum(column) for column in zip(*thin, strict=True)] or [0.0]
    frame = _Frame(at, 0.0, high if high is not None else max(top) * 1.05, percent)
    out, below = [frame.axes()], [0.0] * len(at)
    for (name, _, color), values in zip(series, thin, strict=True):
        above = [a + b for a, b in zip(below, values, strict=True)]
        outline = [(frame.x(x), frame.y(v)) for x, v in zip(at, above, strict=True)]
        outline += [(frame.x(x), frame.y(v)) for x, v in reversed(list(zip(at, below, strict=True)))]
        mean = sum(values) / len(values)
        text = f"{mean:.1%}" if percent else f"{mean:.3g}"
        out.append(
            f"<path class=area d='{_path(outline)}Z' fill='var(--{color})'>"
            f"<title>{escape(name)}, mean {text}</title></path>"
        )
        below = above
    return _figure_of(title, "".join(out), [(name, f"var(--{color})") for name, _, color in series])


def _figure_of(title: str, inside: str, legend: list[tuple[str, str]]) -> str:
    keys = "".join(f"<span><i style='background:{color}'></i>{escape(name)}</span>" for name, color in legend)
    keys = f"<div class=legend>{keys}</div>" if len(legend) > 1 else ""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{keys}"
        f"<svg viewBox='0 0 {_W} {_H}' role=img aria-label='{escape(title)}'>{inside}</svg></figure>"
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""
