"""The ``effnet-fast`` command. Each command is a module of this package, imported only when it is asked for.

A command's module has a docstring (its --help), ``add_arguments(parser)`` and ``run(arguments) -> exit code``.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = {
    "doctor": "what is installed here, and which backends can run",
    "summary": "a network stage by stage: operators, channels, parameters, MACs",
    "scale": "a network from the compound scaling law, or the largest one within a budget",
    "grid": "the paper's grid search for the law's coefficients, by real training on scanned digits",
    "tables": "the paper's tables, computed beside published, with the difference and whether it follows",
    "predict": "classify images",
    "cam": "where in an image the evidence for a class is",
    "train": "train or fine-tune a network on images, with recipes, exact resumption and any number of GPUs",
    "lab": "how optimizer, learning rate, momentum and size change what ResNets learn: a figure for each",
    "eval": "accuracy on the held-out images of a data set",
    "bench": "a network's speed beside every peer that is installed, each checked",
    "convert": "rewrite a checkpoint in the layout of timm, torchvision or lukemelas",
    "demo": "train, save, reload, predict and explain on real scanned digits, offline, in about two minutes",
}
# Modules that an extra brings, the packages that have them, and the extra.
_EXTRAS = {
    "PIL": ("Pillow", "cli"),
    "tqdm": ("tqdm", "cli"),
    "sklearn": ("scikit-learn", "cli"),
    "torchvision": ("torchvision", "train"),
    "matplotlib": ("matplotlib", "bench"),
    "scipy": ("scipy", "train"),
}
BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for bad input (one line on stderr), 130 where interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if sys.stdout is None:
            raise OSError("standard output is closed; an open one, or /dev/null, would do")
        code = _run(argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()  # whoever read it has gone
        return BROKEN_PIPE
    except (ValueError, TypeError, OSError, ImportError) as error:
        print_error(error, training=argv[:1] in (["train"], ["lab"]))
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:
            _drop_output()  # the disk is full, which the line above says
        return BAD_INPUT


def _drop_output() -> None:
    """The interpreter must not complain when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_error(error: Exception, training: bool = False) -> None:
    """One line on stderr. ``training``: the command wants all that the train extra brings."""
    text = str(error)
    if isinstance(error, ModuleNotFoundError):
        found = _EXTRAS.get((error.name or "").split(".")[0])
        if found is None:
            raise error
        package, extra = found[0], "train" if training else found[1]
        text = f"this needs {package}: pip install 'effnet-fast[{extra}]' would do"
    elif isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    say("error", text or type(error).__name__)


def say(kind: str, text: str) -> None:
    """One line on stderr, where there is one: an error, a warning, a note."""
    if sys.stderr is not None:
        print(f"effnet-fast: {kind}:", " ".join(text.split()), file=sys.stderr)


def _run(argv: list[str]) -> int:
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print("usage: effnet-fast COMMAND ...   (effnet-fast COMMAND --help says more)\n")
        print("\n".join(f"  {command:<9}{line}" for command, line in COMMANDS.items()))
        return 0
    if name == "--version":
        from effnet_fast import __version__

        print(f"effnet-fast {__version__}")
        return 0
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown command {name!r}; {nearest!r} would do (effnet-fast --help gives all)")
    command = importlib.import_module(f"effnet_fast.cli.{name}")
    parser = _Parser(
        prog=f"effnet-fast {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    try:
        arguments = parser.parse_args(argv[1:])
    except SystemExit:  # --help has been printed
        return 0
    return int(command.run(arguments))
