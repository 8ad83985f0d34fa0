"""benchmarks/quality/tasks: the data sets for large models, on a few problems in each format, written for these
tests."""

import gzip
import json
import shutil
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from surroundings import ROOT, python

pytestmark = pytest.mark.slow  # tests of the benchmarks


QUALITY = ROOT / "benchmarks" / "quality"
sys.path[:0] = [str(QUALITY), str(ROOT / "examples" / "tiny")]

import run  # noqa: E402
from problems import make_problems  # noqa: E402
from tasks import TASKS, get_task, spider  # noqa: E402
from tasks.records import read_records  # noqa: E402

from s0kernels.tuning.sampling import cut  # noqa: E402
from s0kernels.tuning.verify.sandbox import Sandbox  # noqa: E402

EVAL = ROOT / ".deps" / "eval"
needs_eval = pytest.mark.skipif(not EVAL.is_dir(), reason="nothing is in .deps/eval; `make test` puts it there")


def scores(task, items, completions) -> list[bool]:
    return [task.right(item, text) for item, text in zip(items, completions, strict=True)]


def jsonl(file: Path, rows: list) -> str:
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def test_records(tmp_path):
    rows = [{"a": "1", "b": 2}, {"a": "é\u2028"}]
    text = json.dumps(rows, ensure_ascii=False)
    (tmp_path / "rows.json").write_text(text)
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(text.encode()))
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("rows.json", "rows.json.gz", "rows.jsonl", "rows.jsonl.gz"):
        assert read_records(str(tmp_path / name), ["a"], split="test") == rows
    for name, content, message in (
        ("a.json", b'{"a": "1"}', "must hold a list of rows, got dict"),
        ("b.json", b"[", "b.json is not JSON"),
        ("c.jsonl", b"\n", "c.jsonl is empty"),
        ("d.json", b'[{"a": "1"}, {"b": "2"}]', "d.json: row 2 lacks a as text"),
        ("e.json", b'[{"a": 1}]', "e.json: row 1 lacks a as text"),
        ("f.json", b"[3]", "f.json: row 1 lacks a as text"),
        ("g.jsonl.gz", b"plain", "g.jsonl.gz is not JSON"),
        ("h.jsonl", b"\xff", "h.jsonl is not JSON"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_records(str(tmp_path / name), ["a"], split="test")
    with pytest.raises(FileNotFoundError, match=r"no data at .*none\.json"):
        read_records(str(tmp_path / "none.json"), ["a"], split="test")


def test_a_data_set_of_the_hub_needs_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="reading openai/gsm8k needs the package datasets: pip install"):
        get_task("gsm8k").load()


@needs_eval
def test_a_data_set_as_the_hub_has_it(tmp_path):
    """Load GSM8K's layout, with its subset and parts, through `datasets` itself."""
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    files = [{"split": split, "path": f"{split}.jsonl"} for split in ("train", "test")]
    (folder / "README.md").write_text(
        f"---\nconfigs: {json.dumps([{'config_name': 'main', 'data_files': files}])}\n---\n"
    )
    for split, number in (("train", 205), ("test", 3)):
        rows = [{"question": f"{split} {i}?", "answer": f"It is {i}.\n#### {i},000"} for i in range(number)]
        jsonl(folder / f"{split}.jsonl", rows)
    code = f"""
import sys
sys.path.insert(0, {str(QUALITY)!r})
from tasks import get_task
tune, heldout = get_task("gsm8k", dict(tune={str(folder)!r}, heldout={str(folder)!r}, style="complete")).load()
print(len(tune), len(heldout), repr(tune[199].prompt), repr(heldout[2].reference), heldout[2].data["answer"])
"""
    done = python("-c", code, path=EVAL, cwd=tmp_path)
    assert done.stdout.strip() == ("200 3 'Problem: train 199?\\nSolution:' ' It is 2.\\n#### 2,000' 2,000"), (
        done.stderr
    )


def test_options():
    with pytest.raises(
        ValueError, match="task must be one of tiny, boundary, humaneval, math500, gsm8k, spider, got 'x'"
    ):
        get_task("x")
    with pytest.raises(ValueError, match="tiny has no options; got 'data'"):
        get_task("tiny", {"data": "x"})
    with pytest.raises(ValueError, match="humaneval has the options style, data, scoring; got 'file'"):
        get_task("humaneval", {"file": "x"})
    with pytest.raises(ValueError, match="scoring must be extracted or published, got 'x'"):
        get_task("humaneval", {"scoring": "x"})
    for name in TASKS:
        if name not in ("tiny", "boundary"):
            with pytest.raises(ValueError, match="style must be chat or complete, got 'talk'"):
                get_task(name, {"style": "talk"})
    with pytest.raises(ValueError, match="spider needs databases=FOLDER"):
        get_task("spider").load()
    with pytest.raises(FileNotFoundError, match="databases: no folder /nowhere"):
        get_task("spider", {"databases": "/nowhere"}).load()


def test_command_line_of_tasks(monkeypatch, capsys):
    for options, message in (
        (["--task-option", "style"], "--task-option must be NAME=VALUE, got 'style'"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
    ):
        monkeypatch.setattr(sys, "argv", ["run.py", "main", *options])
        with pytest.raises(SystemExit):
            run.main()
        assert message in capsys.readouterr().err


# MATH-500 and GSM8K


def test_answers_of_mathematics(tmp_path):
    answers = ("\\frac{1}{2}", "\\left( 3, \\frac{\\pi}{2} \\right)", "\\text{Evelyn}", "2\\sqrt{2}")
    rows = [
        {"problem": f"{i}?", "solution": f"It is $\\boxed{{{a}}}$.", "answer": a, "unique_id": f"test/{i}"}
        for i, a in enumerate(answers)
    ]
    math = get_task("math500", {"data": jsonl(tmp_path / "math.jsonl", rows)})
    items = [item for part in math.load() for item in part]
    assert scores(math, items, [item.reference for item in items]) == [True] * 4
    right = [r"\boxed{2}:</think>\boxed{0.5}", r"\boxed{(3,\,\pi / 2)}", r"\boxed{\text{Evelyn}}", r"it is $2\sqrt 2$"]
    wrong = [r"\boxed{2}", r"\boxed{(\pi/2, 3)}", r"\boxed{Eve}", r"\boxed{2.83}"]
    for texts, expected in ((right, True), (wrong, False), ([""] * 4, False)):
        assert scores(math, items, texts) == [expected] * 4
    rows = [{"question": f"{a}?", "answer": f"5 + 6 = <<5+6=11>>11\n#### {a}"} for a in ("11", "1,250")]
    file = jsonl(tmp_path / "gsm.jsonl", rows)
    gsm = get_task("gsm8k", {"tune": file, "heldout": file})
    items = gsm.load()[1]
    assert scores(gsm, items, [item.reference for item in items]) == [True] * 2
    for texts, expected in (
        (["5 + 6 = 11\n#### 11", "#### $1,250\nHope that helps, 3 times!"], [True, True]),
        (["#### Step 1: add\n5 + 6\n#### **11**", "#### 1. Convert\n#### \\$1,250.00"], [True, True]),
        (["I get 11.", "1250 dollars"], [True, True]),
        (["#### 12", "#### 125"], [False, False]),
        (["#### 11 apples", "####"], [True, False]),
    ):
        assert scores(gsm, items, texts) == expected


def test_what_is_wrong_with_mathematics_is_said(tmp_path):
    file = jsonl(tmp_path / "gsm.jsonl", [{"question": "1?", "answer": "1"}])
    task = get_task("gsm8k", {"tune": file, "heldout": file})
    with pytest.raises(ValueError, match=r"gsm\.jsonl: the answer of train/0 has no ####"):
        task.load()


# Spider


@pytest.fixture(scope="module")
def databases():
    """A folder that every user may read, as the sandbox needs it."""
    folder = Path(tempfile.mkdtemp(prefix="spider-test-", dir="/tmp"))
    (folder / "pets").mkdir()
    folder.chmod(0o755)
    file = folder / "pets" / "pets.sqlite"
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(
            "CREATE TABLE pets (id INTEGER, name TEXT, weight REAL, chip BLOB);"
            "INSERT INTO pets VALUES (1, 'Rex', 9.5, x'00'), (2, 'Tom', 4, NULL), (3, 'Rex', 20, x'01');"
        )
    file.chmod(0o644)
    before = file.read_bytes()
    yield folder
    assert file.read_bytes() == before, "a query changed the database"
    assert sorted(path.name for path in file.parent.iterdir()) == ["pets.sqlite"]
    shutil.rmtree(folder)


def spider_task(tmp_path, databases, query, **options):
    file = jsonl(tmp_path / "rows.jsonl", [{"question": "Which?", "query": query, "db_id": "pets"}])
    task = get_task("spider", {"databases": str(databases), "tune": file, "heldout": file, **options})
    return task, task.load()[1]


QUERIES = [  # the data set's query, right ones, wrong ones
    (
        "SELECT name, weight FROM pets",
        ["SELECT weight, name FROM pets ORDER BY id DESC", "WITH p AS (SELECT * FROM pets) SELECT name, weight FROM p"],
        ["SELECT DISTINCT name FROM pets", "SELECT name, id FROM pets", "SELECT name, weight FROM pets LIMIT 2"],
    ),
    (
        "SELECT name FROM pets ORDER BY weight",
        ["SELECT name FROM pets ORDER BY weight, id", "SELECT P.name FROM pets AS P ORDER BY P.weight ASC"],
        ["SELECT name FROM pets ORDER BY name", "SELECT name FROM pets ORDER BY weight DESC"],
    ),
    ("SELECT name FROM pets", ["SELECT name FROM pets ORDER BY name"], ["SELECT DISTINCT name FROM pets"]),
    ("SELECT name FROM pets WHERE id > 9", ["SELECT id FROM pets WHERE 0"], ["SELECT name FROM pets WHERE id = 1"]),
    ("SELECT chip FROM pets WHERE chip IS NULL", ["SELECT NULL"], ["SELECT ''", "SELECT 0"]),
    (
        "SELECT name FROM pets WHERE id ! = 3 AND name != 'a;b'",
        ["SELECT name FROM pets WHERE id < = 2 AND 'a;b' <> name"],
        ["SELECT name FROM pets WHERE id != 2 AND name != 'a;b'", "SELECT a.name FROM pets a, pets b, pets c"],
    ),
    ("SELECT max(weight), 3 FROM pets", ["SELECT 3.0, 20"], ["SELECT '3', 20.0", "SELECT 20.0"]),
]
HOSTILE = [
    "DELETE FROM pets",
    "DROP TABLE pets",
    "INSERT INTO pets VALUES (4, 'x', 1, NULL)",
    "ATTACH 'FILE' AS other",
    "VACUUM INTO 'FILE'",
    "SELECT load_extension('x')",
    "SELEC name",
    "SELECT name FROM nowhere",
    "SELECT name FROM pets; DELETE FROM pets",
    "",
]


def test_spider(tmp_path, databases):
    for query, right, wrong in QUERIES:
        task, items = spider_task(tmp_path, databases, query)
        assert "CREATE TABLE pets (id INTEGER" in items[0].prompt
        texts = [query, *right]
        texts += [f"<think>hm</think>Here it is:\n```sql\n{text};\n```\nIt selects." for text in texts]
        texts += [f"The query: {text}; it selects." for text in (query, *right)]
        texts += [f"To select what is there with names, use:\n\n{text}" for text in (query, *right)]
        texts += [f"```sql\n-- select these; with care\n{text}```" for text in (query, *right)]
        texts += [f"Run `{query}`.", f"```{query}```\nIt selects.", f"Well</think>{query}", query.lower()]
        assert scores(task, items * len(texts), texts) == [True] * len(texts), query
        assert scores(task, items * len(wrong), wrong) == [False] * len(wrong), query
    plain, items = spider_task(tmp_path, databases, "SELECT name FROM pets", style="complete")
    assert items[0].prompt.endswith("-- Which?\nSELECT")
    assert cut(" name FROM pets;\nSELECT", plain.stop) == " name FROM pets"
    assert scores(plain, items * 3, [items[0].reference, " name FROM pets", " id FROM pets"]) == [True, True, False]


def test_hostile_queries(tmp_path, databases, monkeypatch):
    """Each is wrong and leaves the database unchanged, which the fixture checks."""
    task, items = spider_task(tmp_path, databases, "SELECT name FROM pets WHERE 0")  # these queries give no rows either
    texts = [text.replace("FILE", str(databases / "new")) for text in HOSTILE]
    found = scores(task, items * len(texts), texts)
    assert found == [False] * len(texts)
    assert not (databases / "new").exists()
    bomb = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    monkeypatch.setattr(spider, "SANDBOX", Sandbox(timeout=1.0, memory_mb=1024, result_mb=64))
    assert scores(task, items, [bomb]) == [False]
    many = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"
    monkeypatch.setattr(spider, "same_rows", lambda gold, found, ordered: len(found))
    assert scores(task, items, [many]) == [1]  # reads at most one row too many
    with pytest.raises(ValueError, match=r"train/0: the data set's own query fails: .*no such column"):
        spider_task(tmp_path, databases, "SELECT missing FROM pets")


def test_rows_with_equal_columns_are_compared_at_once():
    wide = [tuple([i] * 12 + [i % 2]) for i in range(30)]
    assert spider.same_rows(wide, [row[::-1] for row in wide[::-1]], ordered=False)
    assert not spider.same_rows(wide, [(*row[:12], 1 - row[12]) for row in wide], ordered=False)


# lm-evaluation-harness

HARNESS_TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{key}}"
process_results: !function tiny_score.score
generation_kwargs: {max_gen_toks: 40, do_sample: false, until: ["<none>"]}
metric_list: [{metric: passed, aggregation: mean, higher_is_better: true}]
"""
HARNESS_SCORE = """
import sys
sys.path[:0] = [{quality!r}]
from tasks import get_task
TASK = get_task("tiny")
ITEMS = {{item.name: item for item in TASK.load()[1]}}
def score(doc, results):
    return {{"passed": float(TASK.right(ITEMS[doc["key"]], results[0]))}}
"""


@pytest.mark.slow
@needs_eval
def test_harness(tmp_path):
    """Run the harness on the tiny Falcon-H1 without and with S0. Without S0 its verdicts are those of the
    experiments."""
    from s0kernels import S0Config, S0Trainer

    model = ROOT / "examples" / "tiny" / "falcon_h1"
    trainer = S0Trainer.from_pretrained(str(model), S0Config(n_steps=8, lr=3e-3))
    pairs = [(problem.prompt, problem.solution) for problem in make_problems("tune")[:48]]
    trainer.train([{"prompt": p, "completion": c + trainer.tokenizer.eos_token} for p, c in pairs], progress=False)
    trainer.save(tmp_path / "states")
    rows = [{"key": item.name, "prompt": item.prompt} for item in get_task("tiny").load()[1][:24]]
    jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "tiny.yaml").write_text(HARNESS_TASK)
    (tmp_path / "tiny_score.py").write_text(HARNESS_SCORE.format(quality=str(QUALITY)))
    talks = shutil.copytree(model, tmp_path / "model")
    says = (
        "{{ messages[0].content }}{{ raise_exception('thinks') if enable_thinking is not defined or enable_thinking }}"
    )
    (talks / "chat_template.jinja").write_text(says)
    script = [str(QUALITY / "harness.py"), str(talks), "--states", "states", "--tasks", "tiny", "--include-path", "."]
    done = python(*script, "--chat", "--rows", "24", path=EVAL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "harness.json").read_text())["results"]
    known = json.loads((run.RESULTS / "main-falcon_h1-tiny.json").read_text())["cells"]["no tuning/42"]["passed"][:24]
    assert found["no tuning"]["tiny"]["passed,none"] == pytest.approx(known.count("1") / 24)
    assert found["S0"]["tiny"]["passed,none"] > found["no tuning"]["tiny"]["passed,none"]
    assert "| tiny | passed,none | " in done.stdout
    missing = python(str(QUALITY / "harness.py"), str(model), "--states", "none", "--tasks", "tiny", cwd=tmp_path)
    assert missing.stderr.endswith("harness.py: no states.safetensors in none\n")
