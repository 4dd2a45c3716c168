"""Draws the pictures of concepts.md: `python docs/pictures.py` writes docs/*.svg from alignments that it makes.

An SVG in an <img> takes the page's light or dark scheme by `prefers-color-scheme`; each has a ground of its own, so
that it can also be read where the two do not agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TypeAlias

import xtokmap
from xtokmap import Kind

Tokens: TypeAlias = list[bytes | None]
Sides: TypeAlias = tuple[str, str]

DOCS = Path(__file__).resolve().parent

STYLE = """
svg { --ground:#ffffff; --ink:#1d2329; --dim:#57606a; --line:#d0d7de;
  --ONE_TO_ONE:#cfe0ff; --ONE_TO_MANY:#ffdfc0; --MANY_TO_ONE:#c9efd7; --MANY_TO_MANY:#f7cfe0;
  --REWRITTEN:#ffe9a3; --STOP:#ddd3f5; --MARKER:#c5eef4; --NONE:#eceff2; }
@media (prefers-color-scheme: dark) { svg { --ground:#171c22; --ink:#e4e8ec; --dim:#a5afb9; --line:#3a434d;
  --ONE_TO_ONE:#27477f; --ONE_TO_MANY:#7a4a1e; --MANY_TO_ONE:#1f5e3b; --MANY_TO_MANY:#75304f;
  --REWRITTEN:#6b5712; --STOP:#4b3a78; --MARKER:#14606d; --NONE:#2a3138; } }
text { fill:var(--ink); font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace; }
.side, .kind { fill:var(--dim); font-size:11px; font-family:system-ui,"Segoe UI","DejaVu Sans",sans-serif; }
.ground { fill:var(--ground); stroke:var(--line); }
.cut { stroke:var(--dim); stroke-dasharray:3 3; }
"""

CHAR, PAD, GAP, ROW, LEFT = 8.2, 7, 3, 26, 64


def width(token: str) -> float:
    """Of a token's box."""
    return len(token) * CHAR + 2 * PAD


def picture(tokens: list[list[str]], columns: Iterable[tuple[range, range, str]], title: str, sides: Sides) -> str:
    """Both sides' tokens, a column for each chunk; (range(0), range(0), "NONE") tokens are in no chunk."""
    parts, x = [], float(LEFT)
    for k, (*spans, kind) in enumerate(columns):
        rows = [[side[i] for i in span] for side, span in zip(tokens, spans, strict=True)]
        label = kind if kind != "NONE" else "unaligned"
        need = max(sum(map(width, row)) + GAP * (len(row) - 1) if row else 0 for row in rows)
        wide = max(need, len(label) * 6.4 + 4)
        if k:
            parts.append(f'<path class="cut" d="M{x - 7:.0f} 12V84"/>')
        for y, row in zip((14, 52), rows, strict=True):
            spare = (wide - GAP * (len(row) - 1) - sum(map(width, row))) / len(row) if row else 0
            at = x
            for token in row:
                w = width(token) + spare
                parts.append(f'<rect x="{at:.1f}" y="{y}" width="{w:.1f}" height="{ROW}" rx="4" fill="var(--{kind})"/>')
                parts.append(f'<text x="{at + w / 2:.1f}" y="{y + 17}" text-anchor="middle">{escape(token)}</text>')
                at += w + GAP
        parts.append(f'<text class="kind" x="{x + wide / 2:.1f}" y="97" text-anchor="middle">{label}</text>')
        x += wide + 14
    body, size = "\n".join(parts), f'width="{x + 2:.0f}" height="108"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {x + 2:.0f} 108" {size} role="img">
<title>{escape(title)}</title>
<style>{STYLE}</style>
<rect class="ground" x="0.5" y="0.5" width="{x + 1:.0f}" height="107" rx="8"/>
<text class="side" x="12" y="31">{sides[0]}</text>
<text class="side" x="12" y="69">{sides[1]}</text>
{body}
</svg>
"""


def shown(token: bytes | None, name: str) -> str:
    """A token as the pictures have it: · for a space, \\xNN for bytes that are no character."""
    if token is None:
        return name
    return token.decode(errors="backslashreplace").replace(" ", "·").replace("\n", "⏎")


def drawn(student: Tokens, teacher: Tokens, title: str, sides: Sides = ("student", "teacher")) -> str:
    """The alignment of two lists of tokens; None is an end of a turn."""
    tables = [xtokmap.ByteTable.from_bytes(side, stop_ids=[i for i, t in enumerate(side) if t is None])
              for side in (student, teacher)]  # fmt: skip
    alignment = xtokmap.Aligner(*tables).align(range(len(student)), range(len(teacher)))
    names = [[shown(token, "<stop>") for token in side] for side in (student, teacher)]
    columns, at = [], [0, 0]
    for chunk in [*alignment, None]:
        starts = (chunk.student.start, chunk.teacher.start) if chunk else (len(student), len(teacher))
        between = [range(a, b) for a, b in zip(at, starts, strict=True)]
        if any(between):
            columns.append((*between, "NONE"))
        if chunk:
            columns.append((chunk.student, chunk.teacher, Kind(chunk.kind).name))
            at = [chunk.student.stop, chunk.teacher.stop]
    return picture(names, columns, title, sides)


def pictures() -> dict[str, str]:
    """Every picture by its file's name."""
    return {
        "chunks.svg": drawn(
            [b"blue", b"bird", b"!", b" ok", None],
            [b"bluebird", b"!", b" o", b"k", None],
            "Two tokenizations of one text, cut where tokens of both sides end at the same byte",
        ),
        "kinds.svg": drawn(
            [b"the", b" caf", "e\u0301".encode(), b" sold", b" 20", b"26", b" te", b"as", None],
            [b"the", " caf\u00e9".encode(), b" so", b"ld", b" 2", b"02", b"6", b" teas", None],
            "A chunk of each kind",
        ),
        "characters.svg": drawn(
            [b" ", "你".encode()[:2], "你".encode()[2:], "好".encode()],
            [" 你".encode(), "好".encode()],
            "Tokens may end in the middle of a character",
        ),
        "tail.svg": drawn(
            [b"It", b" is", b" blue"],
            [b"It", b" is", b" bluebird"],
            "A sample that was cut off: its tail is in no chunk",
        ),
        "drift.svg": drawn(
            [b"hav", b"in", b"g", b" fun"],
            [b"having", b" fun"],
            "Sampled tokens above, the same text encoded again below",
            ("sampled", "again"),
        ),
    }  # fmt: skip


if __name__ == "__main__":
    for name, svg in pictures().items():
        (DOCS / name).write_text(svg, encoding="utf-8")
