"""Text of many kinds, on which tokenizers differ; written for this project."""

from __future__ import annotations

import unicodedata

_ACCENTED = (
    "Zoë naïvely ordered crème brûlée, jalapeño purée and a smörgåsbord; Łukasz preferred žemlovka. "
    "Señor Núñez à Besançon: « où est l'élève ? » — Größe, Übermut, çöğüş, Việt Nam, Tiếng Việt, ṩ̌ q̣̇. "
    "Åse bor i Ängelholm. Dvořák složil devět symfonií. Pčela naříká, ač žluťoučký kůň úpěl ďábelské ódy."
)

KINDS: dict[str, str] = {
    "prose": (
        "The lighthouse keeper didn't believe in ghosts, but he'd stopped arguing with people who did. Every autumn "
        "a boat went missing; every winter somebody's cousin swore they had heard it knock against the pier. \"You "
        "can't tow a sound,\" he'd say, pouring more tea. Still, on the third of November 1911, at a quarter past "
        "four, he wrote a single line in the logbook: Visitors - none that I could see. He underlined it twice."
    ),
    "code": (
        "from dataclasses import dataclass\n\n\n@dataclass(frozen=True)\nclass Window:\n"
        '    """A half-open interval [start, stop)."""\n\n    start: int = 0\n    stop: int = 1 << 31\n\n'
        "    def overlap(self, other: 'Window') -> int:\n"
        "        return max(0, min(self.stop, other.stop) - max(self.start, other.start))\n\n\n"
        "if __name__ == '__main__':\n\tassert Window(2, 7).overlap(Window(5, 11)) == 2  # tabs, too\n"
        "for (size_t i = 0; i < n && !done; ++i) { buf[i] ^= 0xFFu; }  // C\r\n"
        "SELECT name, COUNT(*) AS n FROM trips WHERE km >= 12.5 GROUP BY 1 ORDER BY n DESC;\n"
    ),
    "maths": (
        "Let $f\\colon \\mathbb{R}^n \\to \\mathbb{R}$ be convex; then ∀x,y: f(y) ≥ f(x) + ⟨∇f(x), y − x⟩. Hence\n"
        "\\begin{align}\n  \\sum_{k=1}^{\\infty} \\frac{1}{k^2} &= \\frac{\\pi^2}{6} \\approx 1.644934,\\\\\n"
        "  \\int_0^1 x^{-x}\\,dx &= \\sum_{n\\ge 1} n^{-n}.\n\\end{align}\n"
        "So 3×4 ≠ 3⁴, √2 ∉ ℚ, |A∪B| ≤ |A|+|B|, x² + y² = r², a₁…aₙ, 10⁻⁹ ≪ ½, ∂u/∂t = κ∂²u/∂x², ℵ₀ < 2^ℵ₀. ∎\n"
    ),
    "chinese": (
        "山脚下有一家修钟表的小铺子,老板姓顾,镇上的人都叫他“慢师傅”。他从不赶工:一只座钟送来,先听三天,再拆开看。"
        "有人问:“您不怕客人等急了吗?”他笑着说:「钟坏了,时间可没坏,急什么呢?」后来镇上通了高铁,年轻人都走了,"
        "只有铺子里四十七只钟还在走,快慢不一,像一场没完没了的小雨。繁體字也有:龍、龜、鬱、靈。生僻字:𠮷、㐂、龘。"
    ),
    "japanese": (
        "駅前の古本屋には、誰も買わない百科事典が一揃い置いてある。店主は「これは売り物じゃなくて重石だよ」と笑うけれど、"
        "雨の日になるとこっそり一冊ずつ乾かしているのを、わたしは知っている。第十三巻だけが欠けていて、"
        "「テ」から「ト」までの言葉はこの町に存在しないらしい。ｶﾀｶﾅもＡＢＣも、㍻の新聞も、ぱぴぷぺぽも、まだある。"
    ),
    "korean": (
        "할머니는 매일 아침 여섯 시에 라디오를 켜고 날씨를 들으신다. 비가 온다고 하면 우산을 세 개 꺼내 놓으시고, "
        "맑다고 하면 두 개만 꺼내 놓으신다. 왜 하나도 없는 날은 없냐고 여쭤 보았더니, 틀릴 때를 생각해야 한다고 "
        "말씀하셨다. 꿻뷁쀍 같은 글자는 아무도 쓰지 않지만, 컴퓨터는 읽을 줄 알아야 한다. 끝."
    ),
    "arabic": (
        "في آخر الشارع مقهى صغير لا يبيع القهوة إلا بعد غروب الشمس. سألتُ صاحبَهُ عن السبب فقال: «النهارُ للعمل، "
        "والليلُ للكلام». جلستُ أربعين دقيقة، ودفعتُ ١٢٫٥ درهمًا، ولم أسمع إلا حكايةً واحدة: رجلٌ أضاع مفتاحه فبنى "
        "بيتًا بلا باب. الله أكبر، لا إله، ﷲ، ـــــ."
    ),
    "hindi": (
        "नदी के किनारे एक पुराना पुस्तकालय है जहाँ किताबें उधार नहीं, उपहार में दी जाती हैं। शर्त बस इतनी है कि पढ़ने के बाद "
        "उसे किसी अजनबी को दे दो। पिछले साल १,२३४ किताबें गईं और सत्रह लौट आईं; श्रीमती क़ुरैशी कहती हैं—“लौटी हुई किताब "
        "ही असली पाठक होती है।” क्षत्रिय, ज्ञान, ड़, ढ़, फ़र्श, ऋषि।"
    ),
    "emoji": (
        "Packing list 🧳: 👩‍👩‍👧‍👦 (all four), 🏳️‍🌈 flag, 👍🏽👍🏿 ok?, 🧑🏻‍🚀🧑🏾‍🤝‍🧑🏼, 🇨🇭🇯🇵🇧🇷, 1️⃣2️⃣#️⃣, "
        "❤️‍🔥 and ♥︎ vs ♥️, 🏴󠁧󠁢󠁳󠁣󠁴󠁿. "
        "Then 🥲🫠🫡🪿🫎🩷 newer ones; ( ͡° ͜ʖ ͡°) ¯\\_(ツ)_/¯ 😀😃😄😁😆😅😂🤣, ZWSP:a\u200bb, BOM:\ufeffc, tag end ☺️."
    ),
    "accents": unicodedata.normalize("NFD", _ACCENTED),
    "digits": (
        "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798214 "
        "0000000000 9999999999999999 1,000,000,000.00 0x1F2E3D4C5B6A 2^127-1=170141183460469231731687303715884105727 "
        "٠١٢٣٤٥٦٧٨٩ १२३४५६७ １２３４５ ①②③⑳ 1½ 12:59:59.999 +41 (0)44 000 00 00 IPv6 2001:0db8:0000:0042:8a2e::7334"
    ),
    "white space": (
        "   leading\tand\t\ttabs\n\n\n\n   four lines\r\n\r\nCRLF  two   three    four     five\u00a0nbsp"
        "\u00a0\u00a0two\u3000wide\u3000\u3000\u2003em\u2009thin\u202fnarrow"
        "\u2028line\u2029paragraph\x0bvt\x0cff\x85nel \t \n"
        " \t\n                "
        "                sixteen twice\n\n\n\n# a  b   c\td\n\t- item\n"
        "\t\t- deeper\n    \t  mixed\n \n  \n   \n\t\t\t\tdeep\n        \n    trailing    \n\n  "
    ),
    "markers": (
        "<|im_start|>user\nWhat does <|im_end|> mean, and </s>, <s>, <unk>, <pad>?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\nThey are [INST] text [/INST] here.\n</think>\n<|endoftext|><|eot_id|><end_of_turn><eos><bos><0x0A>"
        "<EOT>\n\nHuman: <META> ▁▁word ▁ <｜end▁of▁sentence｜><｜begin▁of▁sentence｜> "
        "<tool_call>{}</tool_call> Ġthe Ċ ##ing "
        "<|fim_prefix|><|endofprompt|><SPECIAL_12> [CLS] [SEP] [MASK] \ufffd\ufffd replaced"
    ),
    "compatibility": (
        "ﬁne ﬂow oﬃce ﬅ ǆ Ĳ № ℡ ™ ℠ ㎏ ㎧ ㏒ ㋿ ｈａｌｆｗｉｄｔｈ "
        "Ａ１！ ｱｲｳｶﾞ ﾊﾟ Ⅷ ⅻ ⁵₇ ª º µ Ω K Å ⑴ ⒜ ㊙ ㈱ ‥… ″‴ ⁈ ﹏ ｟｠ ¼½¾ ⅓ ℃ ℉ ſt ŉ "
        "ẛ̣ 가각 각 א׃ ﬡ ﭏ ﷺ ﻻ ﺎ 豈更車 丽丸 𝐇𝒆𝓵𝔩𝕠 𝟘𝟙𝟚 🄰🅱 ´ ¨ ¸ ˘ ͺ ΅ ᾳ ᾍ ǰ̣ ḍ̇ ḍ̇ q̣̇ q̣̇ é é Å Ã ñ"
    ),
    "mixed": (
        "Ticket #4821 (Zürich→東京): price €1’234.50 ≈ ¥198,000; ETA 18:05±10′. Отправлено: «Скорый поезд №7». "
        "ราคา ๑๒๓ บาท ไม่รวมภาษี; שלום עולם; Ελληνικά: Ἀθῆναι; ქართული; தமிழ் எழுத்து; ʔɛ́ŋ̊; e.g. naïve_café.py\n\n"
        '```rust\nlet s: &str = "žluťoučký 🐎"; // ← UTF-8\n```\n| a | b |\n|--:|:-:|\n| 1 | ✓ |\nhttps://example.org/?q=%E2%9C%93&x=a+b#top'
    ),
}

#: Starts before which an inserted space is easily taken for the text's own white space, or for a mark's.
EDGES = ["\n\nThen", "\t\tx = 1", " \n so", "\u0301e", "\ufe0f1", "\u00a8 \u02d8", "\u00a0\u00a0x"]
