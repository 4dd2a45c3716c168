"""The viewer: what the page shows is what the columns are, whatever the texts hold."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from importlib import resources
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from oracle import SPECIAL, STOP, Pieces, align, cut
from xtokmap import Aligner, ByteTable, Kind, align_offsets, view
from xtokmap.cli import main
from xtokmap.columns import UNALIGNED, Column, Token, columns

NASTY = "</title></style><script>alert('x')</script><img src=//x onerror=alert(1)> {body} & \"' \ud800\x00\u202e"
STYLE = (resources.files("xtokmap") / "data" / "view.css").read_text(encoding="utf-8")
VOID = ("meta",)
KINDS = {kind.lower().replace("_", "-"): kind for kind in view.BADGES}


class Page(HTMLParser):
    """The chunks of a page, read back from its markup.

    A token is what its letters, visible spaces, bytes and codes stand for, as bytes.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.chunks: list[dict[str, Any]] = []
        self.texts: dict[str, str] = {}
        self.cells: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        attributes = dict(attrs)
        assert len(attributes) == len(attrs)
        self.elements.add(tag)
        self.attributes |= set(attributes)
        name = (attributes.get("class") or "").split()
        if tag == "div" and name[:1] == ["chunk"] and "tabindex" in attributes:
            self.chunks.append({"kind": KINDS[name[1]], "dir": attributes.get("dir"), "sides": [], "tip": []})
        elif tag == "span" and name == ["side"] and self.inside("chunk") and self.chunks:
            self.chunks[-1]["sides"].append([])
        elif tag == "bdi" and name[:1] == ["token"]:
            self.chunks[-1]["sides"][-1].append(b"")
        elif tag == "tr" and self.chunks:
            self.chunks[-1]["tip"].append([])
        elif tag in ("td", "th"):
            self.chunks[-1]["tip"][-1].append("")
        if tag not in VOID:
            self.open.append((tag, attributes))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def inside(self, name: str) -> bool:
        return any((attributes.get("class") or "").split()[:1] == [name] for _, attributes in self.open)

    def handle_data(self, data: str) -> None:
        tag, attributes = self.open[-1] if self.open else ("", {})
        self.texts[tag] = self.texts.get(tag, "") + data
        if self.inside("tip"):
            if self.chunks[-1]["tip"]:
                self.chunks[-1]["tip"][-1][-1] += data
        elif self.inside("token") and self.chunks and tag in ("bdi", "i"):
            self.chunks[-1]["sides"][-1][-1] += read(data, attributes.get("class") if tag == "i" else None)


def read(data: str, name: str | None) -> bytes:
    if name == "s":
        return data.translate(str.maketrans("·⏎→", " \n\t")).encode()
    if name == "b":
        return bytes.fromhex(data)
    if name == "u":
        return "".join(chr(int(code, 16)) for code in re.findall(r"U\+(\w+)", data)).encode(errors="surrogatepass")
    return data.encode()


def expected(found: list[Column]) -> list[tuple[str, list[list[bytes]]]]:
    def shown(token: Token) -> bytes:
        return token.text.encode(errors="surrogatepass") if token.spelled is None else token.spelled

    return [(column.kind, [[shown(token) for token in side] for side in column.sides]) for column in found]


def of(page: Page) -> list[tuple[str, list[list[bytes]]]]:
    return [(chunk["kind"], chunk["sides"]) for chunk in page.chunks]


@settings(deadline=None)
@given(oracle.changed_texts, oracle.places, oracle.places)
def test_the_page_shows_the_columns(pieces: Pieces, a: list, b: list) -> None:
    sides = [oracle.without_stops(cut(oracle.side(pieces, k), at)) for k, at in ((0, a), (1, b))]
    alignment = align([*sides[0], SPECIAL, STOP], [*sides[1], STOP])
    assert of(Page(alignment.html())) == expected(columns(alignment))


#: Letters of many scripts, marks, joiners, directions, controls, bytes that are no text, and markup.
HARD = st.lists(
    st.one_of(
        st.text(max_size=6).map(lambda text: text.encode(errors="surrogatepass")),
        st.binary(max_size=4),
        st.sampled_from(
            ["שלום", "مرحبا 12", "नि", "\u0301", "👩\u200d👧", "\u200d", "\u202e", "·", "⏎", "\\xe4", "&lt;"]
        ).map(str.encode),
        st.sampled_from([b"</script>", b"<!--", b"'>", b"\xe4\xbd", b"\xed\xa0\x80", b"\n", b"\0", b"\xef\xbb\xbf"]),
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(HARD, oracle.places, st.text(max_size=10), st.booleans())
def test_every_byte_can_be_read_back_from_the_page(tokens: list[bytes], at: list, name: str, figures: bool) -> None:
    student = [token for token in tokens if token] or [b"x"]
    teacher = [token for token in cut(b"".join(student), at) if token]
    alignment = align([*student, SPECIAL], [*teacher, STOP])
    names = (lambda i: f"{name}{NASTY}", lambda i: NASTY)
    given: Any = {}
    if figures:
        given = {
            "logprobs": ([-0.5] * (len(student) + 1), [math.nan] * (len(teacher) + 1)),
            "advantages": [0.25] * (len(student) + 1),
        }
    text = alignment.html(names=names, title=name + NASTY, **given)
    assert text.encode() != b""  # no half of a surrogate pair in it
    page = Page(text)
    assert of(page) == expected(columns(alignment, names))
    assert page.elements <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "div", "section", "p", "ul", "li", "b", "small"),
        *("span", "bdi", "i", "table", "tr", "th", "td"),
    }
    assert page.attributes <= {
        *("lang", "charset", "name", "content", "http-equiv", "class", "dir", "style", "tabindex", "role"),
        "aria-label",
    }
    assert page.texts["title"] == (name + NASTY).encode(errors="backslashreplace").decode()
    assert page.texts["style"].count("{") == page.texts["style"].count("}")


def test_the_page_fetches_nothing() -> None:
    text = align([b"a"], [b"a"]).html()
    assert "default-src 'none'; style-src 'unsafe-inline'" in text
    assert not re.search(r"url\(|@import|https?:|src=|href=|<script|<link", text)


def test_ids_bytes_and_figures_open_with_a_chunk() -> None:
    alignment = align([b"a", "é".encode()[:1], "é".encode()[1:]], ["aé".encode()])
    ids = [int(i) for i in alignment._bytes.student_ids]
    page = Page(alignment.html(logprobs=([-1.0, math.nan, -2.0], [-0.5]), advantages=[0.5, -0.25, math.nan]))
    (chunk,) = page.chunks
    assert chunk["tip"] == [
        ["", "token", "id", "bytes", "logprob", "advantage"],
        ["student", "a", str(ids[0]), "61", "-1.000", "+0.500"],
        ["student", "C3", str(ids[1]), "C3", "–", "-0.250"],
        ["student", "A9", str(ids[2]), "A9", "-2.000", "–"],
        ["teacher", "aé", str(alignment._bytes.teacher_ids[0]), "61 C3 A9", "-0.500", ""],
    ]
    plain = Page(alignment.html()).chunks[0]["tip"]
    assert plain[0] == ["", "token", "id", "bytes"]
    offsets = Page(align_offsets([[0, 2]], [[0, 1], [1, 2]]).html()).chunks[0]["tip"]
    assert offsets == [["", "token"], ["student", "#0"], ["teacher", "#0"], ["teacher", "#1"]]


def lines(text: str) -> list[tuple[str, str]]:
    """Direction and content of every line, with nothing but letters, marks and the direction of digits in it."""
    found = re.findall(r"<div class=line dir=(\w+) style='[^']*'>(.*?)</div>(?=<div class=line|</section>)", text)
    bare = []
    for direction, inside in found:
        chunks = re.sub(r"<div class=tip.*?</table></div>", "", inside)
        chunks = re.sub(r"<span class=side>(.*?)</span><span class=side>.*?</span></div>", r"[\1]", chunks)
        bare.append((direction, re.sub(r"<(?!span dir|/span)[^>]*>", "", chunks)))
    return bare


def test_lines_stand_in_the_direction_of_their_text() -> None:
    def of(*tokens: str) -> list[tuple[str, str]]:
        made = [token.encode() for token in tokens]
        return lines(align(made, made).html())

    assert of("ab", " ", "c") == [("ltr", "[ab][·][c]")]
    assert of("שלום", " ", "עולם") == [("rtl", "&rlm;[שלום]&rlm;[·]&rlm;[עולם]&rlm;")]
    assert of("a", " ב", "ג") == [("ltr", "&lrm;[a]&lrm;&rlm;[·ב]&rlm;&rlm;[ג]&rlm;")]
    assert of("ב", "1", "2") == [("rtl", "&rlm;[ב]&rlm;<span dir=ltr>[1][2]</span>")]
    assert of("a\n", "ב") == [("ltr", "[a⏎]"), ("rtl", "&rlm;[ב]&rlm;")]
    chunk = Page(align(["ab ב".encode()], ["ab ב".encode()]).html()).chunks[0]
    assert chunk["dir"] == "ltr"


def test_what_combines_with_the_token_before_stands_on_a_circle() -> None:
    text = view.chunk(Column("ONE_TO_ONE", [Token("\u0301a")], [Token("a\u0301")]))
    assert "<bdi class='token mark'>\u0301a</bdi>" in text
    assert "<bdi class='token'>a\u0301</bdi>" in text


def test_joiners_are_seen_where_they_join_and_named_where_they_do_not() -> None:
    family = "👩\u200d👧"
    assert view.shown(Token(family)) == family
    assert view.shown(Token("👩\u200d")) == "👩<i class=u dir=ltr>U+200D</i>"
    assert view.shown(Token("\u200c \u200d")).count("<i class=u") == 2


def test_long_lines_are_laid_out_in_pieces() -> None:
    row = align([b"a"] * 300, [b"a"] * 300)
    assert re.findall(r"--n:(\d+)", row.html().split("</style>")[-1]) == ["120", "120", "60"]


def test_a_report_shows_the_same_chunks_by_gap() -> None:
    alignment = align([b"<script>", b"&"], [b"<script>&"])
    column = columns(alignment, logprobs=([-1.0, -2.0], [-9.0]))[0]
    scored, plain = view.chunk(column, by_gap=True, marked=True), view.chunk(columns(alignment)[0], by_gap=True)
    assert re.sub("<[^>]*>", "", scored) == "&lt;script&gt;-1.0&amp;-2.0&lt;script&gt;&amp;-9.0"
    assert "title='chunk 0 · MANY_TO_ONE, gap +6.00 nats'" in scored
    assert "--g:0.75;--h:var(--red)" in scored
    assert "class='chunk many-to-one marked'" in scored
    assert "nats" not in plain
    assert "style" not in plain
    again = Column.of(column.record())
    assert view.chunk(again, by_gap=True).replace("title='", "title='chunk 0 · ") == view.chunk(column, by_gap=True)
    assert "class='chunk other'" in view.chunk(Column("' onclick=x", [Token("a")], []))


# ---- notebooks ---------------------------------------------------------------------------------------------------


def test_a_notebook_shows_a_row_and_says_what_it_leaves_out() -> None:
    row = align([b"a", b"b"], [b"ab"])
    page = Page(row._repr_html_())
    assert of(page) == expected(columns(row))
    assert "2 student and 1 teacher tokens, 1 chunks; coverage 100.0%" in page.texts["p"]
    long = align([b"a"] * 2500, [b"a"] * 2500)
    page = Page(long._repr_html_())
    assert len(page.chunks) == 2000
    assert "2,500 chunks; coverage 100.0%; its first 2,000 chunks" in page.texts["p"]
    assert page.texts["p"].endswith("`html()` of a row makes a page of all its chunks")
    assert len(Page(long.html()).chunks) == 2500


def test_a_notebook_shows_the_first_rows_of_a_batch_and_how_many_they_are() -> None:
    table = ByteTable.from_bytes([b"a", b"b"])
    aligner = Aligner(table, table)
    page = Page(aligner.align_batch([[0], [1, 0], []], [[0], [1, 0], []])._repr_html_())
    assert re.findall(r"row \d", page.texts["p"]) == ["row 0", "row 1", "row 2"]
    assert "shown" not in page.texts["p"]
    many = aligner.align_batch([[0]] * 100, [[0]] * 100)
    page = Page(many._repr_html_())
    assert len(page.chunks) == 8
    assert page.texts["p"].endswith("8 of 100 rows are shown; `batch[i]` is a row")
    wide = aligner.align_batch([[0] * 1500] * 3, [[0] * 1500] * 3)
    page = Page(wide._repr_html_())
    assert len(page.chunks) == 2000
    assert "2 of 3 rows are shown" in page.texts["p"]
    assert Page(aligner.align_batch([], [])._repr_html_()).chunks == []


@pytest.mark.filterwarnings("ignore:fastokens gives other ids")
def test_the_command_writes_the_page(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import tiny

    for name, tokenizer in (("s", tiny.student_tokenizer()), ("t", tiny.teacher_tokenizer())):
        tokenizer.backend_tokenizer.save(str(tmp_path / f"{name}.json"))
    pair = ["--student", str(tmp_path / "s.json"), "--teacher", str(tmp_path / "t.json")]
    text = "the <b>fox</b>\n你 é"
    assert main(["align", *pair, "--html", str(tmp_path / "out.html"), text]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out.html'}\n"
    page = Page((tmp_path / "out.html").read_text(encoding="utf-8"))
    for side in (0, 1):
        assert b"".join(token for _, sides in of(page) for token in sides[side]).decode() == text
    assert page.texts["h1"] == "s.json → t.json"
    assert main(["align", *pair, "--html", str(tmp_path / "no" / "out.html"), text]) == 2
    assert "No such file or directory" in capsys.readouterr().err


# ---- colors ------------------------------------------------------------------------------------------------------


def channels(color: str) -> list[float]:
    whole = color if len(color) == 7 else "#" + "".join(c * 2 for c in color[1:])
    return [int(whole[k : k + 2], 16) / 255 for k in (1, 3, 5)]


def luminance(color: list[float]) -> float:
    light = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in color)
    return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), light, strict=True))


@pytest.mark.parametrize("mode", [0, 1])
def test_text_can_be_read_on_every_color(mode: int) -> None:
    """The contrast that the WCAG ask of small text."""

    def one(value: str) -> str:
        pair = re.match(r"light-dark\((#\w+), (#\w+)\)", value)
        return pair[mode + 1] if pair else value

    of = {name: one(value) for name, value in re.findall(r"--(\w+): (light-dark\([^)]*\)|#\w+);", STYLE)}
    kinds = re.findall(r"--k: (light-dark\([^)]*\)|#\w+); --tint: (\d+)%", STYLE)
    assert len(kinds) == len(view.BADGES) - 1  # unaligned ones are hatched
    for color, tint in kinds:
        share, pair = int(tint) / 100, zip(channels(one(color)), channels(of["card"]), strict=True)
        ground = luminance([share * a + (1 - share) * b for a, b in pair])
        for text in ("ink", "dim"):
            dark, light = sorted((luminance(channels(of[text])), ground))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (color, text)


def test_every_kind_has_a_mark_beside_its_color() -> None:
    marks = dict(re.findall(r"\.line \.([\w-]+)::after \{ content: \"([^\"]*)\"", STYLE))
    spelled = {name: chr(int(mark[1:], 16)) if mark[0] == "\\" else mark for name, mark in marks.items()}
    badges = {kind.lower().replace("_", "-"): badge for kind, badge in view.BADGES.items()}
    assert spelled == {**badges, "one-to-one": "\xa0"}  # the most frequent one has none
    assert set(badges.values()) == {view.BADGES[kind] for kind in [*(k.name for k in Kind), UNALIGNED]}
