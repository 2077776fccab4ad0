"""The commands as a user runs them, and one clear line for each mistake."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import arviz as az
import jax
import numpy as np
import pandas as pd
import pytest
from helpers.diffusions import fit_of, light_diffusion

from probdiff import cli, load, runs
from probdiff.cli import checking
from probdiff.cli.evaluation import how_it_ended
from probdiff.runs import Run

QUICK = ["--num-timesteps=4", "--num-steps=40", "--width=8", "--depth=1", "--patience=0"]
OWN = ["fit", "own.csv", *QUICK, "--dequantise"]
LIGHT = [*QUICK, "--schedule=linear"]  # the steps of such a fit are compiled soonest
FIGURES = {"samples", "marginals", "distances", "schedule", "elbo_parts", "loss"}
OF_COLUMNS = {"quantiles", "correlations", "principal_components"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run on a table of one's own."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(300, 3)) * [1.0, 20.0, 0.01], columns=["height", "weight", "ratio"])
    table["ratio"] += table["height"] / 100
    table["weight"] = table["weight"].round()  # still floating-point
    table["count"] = rng.poisson(30, 300)
    table.to_csv(folder / "own.csv", index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["probdiff", *OWN])
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert not stopped.value.code
    return folder


@pytest.fixture
def own(made, tmp_path):
    """A copy of it, in the working folder."""
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True) / "runs" / "own"


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_impute_fills_the_empty_cells_alone(probdiff, own):
    """With integers where the column of the training table has their dtype, and not by the values in either."""
    features = ["height", "weight", "ratio", "count"]
    table = pd.read_csv("own.csv").head(5).astype(float)
    table.loc[1, "weight"] = table.loc[3, "height"] = table.loc[3, "count"] = np.nan
    table.loc[4] = np.nan
    given = table[features[::-1]].assign(name=list("abcde"))  # in another order, with a column that was not fitted
    given.to_parquet("holes.parquet")
    code, said, complaint = probdiff("impute", own, "holes.parquet", "-m", 7, "--num-particles", 100)
    assert not code, complaint
    assert "7 empty cells in 5 rows filled 7 times" in said
    filled = pd.read_csv(own / "holes-imputed.csv")
    assert filled.columns.tolist() == ["row", "draw", *given.columns]
    assert (filled["name"] == given["name"].loc[filled["row"]].to_numpy()).all()
    assert len(filled) == 35
    assert filled["count"].dtype.kind == "i"
    assert not filled.isna().any(axis=None)
    repeated = table.loc[filled["row"], features].reset_index(drop=True)
    known = ~repeated.isna()
    np.testing.assert_allclose(filled[repeated.columns].where(known), repeated, rtol=1e-6)
    assert (filled.groupby("row").nunique().loc[4, features] > 3).all()
    assert (filled["count"] == filled["count"].round()).all()
    assert (filled["weight"] != filled["weight"].round())[filled["row"].isin([1, 4])].all()
    separate = ["-m", 2, "--num-particles", 100, "--separate", "--out", "one.csv"]
    assert not probdiff("impute", own, "holes.parquet", *separate)[0]
    for i in range(2):
        one = pd.read_csv(f"one-{i}.csv")
        assert one.columns.tolist() == given.columns.tolist()
        known = ["name", "height"]
        np.testing.assert_array_equal(one[known].iloc[:3], given[known].iloc[:3])
    assert not Path("one.csv").exists()
    table.assign(count=table["count"] + 0.5).to_csv("halves.csv", index=False)
    assert not probdiff("impute", own, "halves.csv", "-m", 7, "--num-particles", 100)[0]
    assert (pd.read_csv(own / "halves-imputed.csv")["count"][:7] == table["count"][0] + 0.5).all()
    dt = az.from_netcdf(own / "holes-imputed-draws.nc")
    assert dict(dt["posterior"].dataset.sizes) == {"chain": 8, "draw": 100, "datum": 3, "feature": 4}
    for group in ("posterior", "filters", "evidence", "observed_data"):
        assert dt[group]["datum"].to_numpy().tolist() == [1, 3, 4]  # rows without empty cells are not drawn
    for arguments, message in (
        (["holes.parquet", "-m", 0], "--num-draws is 0"),
        (["holes.parquet", "--out", "holes.npy"], "--out is holes.npy; it must end in .csv"),
        (["own.csv"], "the table has no empty cell"),
        (["own.xlsx"], "the files read are"),
        (["none.csv"], "none.csv does not exist"),
    ):
        code, _, complaint = probdiff("impute", own, *arguments)
        assert code == 1
        assert message in complaint


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_fit_on_a_table_leaves_the_run_folder(own):
    assert {file.stem for file in own.glob("*.png")} == FIGURES | OF_COLUMNS
    assert all(file.stat().st_size > 5000 for file in own.glob("*.png"))
    summary = pd.read_csv(own / "summary.csv")
    assert len(summary) == 2
    assert np.isfinite(summary[["K", "K se", "K bits", "worst R-hat"]].to_numpy()).all()
    np.testing.assert_allclose(summary["K bits"], summary["K"] / np.log(2))
    dt = az.from_netcdf(own / "fit.nc")
    assert dt["posterior"]["feature"].to_numpy().tolist() == ["height", "weight", "ratio", "count"]
    assert json.loads((own / "run.json").read_text())["num_timesteps"] == 4
    assert not list(own.glob(".*"))


@pytest.mark.parametrize(
    ("taken", "steps", "checks", "said"),
    [
        (400, 400, 0, ""),
        (300, 300, 5, "Fitted for 300 of 400 steps, after which rows held out in turn were most likely"),
        (300, 100, 3, "Stopped at 300 of 400 steps: no progress in 2 checks; best at 100"),
        (300, 0, 3, "no better than a Gaussian"),
    ],
)
def test_how_a_fit_ended_is_said(taken, steps, checks, said):
    fit = fit_of(light_diffusion(), {})
    ended = replace(
        fit, stacked_losses=np.zeros((1, taken)), stacked_validation=np.zeros((1, checks)), steps=np.array([steps])
    )
    line = how_it_ended(ended, 400)
    assert said in line
    assert line.count("\n") == (said != "")


@pytest.mark.slow
def test_check_prints_the_ledger_of_a_run_and_exits_with_one_where_a_row_fails(own, probdiff, monkeypatch):
    code, out, err = probdiff("check", own, "--num-draws", 200)
    assert code == 0, out + err
    tags = [line.split()[0] for line in out.splitlines() if line.startswith("N")]
    assert tags[1:] == [f"N{i}" for i in range(1, 18)]  # after the title
    real = checking.derivation.check

    def swapped(model, guide, *args, **kwargs):
        return real(guide, model, *args, **kwargs)

    monkeypatch.setattr(checking.derivation, "check", swapped)
    code, out, err = probdiff("check", own)
    assert code == 1
    assert "are model and guide swapped?" in out


@pytest.mark.slow
def test_known_density_gives_the_gap(probdiff):
    code, out, err = probdiff("fit", "8-gaussians", *LIGHT, "--covariance=fixed", "--num-chains=1", "--out", "ring")
    assert code == 0, err
    assert err == ""
    row = pd.read_csv("ring/summary.csv").iloc[0]
    assert row["gap L-K"] == pytest.approx(row["exact L"] - row["K"])
    assert row["gap L-K"] > 4 * row["gap se"]  # 40 steps teach little
    assert "gap L-K" in out
    assert "The reverse marginals" in out


def test_report_prints_the_same_table(own, probdiff):
    before = pd.read_csv(own / "summary.csv")
    (own / "summary.csv").unlink()
    code, out, err = probdiff("report", own)
    assert (code, err) == (0, "")
    assert "Held-out log-likelihood" in out
    pd.testing.assert_frame_equal(pd.read_csv(own / "summary.csv"), before)


def test_rows_that_are_known_in_part_are_drawn_from(own, probdiff):
    given = pd.DataFrame({"name": ["a", "b"], "weight": [10.0, np.nan]})
    given.to_csv("given.csv", index=False)
    code, out, err = probdiff("sample", own, "-n", 30, "--given", "given.csv", "--out", "draws.csv")
    assert (code, err) == (0, "")
    assert "30 draws for each row of chain" in out
    drawn = pd.read_csv("draws.csv")
    assert drawn.columns.tolist() == ["row", "draw", "name", "weight", "height", "ratio", "count"]
    assert (drawn["name"] == np.repeat(["a", "b"], 30)).all()
    assert (drawn["weight"][:30] == 10).all()
    assert drawn["weight"][30:].nunique() > 10
    assert drawn["count"].dtype.kind == "i"
    assert not probdiff("sample", own, "-n", 30, "--given", "given.csv", "--out", "draws.npy")[0]
    np.testing.assert_allclose(np.load("draws.npy"), drawn[["height", "weight", "ratio", "count"]], rtol=1e-6)
    given[["name"]].to_csv("none.csv", index=False)
    code, _, err = probdiff("sample", own, "--given", "none.csv", "--out", "draws.csv")
    assert code == 1
    assert "none.csv has none of the columns height, weight, ratio, count; its own are name" in err


def test_a_run_is_opened_from_any_folder_and_without_its_table(own, probdiff, monkeypatch, tmp_path):
    table = pd.read_csv("own.csv").astype(float).head(4)
    assert probdiff("sample", own, "-n", 20, "--out", "before.csv")[0] == 0
    Path("own.csv").unlink()
    moved = shutil.move(own, tmp_path / "elsewhere")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    assert probdiff("sample", moved, "-n", 20, "--out", "after.csv")[0] == 0
    pd.testing.assert_frame_equal(pd.read_csv("after.csv"), pd.read_csv("../before.csv"))
    table.loc[1, "weight"] = np.nan
    table.to_csv("holes.csv", index=False)
    assert probdiff("impute", moved, "holes.csv", "-m", 3, "--num-particles", 100)[0] == 0
    fit = load(moved)
    assert fit.features == ("height", "weight", "ratio", "count")
    assert fit.whole == (False, False, False, True)
    np.testing.assert_allclose(
        fit.chain(fit.best).sample(jax.random.key(0), 20), pd.read_csv("after.csv").to_numpy(), rtol=1e-6
    )


def test_an_earlier_run_wants_its_table_as_it_was(own, probdiff):
    (own / "held_out.npz").unlink()
    assert load(own).features == ("height", "weight", "ratio", "count")
    table = pd.read_csv("own.csv")
    table[::-1].to_csv("own.csv", index=False)
    code, _, err = probdiff("sample", own, "-n", 5, "--out", "draws.csv")
    assert code == 1
    assert err == "probdiff: own.csv has changed since the fit, so its held-out rows are not known\n"


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".parquet"])
def test_sample_writes_draws_in_the_units_of_the_data(own, probdiff, suffix):
    out = f"draws{suffix}"
    code, _, err = probdiff("sample", own, "-n", 50, "--out", out)
    assert (code, err) == (0, "")
    if suffix == ".npy":
        draws = np.load(out)
    else:
        frame = pd.read_csv(out) if suffix == ".csv" else pd.read_parquet(out)
        assert list(frame) == ["height", "weight", "ratio", "count"]
        draws = frame.to_numpy()
    if suffix == ".csv":
        assert "." not in Path(out).read_text().splitlines()[1].split(",")[3]
    assert draws.shape == (50, 4)
    np.testing.assert_array_equal(draws[:, 3], np.floor(draws[:, 3]))
    assert 5 < draws[:, 1].std() < 60


def test_a_run_made_before_there_were_bits_is_still_read(own, probdiff):
    options = json.loads((own / "run.json").read_text())
    for name in ("binary", "base_rate", "components"):
        del options[name]
    (own / "run.json").write_text(json.dumps(options))
    assert probdiff("sample", own, "--out", "draws.npy", "-n", 5)[0] == 0


@pytest.mark.slow
def test_a_table_of_bits_is_fitted_and_drawn_from(tmp_path, probdiff):
    bits = pd.DataFrame(np.random.default_rng(0).integers(0, 2, size=(300, 3)), columns=["a", "b", "c"])
    bits["never"] = 0
    bits.to_csv("bits.csv", index=False)
    code, _, error = probdiff("fit", "bits.csv", *QUICK)
    assert code
    assert "--binary" in error
    code, _, error = probdiff("fit", "bits.csv", "--binary", "--covariance=full", *QUICK)
    assert code
    assert "--covariance is of Gaussian chains" in error
    code, printed, error = probdiff("fit", "bits.csv", "--binary", "--components=2", *LIGHT)
    assert not code, error
    assert "base rate 0.5, components 2" in printed
    assert "warning" not in error
    summary = pd.read_csv(tmp_path / "runs" / "bits" / "summary.csv")
    assert np.isfinite(summary["worst R-hat"]).all()
    run_folder = tmp_path / "runs" / "bits"
    assert {path.stem for path in run_folder.glob("*.png")} == FIGURES
    assert probdiff("sample", run_folder, "--out", "draws.csv", "-n", 50)[0] == 0
    draws = pd.read_csv("draws.csv")
    assert list(draws) == ["a", "b", "c", "never"]
    assert set(np.unique(draws)) == {0, 1}


def test_resume_of_a_finished_run_says_the_same(own, probdiff):
    before = (own / "fit.npz").read_bytes()
    code, _, err = probdiff(*OWN, "--resume")
    assert (code, err) == (0, "")
    assert (own / "fit.npz").read_bytes() == before


def test_resume_needs_the_same_configuration(own, probdiff):
    files = {file: file.read_bytes() for file in own.rglob("*") if file.is_file()}
    code, _, err = probdiff(*OWN, "--resume", "--num-steps", 30)
    assert code == 1
    assert err == (
        "probdiff: runs/own holds a run of another configuration: its --num-steps is 40, this one's is 30, "
        "and only more steps are gone on with\n"
    )
    Path("own.csv").write_text(Path("own.csv").read_text().replace("0.1", "0.2"))
    code, _, err = probdiff(*OWN, "--resume")
    assert code == 1
    assert "holds a run of another configuration: its x" in err
    assert {file: file.read_bytes() for file in own.rglob("*") if file.is_file()} == files


def test_a_run_is_not_overwritten(own, probdiff):
    code, _, err = probdiff(*OWN)
    assert code == 1
    assert err == "probdiff: runs/own already holds a run: add --resume to go on with it, or --out for another folder\n"


@pytest.mark.parametrize("command", [pytest.param("fit", marks=pytest.mark.slow), "sample"])
def test_a_full_disk_is_one_line_and_loses_nothing(own, command):
    """A limit on the size of files stands for a full disk, in a process of its own."""
    files = {file: file.read_bytes() for file in own.parent.rglob("*") if file.is_file()}
    arguments = {
        "fit": [
            "fit",
            "own.csv",
            *LIGHT,
            "--covariance=fixed",
            "--dequantise",
            "--num-chains=1",
            "--out",
            "runs/other",
        ],
        "sample": ["sample", "runs/own", "-n", "5000", "--out", "runs/draws.npy"],
    }

    limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 4; exec "$@"', "bash"]
    command_line = [sys.executable, "-c", "from probdiff.cli import main; main()", *arguments[command]]
    done = subprocess.run(
        limited + command_line,
        cwd=own.parent.parent,
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("probdiff: could not write "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert {file: file.read_bytes() for file in files} == files
    assert not (own.parent / "draws.npy").exists()


ONE_LINE = {
    "unknown data": (["fit", "swiss-rol"], "no data set is called 'swiss-rol'"),
    "no such file": (["fit", "none.csv"], "none.csv does not exist"),
    "unreadable": (["fit", "damaged.parquet"], "damaged.parquet could not be read"),
    "not a number": (["fit", "words.csv"], "column 'name' does not hold numbers"),
    "unknown column": (["fit", "good.csv", "--columns", "a,z"], "no column 'z'; its columns are a, b"),
    "NaN": (["fit", "holes.csv"], "holes.csv has 1 entries that are NaN or infinite, in row(s) 7 and column(s) b"),
    "a column twice": (["fit", "good.csv", "--columns", "a,a"], "columns are a, a; each must be named once"),
    "integers": (["fit", "whole.csv"], "column 'a' holds integers"),
    "some integers": (["fit", "mixed.csv"], "column 'b' holds integers"),
    "option of tables": (["fit", "--columns", "x"], "swiss-roll is synthetic"),
    "empty": (["fit", "empty.csv"], "empty.csv could not be read"),
    "no rows": (["fit", "none_left.csv"], "0 row(s)"),
    "one row": (["fit", "one.csv"], "1 row(s)"),
    "constant": (["fit", "constant.csv"], "same value in every row of feature(s) b"),
    "T below 1": (["fit", "--num-timesteps", "0"], "probdiff: --num-timesteps is 0"),
    "batch too large": (["fit", "good.csv", "--batch-size", "1000"], "probdiff: --batch-size is 1000; x has"),
    "covariance": (["fit", "--covariance", "round"], "round"),
    "schedule": (["fit", "--schedule", "square"], "--schedule is square"),
    "unknown option": (["fit", "--num-timestep", "3"], "No such option: --num-timestep"),
    "bad value": (["fit", "--num-timesteps", "three"], "valid integer"),
    "unknown command": (["fits"], "No such command 'fits'"),
    "no run": (["report", "nowhere"], "nowhere holds no finished run"),
    "a file for a run": (["report", "good.csv"], "good.csv holds no finished run"),
    "a file for a folder": (["fit", "good.csv", "--out", "one.csv/a"], "--out is one.csv/a; one.csv is a file"),
    "no column": (["fit", "good.csv", "--columns", ""], "has no column ''; its columns are a, b"),
    "another encoding": (["fit", "latin.csv"], "latin.csv could not be read: its text is not in UTF-8"),
    "no sample file": (["sample", "nowhere", "--out", "draws.txt"], "it must end in"),
}


@pytest.mark.parametrize("case", ONE_LINE)
def test_mistakes_are_told_in_one_line(probdiff, case):
    rng = np.random.default_rng(0)
    good = pd.DataFrame(rng.normal(size=(40, 2)), columns=["a", "b"])
    good.to_csv("good.csv", index=False)
    good.assign(name="word").to_csv("words.csv", index=False)
    good.assign(b=1.0).to_csv("constant.csv", index=False)
    good.mask((good.index == 7)[:, None] & [False, True]).to_csv("holes.csv", index=False)
    good.round().astype(int).to_csv("whole.csv", index=False)
    good.assign(b=range(40)).to_csv("mixed.csv", index=False)
    good[:0].astype(float).to_csv("none_left.csv", index=False)
    good[:1].to_csv("one.csv", index=False)
    good.rename(columns={"b": "größe"}).to_csv("latin.csv", index=False, encoding="latin-1")
    Path("empty.csv").touch()
    Path("damaged.parquet").write_bytes(b"PAR1 and no more")
    arguments, words = ONE_LINE[case]
    code, out, err = probdiff(*arguments)
    assert code in (1, 2)
    assert err.count("\n") == 1, err
    assert err.startswith("probdiff: ")
    assert words in err
    assert "Traceback" not in out + err
    assert not Path("runs").exists()


def test_version_is_that_of_the_package(probdiff):
    assert probdiff("--version") == (0, f"probdiff {version('probdiff')}\n", "")


def options(**given):
    named = ("covariance", "schedule", "num_timesteps", "components", "depth", "num_steps", "learning_rate")
    return dict.fromkeys(named) | {"schedule": "learned-betas"} | given


@pytest.mark.parametrize(
    ("given", "rows", "size", "expected"),
    [
        ({}, 5_000, 2, (4, 16, 2, 8_000, 0.004)),
        ({"num_timesteps": 10, "depth": 3}, 5_000, 2, (10, 16, 3, 8_000, 0.004)),
        ({"components": 8}, 5_000, 2, (4, 8, 2, 8_000, 0.004)),
        ({}, 4_999, 2, (40, 1, 3, 20_000, None)),
        ({}, 100_000, 17, (40, 1, 3, 20_000, None)),  # whose covariance is diagonal
        ({"num_timesteps": 11}, 5_000, 2, (11, 1, 3, 20_000, None)),
        ({"components": 1}, 5_000, 2, (40, 1, 3, 20_000, None)),
        ({"covariance": "full"}, 5_500, 64, (40, 1, 3, 20_000, None)),
        ({"schedule": "linear"}, 5_000, 2, (40, 1, 3, 20_000, None)),
        ({"components": 3}, 100, 2, (40, 3, 3, 20_000, None)),
    ],
)
def test_many_rows_are_given_a_short_chain_of_mixtures(tmp_path, given, rows, size, expected):
    found = Run(tmp_path, options(**given)).resolved(rows, size, bits=False, resume=False).options
    assert (
        tuple(found[name] for name in ("num_timesteps", "components", "depth", "num_steps", "learning_rate"))
        == expected
    )


def test_a_run_that_is_gone_on_with_keeps_what_it_had_by_default(tmp_path, monkeypatch):
    held = options(num_timesteps=40, depth=3, num_steps=500)
    del held["components"]  # as in runs of earlier versions
    (tmp_path / "run.json").write_text(json.dumps(held))
    run = Run(tmp_path, options(num_steps=600))
    found = run.resolved(100_000, 2, bits=False, resume=True).options
    assert found == options(num_timesteps=40, components=1, depth=3, num_steps=600)
    unfinished = Run(tmp_path / "unfinished", options())
    assert unfinished.resolved(100_000, 2, bits=False, resume=True).options["num_timesteps"] == 4
    monkeypatch.setattr(runs, "starts_at_noise", lambda _: True)  # a run that an earlier version left
    assert unfinished.resolved(100_000, 2, bits=False, resume=True).options["num_timesteps"] == 40


def test_help_names_every_command(probdiff):
    code, out, _ = probdiff("--help")
    assert code == 0
    for command in ("fit", "report", "sample", "impute", "check", "--version"):
        assert command in out


@pytest.mark.slow
def test_two_processes_fit_one_run_and_tell_an_error_once(tmp_path):
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(300, 2)), columns=["a", "b"])
    table.to_csv(tmp_path / "own.csv", index=False)
    start = [
        sys.executable,
        "-c",
        "from probdiff.cli import main; main()",
        "fit",
        "own.csv",
        *LIGHT,
        "--covariance=fixed",
    ]

    def fit():
        return subprocess.run([*start, "--processes=2"], cwd=tmp_path, capture_output=True, text=True, check=False)

    done = fit()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("own.csv: 240 rows") == 1
    assert (tmp_path / "runs/own/summary.csv").exists()
    again = fit()
    assert again.returncode == 1
    assert again.stderr.count("probdiff: runs/own already holds a run") == 1
