"""One definition per command-line flag: names, type, default, range, help and section stand in one place.

A program declares its options as a frozen dataclass:

    @dataclass(frozen=True)
    class Options:
        lr: float = flag("--lr", "--learning-rate", default=0.1, at_least=0, section="schedule", help="...")

The field's annotation gives the type: bool (a switch), int, float, str, tuple[str, ...] or tuple[float, ...] (both
comma-separated), each also with `| None`. The parser, the range checks and the README's tables follow from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from utils.errors import Parser, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Flag:
    """What a flag is, beside its type.

    names: "--lr", "--learning-rate"; a name without dashes is a positional argument, which may be left out.
    default_text: what --help says of the default, where the value itself says too little; "" says nothing.
    at_least, above, at_most, below: bounds of a number; it must be finite in any case.
    """

    names: tuple[str, ...]
    default: Any
    help: str
    section: str
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    default_text: str | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    @property
    def name(self) -> str:
        """The name that messages use: the first long one."""
        return next((name for name in self.names if name.startswith("--")), self.names[0])

    def described_default(self) -> str:
        """The default in words, "" for a switch that is off and where there is none."""
        if self.default_text is not None:
            return self.default_text
        if self.default is None or self.default is False or self.default in ("", ()):
            return ""
        if self.default is True:
            return "on"
        if isinstance(self.default, tuple):
            return ",".join(map(_number, self.default))
        return _number(self.default)

    def check(self, value: Any) -> None:
        """Raise UserError, naming flag, value and range, unless the number, or each of several, is in the range."""
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            low, high = self.at_least, self.at_most
            if not (math.isfinite(number) and (low is None or number >= low) and (high is None or number <= high)
                    and (self.above is None or number > self.above) and (self.below is None or number < self.below)):
                raise UserError(f"{self.name} {_number(number)}: give a number {self._range()}")

    def _range(self) -> str:
        bounds = [("of at least", self.at_least), ("above", self.above), ("up to", self.at_most), ("below", self.below)]
        words = [f"{relation} {_number(bound)}" for relation, bound in bounds if bound is not None]
        return " and ".join(words) or "that is finite"


def flag(*names: str, help: str, section: str = "options", default: Any = None, choices: Iterable[str] | None = None,
         **more: Any) -> Any:
    """A dataclass field that is a flag; the arguments are those of Flag."""
    choices = None if choices is None else tuple(choices)
    definition = Flag(names, default, help, section, choices=choices, **more)
    return dataclasses.field(default=default, metadata={"flag": definition})


def flags_of(options: type) -> dict[str, tuple[Flag, Any]]:
    """{field: (its Flag, its type)} of a dataclass, without the fields that are no flags."""
    types = typing.get_type_hints(options)
    return {field.name: (field.metadata["flag"], types[field.name])
            for field in dataclasses.fields(options) if "flag" in field.metadata}


def add_flags(
    parser: argparse.ArgumentParser, flags: Mapping[str, tuple[Flag, Any]], sections: Iterable[str] = ()
) -> None:
    """Add the flags, a group for each section: those in `sections` first and in that order."""
    groups: dict[str, Any] = {section: parser.add_argument_group(section) for section in sections}
    for field, (definition, kind) in flags.items():
        if definition.section not in groups:
            groups[definition.section] = parser.add_argument_group(definition.section)
        groups[definition.section].add_argument(*definition.names, **_arguments(field, definition, kind))


def _arguments(field: str, definition: Flag, kind: Any) -> dict[str, Any]:
    """The keyword arguments of argparse's add_argument."""
    default = definition.described_default()
    text = definition.help + (f" (default: {default})" if default else "")
    arguments: dict[str, Any] = {"default": definition.default, "help": text.replace("%", "%%")}
    if definition.names[0].startswith("-"):
        arguments["dest"] = field
    else:
        arguments["nargs"] = "?"
    value_type = next(part for part in (typing.get_args(kind) or (kind,)) if part is not type(None))
    if bool in (kind, value_type):
        on = definition.default is False
        return {**arguments, "action": "store_true" if on else argparse.BooleanOptionalAction}
    arguments["metavar"] = definition.metavar
    if definition.choices is not None:
        return {**arguments, "choices": definition.choices}
    if typing.get_origin(kind) is tuple or typing.get_origin(value_type) is tuple:
        part = typing.get_args(kind if typing.get_origin(kind) is tuple else value_type)[0]
        return {**arguments, "type": _numbers if part is float else _files}
    return {**arguments, "type": value_type}


def parse_flags(options: type[T], prog: str, description: str, argv: list[str] | None = None) -> T:
    """Parse `argv`, or the program's own arguments, and check the ranges. Raises UserError."""
    parser = Parser(prog, description)
    add_flags(parser, flags_of(options))
    parsed = options(**vars(parser.parse_args(argv)))
    check_ranges(parsed)
    return parsed


def check_ranges(options: Any) -> None:
    """Raise UserError, naming flag, value and range, for the first number that is outside of its range."""
    for field, (definition, _) in flags_of(type(options)).items():
        definition.check(getattr(options, field))


def flag_tables(flags: Mapping[str, tuple[Flag, Any]], sections: Iterable[str] = ()) -> str:
    """Markdown: a table for each section, in the order of `add_flags`."""
    rows: dict[str, list[str]] = {section: [] for section in sections}
    for definition, kind in flags.values():
        names = ", ".join(f"`{name}`" for name in definition.names)
        if definition.choices is not None:
            names += f" `{'|'.join(definition.choices)}`"
        elif definition.metavar is not None and bool not in (kind, *typing.get_args(kind)):
            names += f" `{definition.metavar}`"
        cells = (names.replace("|", "\\|"), definition.described_default(), definition.help.replace("|", "\\|"))
        rows.setdefault(definition.section, []).append("| " + " | ".join(cells) + " |")
    head = "| {} | default | |\n|---|---|---|\n"
    return "\n\n".join(head.format(section) + "\n".join(lines) for section, lines in rows.items())


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _numbers(text: str) -> tuple[float, ...]:
    """'10,16,21' -> (10.0, 16.0, 21.0); '' and 'none' -> (). One argument cannot swallow the positional one."""
    if text.strip() in ("", "none"):
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers separated by commas, such as 10,16,21") from None


def _files(text: str) -> tuple[str, ...]:
    """'a.bin,b.bin' -> ('a.bin', 'b.bin')."""
    paths = tuple(text.split(","))
    if not all(paths):
        raise argparse.ArgumentTypeError(f"{text!r}: give files separated by commas, such as lfw.bin,cfp_fp.bin")
    return paths
