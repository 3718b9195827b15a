"""The command `fastloda`: the pipeline's functions are its subcommands, their docstrings its help.

A bad input gives one line on stderr and exit code 2, before anything is changed; a bug keeps its traceback.
"""

import argparse
import inspect
import logging
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import docstring_parser
import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from fastloda import __version__
from fastloda.synthesis.account import account
from fastloda.synthesis.bench_report import bench_report
from fastloda.synthesis.demo import demo
from fastloda.synthesis.reproduce import TableName, reproduce
from fastloda.synthesis.stages import choose, evaluate, finetune, pretrain, sample

FUNCTIONS = (pretrain, choose, finetune, sample, evaluate, account, demo, reproduce, bench_report)
POSITIONAL = {"files": {"nargs": "+", "type": Path}, "table": {"type": TableName}}
COMMANDS: dict[str, Callable] = {f.__name__.replace("_", "-"): f for f in FUNCTIONS}
BAD_INPUT, INTERRUPTED = 2, 130
LONGEST_MESSAGE = 600  # characters

DESCRIPTION = """\
Fine-tune a diffusion model on private images under differential privacy, and draw synthetic images from it.

  fastloda demo --run runs/demo                        all of it, on digits, with a report: the place to start

  fastloda pretrain --run runs/a                       a model of public images
  fastloda choose   --run runs/a --delta 1e-5          nearer to the private images; may be left out
  fastloda finetune --run runs/a --privacy.target_epsilon 10 --privacy.delta 1e-5
  fastloda sample   --run runs/a --count 2000          private synthetic images
  fastloda evaluate --run runs/a                       what a classifier learns from them
  fastloda account  --delta 1e-5 --sample_rate 0.01 --noise_multiplier 1 --steps 1000
  fastloda reproduce digits --quick                    every method that the paper compares, as its tables do
  fastloda bench-report bench/results/*.json           tables and plots of what `pytest bench/` measured

Every stage writes into the run's folder, skips what is there, and continues what was interrupted. Settings come from
--config FILE (YAML; the config.yaml that each stage writes is one) and from options, which win.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code. The result goes to stdout, as YAML; notes and errors to stderr."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = next((a for a in arguments if a in COMMANDS), None)
    try:
        with _notes_to_stderr():
            parser = build_parser()
            chosen = parser.instantiate(parser.parse_args(arguments))
            result = run(chosen)
        if result is not None:
            print(yaml.safe_dump(result, sort_keys=False, allow_unicode=True, width=1000), end="")
        return 0
    except KeyboardInterrupt:
        print(f"fastloda {command}: interrupted; the same command continues", file=sys.stderr)
        return INTERRUPTED
    except (ArgumentError, ValueError, OSError) as error:
        if not _is_bad_input(error):
            raise
        print(" ".join(filter(None, ("fastloda", command))) + f": error: {_one_line(error, command)}", file=sys.stderr)
        return BAD_INPUT


def build_parser() -> ArgumentParser:
    """One subcommand for each of COMMANDS, its options and their help taken from signature and docstring."""
    parser = _Parser(prog="fastloda", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"fastloda {__version__}")
    subcommands = parser.add_subcommands(dest="command")
    for name, function in COMMANDS.items():
        text = docstring_parser.parse(function.__doc__)
        sub = _Parser(description=f"{text.short_description}\n\n{text.long_description or ''}")
        sub.add_argument("--config", action="config", help="YAML file of settings; options win over it")
        positional = POSITIONAL.keys() & inspect.signature(function).parameters
        for argument in positional:
            sub.add_argument(argument, **POSITIONAL[argument], help=_parameter_help(text, argument))
        sub.add_function_arguments(function, as_group=False, as_positional=False, skip=positional)
        _switches(sub)
        subcommands.add_subcommand(name, sub, help=text.short_description)
    return parser


def _parameter_help(text: docstring_parser.Docstring, name: str) -> str:
    return next(parameter.description for parameter in text.params if parameter.arg_name == name)


def run(chosen: Namespace) -> dict | None:
    """Call the subcommand's function."""
    options = chosen[chosen.command].as_dict()
    options.pop("config")
    return COMMANDS[chosen.command](**options)


class _Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines."""


class _Parser(ArgumentParser):
    """Raises instead of exiting, and names a type as Python users do."""

    def __init__(self, **options):
        super().__init__(exit_on_error=False, formatter_class=_Help, **options)

    def format_help(self) -> str:
        return re.sub(r"<class\s+'([\w.]+)'>", r"\1", super().format_help())


def _switches(parser: ArgumentParser) -> None:
    """`--public` alone means `--public true`."""
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:
            action.nargs, action.const = "?", True


@contextmanager
def _notes_to_stderr() -> Iterator[None]:
    """What the package logs and warns of, a line each; logging and warnings are as they were after."""
    logger, handler = logging.getLogger("fastloda"), logging.StreamHandler(sys.stderr)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: logger.warning("warning: %s", message)
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _is_bad_input(error: Exception) -> bool:
    """A library's ValueError means that we called it wrongly: a bug. One of our own checks is the user's to mend."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    ours = frame.f_globals.get("__name__", "").startswith("fastloda")
    return ours or isinstance(error, (ArgumentError, OSError))


def _one_line(error: Exception, command: str | None) -> str:
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    else:
        text = re.sub(rf"\b{command}\.", "--", str(error))  # jsonargparse says finetune.privacy.delta
    return textwrap.shorten(text, LONGEST_MESSAGE, placeholder=" ...")
