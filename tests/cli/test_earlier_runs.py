"""A run folder of 2026-11, before a diffusion's identity went by value, is opened by every command.

It was written by `probdiff fit wine --num-chains 2 --num-timesteps 4 --width 8 --depth 1 --num-steps 300`.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from probdiff.cli import commands
from probdiff.datasets import Split
from probdiff.runs import Run

MADE = ["fit", "wine", "--num-chains=2", "--num-timesteps=4", "--width=8", "--depth=1", "--num-steps=300"]
HELD = Path(__file__).parents[1] / "data" / "wine"


@pytest.fixture
def wine(tmp_path):
    return shutil.copytree(HELD, tmp_path / "runs" / "wine")


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_it_is_reported_on(probdiff, wine):
    code, out, err = probdiff("report", wine)
    assert (code, err) == (0, "")
    assert "over 36 data" in out
    np.testing.assert_allclose(pd.read_csv(wine / "summary.csv")["K"], [-21.7492, -21.6868], atol=0.01)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
@pytest.mark.slow
def test_it_is_drawn_from_and_fills_cells(probdiff, wine):
    assert probdiff("sample", wine, "-n", 20, "--out", "draws.csv")[0] == 0
    rows = pd.read_csv("draws.csv").head(2)
    assert rows.shape == (2, 13)
    rows.loc[1, "alcohol"] = np.nan
    rows.to_csv("holes.csv", index=False)
    code, out, err = probdiff("impute", wine, "holes.csv", "-m", 3, "--num-particles", 200)
    assert (code, err) == (0, "")
    assert "1 empty cells in 2 rows filled 3 times" in out


@pytest.mark.slow
def test_its_derivation_is_checked(probdiff, wine):
    code, out, err = probdiff("check", wine, "--num-draws", 100, "--max-data", 2)
    assert code == 0, out + err


def test_rows_are_held_out_as_they_were(wine):
    """Of 1,000 rows of four features a share of 0.15, which later versions choose by themselves."""
    (wine / "run.json").unlink()
    split = Split(np.zeros((1000, 4)), np.zeros((2, 4)), tuple("abcd"))
    run = Run(wine, {"patience": None})
    assert run.stopping(split) == {"validation": 0.15, "patience": 20}
    assert Run(wine / "new", run.options).stopping(split) == {}


def test_it_goes_on_from_its_checkpoint(probdiff, wine, monkeypatch):
    """Unfinished, and without its last checkpoint. On other machines sums are rounded otherwise, and so are digests."""
    monkeypatch.setattr(commands, "report_on", lambda *_, **__: None)
    losses = np.load(wine / "fit.npz")["losses"]
    for name in ("fit.npz", "run.json", "checkpoints/digests/3.sha256"):
        (wine / name).unlink()
    shutil.rmtree(wine / "checkpoints/steps/3")
    file = wine / "checkpoints/configuration.json"
    held = json.loads(file.read_text())
    for name in ("x", "validation", "initial state"):
        del held[name]
    file.write_text(json.dumps(held))
    code, _, err = probdiff(*MADE[:-1], "--num-steps=200", "--resume")
    assert code == 1
    assert "holds a run of another configuration: its num_steps is 300, this one's is 200" in err
    code, _, err = probdiff(*MADE, "--resume")
    assert (code, err) == (0, "")
    resumed = np.load(wine / "fit.npz")["losses"]
    np.testing.assert_array_equal(resumed[:, :200], losses[:, :200])
    np.testing.assert_allclose(resumed, losses, rtol=1e-3)
