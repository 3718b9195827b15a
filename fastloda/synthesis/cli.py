"""The command `fastloda`: its subcommands are functions of the package, and its help texts are the functions' docstrings.

Bad input gives exit code 2 and one line on stderr, plus one for each unreadable file, before anything is changed; a bug shows
its traceback. Modules that are slow to import wait until the subcommand is known. `torchrun -m -- fastloda finetune ...` starts
the ranks of one run, of which only rank 0 writes and prints; the other ranks print only errors of their own.
"""

import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from importlib import import_module

from fastloda import __version__
from fastloda.errors import UserError
from fastloda.synthesis.allocator import keep_freed_memory

COMMANDS = {  # name -> the module of the function of that name
    "synthesize": "synthesize",
    "demo": "demo",
    "pretrain": "stages",
    "choose": "stages",
    "label": "stages",
    "finetune": "stages",
    "sample": "stages",
    "evaluate": "stages",
    "report": "report.release",
    "account": "account",
    "reproduce": "reproduce",
}
ON_SEVERAL_RANKS = ("finetune",)
BAD_INPUT, INTERRUPTED = 2, 130
LONGEST_MESSAGE = 600  # characters

HELP = f"""\
usage: fastloda [--help] [--version] COMMAND [OPTIONS]

Fine-tune a diffusion model on private images under differential privacy, and draw synthetic images from it.

  fastloda demo --run runs/demo                        all of it, on digits, with a report: the place to start
  fastloda synthesize --public A --private B --epsilon 8 --out C    from two folders of images to synthetic ones

The stages of it, one by one:

  fastloda pretrain --run C --data A                   a model of public images
  fastloda choose   --run C --data B --public A --delta 1e-5        nearer to the private images; may be left out
  fastloda label    --run C --data B --delta 1e-5 --labels.noise_multiplier 2       says what samples show; may be left out
  fastloda finetune --run C --data B --privacy.target_epsilon 8 --privacy.delta 1e-5
  fastloda sample   --run C --count 2000               private synthetic images
  fastloda evaluate --run C --test D                   what a classifier learns from them

  fastloda report   --run C                            what is promised, on one page to sign before publication
  fastloda account  --delta 1e-5 --sample_rate 0.01 --noise_multiplier 1 --steps 1000
  fastloda reproduce digits --quick                    every method that the paper compares, as its tables do
  torchrun --nproc_per_node 4 -m -- fastloda finetune  on several GPUs, one process each

`fastloda COMMAND --help` lists the options of one of {", ".join(COMMANDS)}.

Every stage writes into the run's folder, skips what is there, and continues what was interrupted. Settings come from
--config FILE (YAML; the config.yaml that each stage writes is one) and from options, which win.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code. The result goes to stdout, as YAML; notes and errors to stderr."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if _rank() else nullcontext():
        match arguments:
            case ["-h" | "--help", *_]:
                print(HELP, end="")
                return 0
            case ["--version", *_]:
                print(f"fastloda {__version__}")
                return 0
            case [command, *_] if _started_by_torchrun() and command in COMMANDS and command not in ON_SEVERAL_RANKS:
                return _refuse(f"fastloda {command}", "runs in one process: start it without torchrun")
            case [command, *options] if command in COMMANDS:
                return _run(command, options)
    got = f"invalid choice: {arguments[0]!r}" if arguments else "no command"
    return _refuse("fastloda", f"{got}: choose from {', '.join(COMMANDS)}, or see fastloda --help")


def _run(command: str, options: Sequence[str]) -> int:
    name = f"fastloda {command}"
    keep_freed_memory()
    try:
        with _notes_to_stderr(), _process_group() if _started_by_torchrun() else nullcontext():
            function = command_function(command)
            from fastloda.synthesis.parser import as_yaml, parse

            parse = _parse_together if _started_by_torchrun() else parse
            result = function(**parse(name, function, options))
        if result is not None:
            print(as_yaml(result), end="")
        return 0
    except KeyboardInterrupt as interrupt:
        print(f"{name}: interrupted; {str(interrupt) or 'the same command continues'}", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        package = (error.name or "fastloda").partition(".")[0]
        if package == "fastloda":
            raise
        return _fail(name, f"{package} is not installed: pip install 'fastloda[synthesis]'")
    except OSError as error:
        of_file = f": {error.filename}" if error.filename else ""
        return _fail(name, f"{error.strerror}{of_file}" if error.strerror else str(error))
    except UserError as error:
        return _fail(name, str(error))


def _started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _rank() -> int:
    return int(os.environ["RANK"]) if _started_by_torchrun() else 0


@contextmanager
def _process_group() -> Iterator[None]:
    """Join the ranks that torchrun has started, inside the context."""
    import torch.distributed as dist
    from torch.cuda import is_available

    dist.init_process_group("cpu:gloo,cuda:nccl" if is_available() else "gloo")
    try:
        yield
        dist.barrier()  # gloo aborts a rank whose neighbour leaves while it is in their last exchange
    finally:
        dist.destroy_process_group()


def _parse_together(name: str, function: Callable, options: Sequence[str]) -> dict:
    """Parse a subcommand's arguments on all ranks, which must agree; only rank 0 shows progress, and reports a mistake."""
    from fastloda.privacy.ranks import World
    from fastloda.synthesis.parser import parse

    world, arguments, mistake = World.of(), {}, None
    try:
        arguments = parse(name, function, options)
    except UserError as error:
        mistake = error
    world.check_same(arguments | {"mistake": str(mistake)})
    if mistake:
        raise mistake if world.first else SystemExit(0)  # torchrun ends all ranks as soon as one fails
    return arguments | {"progress": arguments["progress"] and world.first}


def command_function(command: str) -> Callable[..., dict | None]:
    """Import the function of a subcommand."""
    return getattr(import_module(f"fastloda.synthesis.{COMMANDS[command]}"), command)


def _refuse(name: str, message: str) -> int:
    """Fail on rank 0 only: torchrun ends all ranks as soon as one fails, and rank 0 has to print the reason."""
    return 0 if _rank() else _fail(name, message)


def _fail(name: str, message: str) -> int:
    first, *more = (
        textwrap.shorten(line, LONGEST_MESSAGE, placeholder=" ...") for line in message.splitlines() or [""]
    )
    rank = f"rank {_rank()}: " if _rank() else ""
    print(f"{name}: {rank}error: {first}", *more, sep="\n", file=sys.stderr)
    return BAD_INPUT


@contextmanager
def _notes_to_stderr() -> Iterator[None]:
    """Print the package's log messages and warnings to stderr inside the context, each on a line; on rank 0 only."""
    logger = logging.getLogger("fastloda")
    handler = logging.NullHandler() if _rank() else logging.StreamHandler(sys.stderr)
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
