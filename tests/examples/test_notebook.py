"""The notebook: that it runs, what it computes, and that the outputs it is shown with are those of such a run."""

import base64
import json
import re
import sys
from itertools import pairwise

import pytest
from notebooks import EXAMPLES, JUPYTER, run

START = EXAMPLES / "start.ipynb"
#: what the cells have computed, for the test to look at
FOUND = """
import json
print(json.dumps({
    "solutions": len(solutions), "losses": losses, "base": result.base, "s0": result.s0, "switched": switched,
    "mixed": mixed, "adapted": adapted, "without": without, "norms": [norm.tolist() for norm in norms.values()],
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not JUPYTER.is_dir(), reason="Jupyter is not in .deps/jupyter; `make test-more` puts it there")
def test_it_runs_from_top_to_bottom():
    book = run(START, then=FOUND)
    found = json.loads(book.cells[-1].outputs[0].text)
    assert found["solutions"] == 48
    assert found["losses"][-1] < 0.1 * found["losses"][0]
    assert 0.4 < found["base"] < 0.6
    assert found["s0"] > found["base"] + 0.15
    starts = {"zero": ("print", "return"), "return": ("return", "return"), "print": ("print", "print")}
    for name, (first, second) in starts.items():
        assert found["switched"][name][0].strip().startswith(first)
        assert found["switched"][name][1].strip().startswith(second)
    assert found["mixed"] == [found["switched"][name][0] for name in ("print", "return")]
    assert found["adapted"] == found["switched"]["return"][0]
    assert found["without"] == found["switched"]["zero"][0]
    assert len(found["norms"]) == 3
    assert all(norm > 0 for layer in found["norms"] for norm in layer)


def test_the_outputs_in_the_file_are_those_of_one_run():
    """From top to bottom, with plots, and nothing of the machine that ran it."""
    assert START.stat().st_size < 300 * 1024
    book = json.loads(START.read_text())
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output.get("name", "plot") for output in outputs} == {"stdout", "plot"}
    plots = [output["data"]["image/png"] for output in outputs if output["output_type"] == "display_data"]
    assert len(plots) == 3
    assert all(base64.b64decode(plot).startswith(b"\x89PNG") for plot in plots)
    text = "\n".join("".join(output["text"]) for output in outputs if "text" in output)
    assert not re.search(r"/\w+/\w+/|[Ww]arning|Error", text)
    assert "".join(book["cells"][0]["source"]).startswith("# ")
    assert not [one for one, two in pairwise(book["cells"]) if one["cell_type"] == two["cell_type"] == "markdown"]
    assert sys.version.split()[0] not in START.read_text()
