"""The README and docs/: links lead somewhere, the README is short, and code blocks run."""

import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
from surroundings import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TINY = "examples/tiny/qwen3_5"
#: commands that no test runs, and why
NOT_RUN = {
    "make ": "checked against the Makefile",
    "pip install ": "checked against the extras",
    "python benchmarks/quality/": "two hours, or data sets and models of the hub",
    "s0kernels bench ": "a minute of timing; tests/bench has it",
    "s0kernels check": "tests/bench has it",
}
#: pages whose code is quoted from the repository, and from which files
QUOTED = {"adding-a-family.md": ("s0kernels/modules/families.py", "s0kernels/modules/bamba.py", "tests/models.py")}
#: what a page takes for granted
BEFORE = {"README.md": f"import transformers\nmodel = transformers.AutoModelForCausalLM.from_pretrained('{TINY}')"}


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, code) of the fenced blocks."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^ *```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [(language, textwrap.dedent(code)) for _, language, code in found]


def prose(page: Path) -> str:
    """Paragraphs and items of lists, without code, tables and headings."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(), flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith(("|", "#", "!"))]
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", "\n".join(lines))


def anchors(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    words = prose(ROOT / "README.md")
    assert len(text.splitlines()) <= 150
    assert len(words.split()) <= 800
    paragraphs = [" ".join(paragraph.split()) for paragraph in words.split("\n\n")]
    sentences = [sentence for paragraph in paragraphs for sentence in re.split(r"(?<=[.!?:]) ", paragraph)]
    assert [sentence for sentence in sentences if len(sentence.split()) > 28] == []
    before = text.partition("get_peft_model(model")[0]
    assert len(before.splitlines()) <= 100


def test_commands_that_are_not_run_exist():
    makefile = (ROOT / "Makefile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in PAGES:
        for language, code in blocks(page):
            for line in code.splitlines() if language == "bash" else ():
                if target := re.match(r"make ([\w-]+)", line):
                    assert re.search(rf"^{target[1]}:", makefile, re.MULTILINE), line
                for extra in re.findall(r"\.\[(\w+)\]", line):
                    assert extra in extras


@pytest.fixture
def folder(tmp_path: Path, page: Path) -> Path:
    """Where a reader would be: a checkout, with a few problems and, unless the page makes them, solutions."""
    for name in ("examples", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    sys.path.append(str(ROOT / "examples" / "tiny"))
    from problems import make_problems

    def write(name: str, rows: list[dict]) -> None:
        (tmp_path / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    write("problems.jsonl", [problem.row() for problem in make_problems("tune")[:6]])
    write("heldout.jsonl", [problem.row() for problem in make_problems("heldout")[:4]])
    solutions = [{"prompt": p.prompt, "completion": p.solution} for p in make_problems("tune")[:4]]
    made = "solutions.jsonl" if ".collect(" in page.read_text() else None
    for name in {"solutions.jsonl", "math.jsonl", "code.jsonl"} - {made}:
        write(name, solutions)
    return tmp_path


def script(page: Path) -> str:
    """What runs the blocks of a page one after the other, as one reader would."""
    lines = ["import shlex, subprocess, sys", BEFORE.get(page.name, "")]
    code = blocks(page)
    for text in [text for language, text in code if language == "yaml"]:
        lines.append(f"open('run.yaml', 'w').write({text!r})")
    for language, text in code:
        text = text.replace("Qwen/Qwen3.5-4B", TINY)
        if language == "python":
            lines.append(text)
        if language == "bash":
            lines += [
                f"subprocess.run([sys.executable, *shlex.split({_module(line)!r})], check=True)"
                for line in text.splitlines()
                if line.strip() and not line.startswith(tuple(NOT_RUN))
            ]
    return "\n".join(lines)


def _module(line: str) -> str:
    """A command without its first word, which is Python."""
    line = re.sub(r"^s0kernels ", "python -m s0kernels ", line)
    assert line.startswith("python "), f"{line!r}: tests do not know how to run it"
    return line.removeprefix("python ")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_code_runs(page, folder):
    for language, code in blocks(page):
        assert language in ("python", "bash", "json", "yaml", ""), f"{page.name}: a block in {language}"
        if language == "json":
            for line in code.splitlines():
                json.loads(line)
    if page.name in QUOTED:
        sources = "\n".join((ROOT / name).read_text() for name in QUOTED[page.name])
        for _, code in blocks(page):
            for line in code.splitlines():
                assert line in sources
        return
    run = folder / "page.py"
    run.write_text(script(page))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(run)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
