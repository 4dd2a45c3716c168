"""A thought and a tool call as two families write them: `python examples/reasoning.py STUDENT TEACHER` (ids, paths)."""

import sys

from transformers import AutoTokenizer

from xtokmap.torch import Pair

TURN = """<think>
The user wants Paris.
</think>

I look it up.
<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call><|im_end|>"""


def picture(student, teacher, text=TURN):
    """A line for each chunk: the student's tokens, the kind, the teacher's; unaligned tokens between them."""
    pair = Pair(student, teacher)
    batch = pair.prepare(["What is the weather in Paris?"], [student(text, add_special_tokens=False).input_ids])
    rows = [(student, batch.student_ids[0]), (teacher, batch.teacher_ids[0])]
    lines, at = [], [0, 0]
    for chunk in [*pair.aligner.align(rows[0][1], rows[1][1]), None]:
        spans = [chunk.student, chunk.teacher] if chunk else [range(len(ids), len(ids)) for _, ids in rows]
        before = [range(a, span.start) for a, span in zip(at, spans, strict=True)]
        for kind, both in (("", before), (chunk.kind.name if chunk else "", spans)):
            shown = ["│".join(tok.decode([ids[i]]) for i in s) for (tok, ids), s in zip(rows, both, strict=True)]
            if any(shown):
                lines.append(f"{shown[0]!r:>36}  {kind:^12}  {shown[1]!r}")
        at = [span.stop for span in spans]
    return "\n".join(lines)


if __name__ == "__main__":
    print(picture(*map(AutoTokenizer.from_pretrained, sys.argv[1:3])))
