"""One definition per command-line flag: its names, type, default, range, help and section.

A program declares its flags as the fields of a frozen dataclass:

    @dataclass(frozen=True)
    class Options:
        lr: float = flag("--lr", "--learning-rate", default=0.1, at_least=0, section="schedule", help="...")

The annotation gives the type: bool (a switch), int, float, str, tuple[str, ...] or tuple[float, ...] (values separated
by commas), each also as `... | None`. The parser, the checks, --help and the flag tables all derive from this.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import operator
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from utils.errors import Parser, UserError, not_empty

T = TypeVar("T")


@dataclass(frozen=True)
class Flag:
    """The definition of a flag."""

    names: tuple[str, ...]  # such as ("--lr", "--learning-rate"); without dashes: an optional positional argument
    help: str
    section: str = "options"
    default: Any = None
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    more_choices: str | None = None  # such as "timm:NAME": every value that begins like it is valid too
    default_text: str | None = None  # the default as --help shows it, if the value would not explain it; "" shows none
    required: bool = False  # the command line must contain the flag; its dataclass field has no default
    per_node: bool = False  # nodes of one run may have different values
    words: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # words that stand for values outside the range
    at_least: float | None = None  # bounds of a number, or of each number in a list; numbers are always finite
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    type: Any = None  # `flags_of` takes these two from the field's annotation
    is_list: bool = False

    @property
    def name(self) -> str:
        """The name in messages: the first long one, or the metavar of a positional argument."""
        return next((name for name in self.names if name.startswith("--")), self.metavar or self.names[0])

    def describe_default(self) -> str:
        """The default as text; "" if there is none or if it is a switch that is off."""
        if self.default_text is not None:
            return self.default_text
        return "" if self.default is None or self.default is False or self.default in ("", ()) else _text(self.default)

    def describe_help(self) -> str:
        """The help, with the choices unless the metavar shows them."""
        return f"{self.help}: {self._choices_text()}" if self.choices and self.metavar else self.help

    def _choices_text(self) -> str:
        return ", ".join([*(self.choices or ()), *([self.more_choices] if self.more_choices else [])])

    def describe(self, value: Any) -> str:
        """Name and value as on the command line: "--lr 0.1", "--compile", "--no-easy-margin"; or "no --compile"."""
        if self.type is bool:
            return self.name if value else f"no {self.name}" if self.default is False else f"--no-{self.name[2:]}"
        return f"{self.name} {_text(value)}"

    def check(self, value: Any) -> None:
        """Raise UserError if the value is outside the range or is none of the choices. None is always valid."""
        if value is None or value in self.words.values():
            return
        values = value if self.is_list else (value,)
        prefix = self.more_choices.removesuffix("NAME") if self.more_choices else None
        if self.choices is not None and not all(
                one in self.choices or prefix is not None and one.startswith(prefix) for one in values):
            raise UserError(f"{self.describe(value)}: choose {'from' if self.is_list else 'one of'} "
                            f"{self._choices_text()}")
        bounds = [(words, bound, holds) for words, bound, holds in (
            ("of at least", self.at_least, operator.ge), ("above", self.above, operator.gt),
            ("up to", self.at_most, operator.le), ("below", self.below, operator.lt)) if bound is not None]
        for number in values if self.type in (int, float) else ():
            if not math.isfinite(number) or not all(holds(number, bound) for _, bound, holds in bounds):
                which = " and ".join(f"{words} {_text(bound)}" for words, bound, _ in bounds) or "that is finite"
                raise UserError(f"{self.describe(value)}: give a number {which}")

    def _parse(self, text: str) -> Any:
        if text in self.words:
            return self.words[text]
        try:
            value = self.type(text)
            if value not in self.words.values():
                return value
            what = "another number"  # only the word stands for this one
        except ValueError:
            what = {int: "a whole number", float: "a number"}[self.type]
        raise argparse.ArgumentTypeError(" or ".join([f"{text!r}: give {what}", *self.words]))

    def add_to(self, group: Any, field: str) -> None:
        """Add the flag to an argparse parser or group. `field` is the attribute that gets the value."""
        default = self.describe_default()
        text = self.describe_help() + (f" (default: {default})" if default else "")
        # Without an argument default "" the parser can tell `--resume ""` from no --resume; the dataclass has it.
        arguments: dict[str, Any] = {"default": argparse.SUPPRESS if self.default == "" else self.default,
                                     "help": text.replace("%", "%%")}
        if self.names[0].startswith("-"):
            arguments |= {"dest": field, "required": self.required}
        else:
            arguments["nargs"] = "?"
        if self.type is bool:
            arguments["action"] = "store_true" if self.default is False else argparse.BooleanOptionalAction
        else:
            arguments["metavar"] = self.metavar or (self.choices and f"{{{','.join(self.choices)}}}")
            arguments["type"] = functools.partial(parse_list, self.type) if self.is_list else (
                not_empty if self.type is str else self._parse)
        group.add_argument(*self.names, **arguments)


def flag(*names: str, default: Any = None, choices: Iterable[str] | None = None, **settings: Any) -> Any:
    """A dataclass field that is a flag. The arguments are those of Flag; `help` is required."""
    definition = Flag(names, default=default, choices=None if choices is None else tuple(choices), **settings)
    return dataclasses.field(default=dataclasses.MISSING if definition.required else default,
                             metadata={"flag": definition})


def flags_of(options: type) -> dict[str, Flag]:
    """{field name: Flag} of a dataclass; fields that are not flags are left out."""
    annotations, flags = typing.get_type_hints(options), dict[str, Flag]()
    for field in dataclasses.fields(options):
        if "flag" in field.metadata:
            kind = annotations[field.name]
            if type(None) in typing.get_args(kind):  # ... | None
                kind = typing.get_args(kind)[0]
            is_list = typing.get_origin(kind) is tuple
            flags[field.name] = dataclasses.replace(field.metadata["flag"], is_list=is_list,
                                                    type=typing.get_args(kind)[0] if is_list else kind)
    return flags


def add_flags(parser: argparse.ArgumentParser, flags: Mapping[str, Flag], sections: Iterable[str] = ()) -> None:
    """Add the flags in one group per section. `sections` come first, in this order."""
    for section, members in _by_section(flags, sections).items():
        group = parser.add_argument_group(section)
        for field, definition in members.items():
            definition.add_to(group, field)


def parse_flags(options: type[T], prog: str, description: str, argv: list[str] | None = None) -> T:
    """Parse `argv` (default: the program's arguments) into the dataclass and check each value. Raises UserError."""
    parser = Parser(prog, description)
    add_flags(parser, flags_of(options))
    parsed = options(**vars(parser.parse_args(argv)))
    check_values(parsed)
    return parsed


def check_values(options: Any) -> None:
    """Raise UserError for the first flag whose value is outside its range or is none of its choices."""
    for field, definition in flags_of(type(options)).items():
        definition.check(getattr(options, field))


def describe_section(options: Any, section: str) -> str:
    """The values of a section's flags, such as "lr 0.1, step, lr-milestones 10,16,21" of "schedule"."""
    return ", ".join(definition.describe(value).removeprefix("--").removeprefix(f"{section} ")
                     for field, definition in flags_of(type(options)).items()
                     if definition.section == section and (value := getattr(options, field)) is not None
                     and value is not False)


def flag_tables(flags: Mapping[str, Flag], sections: Iterable[str] = ()) -> str:
    """Markdown: one table per section, in the order of `add_flags`."""
    tables = []
    for section, members in _by_section(flags, sections).items():
        lines = [f"| {section} | default | |", "|---|---|---|"]
        for definition in members.values():
            names = [name for name in definition.names if name.startswith("-")]
            value = definition.metavar or "|".join(definition.choices or ())
            if definition.type is bool:
                names += [f"--no-{name[2:]}" for name in names if definition.default is not False]
                value = ""
            usage = ", ".join(f"`{name}`" for name in names) + (f" `{value}`" if value else "")
            cells = usage.strip(), definition.describe_default(), re.sub(r"([<*])", r"\\\1", definition.describe_help())
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _by_section(flags: Mapping[str, Flag], sections: Iterable[str]) -> dict[str, dict[str, Flag]]:
    groups: dict[str, dict[str, Flag]] = {section: {} for section in sections}
    for field, definition in flags.items():
        groups.setdefault(definition.section, {})[field] = definition
    return {section: members for section, members in groups.items() if members}


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_text, value)) or "none"
    if value is True:
        return "on"
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse_list(kind: type, text: str) -> tuple[Any, ...]:
    """Numbers: '10,16,21' -> (10.0, 16.0, 21.0); '' and 'none' -> (). Files: 'a.bin,b.bin' -> ('a.bin', 'b.bin').

    The list is a single argument, so it cannot swallow the positional one. Raises ArgumentTypeError.
    """
    if kind is float and text.strip() in ("", "none"):
        return ()
    try:
        if not all(parts := text.split(",")):
            raise ValueError
        return tuple(map(kind, parts))
    except ValueError:
        what = "numbers such as 10,16,21" if kind is not str else "values such as A,B"
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of {what}") from None
