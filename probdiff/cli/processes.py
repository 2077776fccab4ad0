"""This command in several processes of one machine, joined over loopback."""

import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress

_GRACE = 3.0  # seconds


def start_processes(n: int) -> int:
    """Runs this command in n processes and returns 0, or the exit code of the one that failed, 128 + its signal if any.

    The first process prints. What the others say of an error comes after it, and which of them a signal ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    start = f"import sys, jax; jax.distributed.initialize({address!r}, {n}, int(sys.argv.pop(1)))"
    start += "; from probdiff.cli import main; main()"
    with tempfile.TemporaryFile("w+") as of_others:
        running = [
            subprocess.Popen(
                [sys.executable, "-c", start, str(i), *sys.argv[1:]],
                stdout=subprocess.DEVNULL if i else None,
                stderr=of_others if i else None,
            )
            for i in range(n)
        ]
        try:
            while not any(process.poll() for process in running) and any(p.poll() is None for p in running):
                time.sleep(0.1)
            ended = [process.returncode for process in running]
            if any(ended):
                with suppress(subprocess.TimeoutExpired):
                    running[0].wait(_GRACE)  # it may have the same to tell
        finally:
            for process in running:
                process.kill()
            for process in running:
                process.wait()
        failed = [i for i, code in enumerate(ended) if code]
        if not failed:
            return 0
        of_others.seek(0)
        for line in dict.fromkeys(of_others.read().splitlines()):
            print(line, file=sys.stderr)
    first = min(failed, key=lambda i: ended[i])  # one ended by a signal before those that it left alone
    code = ended[first]
    if code < 0:
        name = signal.Signals(-code).name
        print(f"probdiff: process {first} of {n} was ended by {name}; is memory short?", file=sys.stderr)
    return code if code > 0 else 128 - code
