"""An alignment as HTML: a page of its own, a cell of a notebook, a sample of a run's report.

There is no script and nothing is fetched. Every text is escaped and isolated: what a token holds cannot leave it,
neither as markup nor by turning the direction of what stands beside it.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib import resources
from itertools import groupby

from xtokmap.columns import SIDES, UNALIGNED, Column, Token

#: What marks a kind beside its color.
BADGES = {
    "ONE_TO_ONE": "1:1",
    "ONE_TO_MANY": "1:n",
    "MANY_TO_ONE": "n:1",
    "MANY_TO_MANY": "n:m",
    "REWRITTEN": "≠",
    "STOP": "■",
    "MARKER": "◆",
    UNALIGNED: "∅",
}
#: Nats between the two sides at which a chunk of a report has its full color.
_FULL = 8
#: Chunks that a browser lays out together; what is far away it leaves for later.
_BLOCK = 120
_SPACES = str.maketrans(" \n\t", "·⏎→")
_JOINERS = "\u200c\u200d"


def page(rows: Sequence[tuple[str, list[Column]]], title: str) -> str:
    """A page that needs nothing but itself: every row with a line about it."""
    return _PAGE.format(title=_plain(title), body=f"<h1>{_plain(title)}</h1>{fragment(rows)}")


def fragment(rows: Sequence[tuple[str, list[Column]]], note: str = "") -> str:
    """What a page or a notebook shows: legend, rows, and a note on what is left out."""
    style = (resources.files("xtokmap") / "data" / "view.css").read_text(encoding="utf-8")
    shown = "".join(
        f"<section><p class=about>{_plain(about)}</p>{''.join(map(_line, _lines(columns)))}</section>"
        for about, columns in rows
    )
    note = f"<p class=about>{_plain(note)}</p>" if note else ""
    legend = _legend(column for _, columns in rows for column in columns)
    return f"<div class=xtokmap dir=ltr><style>{style}</style>{legend}{shown}{note}</div>"


def chunk(column: Column, *, marked: bool = False, by_gap: bool = False, detail: bool = False) -> str:
    """Both sides of a column under each other.

    Args:
        column: what is shown.
        marked: whether it stands out from its neighbors.
        by_gap: whether its color says who finds the chunk likelier, and by how much, instead of its kind.
        detail: whether kind, ids, bytes and figures open under the pointer and at the keyboard's focus.
    """
    names = f"chunk {_name(column.kind)}{' marked' if marked else ''}"
    direction = _direction(column)
    about = f" dir={direction}" if direction else ""
    if by_gap and column.gap is not None:
        color = "red" if column.gap > 0 else "blue"
        about += f" style='--g:{min(1.0, abs(column.gap) / _FULL):.2f};--h:var(--{color})'"
    if detail:
        about += f" tabindex=0 role=group aria-label='{_plain(_title(column))}'"
    else:
        about += f" title='{_plain(_title(column))}'"
    sides = "".join(
        f"<span class=side>{''.join(map(_token, side)) or '<i class=none>∅</i>'}</span>" for side in column.sides
    )
    return f"<div class='{names}'{about}>{sides}{_detail(column) if detail else ''}</div>"


def shown(token: Token) -> str:
    """Its text as markup: `i.s` spaces and line ends, `i.b` bytes that are no text, `i.u` characters without a look."""
    if token.spelled is None:
        return _text(token.text, lone=False)
    return _text(token.spelled.decode(errors="surrogateescape"), lone=True)


def _plain(text: str) -> str:
    """A text outside the tokens: what cannot be encoded is spelled out."""
    return escape(text.encode(errors="backslashreplace").decode())


def _text(text: str, *, lone: bool) -> str:
    """Markup of a text in which, with `lone`, halves of surrogate pairs stand for bytes."""

    def sort(at: int) -> str:
        c = text[at]
        if c in " \n\t":
            return "s"
        if lone and "\udc80" <= c <= "\udcff":
            return "b"
        if c in _JOINERS and 0 < at < len(text) - 1:  # between two letters, or two pictures, it is seen in these
            around = text[at - 1] + text[at + 1]
            return "" if around.isprintable() and " " not in around else "u"
        return "" if c.isprintable() else "u"

    out = []
    for name, places in groupby(range(len(text)), sort):
        part = "".join(text[at] for at in places)
        if name == "s":
            part = part.translate(_SPACES)
        elif name == "b":
            part = part.encode(errors="surrogateescape").hex(" ").upper()
        elif name == "u":
            part = " ".join(f"U+{ord(c):04X}" for c in part)
        # Without a direction of its own, the letters of a code would count as the token's.
        about = f"{name} dir=ltr" if name in ("b", "u") else name
        out.append(f"<i class={about}>{part}</i>" if name else escape(part))
    return "".join(out)


def _token(token: Token) -> str:
    text = _letters(token)
    # A mark that combines with the token before it stands on a circle.
    name = "token mark" if text and unicodedata.category(text[0])[0] == "M" else "token"
    under = "" if token.logprob is None else f"<small>{_figure(token.logprob, '.1f')}</small>"
    return f"<bdi class='{name}'>{shown(token)}{under}</bdi>"


def _title(column: Column) -> str:
    number = "" if column.chunk is None else f"chunk {column.chunk} · "
    gap = "" if column.gap is None else f", gap {_figure(column.gap, '+.2f')} nats"
    return f"{number}{column.kind}{gap}"


def _detail(column: Column) -> str:
    rows = [(side, token) for side, tokens in zip(SIDES, column.sides, strict=True) for token in tokens]
    heads = ["", "token", "id", "bytes", "logprob", "advantage"]
    cells = [
        [
            f"<bdi>{shown(token)}</bdi>",
            "" if token.id is None else str(token.id),
            "" if token.id is None else (token.spelled or b"").hex(" ").upper() or "none",
            "" if token.logprob is None else _figure(token.logprob, ".3f"),
            "" if token.advantage is None else _figure(token.advantage, "+.3f"),
        ]
        for _, token in rows
    ]
    known = [any(row[k] for row in cells) for k in range(5)]
    head = "".join(f"<th>{name}</th>" for name, there in zip(heads, [True, *known], strict=True) if there)
    bodies = ("".join(f"<td>{cell}</td>" for cell, there in zip(row, known, strict=True) if there) for row in cells)
    body = "".join(f"<tr><th>{side}</th>{row}</tr>" for (side, _), row in zip(rows, bodies, strict=True))
    about = _plain(_title(column))
    return f"<div class=tip dir=ltr><b>{about}</b><table><tr>{head}</tr>{body}</table></div>"


def _legend(columns: Iterable[Column]) -> str:
    counts = Counter(column.kind for column in columns)
    keys = "".join(
        f"<li class='key {_name(kind)}'><b>{badge}</b> {kind} <small>{counts[kind]:,}</small></li>"
        for kind, badge in BADGES.items()
        if counts[kind]
    )
    sides = "".join(f"<span class=side><span class=token>{side}</span></span>" for side in SIDES)
    return f"<ul class=legend><li><div class=chunk>{sides}</div></li>{keys}</ul>"


def _name(kind: str) -> str:
    """Of a class; a record may have any text as its kind."""
    return kind.lower().replace("_", "-") if kind in BADGES else "other"


def _figure(x: float, form: str) -> str:
    return format(x, form) if math.isfinite(x) else "–"


# ---- lines and directions ----------------------------------------------------------------------------------------


def _lines(columns: list[Column]) -> Iterator[list[Column]]:
    """The columns line by line of the text, none longer than a block."""
    line: list[Column] = []
    for column in columns:
        line.append(column)
        if len(line) == _BLOCK or any(side and side[-1].text.endswith("\n") for side in column.sides):
            yield line
            line = []
    if line:
        yield line


def _line(columns: list[Column]) -> str:
    """A line in its own direction.

    To the browser a chunk is an object without a direction. Marks on both sides give it that of its text, so that
    chunks stand in the order in which their text is read; digits are read from the left in any line.
    """
    directions = [_direction(column) for column in columns]
    first = next(filter(None, directions), "ltr")
    chunks = [chunk(column, detail=True) for column in columns]
    if "rtl" in directions:
        marks = {"rtl": "&rlm;", "ltr": "&lrm;", "": ""}
        runs = groupby(zip(columns, directions, chunks, strict=True), lambda one: not one[1] and _is_number(one[0]))
        chunks = [
            f"<span dir=ltr>{''.join(html for *_, html in run)}</span>"
            if number
            else "".join(f"{marks[direction]}{html}{marks[direction]}" for _, direction, html in run)
            for number, run in runs
        ]
    return f"<div class=line dir={first} style='--n:{len(columns)}'>{''.join(chunks)}</div>"


def _direction(column: Column) -> str:
    """Of its first letter; none where it has no letter."""
    for side in column.sides:
        for token in side:
            for c in _letters(token):
                strong = unicodedata.bidirectional(c)
                if strong in ("L", "R", "AL"):
                    return "ltr" if strong == "L" else "rtl"
    return ""


def _letters(token: Token) -> str:
    """Its text without the bytes that are none."""
    return token.text if token.spelled is None else token.spelled.decode(errors="ignore")


def _is_number(column: Column) -> bool:
    text = "".join(_letters(token) for token in column.student or column.teacher)
    return bool(text) and all(unicodedata.bidirectional(c) in ("EN", "AN", "ES", "CS") for c in text)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>
:root {{ color-scheme: light dark; background: light-dark(#fbfbfa, #0f1317); }} body {{ margin: 0; }}
h1 {{ font: 600 22px/1.3 system-ui, sans-serif; overflow-wrap: anywhere; margin: 0; padding: 24px 20px 0; }}
</style></head>
<body>
{body}
</body></html>
"""
