"""The Triton kernels compiled for chips without hardware: their resources are those recorded by
benchmarks/matrix.py."""

import functools
import json
import sys

import pytest
from surroundings import ROOT, TESTS, python

sys.path.insert(0, str(ROOT / "benchmarks"))
import matrix

from s0kernels.backends.triton import aot
from s0kernels.backends.triton.aot_cases import FLAGSHIPS, LEVELS, PAIRS, SIZES, Given, _of, calls_of, pairwise
from s0kernels.backends.triton.common.targets import known_target
from s0kernels.hardware import CHIPS
from s0kernels.versions import PINNED, TESTED

load = functools.cache(matrix.load)


def check(*options: str) -> int:
    """Check that the pinned Triton gives the recorded resources for kernels that have not changed. Return their
    number."""
    done = python(str(ROOT / "benchmarks" / "matrix.py"), "--share", *options)
    assert done.returncode == 0, done.stderr
    recorded, sources = load(), matrix.sources()
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        kernel, key, chip, what, found = row
        assert isinstance(found, list), row
        known = recorded["launches"].get(kernel, {}).get(key, {}).get(chip, {}).get(PINNED["triton"])
        if recorded["sources"].get(kernel) == sources[kernel] and known is not None:  # else the record is out of date
            assert known == found, row
        registers, _, _, products = found
        assert registers <= (512 if chip.startswith("gfx") else 255), row
        without_products = "state_grad", "gated_delta_rule_step", "ssd_step", "ssd_sums_bwd"
        if what.endswith("state-only backward"):
            without_products += ("ssd_prepare_fwd",)
        if kernel not in without_products:
            assert products > 0, row
    return len(rows)


@pytest.mark.parametrize("case", FLAGSHIPS)
def test_flagships(case):
    assert check("0/1", "--fresh", "--chip", "sm_90", "--case", case) >= 7


@pytest.mark.slow
@pytest.mark.parametrize("chip", [chip for chip in CHIPS if chip != "sm_90"])
def test_flagships_on_other_chips(chip):
    cases = [option for case in FLAGSHIPS for option in ("--case", case)]
    assert check("0/1", "--fresh", "--chip", chip, *cases) >= (2 if chip == "sm_75" else 18)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gated_delta_rule", "ssd"])
@pytest.mark.parametrize("share", ["0/2", "1/2"])
def test_optional_arguments(case, share):
    cases = [option for name in PAIRS if name.startswith(case) for option in ("--case", name)]
    assert check(share, "--fresh", "--chip", "sm_90", *cases) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("share", ["0/2", "1/2"])
def test_what_the_file_is_behind_on_compiles(share):
    check(share)


@pytest.mark.parametrize("model", ["qwen3.5-4b", "falcon-h1-7b"])
@pytest.mark.parametrize("packed", [False, True])
def test_other_numbers_of_tokens_and_sequences_compile_nothing_anew(model, packed):
    def keys(B: int, T: int) -> set:
        calls = calls_of(_of(model, B=B, T=T), Given(packed=packed))
        launches = [x for call in calls.values() for x in aot.launches_of(call, known_target("sm_90"))]
        return {(x.kernel.__name__, aot.specialise(x).key(x)) for x in launches}

    assert keys(8, 1024) == keys(10, 1000) == keys(16, 778)  # strides are multiples of 16 in all


def test_comments_are_no_change():
    text = "@jit\ndef f(x):\n    {}y = x{}\n    return y\n"
    plain = aot._without_comments(text.format("", ""))
    assert aot._without_comments(text.format('"""What it does."""\n    ', "  # why")) == plain
    assert aot._without_comments(text.format("", " + 1")) != plain


def test_what_the_file_is_behind_on_is_said(record_property):
    """It is not a failure: `make matrix-triton` compiles the kernels with every version of Triton."""
    if behind := matrix.behind(load()):
        found = ", ".join(f"{kernel} ({count})" for kernel, count in behind.items())
        record_property("to be said", f"{matrix.RESULTS.name} is behind on {found}: make matrix-triton")


def test_everything_in_the_file_compiled_and_fits():
    recorded, tried = load(), set()
    for kernel, launches in recorded["launches"].items():
        for row in launches.values():
            for chip in CHIPS.keys() & row.keys():
                for version, found in row[chip].items():
                    tried.add((chip, version))
                    assert isinstance(found, list), (kernel, row["what"], chip, version, found)
                    assert found[2] <= CHIPS[chip].shared, (kernel, row["what"], chip, version, found)
    assert tried == {(chip, version) for chip in CHIPS for version in TESTED["triton"]}
    assert matrix.RESULTS.stat().st_size < 300_000


def test_chips_that_nothing_is_compiled_for_are_called_never_tried():
    assert {chip for chip, row in CHIPS.items() if row.tried == "never"} == set()


@pytest.mark.parametrize("op", LEVELS)
def test_any_two_options_meet(op):
    rows, levels = pairwise(LEVELS[op]), LEVELS[op]
    assert len(rows) <= 16
    for a in levels:
        for b in levels:
            met = {(row[a], row[b]) for row in rows}
            assert a == b or met == {(x, y) for x in levels[a] for y in levels[b]}


def test_every_case_is_compiled_for_every_chip_that_chooses_by_memory():
    for chip in matrix.SMALL:
        assert set(SIZES) <= set(matrix.sampled(PINNED["triton"])[chip])


def test_a_change_of_a_function_that_a_kernel_calls_is_a_change_of_the_kernel(monkeypatch):
    from s0kernels.backends.triton.ssd import prepare

    before = matrix.sources()
    monkeypatch.setattr(prepare, "softplus", prepare.clamp)
    monkeypatch.setitem(vars(prepare), "STRONGEST", type(prepare.STRONGEST)(-3.0))
    changed = {kernel for kernel, value in matrix.sources().items() if value != before[kernel]}
    assert changed == {"ssd_prepare_fwd"}


def test_what_is_not_of_todays_kernels_goes_from_the_file():
    results = json.loads(json.dumps(load()))
    results["sources"]["ssd_step"] = "another"
    results["launches"]["state_grad"]["nobody's"] = {"what": "", "sm_90": {"3.7.1": [1, 0, 0, 0]}}
    matrix.prune(results)
    assert results["sources"] == matrix.sources()
    assert results["launches"].pop("ssd_step") == {}
    kept = {kernel: rows for kernel, rows in load()["launches"].items() if kernel != "ssd_step"}
    assert results["launches"] == kept


def test_what_failed_is_compiled_again():
    results = json.loads(json.dumps(load()))
    before = matrix.behind(results)
    row = next(iter(results["launches"]["ssd_step"].values()))
    row[next(chip for chip in CHIPS if chip in row)]["3.7.1"] = "ValueError: it does not fit"
    assert matrix.behind(results) - before == {"ssd_step": 1}


def test_the_cli_compiles_a_case():
    done = python("-m", "s0kernels", "aot", "--json", "--case", "Zamba2, 80 heads", "--chip", "sm_75")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["target"], row["call"], row["kernel"], row["spills"]) == ("sm_75", "step", "ssd_step_kernel", 0)


def test_what_triton_compiles_wrongly_is_found():
    done = python(str(TESTS / "backends" / "miscompiled.py"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    refused = found.pop("refused")
    transpose, both = "multiplies by the transpose of a product", "has the same transpose on the left and on the right"
    assert found == {
        "transpose_of_a_product": [transpose],
        "transpose_of_the_product_before": [transpose],
        "transpose_of_a_product_in_a_branch": [transpose],
        "same_on_both_sides": [both],
        "loaded_as_its_transpose": [],
        "transposes_of_what_was_loaded": [],
    }
    assert "bytes of shared memory on sm_90, of 1000" in refused[0]
    assert "bytes of shared memory on sm_90, of 690" in refused[1]
    assert "compiles to nothing for sm_90" in refused[2]
    assert "compiles to nothing for gfx942" in refused[3]
