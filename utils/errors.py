"""Errors that are the user's to fix: one clear line, never a traceback."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import functools
import io
import itertools
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

_SWITCH_VALUES = "true", "false", "yes", "no", "0", "1"  # what users give a flag that takes no value


class UserError(ValueError):
    """Something the user gave cannot work. The message names the flag or file, the value, and what to do."""


class Parser(argparse.ArgumentParser):
    """argparse's, but a mistake on the command line is a UserError too: one line instead of the whole usage.

    An argument @FILE stands for the words in this text file, which a shell would split them into. `#` begins a comment.
    An argument that itself begins with @, such as a directory, is written ./@name.
    """

    def __init__(self, prog: str, description: str) -> None:
        # No abbreviations: a flag that is added later must not change what an old command means.
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        for kind in (None, str):
            self.register("type", kind, not_empty)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's, but with @FILE, and the error for what is left over says what may be meant."""
        given = sys.argv[1:] if args is None else list(args)
        arguments = [word for argument in given for word in self._expand(argument)]
        parsed, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            self.error("; ".join([f"unrecognized arguments: {' '.join(unknown)}", *self._hints(arguments, unknown)]))
        return parsed

    def _expand(self, argument: str) -> list[str]:
        """What an argument stands for: itself, or the words in a file. Raises UserError for a file with a mistake."""
        if not argument.startswith("@"):
            return [argument]
        path, words = argument[1:], list[str]()
        try:
            with open(path, encoding="utf-8") as file:
                lines = file.read().splitlines()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise UserError(f"{argument}: the file of arguments {path} cannot be read ({reason}); give another, or "
                            f"./{argument} if the name begins with @") from None
        for number, line in enumerate(lines, 1):
            try:
                words += _split_line(line.strip().removesuffix("\\"))
            except ValueError as error:
                raise UserError(f"{path}: line {number}: {str(error).lower()}") from None
        if nested := [word for word in words if word.startswith("@")]:
            raise UserError(f"{path}: {nested[0]}: a file of arguments names no other; give both on the command line, "
                            f"or ./{nested[0]} if that is a name")
        try:  # alone, so that the message can say where the mistake is
            if unknown := self.parse_known_args(words)[1]:
                self.error("; ".join([f"unrecognized arguments: {' '.join(unknown)}", *self._hints(words, unknown)]))
        except UserError as error:
            if not str(error).startswith("the following arguments are required"):  # others may give them
                raise UserError(f"{path}: {error}") from None
        return words

    def _hints(self, arguments: list[str], unknown: list[str]) -> Iterator[str]:
        """What may be meant by arguments that no flag takes."""
        names = list(self._option_string_actions)
        for name in [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]:
            dashed = name.replace("_", "-")
            similar = [one for one in names if one.startswith(dashed)] or difflib.get_close_matches(dashed, names)
            if similar and name.startswith("--"):
                yield f"did you mean {similar[0]} instead of {name}?"
        for name, action in self._option_string_actions.items():
            following = arguments[arguments.index(name) + 1:] if name in arguments else []
            values = list(itertools.takewhile(lambda value: not value.startswith("-"), following))
            if action.nargs == 0 and values and (values[0] in unknown or values[0].lower() in _SWITCH_VALUES):
                yield f"{name} takes no value"
            elif str(action.metavar).endswith(",...") and set(values[1:]) & set(unknown):  # a list: FILE,FILE,...
                yield f"the values of {name} are one argument, with commas and without blanks"
        if any(before.endswith(",") and after in unknown for before, after in itertools.pairwise(arguments)):
            yield "a list such as DIR1,DIR2 is one argument, without blanks"

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _split_line(line: str) -> Iterator[str]:
    """The words of a line, as a shell splits them, up to a `#` that begins a word. Raises ValueError for an open quote.
    """
    stream = io.StringIO(line)
    lexer = shlex.shlex(stream, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""  # shlex's own comments begin within words, too
    while not line[stream.tell():].lstrip().startswith("#") and (word := lexer.get_token()) is not None:
        yield word


# What names from files may hold beside letters: line breaks, escape sequences that control the terminal, marks that
# reverse text, bytes that are no text. In a stream the line breaks, the tabs, and the step to the line above are those
# of this program and of tqdm.
_CONTROLS = "[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
_IN_MESSAGE, _IN_STREAM = re.compile(_CONTROLS), re.compile(rf"(?![\n\r\t]|\x1b\[A){_CONTROLS}")


def printable(message: object, controls: re.Pattern[str] = _IN_MESSAGE) -> str:
    """The message in one line, in which names from files are readable but have no effect."""
    return controls.sub(lambda found: ascii(found[0])[1:-1], str(message))


def escape_output() -> None:
    """Have whatever this process prints from now on show control characters as escapes, except the ends of lines."""
    def write(original: Callable[[str], Any], text: str) -> int:
        original(printable(text, _IN_STREAM))
        return len(text)

    os.environ["PYTHON_COLORS"] = "0"  # else the colors of tracebacks and --help (Python 3.13, 3.14) would be escapes
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and "write" not in vars(stream):
            vars(stream)["write"] = functools.partial(write, stream.write)


def not_empty(text: str) -> str:
    """The type of an argument that is text. Raises ArgumentTypeError."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a value, or drop it (is a variable of the shell not set?)")
    return text


class _Terminal(io.FileIO):
    """File descriptor 1 or 2. What cannot be written is dropped: a terminal that has gone must not end a run."""

    error: OSError | None = None  # the first one

    def write(self, data: Any) -> int:
        try:
            if (written := super().write(data)) is not None:
                return written
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        except OSError as error:
            if self.error is None:
                self.error = error
                warning = f"warning: stdout: cannot be written ({error.strerror}); continuing without it\n"
                with contextlib.suppress(OSError):
                    os.write(2, warning.encode() if self.fileno() == 1 else b"")
        return len(data)


def guard_output() -> None:
    """Have print, tqdm and warnings never fail in this process, whatever becomes of stdout and stderr.

    Characters that their encoding lacks, and bytes of file names that are no text, appear as escapes. Standard streams
    that were closed at the start are /dev/null, so that no other file gets their numbers.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # `number` itself, unless another file has it already
            os.set_inheritable(descriptor, True)
            setattr(sys, name, open(descriptor, "w" if number else "r", encoding="utf-8", errors="backslashreplace"))
        elif number and stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            terminal = io.BufferedWriter(_Terminal(number, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(terminal, stream.encoding, "backslashreplace",
                                                line_buffering=stream.line_buffering or stream.write_through))


def require_printed() -> None:
    """Raise UserError if something that was printed is lost, on a full disk for example. A reader may stop early."""
    sys.stdout.flush()
    terminal = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(terminal, _Terminal) and terminal.error is not None and terminal.error.errno != errno.EPIPE:
        raise UserError(f"stdout: cannot be written ({terminal.error.strerror}); what was printed is incomplete")


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run `main`; a UserError becomes one line on stderr and exit status 2; Ctrl-C one word and 130."""
    guard_output()
    escape_output()
    try:
        main()
        require_printed()
    except UserError as error:
        # torchrun ends all processes of a node when one has ended. All make the same mistake, so one prints it.
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK") != "0":
            time.sleep(10)  # for the first one
        else:
            print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
