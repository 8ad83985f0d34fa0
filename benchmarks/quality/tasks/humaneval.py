"""HumanEval: bodies of Python functions, run against the data set's tests in the sandbox.

Data and tests: Chen et al., Evaluating Large Language Models Trained on Code (arXiv 2107.03374). The split, problems
0 to 79 and 80 to 163, is that of the S0 paper, as is asking through the chat template without thinking.
"""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from sandbox import Program, verify

from .records import read_records
from .task import THOUGHTS, Item, Styled, code_blocks

TUNE = 80  # the first problems
FIELDS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
ASK = "Write the body of this Python function. Answer with code alone, without explanation or Markdown.\n\n"


@dataclass
class HumanEval(Styled):
    """data: "openai/openai_humaneval" on the hub, or a file such as HumanEval.jsonl.gz.

    scoring: "extracted" takes the code out of an answer, be it a body or the whole function, in a code block or not.
    "published" is what the method's public scripts do: they strip the answer, and code fences around it, and append
    it to the prompt, so that a body that begins with its indentation fails and the whole function passes.
    """

    name = "humaneval"
    ends = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # those of the data set's paper

    data: str = "openai/openai_humaneval"
    scoring: str = "extracted"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scoring not in ("extracted", "published"):
            raise ValueError(f"scoring must be extracted or published, got {self.scoring!r}")

    def load(self) -> tuple[list[Item], list[Item]]:
        rows = read_records(self.data, FIELDS, split="test")
        items = [
            Item(row["task_id"], (ASK if self.chat else "") + row["prompt"], row["canonical_solution"], row)
            for row in rows
        ]
        return items[:TUNE], items[TUNE:]

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[bool]:
        whole = published if self.scoring == "published" else extracted
        programs = [
            Program(
                whole(item.data["prompt"], item.data["entry_point"], text),
                item.data["entry_point"],
                item.data["test"],
                prelude=item.data["prompt"],
            )
            for item, text in zip(items, completions, strict=True)
        ]
        return [verdict.passed for verdict in verify(programs, timeout=10.0, memory_mb=1024, progress=True)]


def published(prompt: str, function: str, answer: str) -> str:
    text = THOUGHTS.sub("", answer).strip().removeprefix("```python").removesuffix("```")
    return prompt + text.strip() + "\n"


def extracted(prompt: str, function: str, answer: str) -> str:
    """The program that an answer stands for; the prompt, whose last function has a docstring alone, is its start."""
    text = THOUGHTS.sub("", answer)
    whole = re.compile(rf"^(async\s+)?def\s+{function}\b", re.MULTILINE)
    if blocks := code_blocks(text):
        text = next((block for block in blocks if whole.search(textwrap.dedent(block))), blocks[0])
    dedented = textwrap.dedent(text)
    body = re.search(r"^return\b", dedented, re.MULTILINE)  # it may begin with a function of the same name
    if whole.search(dedented) and not body:
        return f"{prompt}\n{dedented}\n"
    return prompt + indented(text) + "\n"


def indented(body: str) -> str:
    """A function's body, moved to four spaces as a whole, or with the indentation that its first line alone lost."""
    first, *rest = re.sub(r"\A(?:\s*\n)+", "", body).rstrip().split("\n")
    margins = [line[: len(line) - len(line.lstrip())] for line in rest if line.strip()]
    margin = min(margins, key=len, default="")
    opens = first.partition("#")[0].rstrip().endswith(":") and margins[:1] == [margin]  # a block, and that is all
    if margin and not first[:1].isspace() and not opens:
        first = margin + first
    margin = first[: len(first) - len(first.lstrip())]
    lines = [first, *rest]
    if not all(line.startswith(margin) or not line.strip() for line in lines):
        return "\n".join(lines)
    return "\n".join(f"    {line.removeprefix(margin)}" if line.strip() else line for line in lines)
