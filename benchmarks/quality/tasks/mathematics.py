"""MATH-500 and GSM8K: word problems. math-verify compares the final answer.

Data: Hendrycks et al. (arXiv 2103.03874), in the selection of Lightman et al. (arXiv 2305.20050), and Cobbe et al.
(arXiv 2110.14168). Splits, numbers of samples, lengths and training data are those of the S0 paper's public scripts
(github.com/JackYoung27/s0-tuning, experiments/); their only limit on solutions is one per problem.
"""

from dataclasses import dataclass

from s0kernels import verify

from .records import read_records
from .task import Item, Styled

TUNE = 200  # of GSM8K
BOXED = "Solve this problem step by step. Put the final answer into \\boxed{}.\n\n"
HASHES = "Solve this problem step by step. End with a line of #### and the final number.\n\n"


class Mathematics(Styled):
    samples = 4

    def right(self, item: Item, completion: str) -> bool:
        return verify.answer(item.data, completion)

    def item(self, name: str, question: str, reference: str, answer: str, ask: str) -> Item:
        prompt = ask + question if self.chat else f"Problem: {question}\nSolution:"
        return Item(name, prompt, reference, {"answer": answer})


@dataclass
class Math500(Mathematics):
    """data: "HuggingFaceH4/MATH-500" on the hub, or a file of its rows. The first half is for tuning."""

    name = "math500"
    ends = ("\nProblem:",)
    max_new_tokens = 1024
    solutions = 250
    normalize = True

    data: str = "HuggingFaceH4/MATH-500"

    def load(self) -> tuple[list[Item], list[Item]]:
        rows = read_records(self.data, ("problem", "solution", "answer", "unique_id"), split="test")
        items = [
            self.item(row["unique_id"], row["problem"], f" {row['solution']}", row["answer"], BOXED) for row in rows
        ]
        return items[: len(items) // 2], items[len(items) // 2 :]


@dataclass
class GSM8K(Mathematics):
    """tune, heldout: "openai/gsm8k" on the hub, of which the first 200 rows of the training part and the whole test
    part are used; or a file for each."""

    name = "gsm8k"
    ends = ("\nProblem:",)
    solutions = TUNE

    tune: str = "openai/gsm8k"
    heldout: str = "openai/gsm8k"

    def load(self) -> tuple[list[Item], list[Item]]:
        parts = []
        for source, split in ((self.tune, "train"), (self.heldout, "test")):
            rows = read_records(source, ("question", "answer"), split=split, subset="main")
            parts.append([self.row(f"{split}/{i}", source, row) for i, row in enumerate(rows)])
        return parts[0][:TUNE], parts[1]

    def row(self, name: str, source: str, row: dict) -> Item:
        worked, mark, answer = row["answer"].rpartition("####")
        if not mark:
            raise ValueError(f"{source}: the answer of {name} has no ####")
        return self.item(name, row["question"], f" {worked}#### {answer.strip()}", answer.strip(), HASHES)
