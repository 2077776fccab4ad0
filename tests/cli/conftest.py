import sys
import warnings

import pytest

from probdiff import cli


def run(monkeypatch, capsys, *arguments):
    """The exit code, and what the command printed on standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["probdiff", *map(str, arguments)])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return (stopped.value.code or 0, *capsys.readouterr())


@pytest.fixture
def probdiff(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run(monkeypatch, capsys, *arguments)
