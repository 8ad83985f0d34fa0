"""The shapes of answers: thoughts before them, code in blocks, functions whole or as bodies, final answers."""

import re
import textwrap

# what a chat model writes before its answer; some templates write the opening tag themselves
_THOUGHTS = re.compile(r"\A.*</think>", re.DOTALL)
# closed where a line begins or ends with the fence: within one it may be part of the code
_FENCED = re.compile(r"^([ \t]*)[^`\n]*```[^`\n]*\n(?P<code>.*?)(?:^\1```|(?<=\S)```\s*$|\Z)", re.DOTALL | re.MULTILINE)

_MARKED = re.compile(r"####\s*([^\n#]+)")


def without_thoughts(text: str) -> str:
    return _THOUGHTS.sub("", text)


def code_blocks(text: str) -> list[str]:
    """What stands between the fences of Markdown, without them."""
    return [block["code"] for block in _FENCED.finditer(text)]


def extracted(prompt: str, function: str, answer: str) -> str:
    """The program that an answer stands for: a function, whole, or its body, in a code block or not. A body stands
    behind `prompt`, whose last function has a docstring alone; without one there are no bodies."""
    text = without_thoughts(answer)
    whole = re.compile(rf"^(async\s+)?def\s+{function}\b", re.MULTILINE)
    if blocks := code_blocks(text):
        text = next((block for block in blocks if whole.search(textwrap.dedent(block))), blocks[0])
    dedented = textwrap.dedent(text)
    if not prompt.strip():
        return dedented
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


def final_answers(text: str) -> list[str]:
    """What may be the answer in a text: the whole; what stands in its last \\boxed{}; the line behind its last ####."""
    found = [text, *_boxed(text), *_MARKED.findall(text)[-1:]]
    return [part.strip() for part in found if part.strip()]


def final_number(text: str) -> str:
    """What follows the last #### that a number follows, since it may begin headings; the whole if there is none."""
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
