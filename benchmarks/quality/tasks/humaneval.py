"""HumanEval: bodies of Python functions, run against the data set's tests in the sandbox.

Data and tests: Chen et al., Evaluating Large Language Models Trained on Code (arXiv 2107.03374). The split, problems
0 to 79 and 80 to 163, is that of the S0 paper, as is asking through the chat template without thinking.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sandbox import Program, verify

from .records import read_records
from .task import Item, Styled

TUNE = 80  # the first problems
FIELDS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
ASK = "Write the body of this Python function. Answer with code alone, without explanation or Markdown.\n\n"
THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)
FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


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
    if block := FENCED.search(text):
        text = block[1]
    if re.search(rf"^\s*(async\s+)?def\s+{function}\b", text, re.MULTILINE):
        return f"{prompt}\n{text}\n"
    return prompt + indented(text) + "\n"


def indented(body: str) -> str:
    """A function's body at four spaces: as it is, moved as a whole, or with the indentation its first line lost."""
    lines = body.strip("\n").split("\n")
    if lines[0][:1].isspace():
        return "\n".join(lines)
    margins = [len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()]
    margin = min(margins, default=0)
    opens = lines[0].partition("#")[0].rstrip().endswith(":") and margins[:1] == [margin]  # a block, and that is all
    if margin and not opens:
        return "\n".join([" " * margin + lines[0], *lines[1:]])
    return "\n".join(f"    {line}" for line in lines)
