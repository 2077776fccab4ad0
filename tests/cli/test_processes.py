"""What a user is told when one of several processes ends."""

import subprocess
import sys

import pytest

from probdiff.cli import processes

KILLED = "probdiff: process 1 of 2 was ended by SIGKILL; is memory short?"


@pytest.mark.parametrize(
    ("programs", "code", "said"),
    [
        (["sleep(60)", "os.kill(os.getpid(), 9)"], 137, KILLED),
        (["sleep(0.5); sys.exit(1)", "os.kill(os.getpid(), 9)"], 137, KILLED),  # left alone, it fails as well
        (["sleep(60)", "print('wrong', file=sys.stderr); sys.exit(3)"], 3, "wrong"),
        (["sleep(1); sys.exit(1)", "print('wrong', file=sys.stderr); sys.exit(3)"], 3, "wrong"),
        (["print('wrong', file=sys.stderr); sys.exit(3)", "sleep(60)"], 3, "wrong"),
        (["pass", "print('not shown'); print('nor this', file=sys.stderr)"], 0, ""),
    ],
)
def test_the_exit_of_one_of_several_processes_is_told(programs, code, said, monkeypatch, capfd):
    popen, left = subprocess.Popen, iter(programs)

    def instead(_, **kwargs):
        return popen([sys.executable, "-c", f"import os, sys; from time import sleep; {next(left)}"], **kwargs)

    monkeypatch.setattr(processes, "_GRACE", 2.0)
    monkeypatch.setattr(subprocess, "Popen", instead)
    assert processes.start_processes(2) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.strip() == said
