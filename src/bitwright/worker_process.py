"""Work in a process of its own: peak memory is then that work's alone, and a crash is nobody else's.

The worker is a module run with `-m` and the path of a file, which says what is asked and takes what was found. It
prints its progress as JSON lines, ends with the process that started it, whose end closes its standard input, and says
on stderr, in its last line, why it failed.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from bitwright.errors import BitwrightError
from bitwright.progress import Progress

ORPHANED = 3


def run_worker(module: str, file: Path, log: Path, progress: Progress) -> str | None:
    """Run a worker in a new process of this interpreter, with as many threads; return why it failed, or None.

    Args:
        module: of the worker, such as `bitwright.bench_worker`.
        file: what is asked of it.
        log: takes what it writes to stderr.
        progress: called with what the worker reports.
    """
    environment = {"OMP_NUM_THREADS": str(torch.get_num_threads()), **os.environ}
    command = [sys.executable, "-m", module, str(file)]
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                what, done, total = json.loads(line)
                progress(what, done, total)
            status = process.wait()
        finally:
            process.kill()
    if status == 0:
        return None
    if status < 0:
        return f"its process was killed by {signal.Signals(-status).name}, perhaps for want of memory"
    said = log.read_text(encoding="utf-8", errors="replace").strip()
    return said.splitlines()[-1] if said else f"its process ended with status {status}"


def serve(work: Callable[[Path, Progress], None]) -> int:
    """Entry point of a worker's process: do the work of the file named on the command line; return the exit status."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no progress
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def progress(what: str, done: int, total: int) -> None:
        print(json.dumps([what, done, total]), file=channel, flush=True)

    try:
        work(Path(sys.argv[1]), progress)
    except BitwrightError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock a thread would keep beyond the interpreter's end
        pass
    os._exit(ORPHANED)
