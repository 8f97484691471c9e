"""The command line: ``wanquant ptq|train|eval ...``, with ``report``, ``export`` and ``doctor``.

The scripts ``ptq.py``, ``train.py`` and ``eval.py`` call it too. Imports come as late as they can, and from the first
line on an interrupt ends them too.
"""

from __future__ import annotations

import sys
from importlib import import_module

import wanquant
from wanquant import interrupt

USAGE = """usage: wanquant <program> [arguments]

  ptq      quantize a model and measure what it cost      wanquant ptq protect=boundary
  train    quantization-aware training beside PTQ         wanquant train qat=on
  eval     the verdict on a run, a sweep or a model       wanquant eval run=outputs/ptq/<run>
  report   the table of a sweep                           wanquant report outputs/ptq/<sweep>
  export   a checkpoint in another engine's layout        wanquant export <checkpoint> <target> --layout bf16
  doctor   what is installed, and which weights           wanquant doctor

wanquant <program> --help tells more. Config groups of your own: wanquant ptq --config-dir <folder> protect=mine"""

#: Configured by Hydra; the others have arguments of their own.
PROGRAMS = ("ptq", "train", "eval")
TOOLS = ("report", "export", "doctor")


def main(program: str | None = None) -> None:
    """Runs ``program``, or that named by the first argument. Exits 0 only where all went well, 1 after an error of the
    user's, 2 for a wrong command line, 130 when interrupted, 143 when terminated."""
    interrupt.watch()
    try:
        _run(program or _named())
    except KeyboardInterrupt:
        interrupt.tell()
        interrupt.end(130)
    except SystemExit as stopped:
        if stopped.code in (130, 143):
            interrupt.end(int(stopped.code))
        raise


def _named() -> str:
    """The first argument, which is taken away: what is left is the program's."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        print(USAGE)
        sys.exit(0)
    if name == "--version":
        print(wanquant.__version__)
        sys.exit(0)
    if name not in (*PROGRAMS, *TOOLS):
        print(
            f"error: {import_module('wanquant.choices').mistaken('program', name, (*PROGRAMS, *TOOLS))}",
            file=sys.stderr,
        )
        sys.exit(2)
    del sys.argv[1]
    return name


def _run(program: str) -> None:
    if program in PROGRAMS:
        import_module("wanquant.config").main(program)
    else:
        import_module(f"wanquant.{program}").main()
