"""Ctrl-C ends a command within seconds, whatever it is doing: one line, no traceback, no process left.

SIGINT is blocked in every thread but one, which waits for it and then has the main thread raise KeyboardInterrupt. What
the command has started inherits the block, so that the workers of a sweep do not die each with a traceback of its own
when a terminal signals all of them: this process ends them. Where the main thread does not come back in time, because
a library swallows the exception or its cleaning up takes long, the process is ended all the same.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

#: Seconds that the main thread has to clean up.
GRACE = 1.5
#: By which the waiting thread reaches the main one. Nothing else here uses it.
WAKE = getattr(signal, "SIGVTALRM", None)

_advice = "nothing was begun; the same command starts again"
_told, _begun = threading.Event(), threading.Event()
#: What to raise in the main thread in the place of an interrupt.
_instead: BaseException | None = None


def advise(how: str) -> None:
    """What the line says from now on: how to go on."""
    global _advice
    _advice = how


def tell() -> None:
    """Prints the line, once."""
    if not _told.is_set():
        _told.set()
        behind = "\n" if sys.stderr.isatty() else ""  # a bar may stand on the line, and the terminal's ^C
        print(f"{behind}interrupted: {_advice}", file=sys.stderr, flush=True)


def hush() -> None:
    """From now on this process ends without a line."""
    _told.set()


def stop(error: BaseException) -> None:
    """Has the main thread raise it, as soon as that is back in Python. Nothing where it is not watched."""
    global _instead
    if WAKE is not None and signal.getsignal(WAKE) is _interrupted:
        _instead = error
        signal.pthread_kill(threading.main_thread().ident or 0, WAKE)


def watch() -> None:
    """From now on SIGINT and SIGTERM end this process as said above. For the main thread of a command."""
    signal.signal(signal.SIGTERM, _terminate)
    if WAKE is None or not hasattr(signal, "sigwait"):  # Windows
        return
    # Whichever comes: some libraries unblock SIGINT when they start a process of their own.
    signal.signal(signal.SIGINT, _interrupted)
    signal.signal(WAKE, _interrupted)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    sys.unraisablehook = _unraisable
    threading.Thread(target=_wait, args=[threading.get_ident()], name="interrupt", daemon=True).start()


def shield_workers() -> None:
    """To be called before joblib starts workers, which are to inherit the block: it and multiprocessing start a process
    that tracks resources first, and unblock SIGINT then."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not _interrupted:
        return  # not watched
    for name in ("multiprocessing.resource_tracker", "joblib.externals.loky.backend.resource_tracker"):
        importlib.import_module(name).ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def end(status: int) -> None:
    """Ends this process and all that it has started. Nothing that they would still say is heard."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _end_children()
    os._exit(status)


def _wait(main: int) -> None:
    assert WAKE is not None
    while True:
        signal.sigwait({signal.SIGINT})
        if _begun.is_set():
            _give_up()
        signal.pthread_kill(main, WAKE)


def _interrupted(_: int, __: FrameType | None) -> None:
    """In the main thread: the first time it may clean up, for a while; the second time the process ends at once."""
    global _instead
    if _instead is not None:
        error, _instead = _instead, None
        raise error
    if _begun.is_set():
        _give_up()
    _begun.set()
    late = threading.Timer(GRACE, _give_up)
    late.daemon = True
    late.start()
    raise KeyboardInterrupt


def _give_up() -> None:
    tell()
    end(130)


def _unraisable(error: Any) -> None:
    """Python prints what is raised in a finalizer, and goes on. An interrupt is raised again, a little later."""
    if error.exc_type is KeyboardInterrupt and WAKE is not None:
        _begun.clear()
        threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, WAKE]).start()
    else:
        sys.__unraisablehook__(error)


def _terminate(_: int, __: FrameType | None) -> None:
    """`kill` ends a run as an interrupt does, through its clean-up."""
    if not _told.is_set():
        print("terminated", file=sys.stderr)
    sys.exit(143)


def _end_children() -> None:
    """And those that they start meanwhile."""
    import psutil

    for patience in (0.3, 0.0, 0.0):
        with contextlib.suppress(psutil.Error):
            children = psutil.Process().children(recursive=True)
            for child in children:
                with contextlib.suppress(psutil.Error):
                    child.terminate()
            for child in psutil.wait_procs(children, timeout=patience)[1]:
                with contextlib.suppress(psutil.Error):
                    child.kill()
