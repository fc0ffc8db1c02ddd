"""Run a program that must not outlive `lorry up`, even when that is killed with SIGKILL.

    python -m cli.up.tether [--stop INT] [--kill QUIT] [--user NAME] FD -- COMMAND…

The tether and the program each lead a session, so that the terminal's Ctrl-C reaches `lorry up`
alone. FD is the read end of a pipe that only `lorry up` can write to:

- SIGTERM asks the program to stop, by the signal that means so to it (postgres: SIGINT);
- SIGQUIT kills it and its whole session (postgres gets its own SIGQUIT first);
- the pipe's end, which is the death of `lorry up`, does the one, and the other `GRACE_SECONDS`
  later.

The exit code is the program's.
"""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from workers.process_tree import kill_all, run_child

#: Time for an orderly stop once `lorry up` is gone.
GRACE_SECONDS = 5.0
#: Time for a program that takes others along when it is killed by a signal it can handle: the
#: backends of postgres lead sessions of their own.
KILL_SECONDS = 1.0


def command(
    argv: Sequence[str],
    fd: int,
    *,
    stop: signal.Signals = signal.SIGTERM,
    kill: signal.Signals = signal.SIGKILL,
    user: str | None = None,
) -> list[str]:
    """The command line that runs `argv` tethered to the pipe `fd`."""
    options = ["--stop", stop.name, "--kill", kill.name, *(["--user", user] if user else [])]
    return [sys.executable, "-m", "cli.up.tether", *options, str(fd), "--", *argv]


def main() -> int:
    """Run the command line's program until it ends."""
    parser = argparse.ArgumentParser(prog="python -m cli.up.tether")
    parser.add_argument("--stop", type=signal.Signals.__getitem__, default=signal.SIGTERM)
    parser.add_argument("--kill", type=signal.Signals.__getitem__, default=signal.SIGKILL)
    parser.add_argument("--user")
    parser.add_argument("fd", type=int)
    parser.add_argument("argv", nargs="+")
    args = parser.parse_args()
    stop: signal.Signals = args.stop
    kill: signal.Signals = args.kill

    def watch(pid: int) -> None:
        signal.signal(signal.SIGQUIT, lambda _number, _frame: _thread(lambda: _kill(pid, kill)))
        _thread(lambda: _stop_at_end(args.fd, pid, stop, kill))

    return run_child(
        args.argv,
        forward={signal.SIGTERM: stop, signal.SIGINT: stop},
        user=args.user,
        started=watch,
    )


def _thread(work: Callable[[], None]) -> None:
    threading.Thread(target=work, daemon=True).start()


def _stop_at_end(fd: int, pid: int, stop: signal.Signals, kill: signal.Signals) -> None:
    while os.read(fd, 1):
        pass
    with suppress(ProcessLookupError):
        os.kill(pid, stop)
    time.sleep(GRACE_SECONDS)
    _kill(pid, kill)


def _kill(pid: int, kill: signal.Signals) -> None:
    if kill is not signal.SIGKILL:
        with suppress(ProcessLookupError):
            os.kill(pid, kill)
        time.sleep(KILL_SECONDS)
    kill_all(pid)


if __name__ == "__main__":
    sys.exit(main())
