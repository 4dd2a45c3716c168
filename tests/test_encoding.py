"""Encoding rules against the tokenizers themselves: what they do with two tokens side by side, and with words."""

import json
import random
import sys
import unicodedata
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest

import corpus
import real_tokenizers as real
import xtokmap
from xtokmap import _core
from xtokmap.boundary.encoding import EncodingRule
from xtokmap.tokenizers import base

PAIRS = 4000
#: What a rule may get wrong. A pre-tokenizer is asked about classes of tokens, and a rare pair is unlike its class.
TOLERANCE = PAIRS // 2000


@dataclass
class Case:
    """A tokenizer, and how it encodes a text that does not stand at the beginning."""

    source: Any
    encode: Any
    table: xtokmap.ByteTable = field(init=False)
    rule: EncodingRule = field(init=False)

    def __post_init__(self):
        self.table = xtokmap.byte_table(self.source)
        self.rule = EncodingRule(self.source, self.table)
        self.rule.learn(np.arange(len(self.table)))


def of_json(name):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(real.path(name)))
    return Case(tokenizer, lambda text: tokenizer.encode(text, add_special_tokens=False).ids)


def of_transformers(path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return Case(tokenizer, lambda text: tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def of_tiktoken(name):
    pytest.importorskip("regex")
    encoding = real.encoding(name)
    return Case(encoding, encoding.encode_ordinary)


def of_tekken(name):
    pytest.importorskip("regex")
    package = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    core = package.Tekkenizer.from_file(real.path(name))
    return Case(core, lambda text: core.encode(text, bos=False, eos=False))


def of_sentencepiece(name):
    package = pytest.importorskip("sentencepiece")
    processor = package.SentencePieceProcessor(model_file=str(real.path(name)))
    start = processor.encode("\n")
    # The space that it puts in front, and a line feed, which merges with nothing.
    return Case(processor, lambda text: processor.encode("\n" + text)[len(start) :])


CASES = {
    "deepseek": lambda: of_json("deepseek"),
    "anthropic": lambda: of_json("anthropic"),
    "smollm2": lambda: of_transformers(real.path("smollm2")),
    "qwen": lambda: of_tiktoken("qwen"),
    "qwen3.6": lambda: of_tiktoken("qwen3.6"),
    "cl100k": lambda: of_tiktoken("cl100k"),
    "o200k": lambda: of_tiktoken("o200k"),
    "tekken": lambda: of_tekken("tekken"),
    "mistral-v1": lambda: of_sentencepiece("mistral-v1"),
    "mistral-v3": lambda: of_sentencepiece("mistral-v3"),
}
_made = cache(lambda name: CASES[name]())


@pytest.fixture(params=CASES)
def case(request):
    return _made(request.param)


def text_of(token):
    try:
        return (token or b"").decode()
    except UnicodeDecodeError:
        return ""


def pairs_of(case, number, seed=0):
    """Random pairs of tokens, most of them of the kinds about which pre-tokenizers and merges have most to say."""
    chosen = random.Random(seed)
    texts = {i: text for i in range(len(case.table)) if (text := text_of(case.table[i]))}
    kinds = [
        [i for i, text in texts.items() if any(character.isdigit() for character in text)],
        [i for i, text in texts.items() if text.isspace()],
        [i for i, text in texts.items() if any(unicodedata.category(c)[0] in "PS" for c in text)],
        [i for i, text in texts.items() if len(text) < 4],
        list(texts),
    ]
    kinds = [kind for kind in kinds if kind]
    while number > 0:
        s, u = (chosen.choice(chosen.choice(kinds)) for _ in range(2))
        text = texts[s] + texts[u]
        # What a normalizer changes is another text, and what never comes from an encoding is not next.
        if case.encode(texts[u]) == [u] and case.table.decode(case.encode(text)) == text.encode():
            number -= 1
            yield s, u, text


def test_two_tokens_are_joined_where_the_tokenizer_would_not_begin_with_the_first(case):
    wrong = [
        (case.table[s], case.table[u])
        for s, u, text in pairs_of(case, PAIRS)
        if case.rule.core.joined(s, u) != (case.encode(text)[0] != s)
    ]
    assert len(wrong) <= TOLERANCE, wrong


@pytest.mark.slow
def test_gemma_with_its_added_tokens(tmp_path):
    case = of_transformers(real.gemma_model(tmp_path))
    pairs = list(pairs_of(case, 2 * PAIRS))
    wrong = [
        (case.table[s], case.table[u])
        for s, u, text in pairs
        if case.rule.core.joined(s, u) != (case.encode(text)[0] != s)
    ]
    assert len(wrong) <= 2 * TOLERANCE, wrong


def test_words_are_encoded_as_the_tokenizer_does(case):
    """Words of letters: what no pre-tokenizer cuts, with the space before them."""
    words = {word for text in corpus.KINDS.values() for word in text.split() if word.isalpha()}
    words = sorted(word for word in words if case.table.decode(case.encode(" " + word)) == f" {word}".encode())
    assert len(words) > 100
    for text in [*words, *(" " + word for word in words)]:
        pieces = case.rule._cuts(text) if case.rule._cuts is not None else set()
        if not pieces:
            assert case.rule.core.encode(text.encode()) == case.encode(text), text


def test_the_kind_of_rule(case):
    assert case.rule.name == "bpe"


# ---- rules of tokenizers made here -------------------------------------------------------------------------------


def tokenizer_of(model, **parts):
    tokenizer = pytest.importorskip("tokenizers").Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


@pytest.fixture
def tokenizers():
    return pytest.importorskip("tokenizers")


def byte_level(tokenizers, tokens, merges, **options):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *tokens])}
    return tokenizer_of(
        tokenizers.models.BPE(vocab, merges, **options),
        pre_tokenizer=tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=tokenizers.decoders.ByteLevel(),
    )


def rule_of(tokenizer):
    table = xtokmap.byte_table(tokenizer)
    rule = EncodingRule(tokenizer, table)
    rule.learn(np.arange(len(table)))
    return rule, table


def test_a_whole_piece_comes_before_its_merges(tokenizers):
    for whole in (False, True):
        tokenizer = byte_level(tokenizers, ["ab", "bc", "abc"], [("b", "c"), ("a", "b")], ignore_merges=whole)
        rule, table = rule_of(tokenizer)
        assert rule.core.encode(b"abc") == tokenizer.encode("abc").ids
        ids = {table[i]: i for i in range(len(table))}
        expected = tokenizer.encode("abc").ids[0] != ids[b"a"]
        assert rule.core.joined(ids[b"a"], ids[b"bc"]) == expected == whole
        # What only stands as a whole piece never stands before a letter.
        assert rule.core.joined(ids[b"abc"], ids[b"a"])
        assert rule.core.joined(ids[b"abc"], ids[b" "]) == (not whole)


def test_a_pre_tokenizer_keeps_tokens_apart(tokenizers):
    tokenizer = byte_level(tokenizers, ["a1", "ab"], [("a", "1"), ("a", "b")])
    rule, table = rule_of(tokenizer)
    ids = {table[i]: i for i in range(len(table))}
    assert tokenizer.encode("a1").ids == [ids[b"a"], ids[b"1"]]
    assert not rule.core.joined(ids[b"a"], ids[b"1"])
    assert rule.core.joined(ids[b"a"], ids[b"b"])


def test_an_added_token_comes_before_everything(tokenizers):
    tokenizer = byte_level(tokenizers, ["ab", "abc"], [("a", "b"), ("ab", "c")])
    tokenizer.add_tokens(["bc"])
    rule, table = rule_of(tokenizer)
    ids = {table[i]: i for i in range(len(table))}
    for text in ("abc", "bcbc", "abbc", "ac"):
        assert rule.core.encode(text.encode()) == tokenizer.encode(text).ids
    assert tokenizer.encode("abc").ids == [ids[b"a"], ids[b"bc"]]
    assert rule.core.joined(ids[b"ab"], ids[b"c"])
    assert not rule.core.joined(ids[b"a"], ids[b"bc"])
    # A token with an added one inside is never made.
    assert rule.core.joined(ids[b"abc"], ids[b"a"])


def test_unigram_takes_the_best_path(tokenizers):
    pieces = [("<unk>", 0.0), ("a", -2.0), ("b", -2.5), ("ab", -3.5), ("aba", -5.0), ("ba", -5.1)]
    tokenizer = tokenizer_of(tokenizers.models.Unigram(pieces, 0), decoder=tokenizers.decoders.Fuse())
    rule, table = rule_of(tokenizer)
    assert rule.name == "unigram"
    for text in ("a", "ab", "aba", "abab", "bab", "ababa", "bbaab"):
        assert rule.core.encode(text.encode()) == tokenizer.encode(text).ids, text
    ids = {table[i]: i for i in range(len(table))}
    assert rule.core.joined(ids[b"a"], ids[b"b"])
    assert not rule.core.joined(ids[b"b"], ids[b"b"])


def test_the_longest_match_where_nothing_else_is_known(tokenizers):
    table = xtokmap.ByteTable.from_bytes([b"a", b"b", b"ab", b"abb", None])
    rule = EncodingRule(table, table)
    assert rule.name == "longest match"
    assert rule.core.encode(b"abbab") == [3, 2]
    assert rule.core.joined(0, 1)
    assert not rule.core.joined(1, 0)
    assert rule.pieces(table) is None


def test_files_have_the_rule_of_what_is_read_from_them(tmp_path, tokenizers):
    tokenizer = byte_level(tokenizers, ["ab"], [("a", "b")])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    for source in (path, str(path), tmp_path):
        rule, _ = rule_of(source)
        assert rule.core.encode(b"abab") == tokenizer.encode("abab").ids
    # Merges as strings, as older files have them.
    spec = json.loads(path.read_text(encoding="utf-8"))
    spec["model"]["merges"] = ["a b"]
    path.write_text(json.dumps(spec), encoding="utf-8")
    assert rule_of(path)[0].core.encode(b"abab") == tokenizer.encode("abab").ids


@pytest.fixture
def unsaid():
    """What is said once may have been said before."""
    base.say_missing.cache_clear()
    yield
    base.say_missing.cache_clear()


def test_without_tokenizers_the_pre_tokenizer_is_missed_aloud(tmp_path, tokenizers, monkeypatch, unsaid, recwarn):
    plain = tokenizer_of(tokenizers.models.BPE({"a": 0}, []), decoder=tokenizers.decoders.ByteLevel())
    tokenizer = byte_level(tokenizers, ["a1"], [("a", "1")])
    for name, made in (("plain.json", plain), ("tokenizer.json", tokenizer)):
        made.save(str(tmp_path / name))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert rule_of(tmp_path / "plain.json")[0]._cuts is None  # nothing is missed
    assert not recwarn.list
    for _ in range(2):
        rule, table = rule_of(tmp_path / "tokenizer.json")
        ids = {table[i]: i for i in range(len(table))}
        assert rule.core.joined(ids[b"a"], ids[b"1"])
    (said,) = [str(warning.message) for warning in recwarn]
    assert said.startswith("the package tokenizers is not installed: what the pre-tokenizer")
    assert said.endswith("pip install tokenizers")


def test_without_regex_the_pattern_is_missed_aloud(tmp_path, monkeypatch, unsaid):
    vocab = [{"rank": k, "token_bytes": token} for k, token in enumerate(("YQ==", "MQ==", "YTE="))]  # a, 1, a1
    config = {"default_num_special_tokens": 3, "default_vocab_size": 6, "pattern": r"[a-z]+|[0-9]"}
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab}))
    pytest.importorskip("regex")
    assert not rule_of(tmp_path)[0].core.joined(3, 4)
    monkeypatch.setitem(sys.modules, "regex", None)
    with pytest.warns(UserWarning, match=r"the package regex is not installed: .* pip install regex"):
        rule, _ = rule_of(tmp_path)
    assert rule.core.joined(3, 4)


def test_what_does_not_fit_is_refused():
    table = xtokmap.ByteTable.from_bytes([b"a", b"b"])
    numbers = np.zeros(1, np.uint32)
    for arguments, message in [
        ({"rule": "bpe", "merges": np.asarray([[0, 1, 2]], np.uint32)}, r"merges\[0\]: id 2 is outside"),
        ({"rule": "bpe", "ranks": numbers}, "1 ranks for a byte table of 2 ids"),
        ({"rule": "bpe", "added": numbers + 7}, "added: id 7 is outside"),
        ({"rule": "unigram", "scores": np.zeros(3, np.float32)}, "3 scores for a byte table of 2 ids"),
        ({"rule": "unigram"}, "use longest match, bpe or unigram"),
        ({"rule": "guess"}, 'rule "guess"'),
        ({"splits": (numbers, numbers, 1, 1)}, "splits do not fit"),
    ]:
        with pytest.raises(xtokmap.XTokMapError, match=message):
            _core.Encoding(table, **arguments)
    encoding = _core.Encoding(table)
    with pytest.raises(xtokmap.XTokMapError, match="no such class"):
        encoding.learn(0, np.zeros(1, np.uint8))
    with pytest.raises(IndexError, match="id 2 is outside 2 ids"):
        encoding.joined(0, 2)
