"""Flags as dataclass fields: parsing, checks, help and tables."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from scripts import flag_tables as script
from utils.errors import UserError
from utils.flags import describe_section, flag, flag_tables, flags_of, parse_flags


@dataclass(frozen=True, kw_only=True)
class Options:
    where: str | None = flag("where", metavar="DIR", section="files", help="a directory")
    files: tuple[str, ...] = flag("--files", default=(), metavar="A,B", section="files", help="some files")
    rates: tuple[float, ...] = flag("--rates", default=(0.5, 2.0), at_least=0, metavar="R,R", section="numbers",
                                    help="rates")
    count: int | None = flag("-c", "--count", at_least=1, below=10, default_text="all", section="numbers",
                             help="how many")
    share: float = flag("--share", "--part", default=0.25, above=0, at_most=1, section="numbers",
                        help="in 100 % | less")
    size: int = flag("--size", required=True, section="numbers", help="needed")
    color: str = flag("--color", default="red", choices=("red", "blue"), help="a color")
    fast: bool = flag("--fast", default=False, help="be fast")
    safe: bool = flag("--safe", default=True, help="be safe")


def parse(*argv: str) -> Options:
    return parse_flags(Options, "prog", "A program.", ["--size", "3", *argv])


def test_defaults_and_types():
    assert parse() == Options(size=3)
    assert parse("here", "--files", "a,b", "--rates", "1,2.5", "-c", "4", "--part", "1", "--color", "blue", "--fast",
                 "--no-safe") == Options(where="here", files=("a", "b"), rates=(1.0, 2.5), count=4, share=1.0, size=3,
                                         color="blue", fast=True, safe=False)
    assert parse("--rates", "none").rates == parse("--rates", "").rates == ()
    assert {field: (one.type, one.is_list) for field, one in flags_of(Options).items()} == {
        "where": (str, False), "files": (str, True), "rates": (float, True), "count": (int, False),
        "share": (float, False), "size": (int, False), "color": (str, False), "fast": (bool, False),
        "safe": (bool, False),
    }


@pytest.mark.parametrize(("argv", "words"), [
    (["--count", "0"], "--count 0: give a number of at least 1 and below 10"),
    (["-c", "10"], "--count 10: .* below 10"),
    (["--count", "x"], "--count: .*'x'"),
    (["--share", "0"], "--share 0: give a number above 0 and up to 1"),
    (["--share", "nan"], "--share nan: "),
    (["--rates", "1,-2"], "--rates 1,-2: .* at least 0"),
    (["--rates", "1,inf"], "--rates 1,inf: "),
    (["--rates", "1,x"], "--rates: '1,x' .*numbers"),
    (["--files", "a,,b"], "--files: 'a,,b' .*values such as A,B"),
    (["--color", "green"], "--color green: choose one of red, blue"),
    (["--fas"], "--fas"),
])
def test_a_wrong_value_is_named_with_its_range(argv, words):
    with pytest.raises(UserError, match=words):
        parse(*argv)


def test_a_required_flag_is_named():
    with pytest.raises(UserError, match="--size"):
        parse_flags(Options, "prog", "A program.", [])


def test_help_shows_defaults_and_choices(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    words = " ".join(capsys.readouterr().out.split())
    for text in ("-c COUNT, --count COUNT how many (default: all)", "in 100 % | less (default: 0.25)",
                 "--color {red,blue}", "--safe, --no-safe", "be fast --safe", "rates (default: 0.5,2)"):
        assert text in words, text
    assert words.index("files:") < words.index("numbers:") < words.index("options: --color")


def test_values_as_text():
    assert describe_section(Options(size=3, count=2), "numbers") == "rates 0.5,2, count 2, share 0.25, size 3"
    flags = flags_of(Options)
    assert [flags["safe"].describe(value) for value in (True, False)] == ["--safe", "--no-safe"]
    assert flags["files"].describe(("a", "b")) == "--files a,b"


def test_tables():
    first, *_, last = flag_tables(flags_of(Options), ["numbers"]).split("\n\n")
    assert first.splitlines()[:4] == [
        "| numbers | default | |", "|---|---|---|", "| `--rates` `R,R` | 0.5,2 | rates |",
        "| `-c`, `--count` | all | how many |"]
    assert "| `--share`, `--part` | 0.25 | in 100 % \\| less |" in first
    assert "| `--color` `red\\|blue` | red | a color |\n| `--fast` |  | be fast |\n" in last
    assert "| `--safe`, `--no-safe` | on |" in last


def test_the_generated_tables_are_up_to_date():
    with open(script.PATH, encoding="utf-8") as file:
        assert file.read() == script.generate(), "run python3 scripts/flag_tables.py"
