"""What Triton 3.7.1 and older compile wrongly for Hopper, looked for in the code of kernels.

- A product one of whose factors is the transpose of another product's result (fla issues 640 and 826).
- W^T X W^T: the right factor is the transpose of what the left one was multiplied with from the left, transposed too
  (fla issues 984 and 988).

Operations on single elements, and loops and branches that a value goes through, make no difference.
"""

import re

_ASSIGNED = re.compile(r'^\s*(%\w+)(?::\d+)? = "?([\w.]+)"?(.*)$')
_CARRIED = re.compile(r"(%\w+) = (%\w+(?:#\d+)?)")
_VALUE = re.compile(r"%\w+(?:#\d+)?")
#: Where a value comes from that a loop or a branch hands on: from any of its operands.
_HANDED_ON = "handed on"
_ROUNDING = ("arith.truncf", "arith.extf", "tt.fp_to_fp")

#: (operation, operands) of each value
Graph = dict[str, tuple[str, list[str]]]


def miscompiled(ttir: str) -> list[str]:
    """What stands in the first form that Triton brings a kernel into, `asm["ttir"]`, functions being inlined there."""
    graph, found = _parse(ttir), []
    for name, (operation, operands) in graph.items():
        if operation != "tt.dot":
            continue
        left, right = operands[:2]
        products = _products(graph, left)
        if any(transposed for _, transposed in products | _products(graph, right)):
            found.append(f"{name} multiplies by the transpose of a product")
        w = _transposed(graph, right)
        if w is not None and any(_transposed(graph, graph[product][1][0]) == w for product, _ in products):
            found.append(f"{name} has the same transpose on the left and on the right")
    return found


def _parse(ttir: str) -> Graph:
    graph: Graph = {}
    open_regions = []  # (result, values that a loop carries) of the loops and branches around a line
    for line in ttir.splitlines():
        match = _ASSIGNED.match(line)
        name, operation, rest = match.groups() if match else (None, line.strip().partition(" ")[0], line)
        if operation in ("scf.for", "scf.while", "scf.if"):
            carried = _CARRIED.findall(rest.partition("iter_args(")[2].partition(")")[0])
            for inside, initial in carried:
                graph[inside] = (_HANDED_ON, [initial])
            open_regions.append((name, [inside for inside, _ in carried]))
        elif operation == "scf.yield" and open_regions:
            result, carried = open_regions[-1]
            for i, value in enumerate(_VALUE.findall(line.partition(" : ")[0])):
                for handed in (f"{result}#{i}", result if i == 0 else None, carried[i] if carried else None):
                    if handed:
                        graph.setdefault(handed, (_HANDED_ON, []))[1].append(value)
        elif name is not None:
            graph[name] = (operation, _VALUE.findall(rest.partition(" : ")[0]))
        end = line.strip()
        if open_regions and end.startswith("}") and not end.startswith(("} else", "})")):  # "})" ends a reduction
            open_regions.pop()
    return graph


def _products(graph: Graph, value: str) -> set[tuple[str, bool]]:
    """The products that a value comes from, and whether it is transposed against them."""
    found, seen, waiting = set(), set(), [(value, False)]
    while waiting:
        value, transposed = waiting.pop()
        if (value, transposed) in seen or value not in graph:
            continue
        seen.add((value, transposed))
        operation, operands = graph[value]
        if operation == "tt.dot":
            found.add((value, transposed))
        elif operation == "tt.trans":
            waiting += [(x, not transposed) for x in operands]
        elif operation == _HANDED_ON or operation.startswith(("arith.", "math.", *_ROUNDING)):
            waiting += [(x, transposed) for x in operands]
    return found


def _transposed(graph: Graph, value: str) -> str | None:
    """What a value is the transpose of, rounding aside."""
    flipped = False
    while value in graph and graph[value][0] in ("tt.trans", *_ROUNDING):
        flipped ^= graph[value][0] == "tt.trans"
        value = graph[value][1][0]
    return value if flipped else None
