"""s0kernels/tuning/verify/sandbox.py: values that calls return, databases that they read, and the confinement."""

import json
import math
import os
import random
import sqlite3
import time

import pytest
from escapes import HANG, LONG, attempt, sandbox, untouched

from s0kernels.tuning.verify.sandbox import Call, Outcome, confinement, evaluate
from s0kernels.tuning.verify.wire import decode, encode

pytestmark = pytest.mark.slow  # many processes


def run(source, *arguments, **settings):
    (outcome,) = evaluate([Call(source, "f", arguments)], **{"timeout": LONG, "workers": 1, **settings})
    assert outcome.ok == (outcome.reason == "returned")
    return outcome


VALUES = [
    None,
    [True, 1, 1.0, "1", b"1", 1j],
    (math.inf, -0.0, 10**50, -(2**63), 1 << 99999),
    {1: (2, [3]), (4,): {5}, None: frozenset({6, (7,)}), "\ud800": {}},
]


@pytest.mark.parametrize("value", VALUES, ids=["none", "scalars", "numbers", "containers"])
def test_values_come_back_as_they_are(value):
    outcome = run("def f(x): return x", value)
    assert outcome == Outcome(value, "returned", True)
    assert encode(outcome.value) == encode(value)


def test_outcomes_in_order():
    sources = ["return x", "return None", "raise KeyError(x)", "import os; os._exit(0)", "return f"]
    calls = [Call(f"def f(x): {sources[i % 5]}", "f", (i,)) for i in range(50)]
    outcomes = evaluate(calls, timeout=LONG)
    assert [outcome.value for outcome in outcomes] == [i if i % 5 == 0 else None for i in range(50)]
    assert [outcome.ok for outcome in outcomes] == [True, True, False, False, False] * 10
    reasons = [
        "returned",
        "returned",
        "KeyError: 2",
        "no result (exit code 0)",
        "TypeError: not a plain value: function",
    ]
    assert [outcome.reason for outcome in outcomes[:5]] == reasons


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def f(): return 'x' * (2 << 20)", "output flood"),
        ("def f():\n while True: pass", "timed out"),
        ("def f(): bytearray(1 << 30)", "MemoryError"),
        ("class A(int): pass\ndef f(): return A(1)", "not a plain value: A"),
        ("def f():\n x = []\n x.append(x)\n return x", "cyclic"),
        ('import os\ndef f(): os.write(3, b\'{"error": "returned"}\'); os._exit(0)', "garbled"),
        ('import os\ndef f(): os.write(3, b\'["list", ["object"]]\'); os._exit(0)', "garbled"),
        ("import os\ndef f(): os.write(3, b'[\"list\"]'); os._exit(0)", "garbled"),
        (attempt("os.fork()").replace("f(x)", "f()"), "PermissionError"),
    ],
)
def test_no_value(source, reason):
    outcome = run(source, timeout=HANG)
    assert outcome.value is None
    assert not outcome.ok
    assert reason in outcome.reason


def test_larger_results_where_asked_for():
    assert run("def f(): return 'x' * (2 << 20)", result_mb=3).value == "x" * (2 << 20)
    with pytest.raises(ValueError, match="result_mb"):
        evaluate([], result_mb=0)


@pytest.mark.parametrize("arguments", [[1], (len,), ({1: object()},)])
def test_impossible_calls_raise(arguments):
    with pytest.raises(TypeError):
        evaluate([Call("def f(x): pass", "f", arguments)])


QUERY = """
import sqlite3
def f(path, query):
    open(path).close()  # says why not, where it cannot be read
    database = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
    database.execute("PRAGMA temp_store=memory")
    return database.execute(query).fetchall()
"""
ROWS = [(1, "a", 1.5, b"\0\xff", None), (2, "\u00e9", -2.5, b"", 10**15)]


@pytest.fixture(scope="module")
def database(playground):
    path = playground.with_name(playground.name + ".db")
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (a INTEGER, b TEXT, c REAL, d BLOB, e)")
        connection.executemany("INSERT INTO t VALUES (?, ?, ?, ?, ?)", ROWS)
    connection.close()
    path.chmod(0o666)  # so that only the sandbox protects it, not the mode
    yield path
    path.unlink()


QUERIES = {
    "rows": ("SELECT * FROM t ORDER BY a", ROWS),
    "join": ("SELECT x.a, count(*) FROM t x, t y GROUP BY x.a ORDER BY x.a DESC", [(2, 2), (1, 2)]),
    "nothing": ("SELECT a FROM t WHERE a > 2", []),
    "large-sort": (
        "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r WHERE x < 100000) "
        "SELECT max(y) FROM (SELECT x || 'abcdefghijklmnopqrstuvwxyz' AS y FROM r ORDER BY y LIMIT 99999)",
        [("99abcdefghijklmnopqrstuvwxyz",)],
    ),
}
REFUSED = {
    "runs-forever": (
        "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT sum(x) FROM r",
        "timed out",
    ),
    "fills-memory": (
        "WITH RECURSIVE r(x) AS (SELECT zeroblob(1000000) UNION ALL SELECT x || x FROM r) SELECT max(x) FROM r",
        "",
    ),
    "too-many-rows": (
        "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r WHERE x < 300000) SELECT x FROM r",
        "output flood",
    ),
    "insert": ("INSERT INTO t VALUES (3, '', 0, '', 0)", "attempt to write a readonly database"),
    "drop": ("DROP TABLE t", "attempt to write a readonly database"),
    "pragma": ("PRAGMA user_version = 7", "attempt to write a readonly database"),
    "attach": ("ATTACH 'FILE-new' AS n", "unable to open database"),
    "attach-for-writing": ("ATTACH 'file:FILE-new?mode=rwc' AS n", "unable to open database"),
    "vacuum-into": ("VACUUM INTO 'FILE-new'", "unable to open database"),
    "extension": ("SELECT load_extension('FILE')", "not authorized"),
    "write-a-file": ("SELECT writefile('FILE', 'x')", "no such function"),
    "two-statements": ("SELECT 1; DROP TABLE t", "one statement at a time"),
    "not-sql": ("SELEC 1", "syntax error"),
    "no-table": ("SELECT * FROM u", "no such table: u"),
}


@pytest.mark.parametrize("name", QUERIES)
def test_query_returns_rows(name, database):
    query, rows = QUERIES[name]
    outcome = run(QUERY, str(database), query)
    assert outcome == Outcome(rows, "returned", True)
    assert repr(outcome.value) == repr(rows)


@pytest.mark.parametrize("name", REFUSED)
def test_query_is_refused(name, database, playground):
    query, reason = REFUSED[name]
    before, entries = database.read_bytes(), sorted(database.parent.glob(f"{database.name}*"))
    limit = HANG if reason == "timed out" else LONG
    outcome = run(QUERY, str(database), query.replace("FILE", str(playground / "kept")), timeout=limit)
    assert outcome.value is None
    assert reason in outcome.reason
    assert not outcome.ok
    assert database.read_bytes() == before
    assert sorted(database.parent.glob(f"{database.name}*")) == entries
    assert untouched(playground)


def child_uid():
    return run("import os\ndef f(): return os.getuid()").value


def test_database_that_only_the_caller_may_read(database):
    if child_uid() == os.geteuid():
        pytest.skip("without a change of uid the caller's files can be read")
    database.chmod(0o600)
    try:
        assert "Permission denied" in run(QUERY, str(database), "SELECT 1").reason
    finally:
        database.chmod(0o666)


def test_confinement_is_said(monkeypatch):
    line = confinement()
    assert line.startswith(f"seccomp filter, rlimits, uid {child_uid()}; ")
    if sandbox._TRY_NAMESPACES:
        assert line.endswith("; namespaces: net ipc uts") or "; no namespaces (unshare: " in line
    else:
        assert line.endswith("; no namespaces (not asked for)")
    monkeypatch.setattr(sandbox, "_PROBE", sandbox.Job("def f(): return 'open'", "f", [()], ["confined"]))
    assert confinement().startswith("the sandbox does not work here: wrong answer")


def test_namespaces_are_those_that_were_said():
    source = """
import os
def f():
    return {name: os.stat(f"/proc/self/ns/{name}").st_ino for name in ("net", "ipc", "uts", "pid", "mnt")}, \
        open("/proc/self/net/dev").read().count(":")
"""
    ours = {name: os.stat(f"/proc/self/ns/{name}").st_ino for name in ("net", "ipc", "uts", "pid", "mnt")}
    outcome = run(source)
    if "Permission denied" in outcome.reason:
        pytest.skip("here a process that may not dump core cannot look its namespaces up")
    assert outcome.ok, outcome.reason
    left = {"net", "ipc", "uts"} if "namespaces: net" in confinement() else set()
    assert {name for name in ours if ours[name] != outcome.value[0][name]} == left


GARBLED = [
    "",
    "[",
    "{}",
    "[]",
    '["list", {}]',
    '["int"]',
    '["int", 1]',
    '["int", "x"]',
    '["bytes", "0"]',
    '["dict", 1]',
]
GARBLED += [
    '["dict", 1]',
    '["dict", ["list"], 1]',
    '["set", ["list"]]',
    '["object"]',
    '["complex", "x"]',
    "[[]]",
    "[1]",
]
GARBLED += ["4" * 9999, "[" * 99999, '["list", ' * 5000 + "1" + "]" * 5000, '["complex", 1, 2, 3]', "\ud800"]


@pytest.mark.parametrize("text", GARBLED, ids=range(len(GARBLED)))
def test_garbled_values_are_refused(text):
    with pytest.raises(ValueError):
        decode(text)


def test_damaged_values_are_refused_or_plain():
    chance, text = random.Random(0), encode(VALUES)[:400]
    for _ in range(2000):
        damaged = list(text)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.choice('[]{}",:019-eEtuplist \\')
        try:
            value = decode("".join(damaged))
        except ValueError:
            continue
        assert json.dumps(encode(value))


FORGED = """
import os
def f(how):
    values = [f'["int", "{hex(i * (2**61 - 1))}"]' for i in range(8, 25_000)]
    text = ", ".join(values) if how != "dict" else ", ".join(value + ", 0" for value in values)
    data = f'["list", ["{how}", {text}]]'.encode()
    while data: data = data[os.write(3, data):]
    os._exit(0)
"""


@pytest.mark.parametrize("how", ["set", "frozenset", "dict"])
def test_forged_hashes_do_not_keep_the_caller_busy(how):
    """0.8 MB of numbers with equal hashes: building a table of them takes seconds, regardless of the timeout."""
    start = time.monotonic()
    found = run(FORGED, how, timeout=5.0)
    assert time.monotonic() - start < 5.0
    assert (found.ok, found.reason) == (False, "garbled result")


def test_honest_tables_of_many_values_cross():
    source = "def f(n): return {*range(-n, n)}, {str(i): i for i in range(n)}, {(i, -i) for i in range(n)}"
    found = run(source, 8000)
    assert found.ok
    assert found.value == ({*range(-8000, 8000)}, {str(i): i for i in range(8000)}, {(i, -i) for i in range(8000)})
