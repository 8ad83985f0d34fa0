"""Spider: turn questions into SQL queries. A query is right if it gives the same rows as the reference query.

Data: Yu et al. (arXiv 1809.08887). The split (the first 500 questions of the training part, and the development part)
and the number of samples are those of the S0 paper's public scripts. In the paper S0 is expected to fail this test.

Rows are compared as in the data set's execution evaluator (Zhong et al., arXiv 2010.02840): the same rows the same
number of times, in any order unless the reference query orders them, with columns in any order. There are two
differences: DISTINCT counts, which that evaluator ignores by default; and there is one database per question, not a
suite.
"""

import functools
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from s0kernels.tuning.verify.sandbox import Call, Outcome, Sandbox
from s0kernels.tuning.verify.shapes import code_blocks, without_thoughts

from .records import read_records
from .task import Item, Styled

TUNE = 500
ASK = (
    "The tables of the database {name}:\n\n{schema}\n\n"
    "Write one SQLite query that answers: {question}\nAnswer with SQL alone."
)
PLAIN = "-- The tables of the database {name}\n{schema}\n\n-- {question}\nSELECT"

# A query begins at the start of a line, or anywhere in capitals, because prose contains "select" and "with" as well.
_WITH = r"with\s+(?:recursive\s+)?[\w\"`\[\]]+\s*(?:\([^()]*\)\s*)?as\s*(?:(?:not\s+)?materialized\s*)?\("
BEGINS = [
    re.compile(rf"^\s*(select\b(?![^\n]*:$)|{_WITH})", re.IGNORECASE | re.MULTILINE),
    re.compile(rf"\b(SELECT\b|(?i:{_WITH}))"),
    re.compile(r"\b(select)\b", re.IGNORECASE),
]
UP_TO_SEMICOLON = re.compile(r"(?:'[^']*'|\"[^\"]*\"|`[^`]*`|--[^\n]*|/\*.*?\*/|[^;])*", re.DOTALL)

# Runs in the sandbox.
QUERY = """
import sqlite3
def query(uri, sql, most):
    connection = sqlite3.connect(uri, uri=True)
    connection.text_factory = lambda raw: raw.decode(errors="ignore")
    connection.execute("PRAGMA temp_store=memory")  # temporary files are refused
    cursor = connection.execute(sql)
    if cursor.description is None:
        raise ValueError("not a query")
    return cursor.fetchall() if most is None else cursor.fetchmany(most)
"""
SANDBOX = Sandbox(timeout=30.0, memory_mb=1024, result_mb=64)


@dataclass
class Spider(Styled):
    """databases: the folder `database` of the data set's archive, which has a folder for each database and must be
    readable by every user. tune, heldout: "xlangai/spider" on the hub (parts train and validation), or a file for
    each."""

    name = "spider"
    ends = (";", "\n\n")
    samples = 4
    solutions = TUNE
    normalize = True

    databases: str = ""
    tune: str = "xlangai/spider"
    heldout: str = "xlangai/spider"

    def load(self) -> tuple[list[Item], list[Item]]:
        if not self.databases:
            raise ValueError("spider needs databases=FOLDER, the folder `database` of its archive")
        if not Path(self.databases).is_dir():
            raise FileNotFoundError(f"databases: no folder {self.databases}")
        fields = ("question", "query", "db_id")
        tune, heldout = (
            [(f"{split}/{i}", row) for i, row in enumerate(read_records(source, fields, split=split))]
            for source, split in ((self.tune, "train"), (self.heldout, "validation"))
        )
        return self._items(tune[:TUNE]), self._items(heldout)

    def _items(self, rows: Sequence[tuple[str, dict]]) -> list[Item]:
        """Return items with the results of the data set's own queries. Raise ValueError if one of these fails."""
        files = [Path(self.databases).resolve() / row["db_id"] / f"{row['db_id']}.sqlite" for _, row in rows]
        form, items = ASK if self.chat else PLAIN, []
        prompts = [
            form.format(name=row["db_id"], schema=schema(file), question=row["question"])
            for file, (_, row) in zip(files, rows, strict=True)
        ]
        for (name, row), prompt, file in zip(rows, prompts, files, strict=True):
            uri, query = _uri(file), row["query"]
            gold = _rows(uri, query, None)
            if not gold.ok:
                raise ValueError(f"{name}: the data set's own query fails: {gold.reason}")
            reference = query if self.chat else re.sub(r"^\s*select\b", "", query, flags=re.IGNORECASE)
            data = {"uri": uri, "rows": gold.value, "ordered": "order by" in query.lower()}
            items.append(Item(name, prompt, reference, data))
        return items

    def right(self, item: Item, completion: str) -> bool:
        # read at most one row more than expected: a missing join condition can give millions
        found = _rows(item.data["uri"], self.sql(completion), len(item.data["rows"]) + 1)
        return found.ok and same_rows(item.data["rows"], found.value, item.data["ordered"])

    def sql(self, text: str) -> str:
        """Return the query in an answer: from its beginning, in the code block if there is one, up to a semicolon."""
        if not self.chat:
            return f"SELECT{text}"
        text = without_thoughts(text)
        text = next(iter(code_blocks(text)), text)
        if begin := next(filter(None, (pattern.search(text) for pattern in BEGINS)), None):
            before, text = text[: begin.start(1)], text[begin.start(1) :]
            if before.endswith("`"):
                text = text.partition("```" if before.endswith("```") else "`")[0]
        return UP_TO_SEMICOLON.match(text)[0].strip()


@functools.cache
def _rows(uri: str, sql: str, most: int | None) -> Outcome:
    """Run a query, and return at most `most` rows. Like the evaluator, join operators that a tokenizer has split."""
    return SANDBOX.run(Call(QUERY, "query", (uri, re.sub("([<>!]) =", r"\1=", sql), most)))


def _uri(file: Path) -> str:
    """Return the URI of a database. It is opened as immutable, so that SQLite neither locks it nor writes files beside
    it."""
    return f"{file.as_uri()}?mode=ro&immutable=1"


@functools.cache
def schema(file: Path) -> str:
    """Return the statements that create the tables of a database."""
    if not file.is_file():
        raise FileNotFoundError(f"databases: no file {file}")
    with closing(sqlite3.connect(_uri(file), uri=True)) as connection:
        rows = connection.execute("SELECT sql FROM sqlite_master WHERE type = 'table' AND sql IS NOT NULL")
        return "\n\n".join(sql for (sql,) in rows)


def same_rows(gold: Sequence[tuple], found: Sequence[tuple], ordered: bool) -> bool:
    """Whether `found` equals `gold` for some order of its columns, in any order of rows unless `ordered`."""
    if len(gold) != len(found):
        return False
    if not gold:
        return True
    if len(gold[0]) != len(found[0]):
        return False
    columns, others = list(zip(*gold, strict=True)), list(zip(*found, strict=True))
    same = (lambda a, b: list(a) == list(b)) if ordered else (lambda a, b: Counter(a) == Counter(b))
    return any(
        same(gold, list(zip(*(others[j] for j in order), strict=True))) for order in _orders(columns, others, same)
    )


def _orders(columns: list[tuple], others: list[tuple], same) -> Iterator[list[int]]:
    """Yield the ways to assign a different column of `others` with the same values to each column."""
    if not columns:
        yield []
        return
    tried = []
    for j, other in enumerate(others):
        if other is not None and other not in tried and same(columns[0], other):
            tried.append(other)  # equal columns are the same choice
            for rest in _orders(columns[1:], [*others[:j], None, *others[j + 1 :]], same):
                yield [j, *rest]
