"""Readers and codecs against the tokenizers' own decoders and encoders: every id, many kinds of text, every refusal."""

import base64
import codecs
import copy
import gzip
import io
import json
import random
import re
import subprocess
import sys
import tracemalloc
import types
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest

import oracle
import real_tokenizers as real
import xtokmap
from xtokmap import UnsupportedTokenizerError, byte_table
from xtokmap import tokenizers as kinds
from xtokmap.boundary.encoding import EncodingRule
from xtokmap.tokenizers import base, parse, text_codec
from xtokmap.tokenizers.base import STOP_TOKENS
from xtokmap.tokenizers.hf import ODD_TEXTS

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

CORPUS = {
    "prose": "The teacher's shoes weren't new; she'd said so, and I'll admit I didn't listen. “Why?” he asked.",
    "code": "def f(x: int) -> str:\n\tif x >= 10:\n        return f'{x:>4}' + \"\\n\"  # no\n\n\nclass A:\n    pass\n",
    "maths": "∀ε>0 ∃δ: |x−a|<δ ⇒ |f(x)−L|<ε;  ∑_{i=1}^{n} i² = n(n+1)(2n+1)/6 ≈ \\frac{n^3}{3}",
    "chinese": "知识蒸馏把教师模型的概率传给学生，逐字节对齐两种分词。龘靐齉",
    "japanese": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。ｶﾀｶﾅ",
    "korean": "한국어 문장은 띄어쓰기를 합니다. 뷁쉛",
    "arabic": "مرحبًا بالعالَم، كيف الحال؟ ١٢٣٤",
    "hindi": "नमस्ते दुनिया, यह एक परीक्षण है। क्षत्रिय",
    "thai": "ภาษาไทยไม่มีการเว้นวรรคระหว่างคำ",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇨🇭 ❤️‍🔥 🤷🏿‍♀️",
    "accents": "cafe\u0301 nai\u0308ve A\u030angstro\u0308m s\u0323\u0307 vie\u0323\u0302t, précomposé ñ ß",
    "digits": "31415926535897932384626433832795028841971 1,000,000.00 0x1F3A 1e-10 2024-02-29",
    "whitespace": "a  b   c    d\t\te\n\n\nf\r\ng \n h        i\u00a0j\u3000k\u2003l",
    "markers": "<|im_end|> </s> <s> <eos> [INST] <|endoftext|> <0x41> ## [UNK] <unk> <end_of_turn> [SEP]",
    "controls": "nul \x00 bell \x07 esc \x1b[0m del \x7f soft\u00adhyphen \u200bzw\ufeff \ufffd \U0010ffff",
}
TEXTS = list(CORPUS.values())


def lossy(data, invalid):
    """`data` as text, with one U+FFFD for each invalid byte ("each") or for each invalid part ("maximal")."""
    codecs.register_error("each", lambda error: ("\ufffd" * (error.end - error.start), error.end))
    return data.decode("utf-8", {"each": "each", "maximal": "replace"}[invalid])


@dataclass
class Case:
    """A tokenizer: what `byte_table` is given, and its own encoder and decoder."""

    source: Any
    encode: Any
    decode: Any  # rows of ids -> texts, nothing cleaned up, specials left out
    stops: tuple[int, ...]
    invalid: str = "maximal"
    edge: str = ""  # where the decoder leaves a space out: "prefix", "suffix"; "first": all of the first token's
    at_start: dict[int, bytes] = field(default_factory=dict)  # tokens that spell something else at position 0
    exact: bool = True  # decode(encode(text)) == text
    codec: Any = None  # what text_codec is given, where that is not `source`
    table: xtokmap.ByteTable = field(init=False)

    def __post_init__(self):
        self.table = byte_table(self.source)

    def spell(self, ids):
        """What the decoder makes of these ids."""
        first, rest = self.table.decode(ids[:1]), self.table.decode(ids[1:])
        if ids and ids[0] in self.at_start:
            first = self.at_start[ids[0]]
        elif self.edge == "prefix" and self.invalid != "run":
            first = first.removeprefix(b" ")
        elif self.edge == "first":
            first = first.replace(b" ", b"")
        if self.invalid == "run":
            tokens = [first, *(self.table[i] or b"" for i in ids[1:])]
            byte_pieces = set(self.table.byte_pieces)
            pieces = oracle.byte_runs(zip(tokens, (i in byte_pieces for i in ids), strict=True))
            text = b"".join(spelled for _, spelled in pieces).decode()
            text = text.removeprefix(" ") if self.edge == "prefix" else text
        else:
            text = lossy(first + rest, self.invalid)
        return text.removesuffix(" ") if self.edge == "suffix" else text


def of_tokenizer(tokenizer, source=None, **options):
    return Case(
        tokenizer if source is None else source,
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        lambda rows: tokenizer.decode_batch(rows, skip_special_tokens=False),
        codec=tokenizer,
        **options,
    )


def of_tiktoken(name, stops=()):
    encoding = real.encoding(name)
    return Case(
        real.path(name), encoding.encode_ordinary, lambda rows: list(map(encoding.decode, rows)), stops, codec=encoding
    )


def of_sentencepiece(source, stops, model=None, **options):
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor(
        **({"model_proto": model} if model else {"model_file": str(source)})
    )
    space = processor.piece_to_id("<0x20>")  # a byte is no prefix space; 0, the unknown piece, where there is none
    return Case(
        source or processor,
        processor.encode,
        processor.decode,
        stops,
        "each",
        "prefix",
        at_start={space: b" "},
        codec=processor,
        **options,
    )


def tekken(name="tekken"):
    package = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    core = package.Tekkenizer.from_file(real.path(name))
    return Case(
        real.path(name),
        lambda text: core.encode(text, bos=False, eos=False),
        lambda rows: [core.decode(row) for row in rows],
        (2,),
        codec=core,
    )


def smollm2():
    """The table of the GGUF file against the tokenizer that transformers makes of it."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    path = real.path("smollm2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    case = of_tokenizer(tokenizer.backend_tokenizer, path, stops=(2, 0))
    case.codec = tokenizer
    return case


def trained(model, trainer, pre_tokenizer, decoder, normalizer=None, texts=TEXTS):
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, pre_tokenizer, decoder
    tokenizer.train_from_iterator(texts * 3, trainer)
    return tokenizer


def byte_level():
    tokenizer = trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<|endoftext|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.add_tokens(["<think>", "<tool call>", "知识蒸馏"])
    return of_tokenizer(tokenizer, stops=(1, 0))


BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


def llama(decoder, edge):
    """Byte fallback as converters write it: `<0xNN>` pieces in the vocabulary, spaces as `▁`."""
    tokenizer = trained(
        models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"),
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<unk>", "<s>", "</s>", *BYTE_PIECES],
            show_progress=False,
        ),
        None,
        decoder,
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        texts=[CORPUS[kind] for kind in ("prose", "code", "digits", "whitespace", "korean")],
    )
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]  # the byte pieces are ordinary pieces
    return of_tokenizer(
        Tokenizer.from_str(json.dumps(spec)),
        stops=(2,),
        invalid="run",
        edge=edge,
        at_start={spec["model"]["vocab"]["<0x20>"]: b" "} if edge == "first" else {},
    )


def word_piece(cleanup):
    tokenizer = trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece("##", cleanup),
        normalizers.BertNormalizer(),
    )
    tokenizer.add_tokens(["<think>"])
    # The decoder takes `##` away where something stands before it.
    inner = {i: token.encode() for token, i in tokenizer.get_vocab().items() if token.startswith("##")}
    return of_tokenizer(tokenizer, stops=(2,), edge="prefix", exact=False, at_start=inner)


def unigram():
    tokenizer = trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=500, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
        ),
        pre_tokenizers.Metaspace(),
        decoders.Metaspace(),
    )
    return of_tokenizer(tokenizer, stops=(1,), edge="first", exact=False)


def suffix():
    tokenizer = trained(
        models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"),
        trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False),
        pre_tokenizers.WhitespaceSplit(),
        decoders.BPEDecoder("</w>"),
    )
    return of_tokenizer(tokenizer, stops=(), edge="suffix", exact=False)


@cache
def sentencepiece_model(kind, **options):
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    model = io.BytesIO()
    trainer.train(
        sentence_iterator=iter([line for text in TEXTS * 3 for line in text.replace("\0", "").splitlines()]),
        model_writer=model,
        model_type=kind,
        vocab_size=700,
        hard_vocab_limit=False,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<think>", "<end_of_turn>", "▁▁"],
        control_symbols=["<ctrl>"],
        **options,
    )
    return model.getvalue()


def byte_fallback_model():
    return sentencepiece_model("bpe", byte_fallback=True, character_coverage=0.98)


CASES = {
    "deepseek": lambda: of_tokenizer(
        Tokenizer.from_file(str(real.path("deepseek"))), real.path("deepseek"), stops=(1,)
    ),
    "deepseek-litellm": lambda: of_tokenizer(
        Tokenizer.from_file(str(real.path("deepseek-litellm"))), real.path("deepseek-litellm"), stops=(1,)
    ),
    "anthropic": lambda: of_tokenizer(
        Tokenizer.from_file(str(real.path("anthropic"))), real.path("anthropic"), stops=(0,), exact=False
    ),
    "mistral-v1": lambda: of_sentencepiece(real.path("mistral-v1"), (2,)),
    "mistral-v3": lambda: of_sentencepiece(real.path("mistral-v3"), (2,)),
    "tekken": tekken,
    "tekken-240718": lambda: tekken("tekken-240718"),
    "qwen": lambda: of_tiktoken("qwen"),
    "qwen3.6": lambda: of_tiktoken("qwen3.6"),
    "cl100k": lambda: of_tiktoken("cl100k"),
    "o200k": lambda: of_tiktoken("o200k"),
    "smollm2": smollm2,
    "byte-level": byte_level,
    "llama": lambda: llama(
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
        edge="prefix",
    ),
    "metaspace-bytes": lambda: llama(
        decoders.Sequence([decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback(), decoders.Fuse()]),
        edge="first",
    ),
    "wordpiece": lambda: word_piece(cleanup=True),
    "wordpiece-verbatim": lambda: word_piece(cleanup=False),
    "unigram": unigram,
    "bpe-suffix": suffix,
    "sentencepiece-bpe": lambda: of_sentencepiece(None, (2, 5), byte_fallback_model()),
    "sentencepiece-unigram": lambda: of_sentencepiece(None, (2, 5), sentencepiece_model("unigram"), exact=False),
}
#: Vocabularies without some of the characters of the markers.
LACKING = ("wordpiece", "wordpiece-verbatim", "unigram", "bpe-suffix", "sentencepiece-unigram")
_made = cache(lambda name: CASES[name]())


@pytest.fixture(params=CASES)
def case(request):
    return _made(request.param)


def rows_of(table):
    return [table[i] for i in range(len(table))], table.stop_ids, table.invalid


# ---- bytes against the tokenizer's own decoder -------------------------------------------------------------------


def test_every_id_spells_what_the_decoder_spells(case):
    """Each id between two tokens `x`, so that neither edge of the text is its own."""
    x = case.encode("x")[-1]
    assert case.table[x].strip() == b"x"
    ids = np.flatnonzero(~case.table.is_special).tolist()
    got = case.decode([[x, i, x] for i in ids])
    wrong = [(i, case.table[i], text) for i, text in zip(ids, got, strict=True) if case.spell([x, i, x]) != text]
    assert not wrong, (len(wrong), wrong[:10])


def test_every_id_alone(case):
    """At position 0 and at the end of the text at once."""
    ids = np.flatnonzero(~case.table.is_special).tolist()
    got = case.decode([[i] for i in ids])
    wrong = [(i, case.table[i], text) for i, text in zip(ids, got, strict=True) if case.spell([i]) != text]
    assert not wrong, (len(wrong), wrong[:10])


def test_random_ids(case):
    """No tokenizer would make these rows: characters are cut, bytes are not UTF-8, markers stand anywhere."""
    rng = random.Random(11)
    ids = np.flatnonzero(~case.table.is_special).tolist()
    short = [i for i in ids if case.table.lengths[i] == 1]  # most of what is not UTF-8 is there
    rows = [[rng.choice(rng.choice((ids, short))) for _ in range(rng.randrange(1, 40))] for _ in range(200)]
    wrong = [(row, text) for row, text in zip(rows, case.decode(rows), strict=True) if case.spell(row) != text]
    assert not wrong, (len(wrong), min(wrong, key=lambda pair: len(pair[0])))


@pytest.mark.parametrize("name", ["llama", "metaspace-bytes", "byte-level", "mistral-v3"])
def test_retokenize_gives_the_teacher_what_the_students_decoder_spells(name):
    """Rows of random ids, most of them single bytes."""
    case, teacher = _made(name), _made("byte-level")
    rng = random.Random(5)
    ids = np.flatnonzero(~case.table.is_special).tolist()
    short = [i for i in ids if case.table.lengths[i] == 1]
    rows = [[rng.choice(rng.choice((ids, short, short))) for _ in range(rng.randrange(1, 30))] for _ in range(200)]
    rows = [[short[0], *row] for row in rows]
    teacher_ids, batch = xtokmap.Aligner(case.source, teacher.source).retokenize(rows)
    for text, row, retokenized in zip(case.decode(rows), rows, teacher_ids, strict=True):
        assert teacher.table.decode(retokenized.tolist()).decode() == text, row
    assert batch.coverage == 1


@pytest.mark.parametrize("kind", CORPUS)
def test_text(case, kind):
    text = CORPUS[kind]
    ids = case.encode(text)
    specials = [i for i in ids if case.table.is_special[i]]
    if specials:  # a marker in the text, or a character that the vocabulary lacks
        assert kind == "markers" or not case.exact
        ids = [i for i in ids if i not in specials]
    assert case.spell(ids) == case.decode([ids])[0]
    if case.exact and not specials:
        prefix = b" " if case.edge in ("prefix", "first") else b""
        assert case.table.decode(ids) == prefix + text.encode()


def test_specials_have_no_bytes(case):
    assert case.table.stop_ids == case.stops
    assert case.table.invalid == case.invalid
    assert all(case.table[i] is None for i in case.stops)
    assert len(case.table) == len(case.table.lengths) == len(case.table.is_special)
    assert not case.table.lengths[case.table.is_special].any()


@pytest.mark.parametrize("name", ["deepseek", "smollm2"])
def test_byte_level_tokens_by_the_gpt2_table(name):
    """Every token of a byte-level vocabulary through GPT-2's table, written as its authors do."""
    case = _made(name)
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    chars, new = list(shown), 0
    for byte in range(256):
        if byte not in shown:
            shown.append(byte)
            chars.append(256 + new)
            new += 1
    byte_of = dict(zip(map(chr, chars), shown, strict=True))
    tokenizer = getattr(case.codec, "backend_tokenizer", case.codec)
    added = tokenizer.get_added_tokens_decoder()
    for token, i in tokenizer.get_vocab().items():
        if i not in added:
            assert case.table[i] == bytes(byte_of[char] for char in token)


@pytest.mark.parametrize("name", ["qwen", "qwen3.6", "cl100k", "o200k"])
def test_tiktoken_bytes(name):
    ranks = {rank: token for token, rank in real.ranks(name).items()}
    table = _made(name).table
    assert [table[i] for i in range(len(table))] == [ranks.get(i) for i in range(max(ranks) + 1)]


@pytest.mark.parametrize("name", ["mistral-v3", "llama", "metaspace-bytes", "sentencepiece-bpe"])
def test_byte_pieces_spell_characters(name):
    """Every byte that can be part of UTF-8, inside a character, by the decoder's own joining of byte pieces."""
    case = _made(name)
    ids = {case.table[i]: i for i in range(len(case.table)) if case.table.lengths[i] == 1}
    for code in [*range(0x80), *range(0x80, 0x800, 7), *range(0x800, 0x11000, 511), *range(0x11000, 0x110000, 4099)]:
        if not 0xD800 <= code < 0xE000:
            pieces = [ids[bytes([byte])] for byte in chr(code).encode()]
            assert case.decode([[ids[b"x"], *pieces]]) == [case.spell([ids[b"x"], *pieces])] == [f"x{chr(code)}"]


# ---- the same vocabulary, by every way in ------------------------------------------------------------------------


def test_tokenizer_objects_and_files_agree(tmp_path):
    transformers = pytest.importorskip("transformers")
    for name in ("byte-level", "llama", "wordpiece", "unigram", "bpe-suffix"):
        tokenizer = _made(name).source
        expected = rows_of(_made(name).table)
        file = tmp_path / "tokenizer.json"
        tokenizer.save(str(file))
        assert rows_of(byte_table(file)) == rows_of(byte_table(str(file))) == rows_of(byte_table(tmp_path)) == expected
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        assert rows_of(byte_table(fast)) == expected
    table = _made("llama").table
    assert byte_table(table) is table


def test_roles_of_a_transformers_tokenizer(tmp_path):
    """Its own end of text comes first, and every role is special, also for a token that was ordinary."""
    transformers = pytest.importorskip("transformers")
    tokenizer = copy.deepcopy(_made("byte-level").source)
    think, im_end, end = (tokenizer.token_to_id(token) for token in ("<think>", "<|im_end|>", "<|endoftext|>"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    assert byte_table(fast).stop_ids == (end, im_end)
    assert byte_table(fast)[think] == b"<think>"
    fast.pad_token = "<think>"
    assert byte_table(fast)[think] is None
    fast.save_pretrained(tmp_path)
    assert rows_of(byte_table(tmp_path)) == rows_of(byte_table(fast))


def test_mistral_common_objects():
    mistral = pytest.importorskip("mistral_common.tokens.tokenizers.mistral")
    for name in ("mistral-v3", "tekken"):
        tokenizer = mistral.MistralTokenizer.from_file(str(real.path(name)))
        inner = tokenizer.instruct_tokenizer
        expected = rows_of(_made(name).table)
        assert rows_of(byte_table(tokenizer)) == rows_of(byte_table(inner)) == rows_of(byte_table(inner.tokenizer))
        assert rows_of(byte_table(tokenizer)) == expected
        assert split(text_codec(tokenizer).encode_batch(TEXTS)) == [_made(name).encode(text) for text in TEXTS]


@pytest.mark.parametrize("name", [name for name in CASES if name in real.FILES])
def test_real_files_and_objects_agree(name):
    """The object that loads a file gives the file's bytes; a bare rank file has no special tokens, its encoding has."""
    case = _made(name)
    thing = case.codec or case.source
    got, file = byte_table(thing), case.table
    assert got.invalid == file.invalid
    assert [got[i] for i in range(len(file))] == [file[i] for i in range(len(file))]
    if name in real.ENCODINGS:
        specials = real.ENCODINGS[name][1]
        assert np.flatnonzero(got.is_special).tolist() == list(range(len(file), max(specials.values()) + 1))
        assert set(got.stop_ids) == {specials[token] for token in ("<|im_end|>", "<|endoftext|>") if token in specials}
    else:
        assert (len(got), got.stop_ids) == (len(file), file.stop_ids)


def test_mistral_common_inside_transformers():
    backend = pytest.importorskip("transformers.tokenization_mistral_common")
    pytest.importorskip("mistral_common")
    tokenizer = backend.MistralCommonBackend(str(real.path("tekken")))
    assert rows_of(byte_table(tokenizer)) == rows_of(_made("tekken").table)
    assert split(text_codec(tokenizer).encode_batch(TEXTS)) == [_made("tekken").encode(text) for text in TEXTS]


def test_tiktoken_encoding_has_specials_that_its_file_lacks():
    table, file = byte_table(real.encoding("cl100k")), _made("cl100k").table
    assert [table[i] for i in range(len(file))] == [file[i] for i in range(len(file))]
    assert table.stop_ids == (100257,)
    assert np.flatnonzero(table.is_special).tolist() == list(range(100256, 100277))  # 100256 is a hole
    assert byte_table(real.encoding("qwen")).stop_ids == (151645, 151643)


def test_tiktoken_files(tmp_path):
    rows = [b"a", b" b", b"\xff\x00", "é".encode()]
    data = b"".join(base64.b64encode(row) + b" %d\n" % i for i, row in enumerate(rows))
    (tmp_path / "x.tiktoken").write_bytes(data)
    (tmp_path / "x.tiktoken.gz").write_bytes(gzip.compress(data))
    (tmp_path / "tokenizer.model").write_bytes(data)  # as Llama 3 names its ranks
    for name in ("x.tiktoken", "x.tiktoken.gz", "tokenizer.model"):
        assert rows_of(byte_table(tmp_path / name)) == (rows, (), "maximal")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_files_and_processors(tmp_path, kind):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = byte_fallback_model() if kind == "bpe" else sentencepiece_model("unigram")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    table = byte_table(processor)
    for name in ("tokenizer.model", "spiece.model", "x.model.v7m1"):
        (tmp_path / name).write_bytes(model)
        assert rows_of(byte_table(tmp_path / name)) == rows_of(table)
    piece = processor.piece_to_id
    assert table.stop_ids == (piece("</s>"), piece("<end_of_turn>"))  # the second is user-defined, as in Gemma
    assert table[piece("<think>")] == b"<think>"
    assert table[piece("▁▁")] == b"  "
    for i in range(len(table)):
        hidden = processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i) or i in table.stop_ids
        assert (table[i] is None) == hidden


def test_sentencepiece_names_its_end_of_text():
    model = sentencepiece_model("bpe", eos_piece="<fin>")
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=model)
    assert byte_table(processor).stop_ids[0] == processor.eos_id() == processor.piece_to_id("<fin>")


def test_sentencepiece_pieces_need_no_package(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(byte_fallback_model())
    expected = rows_of(_made("sentencepiece-bpe").table)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert rows_of(byte_table(tmp_path / "tokenizer.model")) == expected
    with pytest.raises(UnsupportedTokenizerError, match="pip install sentencepiece"):
        text_codec(tmp_path / "tokenizer.model")


def test_slow_sentencepiece_tokenizer(tmp_path):
    """By the model inside it if the ids are the model's, and not if a class shifts them."""
    slow = pytest.importorskip("transformers.tokenization_utils_sentencepiece")
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(byte_fallback_model())
    tokenizer = slow.SentencePieceBackend(
        vocab_file=str(tmp_path / "tokenizer.model"), eos_token="</s>", unk_token="<unk>", bos_token="<s>"
    )
    tokenizer.add_tokens(["<tool_call>", AddedToken("<|im_end|>", special=True), "▁▁"])  # the last is a piece already
    table, own = byte_table(tokenizer), _made("sentencepiece-bpe").table
    tool, end = tokenizer.convert_tokens_to_ids(["<tool_call>", "<|im_end|>"])
    assert {tool, end} == {len(own), len(own) + 1}
    assert table[tool] == b"<tool_call>"
    assert table.stop_ids == (2, end, *own.stop_ids[1:])
    assert [table[i] for i in range(len(own))] == [own[i] for i in range(len(own))]
    text = "a </s> <tool_call> <|im_end|>"
    ids, _ = text_codec(tokenizer).encode_batch([text])
    assert table.decode(ids.tolist()).strip() == text.encode()

    other = slow.SentencePieceBackend(vocab_file=tokenizer.vocab_file, eos_token="<ctrl>", unk_token="<unk>")
    assert byte_table(other).stop_ids == (tokenizer.sp_model.piece_to_id("<ctrl>"), *own.stop_ids)

    class Shifted(slow.SentencePieceBackend):
        def _convert_id_to_token(self, index):
            return super()._convert_id_to_token(max(index - 1, 0))

    with pytest.raises(UnsupportedTokenizerError, match=r"Shifted is a slow tokenizer: .*fast version"):
        byte_table(Shifted(vocab_file=str(tmp_path / "tokenizer.model"), eos_token="</s>", unk_token="<unk>"))


# ---- GGUF --------------------------------------------------------------------------------------------------------


def write_gguf(path, kind, pieces, token_types, endianess=None, **ids):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian[endianess or "LITTLE"])
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_tokenizer_model(kind)
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * len(pieces))
    if token_types:
        writer.add_token_types(token_types)
    for name, i in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", i)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


PIECES = ["<unk>", "<s>", "</s>", "<0xE2>", "▁the", "▁▁", "<end_of_turn>", "<think>", "[PAD8]", "</w>", "Ġé"]
TYPES = [2, 3, 3, 6, 1, 4, 3, 4, 5, 1, 1]


@pytest.mark.parametrize("endianess", ["LITTLE", "BIG"])
def test_gguf(tmp_path, endianess):
    llama = write_gguf(tmp_path / "llama.gguf", "llama", PIECES, TYPES, endianess, eos=2, eot=6)
    rows = [None, None, None, b"\xe2", b" the", b"  ", None, b"<think>", None, b"</w>", "Ġé".encode()]
    assert rows_of(byte_table(llama)) == (rows, (2, 6), "each")
    types_ = [1 if t == 6 else t for t in TYPES]
    gpt2 = write_gguf(tmp_path / "gpt2.gguf", "gpt2", PIECES, types_, endianess, eos=6)
    rows[3:6], rows[10] = [b"<0xE2>", "▁the".encode(), "▁▁".encode()], b" \xe9"
    assert rows_of(byte_table(gpt2)) == (rows, (6, 2), "maximal")


def test_user_defined_turn_markers_are_special_and_html_is_not(tmp_path):
    """Gemma's pieces: <end_of_turn> is user-defined, and so is </s>, which is HTML there."""
    path = write_gguf(tmp_path / "gemma.gguf", "llama", ["<eos>", "</s>", "<end_of_turn>", "<b>"], [3, 4, 4, 4], eos=0)
    assert rows_of(byte_table(path)) == ([None, b"</s>", None, b"<b>"], (0, 2), "each")


def test_gguf_user_defined_tokens_are_text(tmp_path):
    """Also where their letters are in the byte alphabet; and a file beside can make one of them the end of a turn."""
    write_gguf(tmp_path / "x.gguf", "gpt2", ["Ġé", "Ġé!", "<|user|>"], [1, 4, 4])
    assert rows_of(byte_table(tmp_path)) == ([b" \xe9", "Ġé!".encode(), b"<|user|>"], (), "maximal")
    write(tmp_path, generation_config={"eos_token_id": 2})
    assert rows_of(byte_table(tmp_path)) == ([b" \xe9", "Ġé!".encode(), None], (2,), "maximal")


def test_gguf_refusals(tmp_path):
    with pytest.raises(UnsupportedTokenizerError, match=r"x.gguf: tokenizer.ggml.model 'rwkv'.*own tokenizer"):
        byte_table(write_gguf(tmp_path / "x.gguf", "rwkv", PIECES, TYPES))
    with pytest.raises(UnsupportedTokenizerError, match=r"not a readable GGUF file with a tokenizer .*token_type"):
        byte_table(write_gguf(tmp_path / "y.gguf", "llama", PIECES, None))
    with pytest.raises(UnsupportedTokenizerError, match=r"a bare vocabulary cannot encode.*gguf_file="):
        text_codec(write_gguf(tmp_path / "z.gguf", "llama", PIECES, TYPES))


def test_gemma_gguf(tmp_path):
    table = byte_table(real.gemma_header(tmp_path))
    assert len(table) == 262144
    assert table.stop_ids == (1, 106)
    assert table.invalid == "each"
    assert {table[i] for i in range(238, 494)} == {bytes([byte]) for byte in range(256)}
    assert (table[212], table[138], table[107], table[2]) == (b"</s>", b"  ", b"\n", None)


@pytest.mark.slow
def test_gemma_gguf_against_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = real.gemma_model(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name).backend_tokenizer
    case = of_tokenizer(tokenizer, path, stops=(1, 106), invalid="each")
    test_every_id_spells_what_the_decoder_spells(case)
    for kind in CORPUS:
        test_text(case, kind)
    rows, stops, invalid = rows_of(byte_table(tokenizer))
    assert (rows, set(stops), invalid) == (rows_of(case.table)[0], {1, 106}, "run")


# ---- directories -------------------------------------------------------------------------------------------------


def write(directory, **files):
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def test_directory_declares_stops_and_added_tokens(tmp_path):
    case = _made("sentencepiece-bpe")
    own, n, two = case.table, len(case.table), case.source.piece_to_id("▁▁")
    (tmp_path / "tokenizer.model").write_bytes(byte_fallback_model())
    write(
        tmp_path,
        tokenizer_config={
            "tokenizer_class": "LlamaTokenizer",
            "eos_token": {"content": "<|done|>"},
            "add_bos_token": True,
            "added_tokens_decoder": {
                str(n): {"content": "<|done|>", "special": True},
                str(n + 2): {"content": "<tool_call>", "special": False},
                str(n + 3): {"content": "<|im_end|>", "special": True},
                str(n + 4): {"content": "<|observation|>", "special": False},
                str(two): {"content": "▁▁", "special": False},
            },
        },
        generation_config={"eos_token_id": [2, n + 4, 10**6, 300]},
        config={"eos_token_id": 2},
    )
    table = byte_table(tmp_path)
    assert [table[i] for i in range(n, n + 5)] == [None, None, b"<tool_call>", None, None]
    assert table[two] == b"  "
    assert table.stop_ids == (n, 2, n + 4, n + 3, own.stop_ids[1])  # 300 is an ordinary piece: not this vocabulary's
    with pytest.raises(UnsupportedTokenizerError, match=r"cannot encode the added tokens.*AutoTokenizer"):
        text_codec(tmp_path)


def test_saved_model_directory_orders_its_stops(tmp_path):
    """The tokenizer's eos, then generation_config's list in its order, then the names that are left."""
    transformers = pytest.importorskip("transformers")
    tokenizer = copy.deepcopy(_made("byte-level").source)
    tokenizer.add_special_tokens(["<|eot_id|>", "</s>", "<pad>"])
    im_end, end, eot, s, think = map(
        tokenizer.token_to_id, ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>", "<think>")
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(tmp_path)
    assert byte_table(tmp_path).stop_ids == (s, im_end, eot, end)
    transformers.GenerationConfig(eos_token_id=[end, s, eot, think]).save_pretrained(tmp_path)
    table = byte_table(tmp_path)
    assert table.stop_ids == (s, end, eot, think, im_end)
    assert table[think] is None


def test_directory_with_old_added_tokens_file(tmp_path):
    n = len(_made("sentencepiece-bpe").table)
    (tmp_path / "tokenizer.model").write_bytes(byte_fallback_model())
    write(
        tmp_path,
        added_tokens={"<|im_end|>": n, "<tool_call>": n + 1},
        special_tokens_map={"additional_special_tokens": ["<|im_end|>"], "eos_token": "</s>"},
    )
    table = byte_table(tmp_path)
    assert (table[n], table[n + 1], table.stop_ids[:2]) == (None, b"<tool_call>", (2, n))


def test_directory_prefers_tokenizer_json(tmp_path):
    _made("llama").source.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes(byte_fallback_model())
    assert rows_of(byte_table(tmp_path)) == rows_of(_made("llama").table)


def test_directory_refusals(tmp_path):
    with pytest.raises(UnsupportedTokenizerError, match=r"among its files \['vocab.json'\].*AutoTokenizer"):
        byte_table(write(tmp_path / "none", vocab={}))
    shifted = write(tmp_path / "shifted", tokenizer_config={"tokenizer_class": "XLMRobertaTokenizerFast"})
    (shifted / "sentencepiece.bpe.model").write_bytes(byte_fallback_model())
    with pytest.raises(UnsupportedTokenizerError, match=r"XLMRobertaTokenizerFast need not use the ids of .*\.model"):
        byte_table(shifted)
    two = write(tmp_path / "two")
    for name in ("source.model", "target.model"):
        (two / name).write_bytes(byte_fallback_model())
    with pytest.raises(UnsupportedTokenizerError, match=r"2 files match \*\.model \(source\.model, target\.model\)"):
        byte_table(two)
    with pytest.raises(FileNotFoundError, match=r"org/model: no such file.*AutoTokenizer"):
        byte_table("org/model")


# ---- rules of the parts ------------------------------------------------------------------------------------------


def of_decoder(decoder, vocab, model=models.BPE, **options):
    tokenizer = Tokenizer(model(vocab, [], **options) if model is models.BPE else model(vocab, **options))
    tokenizer.decoder = decoder
    return tokenizer


def test_added_tokens():
    """Special: none. Others: their own text; a decoder's alphabet or space mark has no say in it."""
    for decoder in (decoders.ByteLevel(), decoders.Replace("▁", " "), decoders.Metaspace()):
        tokenizer = of_decoder(decoder, {"a": 0, "▁▁": 1})
        tokenizer.add_tokens(["<think>", "naïve", "日本", "tool▁call", "▁▁"])
        tokenizer.add_special_tokens(["<|eot_id|>", "<pad>"])
        rows, stops, _ = rows_of(byte_table(tokenizer))
        two_spaces = b"  " if "ByteLevel" not in str(decoder) else "▁▁".encode()  # of the vocabulary: as decoded
        assert rows == [b"a", two_spaces, *(t.encode() for t in ("<think>", "naïve", "日本", "tool▁call")), None, None]
        assert stops == (6,)


def test_holes_and_unknown_tokens():
    tokenizer = of_decoder(decoders.ByteLevel(), {"a": 0, "b": 3, "<unk>": 5}, unk_token="<unk>")
    assert rows_of(byte_table(tokenizer))[0] == [b"a", None, None, b"b", None, None]
    unigram = of_decoder(
        decoders.Metaspace(), [("a", 0.0), ("▁b", 0.0), ("?", 0.0), ("a", 0.0)], models.Unigram, unk_id=2
    )
    assert rows_of(byte_table(unigram))[0] == [b"a", b" b", None, b"a"]


def test_a_stop_token_is_one_by_role_not_by_text():
    for name in STOP_TOKENS:
        tokenizer = of_decoder(decoders.ByteLevel(), {"a": 0})
        tokenizer.add_tokens([name])
        assert rows_of(byte_table(tokenizer))[:2] == ([b"a", name.encode()], ())
        tokenizer.add_special_tokens([name])
        assert rows_of(byte_table(tokenizer))[:2] == ([b"a", None], (1,))


def test_word_piece_spelling():
    vocab = {token: i for i, token in enumerate(["[UNK]", "play", "##ing", "##.", ".", "n't", "'s"])}
    for cleanup, dot, nt, s in ((True, b".", b"n't", b"'s"), (False, b" .", b" n't", b" 's")):
        tokenizer = of_decoder(decoders.WordPiece("##", cleanup), vocab, models.WordPiece, unk_token="[UNK]")
        tokenizer.add_tokens(["<think>"])
        assert rows_of(byte_table(tokenizer))[0] == [None, b" play", b"ing", b".", dot, nt, s, b" <think>"]


VOCAB = {"a": 0, "▁b": 1, "c</w>": 2}
REFUSED = {
    "ctc": (decoders.CTC(), r"decoder step CTC \{'pad_token': '<pad>'.*ByteTable.from_bytes"),
    "regex": (decoders.Replace(Regex("a+"), "b"), r"decoder step Replace \{'pattern': \{'Regex': 'a\+'\}"),
    "empty suffix": (decoders.BPEDecoder(""), r"decoder step BPEDecoder \{'suffix': ''\}"),
    "strip of tokens": (decoders.Strip(" ", 1, 0), r"decoder step Strip"),
    "strip of words": (decoders.Sequence([decoders.Fuse(), decoders.Strip("x", 1, 0)]), r"decoder step Strip"),
    "strip at the end": (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]), r"decoder step Strip"),
    "strip of two": (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)]), r"decoder step Strip"),
    "replace in text": (
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        r"decoder step Replace .*, after the tokens are joined",
    ),
    "metaspace in text": (
        decoders.Sequence([decoders.ByteFallback(), decoders.Sequence([decoders.Metaspace()])]),
        r"decoder step Metaspace .*, after the tokens are joined",
    ),
    "two byte steps": (
        decoders.Sequence([decoders.ByteLevel(), decoders.ByteFallback()]),
        r"decoder step ByteFallback",
    ),
    "none": (None, r"decoder: this tokenizer has none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_decoders_that_are_refused(name):
    decoder, message = REFUSED[name]
    tokenizer = of_decoder(decoder, VOCAB)
    with pytest.raises(UnsupportedTokenizerError, match=message):
        byte_table(tokenizer)


def test_affixes_that_no_decoder_takes_away(tmp_path):
    """CLIP's vocabulary: `</w>` stays in what the decoder spells, and a class of transformers removes it by hand."""
    tokenizer = of_decoder(decoders.ByteLevel(), VOCAB, end_of_word_suffix="</w>")
    with pytest.raises(
        UnsupportedTokenizerError, match=r"end_of_word_suffix '</w>' stays in the text, as decoder Byte"
    ):
        byte_table(tokenizer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("</w>", " "), decoders.ByteLevel()])
    assert byte_table(tokenizer)[2] == b"c "
    tokenizer = of_decoder(decoders.WordPiece("@@"), {"[UNK]": 0, "##a": 1}, models.WordPiece, unk_token="[UNK]")
    with pytest.raises(UnsupportedTokenizerError, match=r"continuing_subword_prefix '##' stays"):
        byte_table(tokenizer)


def test_a_class_with_its_own_decode_is_refused():
    transformers = pytest.importorskip("transformers")

    class Mine(transformers.PreTrainedTokenizerFast):
        def _decode(self, *args, **options):
            return super()._decode(*args, **options).upper()

    tokenizer = Mine(tokenizer_object=_made("byte-level").source)
    with pytest.raises(UnsupportedTokenizerError, match=r"Mine: its class has its own _decode\(\).*backend_tokenizer"):
        byte_table(tokenizer)
    assert len(byte_table(tokenizer.backend_tokenizer))


@pytest.mark.parametrize("attribute", ["tokenizer", "model"])
def test_slow_tokenizers_that_hold_an_encoding(attribute):
    """Qwen's and Kimi's own classes: a Python tokenizer around a tiktoken encoding."""
    python = pytest.importorskip("transformers.tokenization_python")
    tiktoken = pytest.importorskip("tiktoken")
    encoding = tiktoken.Encoding(
        "x", pat_str=r"\S+|\s+", mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={"<|x|>": 300}
    )

    class Qwen(python.PythonBackend):
        def __init__(self):
            setattr(self, attribute, encoding)
            super().__init__()

        vocab_size = 301

        def get_vocab(self):
            return {}

    assert rows_of(byte_table(Qwen())) == rows_of(byte_table(encoding))
    assert byte_table(encoding)[256] is byte_table(encoding)[300] is None
    assert text_codec(Qwen()).encode_batch(["<|x|>"])[0].tolist() == list(b"<|x|>")
    assert EncodingRule(Qwen(), byte_table(encoding)).name == "bpe"


def test_a_kind_is_one_file_and_one_line(tmp_path, monkeypatch):
    """Morse: what a stranger writes, and what knows it then."""

    class Morse:
        letters = "ET A"

    def letters(source):
        return source.path.read_text() if isinstance(source, parse.File) else source.letters

    kind = base.Kind(
        lambda source: base.Vocabulary({i: letter.encode() for i, letter in enumerate(letters(source))}, {}),
        lambda source: base.Rule("bpe", {"ranks": np.arange(len(letters(source)), dtype=np.uint32)}),
        lambda source, directory: base.Lists(lambda texts: [[letters(source).index(c) for c in t] for t in texts]),
        packages=frozenset({__name__}),
        name=r".*\.morse",
        in_directory=("*.morse",),
    )
    path = tmp_path / "x.morse"
    path.write_text("ET A")
    with pytest.raises(UnsupportedTokenizerError, match=r"unknown kind of file; known are .*\*\.gguf and directories"):
        byte_table(path)
    monkeypatch.setattr(kinds, "KINDS", (*kinds.KINDS, kind))
    for source in (Morse(), path, tmp_path):
        table = byte_table(source)
        assert rows_of(table)[0] == [b"E", b"T", b" ", b"A"]
        assert text_codec(source).encode_batch(["TEA"])[0].tolist() == [1, 0, 3]
        assert EncodingRule(source, table).name == "bpe"


def test_unknown_things(tmp_path):
    with pytest.raises(UnsupportedTokenizerError, match=r"dict \(from builtins\): no reader"):
        byte_table({})
    slow = type("ByT5Tokenizer", (), {"__module__": "transformers.models.byt5"})
    with pytest.raises(UnsupportedTokenizerError, match="ByT5Tokenizer is a slow tokenizer"):
        byte_table(slow())
    other = type("Odd", (), {"__module__": "mistral_common.odd"})
    with pytest.raises(UnsupportedTokenizerError, match="mistral-common Odd: only"):
        byte_table(other())
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(UnsupportedTokenizerError, match=r"vocab.txt: unknown kind of file"):
        byte_table(tmp_path / "vocab.txt")
    with pytest.raises(UnsupportedTokenizerError, match=r"other.json: neither a tokenizer.json .* nor a tekken.json"):
        byte_table(write(tmp_path, other={"vocab": {}}) / "other.json")
    same_id = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 0}},
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [],
    }
    with pytest.raises(UnsupportedTokenizerError, match=r"1 ids of the vocabulary belong to more than one token"):
        byte_table(write(tmp_path, same=same_id) / "same.json")


def test_denormalizer_is_refused(tmp_path):
    spec = b"\x12\x03map"  # field 2, precompiled_charsmap
    (tmp_path / "x.model").write_bytes(byte_fallback_model() + b"\x2a" + bytes([len(spec)]) + spec)
    with pytest.raises(UnsupportedTokenizerError, match=r"x.model: denormalizer: "):
        byte_table(tmp_path / "x.model")


LEVEL = {"type": "ByteLevel"}
HOSTILE = {
    "huge.tiktoken": b"YQ== 99999999999\n",
    "twice.tiktoken": b"YQ== 0\nYg== 0\n",
    "negative.tiktoken": b"YQ== -1\nYg== 0\n",
    "negative.json": {"model": {"vocab": {"a": -1, "b": 0}}, "decoder": LEVEL},
    "text.json": {"model": {"vocab": {"a": "0"}}, "decoder": LEVEL},
    "float.json": {"model": {"vocab": {"a": 1.5}}, "decoder": LEVEL},
    "huge.json": {"model": {"vocab": {"a": 10**12}}, "decoder": LEVEL},
    "added.json": {
        "model": {"vocab": {}},
        "decoder": LEVEL,
        "added_tokens": [{"id": 0, "content": 1, "special": False}],
    },
    "surrogate.json": {"model": {"vocab": {"\ud800": 0}}, "decoder": LEVEL},
    "deep.json": b"[" * 100_000,
    "list.json": [],
    "bool.json": {"model": {"vocab": {"a": 0, "b": True}}, "decoder": LEVEL},
    "half.json": {"model": {"vocab": {"a": 0, "b": 0.5, "c": 1}}, "decoder": LEVEL},
    "unk.json": {"model": {"vocab": {"a": 0}, "unk_token": 0}, "decoder": LEVEL},
    "unk-id.json": {"model": {"vocab": [["a", 0.0], ["b", 0.0]], "unk_id": 1.0}, "decoder": LEVEL},
    "vocab.json": {"model": {"vocab": "ab"}, "decoder": LEVEL},
    "2**40.json": {"model": {"vocab": {"a": 0, "b": 2**40}}, "decoder": LEVEL},
    "steps.json": {"model": {"vocab": {"a": 0}}, "decoder": {"type": "Sequence", "decoders": {}}},
    "metaspace.json": {"model": {"vocab": {"a": 0}}, "decoder": {"type": "Metaspace", "replacement": ""}},
    **{
        f"added-{name}.json": {
            "model": {"vocab": {"a": 0, "b": 1}},
            "decoder": LEVEL,
            "added_tokens": [{"id": i, "content": content, "special": special} for i, content, special in added],
        }
        for name, added in {
            "huge": [(2**40, "<x>", True)],
            "negative": [(-1, "<x>", True)],
            "twice": [(2, "<x>", False), (2, "<y>", False)],
            "moved": [(0, "b", True)],
            "taken": [(1, "<x>", False)],
            "late": [(3, "<x>", False)],
            "float": [(2.0, "<x>", True)],
            "empty": [(2, "", False)],
            "text": [(2, "<x>", "no")],
        }.items()
    },
    "tekken.json": {"config": {"default_num_special_tokens": 10**12, "default_vocab_size": 10**12}, "vocab": []},
    **{
        f"tekken-{name}.json": {
            "config": {"default_num_special_tokens": 3, "default_vocab_size": 5, **config},
            "special_tokens": special,
            "vocab": [{"rank": rank, "token_bytes": token} for rank, token in vocab],
        }
        for name, (config, special, vocab) in {
            "short": ({}, [], [(0, "YQ==")]),
            "twice": ({}, [], [(0, "YQ=="), (0, "Yg==")]),
            "negative": ({}, [], [(-1, "YQ=="), (0, "Yg==")]),
            "huge": ({}, [], [(0, "YQ=="), (2**40, "Yg==")]),
            "base64": ({}, [], [(0, "YQ=="), (1, "Y!g=")]),
            "number": ({}, [], [(0, "YQ=="), (1, 5)]),
            "text": ({}, [], [(0, "YQ=="), ("1", "Yg==")]),
            "float": ({"default_num_special_tokens": 3.0}, [], [(0, "YQ=="), (1, "Yg==")]),
            "special": ({}, [{"rank": 3, "token_str": "</s>"}], [(0, "YQ=="), (1, "Yg==")]),
            "specials": ({}, [{"rank": 1, "token_str": t} for t in "ab"], [(0, "YQ=="), (1, "Yg==")]),
            "name": ({}, [{"rank": 1, "token_str": 7}], [(0, "YQ=="), (1, "Yg==")]),
            "few": ({"default_num_special_tokens": 2}, [], [(i, "YQ==") for i in range(3)]),
        }.items()
    },
    "base64.tiktoken": b"YQ== 0\nY!g= 1\n",
    "float.tiktoken": b"YQ== 0\nYg== 1.0\n",
    "2**40.tiktoken": b"YQ== 0\nYg== %d\n" % 2**40,
    "columns.tiktoken": b"YQ== 0 1\n",
    "plain.tiktoken.gz": b"YQ== 0\n",
    "short.tiktoken.gz": gzip.compress(b"YQ== 0\n")[:-4],
    "byte.model": b"\x0a\x07\x0a\x03abc\x18\x06",
    "type.model": b"\x0a\x05\x0a\x01a\x18\x09",
    "array.gguf": b"GGUF\x03\0\0\0"
    + bytes(8)
    + b"\x01"
    + bytes(7)
    + b"\x01"
    + bytes(7)
    + b"k\x09"
    + bytes(7)
    + b"\xff" * 8,
    "old.gguf": b"GGUF\x01\0\0\0" + bytes(16),
    "varint.model": b"\xff" * 100,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name(tmp_path, name):
    content = HOSTILE[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    tracemalloc.start()
    try:
        with pytest.raises(UnsupportedTokenizerError, match=re.escape(f"{path}: ")):
            byte_table(path)
        assert tracemalloc.get_traced_memory()[1] < 100e6  # no row for each id below a huge one
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens", {"<x>": 1.0}),
        ("added_tokens", {"<x>": -1}),
        ("added_tokens", {"<x>": 2**40}),
        ("added_tokens", {"<x>": 700, "<y>": 700}),
        ("added_tokens", []),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "<x>"}}}),
        ("tokenizer_config", {"added_tokens_decoder": {"700": {"content": 7, "special": True}}}),
        ("tokenizer_config", {"added_tokens_decoder": {"700": "<x>"}}),
        ("tokenizer_config", {"additional_special_tokens": 7}),
        ("special_tokens_map", {"eos_token": []}),
        ("generation_config", {"eos_token_id": "2"}),
        ("generation_config", {"eos_token_id": [2, [2]]}),
        ("generation_config", {"eos_token_id": True}),
        ("config", {"eos_token_id": 2.0}),
        ("config", None),
    ],
)
def test_hostile_files_beside_are_refused_by_name(tmp_path, file, content):
    (tmp_path / "tokenizer.model").write_bytes(byte_fallback_model())
    write(tmp_path, **{file: content})
    with pytest.raises(UnsupportedTokenizerError, match=re.escape(str(tmp_path))):
        byte_table(tmp_path)


def test_added_ids_are_those_that_tokenizers_gives(tmp_path):
    """It passes over the ids of the file; where they differ, nobody can say which ones a model was trained with."""
    for added in ([(2, "<x>"), (3, "<y>")], [(1, "b"), (2, "<x>")], [(3, "<y>"), (2, "<x>")], [(2, "<x>"), (4, "<y>")]):
        spec = json.loads(of_decoder(decoders.ByteLevel(), {"a": 0, "b": 1}).to_str())
        options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        spec["added_tokens"] = [{"id": i, "content": content, **options} for i, content in added]
        path = write(tmp_path, tokenizer=spec) / "tokenizer.json"
        given = Tokenizer.from_file(str(path))
        if all(given.token_to_id(content) == i for i, content in added):
            assert rows_of(byte_table(path)) == rows_of(byte_table(given))
        else:
            with pytest.raises(UnsupportedTokenizerError, match=r"added token '<.>' is listed as id ., but tokenizers"):
                byte_table(path)


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b", "no/such/file.gguf"])
def test_names_of_nothing(name):
    for reader in (byte_table, text_codec):
        with pytest.raises(FileNotFoundError, match="no such file or directory"):
            reader(name)


@pytest.mark.parametrize(
    ("file", "content", "package"),
    [
        ("tokenizer.json", b"{}", "tokenizers"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "tokenizers"),
        ("tokenizer.json", b'{"model"', "tokenizers"),
        ("tekken.json", b'{"config": {}, "vocab": []}', "mistral_common"),
        ("tekken.json", json.dumps(HOSTILE["tekken-short.json"]).encode(), "mistral_common"),
        ("x.model", b"", "sentencepiece"),
        ("x.model", b"\xff" * 100, "sentencepiece"),
    ],
)
def test_codecs_of_damaged_files(tmp_path, file, content, package):
    """Each package has its own way to fail: a bare Exception, a RuntimeError, an AssertionError."""
    pytest.importorskip(package)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UnsupportedTokenizerError, match=re.escape(f"{tmp_path / file}: ")):
        text_codec(tmp_path / file)


class PythonPart:
    def pre_tokenize(self, pretokenized):
        pass

    def decode_chain(self, tokens):
        return tokens


def test_parts_in_python_are_refused_where_they_matter():
    tokenizer = of_decoder(decoders.ByteLevel(), {"a": 0})
    tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(PythonPart())
    assert byte_table(tokenizer)[0] == b"a"
    with pytest.raises(UnsupportedTokenizerError, match=r"tokenizer: Custom PreTokenizer .*set a built-in one"):
        text_codec(tokenizer)
    tokenizer.decoder = decoders.Decoder.custom(PythonPart())
    with pytest.raises(UnsupportedTokenizerError, match=r"decoder: .*set a built-in one"):
        byte_table(tokenizer)


def damaged(data, rng, cuts):
    yield b""
    for _ in range(cuts):
        yield data[: rng.randrange(len(data))]
        at = rng.randrange(len(data))
        yield data[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9))) + data[at + 1 :]


def test_damaged_files_are_refused_by_name(tmp_path):
    rng = random.Random(5)
    tiktoken = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    tekken_ = {
        "config": {"default_num_special_tokens": 4, "default_vocab_size": 260},
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode()} for i in range(256)],
    }
    small = of_decoder(decoders.ByteLevel(), {chr(i): i for i in range(33, 99)})
    write_gguf(tmp_path / "ok.gguf", "llama", PIECES, TYPES, eos=2)
    files = {
        "tokenizer.json": small.to_str().encode(),
        "tekken.json": json.dumps(tekken_).encode(),
        "x.tiktoken": tiktoken,
        "x.tiktoken.gz": gzip.compress(tiktoken),
        "x.model": byte_fallback_model(),
        "x.gguf": (tmp_path / "ok.gguf").read_bytes(),
    }
    for name, data in files.items():
        path = tmp_path / name
        path.write_bytes(data)
        assert len(byte_table(path)) > 0
        messages = [message for bad in damaged(data, rng, 60) if (message := refusal(path, bad))]
        assert len(messages) > 20, name
        assert [message for message in messages if not message.startswith(f"{path}: ")] == []


def refusal(path, data):
    """What the reader says to these bytes; None if they still are a readable file. Any other error is the test's."""
    path.write_bytes(data)
    try:
        byte_table(path)
    except UnsupportedTokenizerError as error:
        return str(error)


# ---- imports -----------------------------------------------------------------------------------------------------


def test_no_optional_package_is_imported(tmp_path):
    """Neither by importing, nor by reading any kind of file, nor by looking at an object of another kind."""
    _made("llama").source.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "x.model").write_bytes(byte_fallback_model())
    write_gguf(tmp_path / "x.gguf", "llama", PIECES, TYPES)
    code = f"""
import sys, pathlib, xtokmap
for name in ("tokenizer.json", "x.model", "x.gguf"):
    assert len(xtokmap.byte_table(pathlib.Path({str(tmp_path)!r}) / name)) > 0
try:
    xtokmap.byte_table(object())
except xtokmap.UnsupportedTokenizerError:
    pass
optional = "torch transformers tokenizers sentencepiece tiktoken mistral_common gguf fastokens google".split()
print([name for name in optional if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ---- codecs ------------------------------------------------------------------------------------------------------


def split(encoded):
    ids, cu = encoded
    assert ids.dtype == cu.dtype == np.int64
    return [row.tolist() for row in np.split(ids, cu[1:-1])]


@pytest.fixture
def exact_codec(monkeypatch):
    """`text_codec` where fastokens is not installed."""
    monkeypatch.setitem(sys.modules, "fastokens", None)
    return text_codec


def test_codec_encodes_as_the_tokenizer_does(case, exact_codec):
    codec = exact_codec(case.codec or case.source)
    plain = [text for kind, text in CORPUS.items() if kind != "markers"]
    assert split(codec.encode_batch(plain)) == [case.encode(text) for text in plain]
    assert split(codec.encode_batch(["", "x"])) == [case.encode(""), case.encode("x")]
    ids, cu = codec.encode_batch([])
    assert (ids.tolist(), cu.tolist()) == ([], [0])


@pytest.mark.parametrize("name", [name for name in CASES if name not in LACKING])
def test_codec_reads_special_tokens_as_text(name, exact_codec):
    case = _made(name)
    ids, _ = exact_codec(case.codec or case.source).encode_batch([CORPUS["markers"]])
    assert not case.table.is_special[ids].any()
    assert case.table.decode(ids.tolist()).removeprefix(b" ").decode() == CORPUS["markers"]


def test_codec_keeps_ordinary_added_tokens_whole():
    case = _made("byte-level")
    ids, _ = text_codec(case.source).encode_batch(["a<think>b"])
    assert case.source.token_to_id("<think>") in ids


def test_codec_reads_an_unmarked_end_of_text_as_text(tmp_path):
    """An eos that is an added token but not marked special, as in DeepSeek Coder; a user-defined one, as in Gemma."""
    transformers = pytest.importorskip("transformers")
    tokenizer = copy.deepcopy(_made("byte-level").source)
    tokenizer.add_tokens(["<|EOT|>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|EOT|>")
    fast.save_pretrained(tmp_path)
    for source in (fast, tmp_path):
        table = byte_table(source)
        assert table.stop_ids[0] == tokenizer.token_to_id("<|EOT|>")
        ids, _ = text_codec(source).encode_batch(["a<|EOT|>b<think>"])
        assert table.decode(ids.tolist()) == b"a<|EOT|>b<think>"
        assert tokenizer.token_to_id("<think>") in ids
    case = _made("sentencepiece-bpe")
    ids, _ = text_codec(case.source).encode_batch(["a<end_of_turn>b<think>"])
    assert case.table.decode(ids.tolist()) == b" a<end_of_turn>b<think>"
    assert case.source.piece_to_id("<think>") in ids


def test_codec_leaves_the_tokenizer_alone():
    tokenizer = copy.deepcopy(_made("byte-level").source)
    tokenizer.enable_truncation(max_length=3)
    tokenizer.enable_padding(length=5)
    before = tokenizer.truncation, tokenizer.padding, tokenizer.encode_special_tokens
    text = "<|im_end|> much longer than three tokens"
    ids, _ = text_codec(tokenizer).encode_batch([text])
    assert byte_table(tokenizer).decode(ids.tolist()) == text.encode()
    assert (tokenizer.truncation, tokenizer.padding, tokenizer.encode_special_tokens) == before
    assert len(tokenizer.encode(text).ids) == 5


def test_codecs_of_files(tmp_path, exact_codec):
    _made("llama").source.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "x.model").write_bytes(byte_fallback_model())
    plain = [CORPUS["prose"], CORPUS["emoji"]]
    for path, name in ((tmp_path, "llama"), (str(tmp_path / "x.model"), "sentencepiece-bpe")):
        assert split(exact_codec(path).encode_batch(plain)) == [_made(name).encode(text) for text in plain]
    tekken_case = _made("tekken")
    assert split(text_codec(real.path("tekken")).encode_batch(plain)) == [tekken_case.encode(text) for text in plain]
    for thing in (xtokmap.ByteTable.from_bytes([b"a"]), object()):
        with pytest.raises(UnsupportedTokenizerError, match="cannot encode text"):
            text_codec(thing)
    with pytest.raises(UnsupportedTokenizerError, match="a bare vocabulary cannot encode"):
        text_codec(real.path("qwen"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        text_codec(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("package", "module", "file"),
    [
        ("tokenizers", "tokenizers", "tokenizer.json"),
        ("mistral-common", "mistral_common.tokens.tokenizers.tekken", "tekken.json"),
        ("sentencepiece", "sentencepiece", "x.model"),
    ],
)
def test_missing_package_is_named(tmp_path, monkeypatch, package, module, file):
    (tmp_path / file).write_text(
        json.dumps({"config": {}, "vocab": []} if "tekken" in file else {"model": {}, "decoder": None})
    )
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnsupportedTokenizerError, match=rf"encoding with {re.escape(file)} .*pip install {package}"):
        text_codec(tmp_path / file)


def test_sentencepiece_codec_ignores_the_processors_defaults():
    sentencepiece = pytest.importorskip("sentencepiece")
    noisy = sentencepiece.SentencePieceProcessor(
        model_proto=byte_fallback_model(), add_bos=True, add_eos=True, reverse=True, out_type=str
    )
    plain = [text for kind, text in CORPUS.items() if kind != "markers"]
    assert split(text_codec(noisy).encode_batch(plain)) == [_made("sentencepiece-bpe").encode(text) for text in plain]


class WrongFastokens:
    """A stand-in for fastokens that is wrong about one text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def from_json_str(self, spec):
        return self

    def encode_batch_flat(self, texts, split_special_tokens):
        rows = [[7] if text == ODD_TEXTS[4] else self.tokenizer.encode(text).ids for text in texts]
        cu = np.cumsum([0, *map(len, rows)]).astype(np.uint64)
        return np.array([i for row in rows for i in row], np.uint32).tobytes(), cu.tobytes()


def test_fastokens_that_differs_is_not_used(monkeypatch):
    tokenizer = copy.deepcopy(_made("byte-level").source)
    tokenizer.encode_special_tokens = True
    module = types.SimpleNamespace(Tokenizer=WrongFastokens(tokenizer))
    monkeypatch.setitem(sys.modules, "fastokens", module)
    with pytest.warns(UserWarning, match=re.escape(f"fastokens gives other ids than tokenizers on {ODD_TEXTS[4]!r}")):
        codec = text_codec(tokenizer)
    assert split(codec.encode_batch([ODD_TEXTS[4]])) == [tokenizer.encode(ODD_TEXTS[4]).ids]


@pytest.mark.parametrize("name", ["deepseek", "smollm2", "byte-level", "llama", "wordpiece"])
def test_codec_with_fastokens_is_the_codec_without(name, recwarn, monkeypatch):
    """Used, or refused in silence (it does not know the kind), or refused with a warning (it is wrong)."""
    pytest.importorskip("fastokens")
    case = _made(name)
    tokenizer = getattr(case.codec, "backend_tokenizer", case.codec)
    codec = text_codec(tokenizer)
    assert all("fastokens gives other ids" in str(warning.message) for warning in recwarn)
    monkeypatch.setitem(sys.modules, "fastokens", None)
    exact = text_codec(tokenizer)
    if name == "deepseek":
        assert type(codec) is not type(exact)
    sample = [*TEXTS, *ODD_TEXTS, "</s><s><unk>", "[SEP][CLS]"]
    assert split(codec.encode_batch(sample)) == split(exact.encode_batch(sample))
