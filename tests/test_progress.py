"""Where progress is shown, and where not."""

import io
import sys
import time

import nbformat
import pytest
from nbclient import NotebookClient

from probdiff.progress import of_long_work, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "show", "seen"), [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)]
)
def test_bars_are_for_those_who_watch(monkeypatch, stream, show, seen):
    monkeypatch.setattr(sys, "stderr", stream())
    assert list(progress(range(3), desc="fit", show=show)) == [0, 1, 2]
    assert ("fit: 100%" in sys.stderr.getvalue()) == seen


def test_elsewhere_it_is_a_line_a_minute(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr("probdiff.progress._LOGGED", 0.2)
    for _ in progress(range(4), desc="fit"):
        time.sleep(0.15)
    lines = sys.stderr.getvalue().splitlines()
    assert 1 <= len(lines) <= 3
    assert all(line.startswith("fit: ") and "/4 [" in line for line in lines)


def test_short_work_has_no_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(of_long_work(range(3), desc="rows")) == [0, 1, 2]
    assert sys.stderr.getvalue().strip() == ""


@pytest.mark.slow
def test_a_notebook_without_widgets_has_one():
    lines = ["import warnings", "warnings.simplefilter('ignore')", "from probdiff.progress import progress"]
    lines.append("list(progress(range(3), desc='fit'))")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("\n".join(lines))])
    NotebookClient(notebook, kernel_name="python3").execute()
    written = "".join(output["text"] for output in notebook.cells[0].outputs if output.get("name") == "stderr")
    assert "fit: 100%" in written
