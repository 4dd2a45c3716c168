"""Fuzzes the alignment of edited text: `python fuzz/edits.py [seconds] [seed]`.

Long rows of words in many scripts are edited anywhere, in a vocabulary of bytes; a brute-force edit distance says what
is right. What is claimed equal is equal and rises on both sides, the sides may be swapped, an edit costs its
neighborhood alone, and hardly a pair of characters is one that no shortest edit keeps. A row that breaks this is
printed, and the exit status is 1.
"""

import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import xtokmap
from edits import BYTES, Distances, Edited, edited

WORDS = [
    *["the", "tokenizer", "of", "a", "teacher,", "its", "student", "and", "their", "(common)", "bytes;", "x", "="],
    *["f(y,", "10)", "if", "not", "done", "else", "[1,", "2,", "3]", "return", "self.value", "!=", "None", "42.5 %"],
    *["\n\n", "    ", "\t", "#:", "->", "naïve", "café", "Größe", "žluťoučký", "山脚下", "修钟表", "말", "한국어"],
]
#: Characters that an edit may cost beside itself, and pairs of 10,000 that may be wrong where the edits lie close.
NEIGHBORHOOD, WRONG = 16, 10


def rows(rng: random.Random) -> Edited:
    text = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(4, 80)))
    return edited(rng, text, rng.choice((1, 1, 2, 3, 5, len(text) // 30)), rng.choice(("r", "i", "d", "rid")))


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(2**32)
    rng, until = random.Random(seed), time.monotonic() + seconds
    al = xtokmap.Aligner(BYTES, BYTES)
    count = untouched = kept = wrong = 0
    findings: dict[str, Edited] = {}
    while time.monotonic() < until:
        row, count = rows(rng), count + 1
        x, y = row.before.encode(), row.after.encode()
        forth, back = al.align(list(x), list(y)), al.align(list(y), list(x))
        # Characters by the byte at which they start.
        places = [{len(text[:k].encode()): k for k in range(len(text))} for text in (row.before, row.after)]
        found = {}
        for c in forth:
            if c.kind != xtokmap.Kind.REWRITTEN and c.student.start in places[0]:
                i, j = places[0][c.student.start], places[1].get(c.teacher.start)
                if j is None or row.before[i] != row.after[j]:
                    findings.setdefault("claimed equal, and is not", row)
                else:
                    found[i] = j
        if sorted(found.values()) != list(found.values()):
            findings.setdefault("not in order", row)
        if forth.student_chunk.tolist() != back.teacher_chunk.tolist():
            findings.setdefault("another alignment with the sides swapped", row)
        stays = [k for k, place in enumerate(row.place) if place >= 0]
        lost = sum(k not in found for k in stays)
        edits = Distances(row.before, row.after) if lost or any(row.place[i] != j for i, j in found.items()) else None
        if edits is not None:
            wrong += sum(row.place[i] != j and not edits.keeps(i, j) for i, j in found.items())
            if lost > NEIGHBORHOOD * max(edits.shortest, 1):
                findings.setdefault(f"{edits.shortest} edits cost {lost} characters", row)
        untouched, kept = untouched + len(stays), kept + len(stays) - lost
    print(f"seed {seed}: {count} rows, {kept / untouched:.4f} of {untouched} characters kept, {wrong} wrong")
    if wrong * 10_000 > WRONG * untouched:
        print(f"  more than {WRONG} wrong pairs in 10,000")
    for finding, row in findings.items():
        print(f"  {finding}: {row.before!r} {row.after!r}")
    return 1 if findings or wrong * 10_000 > WRONG * untouched else 0


if __name__ == "__main__":
    sys.exit(main())
