"""HumanEval: bodies of Python functions. The sandbox runs them against the tests of the data set.

Data and tests: Chen et al., Evaluating Large Language Models Trained on Code (arXiv 2107.03374). The split into
problems 0 to 79 and 80 to 163 is that of the S0 paper, and so is the use of the chat template without thinking.
"""

from dataclasses import dataclass

from s0kernels import verify
from s0kernels.tuning.verify.sandbox import Program, Sandbox
from s0kernels.tuning.verify.shapes import without_thoughts

from .records import read_records
from .task import Item, Styled

TUNE = 80  # the first problems
FIELDS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
ASK = "Write the body of this Python function. Answer with code alone, without explanation or Markdown.\n\n"
SANDBOX = Sandbox(timeout=10.0, memory_mb=1024)


@dataclass
class HumanEval(Styled):
    """data: "openai/openai_humaneval" on the hub, or a file such as HumanEval.jsonl.gz.

    scoring: "extracted" extracts the code from an answer, whether it is a body or the whole function, in a code block
        or not. "published" is the scoring of the method's public scripts: they strip the answer and its code fences,
        and append it to the prompt. So a body that begins with its indentation fails, and a whole function passes.
    """

    name = "humaneval"
    ends = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # from the paper of the data set

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

    def right(self, item: Item, completion: str) -> bool:
        prompt, name, tests = (item.data[field] for field in ("prompt", "entry_point", "test"))
        if self.scoring == "published":
            return SANDBOX.run(Program(published(prompt, completion), name, tests, prelude=prompt)).passed
        return verify.python({"tests": tests, "entry_point": name, "prefix": prompt}, completion)


def published(prompt: str, answer: str) -> str:
    text = without_thoughts(answer).strip().removeprefix("```python").removesuffix("```")
    return prompt + text.strip() + "\n"
