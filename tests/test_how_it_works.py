"""The walk that docs/how-it-works.md shows is what the core does."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

import oracle

PAGE = Path(__file__).parent.parent / "docs" / "how-it-works.md"


def walk_of_the_page() -> Callable[..., list[tuple[range, range]]]:
    code = re.search(r"```python\n(def chunks.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code[1], PAGE.name, "exec"), names)
    return names["chunks"]


chunks = walk_of_the_page()


def cut(text: bytes, ends: list[bool]) -> list[bytes]:
    """Tokens of a text: one ends behind every byte whose `ends` is true, and one at the end of the text."""
    stops = [k + 1 for k, end in enumerate(ends) if end or k + 1 == len(text)]
    return [text[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]


#: Bytes, whole characters and broken ones among them, and whether a token of either side ends behind each.
cut_bytes = st.lists(st.tuples(st.sampled_from(b"ab \xc3\xa9\xff"), st.booleans(), st.booleans()), max_size=40)


@settings(max_examples=500)
@given(cut_bytes, st.sampled_from([0, 0, 1, 2, 5]), st.booleans())
def test_the_walk_finds_the_chunks_of_the_core(bytes_: list[tuple[int, bool, bool]], tail: int, longer: bool) -> None:
    text = bytes(byte for byte, _, _ in bytes_)
    left = text[: max(0, len(text) - tail)]
    whole, part = cut(text, [end for _, end, _ in bytes_]), cut(left, [end for _, _, end in bytes_[: len(left)]])
    student, teacher = (whole, part) if longer else (part, whole)
    found = [(chunk.student, chunk.teacher) for chunk in oracle.align(student, teacher)]
    assert chunks(student, teacher) == found


@given(st.lists(st.binary(min_size=1, max_size=4), max_size=20))
def test_a_side_beside_itself_is_token_by_token(tokens: list[bytes]) -> None:
    assert chunks(tokens, tokens) == [(range(i, i + 1), range(i, i + 1)) for i in range(len(tokens))]
