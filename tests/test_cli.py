"""The command line itself: what it says without arguments, and each command's help."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from s0kernels import cli

EVERY = pytest.mark.parametrize("name", cli.COMMANDS)


def help_of(name: str, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def parsed(line: str):
    """What a command's own parser makes of a line that is there to be copied."""
    program = cli.make_parser().prog
    assert line.startswith(program)
    words = shlex.split(line.removeprefix(program))
    return cli.make_parser(words[0]).parse_args(words)


@pytest.mark.parametrize(("script", "program"), [("s0kernels", "s0kernels"), ("__main__.py", "python -m s0kernels")])
def test_without_arguments_it_greets(script, program, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script])
    assert cli.main() == 0
    said = capsys.readouterr()
    assert said.err == ""
    first, *lines = said.out.splitlines()
    assert re.fullmatch(r"s0kernels [\d.]+: .+\.", first)
    copied = [parsed(line.strip()).command for line in lines if line.startswith("    ")]
    assert copied == ["env", "check", "tune", "generate", "evaluate"]
    assert f"All commands: {program} --help." in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tun"], "invalid choice: 'tun'"),
        (["tune"], "the following arguments are required: MODEL, DATA, OUTPUT"),
        (["env", "--loud"], "unrecognized arguments: --loud"),
        (["--loud"], "required: COMMAND"),
    ],
)
def test_wrong_commands_end_with_the_words_of_argparse(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_ends_it():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "s0kernels"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_prompts_stand_before_options_or_behind_them(capsys):
    found = cli._parse(["generate", "M", "a", "--max-new-tokens", "4", "b", "c"])
    assert (found.prompt, found.max_new_tokens) == (["a", "b", "c"], 4)
    assert cli._parse(["generate", "M", "--json", "a"]).prompt == ["a"]
    for given in (["generate", "M", "a", "--jsn"], ["env", "a"]):
        with pytest.raises(SystemExit) as ended:
            cli._parse(given)
        assert ended.value.code == 2
        assert f"unrecognized arguments: {given[-1]}" in capsys.readouterr().err


@EVERY
def test_every_command_has_a_line_about_it_and_an_example_that_it_takes(name, capsys):
    text = help_of(name, capsys)
    about = text.split("\n\n")[1]
    assert re.fullmatch(r"[A-Z].+\.", about), "one line"
    examples = text.rpartition("\nexample")[2].splitlines()[1:]
    assert examples
    for line in examples:
        assert parsed(line.strip()).command == name


@EVERY
def test_every_option_says_what_it_does_and_what_holds_without_it(name, capsys):
    """Of a flag that is all that the reader needs, but a choice of yes and no has its default as well."""
    entries = re.split(r"\n  (?=-|\{|[A-Z])", help_of(name, capsys).split("\n\n", 2)[2].rpartition("\nexample")[0])
    for entry in entries[1:]:
        words = " ".join(entry.split())
        if not words.startswith("-"):
            assert re.match(r"[A-Z]+ [a-z]", words), words
        elif re.match(r"--[a-z-]+ [A-Z{]|--[a-z-]+, --no-", words) and not words.startswith(REQUIRE_NOTHING):
            assert "(default: " in words, words


#: what these name is optional, and nothing stands in for it
REQUIRE_NOTHING = ("--config", "--checkpoint FILE", "--task", "--out", "--json", "--command", "--stop")
REQUIRE_NOTHING += ("--chat-template-kwargs", "--development")


def test_check_prints_its_table_once_and_how_far_it_is_elsewhere(capsys, monkeypatch):
    from s0kernels.bench import check

    rows = [check.Row("cpu", "ssd", backend, "float32", 0.1, 0.2, "A") for backend in ("torch", "cpu")]
    monkeypatch.setattr(check, "rows", lambda: iter(rows))
    monkeypatch.setattr(check, "count", lambda: len(rows))
    assert cli.main(["check"]) == 0
    said = capsys.readouterr()
    assert said.out.count("device") == 1
    assert len(said.out.splitlines()) == 2 + len(rows)
    assert said.err.splitlines()[-1].startswith("checking: 2 of 2 results")
    assert cli.main(["check", "--quiet"]) == 0
    again = capsys.readouterr()
    assert (again.out, again.err) == (said.out, "")
