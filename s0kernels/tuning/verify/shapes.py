"""Parse answers of models: thoughts, code blocks, functions or function bodies, final answers."""

import re
import textwrap

# thoughts before an answer; some templates write the opening tag themselves
_THOUGHTS = re.compile(r"\A.*</think>", re.DOTALL)
# a block is closed by a fence at the beginning or end of a line; within a line it may be part of the code
_FENCED = re.compile(r"^([ \t]*)[^`\n]*```[^`\n]*\n(?P<code>.*?)(?:^\1```|(?<=\S)```\s*$|\Z)", re.DOTALL | re.MULTILINE)

_MARKED = re.compile(r"####\s*([^\n#]+)")


def without_thoughts(text: str) -> str:
    return _THOUGHTS.sub("", text)


def code_blocks(text: str) -> list[str]:
    """Return the code between Markdown fences."""
    return [block["code"] for block in _FENCED.finditer(text)]


def extracted(prompt: str, function: str, answer: str) -> str:
    """Return the program in an answer: a whole function or its body, in a code block or not. A body is put after
    `prompt`, whose last function has only a docstring. Without a prompt, bodies are not recognised."""
    text = without_thoughts(answer)
    whole = re.compile(rf"^(async\s+)?def\s+{function}\b", re.MULTILINE)
    if blocks := code_blocks(text):
        text = next((block for block in blocks if whole.search(textwrap.dedent(block))), blocks[0])
    dedented = textwrap.dedent(text)
    if not prompt.strip():
        return dedented
    body = re.search(r"^return\b", dedented, re.MULTILINE)  # a body may begin with a function of the same name
    if whole.search(dedented) and not body:
        return f"{prompt}\n{dedented}\n"
    return prompt + indented(text) + "\n"


def indented(body: str) -> str:
    """Indent the body of a function by four spaces. If only its first line has lost its indentation, restore it."""
    first, *rest = re.sub(r"\A(?:\s*\n)+", "", body).rstrip().split("\n")
    margins = [line[: len(line) - len(line.lstrip())] for line in rest if line.strip()]
    margin = min(margins, key=len, default="")
    opens = first.partition("#")[0].rstrip().endswith(":") and margins[:1] == [margin]  # the whole body is one block
    if margin and not first[:1].isspace() and not opens:
        first = margin + first
    margin = first[: len(first) - len(first.lstrip())]
    lines = [first, *rest]
    if not all(line.startswith(margin) or not line.strip() for line in lines):
        return "\n".join(lines)
    return "\n".join(f"    {line.removeprefix(margin)}" if line.strip() else line for line in lines)


def final_answers(text: str) -> list[str]:
    """Return the candidates for the answer in a text: the whole text, the content of its last \\boxed{}, the line after
    its last ####."""
    found = [text, *_boxed(text), *_MARKED.findall(text)[-1:]]
    return [part.strip() for part in found if part.strip()]


def final_number(text: str) -> str:
    """Return the text after the last #### that precedes a number, because #### may also begin headings; the whole text
    if there is none."""
    found = [line for line in _MARKED.findall(text) if re.search(r"\d", line)]
    return found[-1].strip() if found else text


def _boxed(text: str) -> list[str]:
    start = text.rfind("\\boxed{")
    depth = 0
    for place in range(start + len("\\boxed"), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return [text[start + len("\\boxed{") : place]]
    return []
