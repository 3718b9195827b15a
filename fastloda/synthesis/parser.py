"""The options of a subcommand, built from its function's signature and docstring."""

import argparse
import inspect
import re
from collections.abc import Callable, Sequence

import docstring_parser
import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

from fastloda.errors import UserError

POSITIONAL = ("table",)
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w.-]*")


class _Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A help formatter that keeps the line breaks of the description."""


class _Parser(ArgumentParser):
    """A parser that raises errors instead of exiting, and names types as Python does."""

    def __init__(self, **options):
        options |= {"exit_on_error": False, "formatter_class": _Help}  # jsonargparse passes its own for a nested class
        super().__init__(**options)

    def format_help(self) -> str:
        return _OPTION.sub(_dashed, re.sub(r"<class\s+'([\w.]+)'>", r"\1", super().format_help()))


def parse(name: str, function: Callable, options: Sequence[str]) -> dict:
    """Parse the function's arguments from options and from the files that the options name.

    Raises:
        UserError: an option is unknown, missing or malformed.
        SystemExit: after --help.
    """
    parser = build_parser(name, function)
    try:
        chosen = parser.instantiate(parser.parse_args([_underscored(option) for option in options])).as_dict()
    except ArgumentError as error:
        raise UserError(_with_dashes(" ".join(str(error).split()))) from error
    del chosen["config"]
    return chosen


def _dashed(option: re.Match) -> str:
    """Write an option as it is shown, with dashes: --skip-unreadable."""
    return option[0].replace("_", "-")


def _underscored(argument: str) -> str:
    """Write an option as the functions' arguments are written, with underscores: --skip_unreadable; values are unchanged."""
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument[2:].partition("=")
    return f"--{option.replace('-', '_')}{equals}{value}"


def _with_dashes(message: str) -> str:
    """Write the names of missing arguments as they are typed."""
    text, colon, names = message.partition("are required: ")
    return text + colon + ", ".join(n if n in POSITIONAL or not colon else f"--{n}" for n in names.split(", "))


def build_parser(name: str, function: Callable) -> ArgumentParser:
    """Make the parser of one subcommand, called `name` in its help (for example "fastloda pretrain")."""
    text = docstring_parser.parse(function.__doc__)
    parser = _Parser(prog=name, description=f"{text.short_description}\n\n{text.long_description or ''}")
    parser.add_argument("--config", action="config", help="YAML file of settings; options win over it")
    parameters = inspect.signature(function).parameters
    positional = {argument for argument in POSITIONAL if argument in parameters}
    for argument in positional:
        described = next(parameter.description for parameter in text.params if parameter.arg_name == argument)
        parser.add_argument(argument, type=parameters[argument].annotation, help=described)
    parser.add_function_arguments(function, as_group=False, as_positional=False, skip=positional)
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:  # `--public` alone means `--public true`
            action.nargs, action.const = "?", True
    return parser


def as_yaml(result: dict) -> str:
    """Convert a subcommand's result to the YAML that is printed."""
    return yaml.safe_dump(result, sort_keys=False, allow_unicode=True, width=1000)
