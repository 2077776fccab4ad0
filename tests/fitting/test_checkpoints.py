"""What a fit leaves behind so that it can go on, and what tells one fit's checkpoints from another's."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.diffusions import light_diffusion, linear_diffusion, mlp_diffusion
from helpers.stopped import stopped_after
from test_loop import KEY, SETTINGS, X, same, train

from probdiff import BinomialDiffusion, GaussianDiffusion, networks, schedules
from probdiff.fitting import loop as training
from probdiff.fitting.checkpoints import configuration, description

OWN = optax.adamw(1e-3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run with checkpoints, and its folder."""
    folder = tmp_path_factory.mktemp("made") / "run"
    return train(checkpoint_dir=folder), folder


@pytest.fixture
def whole(made):
    return made[0]


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the folder."""
    return shutil.copytree(made[1], tmp_path / "run")


def test_a_run_with_validation_and_dropout_goes_on_with_the_same_bits(tmp_path):
    settings = training.Settings(num_steps=40, batch_size=16, num_chains=2, check_every=10, patience=5, dropout=True)
    d = light_diffusion()
    with stopped_after(3):
        train(settings, d, validation=X[:20], checkpoint_dir=tmp_path)
    compiled = training.run_steps._cache_size()
    resumed = train(settings, d, validation=X[:20], checkpoint_dir=tmp_path, resume=True)
    uninterrupted = train(settings, d, validation=X[:20])
    assert training.run_steps._cache_size() == compiled
    assert same(resumed, uninterrupted)
    np.testing.assert_array_equal(resumed.validation, uninterrupted.validation)


@pytest.mark.parametrize("first", [20, 25])
def test_a_finished_run_goes_on_for_more_steps(tmp_path, first):
    """From the last whole stretch, with the learning rate of the longer run; an optimizer of one's own knows no end."""
    options = {"batch_size": 16, "check_every": 10, "optimizer": OWN}
    d = light_diffusion()
    short = train(training.Settings(num_steps=first, **options), d, validation=X[:20], checkpoint_dir=tmp_path)
    settings = training.Settings(num_steps=40, **options)
    longer = train(settings, d, validation=X[:20], checkpoint_dir=tmp_path, resume=True)
    assert same(longer, train(settings, d, validation=X[:20]))
    np.testing.assert_array_equal(short.losses, longer.losses[:, :first])
    assert same(longer, train(settings, d, validation=X[:20], checkpoint_dir=tmp_path, resume=True))
    with pytest.raises(ValueError, match="its num_steps is 40, this one's is 30"):
        train(training.Settings(num_steps=30, **options), d, validation=X[:20], checkpoint_dir=tmp_path, resume=True)


def test_keys_of_another_kind_go_on(tmp_path):
    key, d = jax.random.key(0, impl="rbg"), light_diffusion()
    settings = training.Settings(num_steps=20, batch_size=16, check_every=10)
    options = {"rng_key": key, "progress_bar": False, "checkpoint_dir": tmp_path}
    with stopped_after(1):
        training.train(d, X, settings, **options)
    resumed = training.train(d, X, settings, **options, resume=True)
    assert same(resumed, training.train(d, X, settings, rng_key=key, progress_bar=False))
    with jax.enable_x64(True), pytest.raises(ValueError, match="its precision is float32, this one's is float64"):
        training.train(d, X.astype(float), settings, **options, resume=True)


def test_a_finished_run_resumes_at_once(whole, folder):
    assert same(whole, train(checkpoint_dir=folder, resume=True))


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(whole, folder, damage):
    newest = max((folder / "steps").iterdir(), key=lambda step: int(step.name))
    largest = max(newest.rglob("ocdbt.process_0/d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    if damage == "cut":
        largest.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 255
        largest.write_bytes(content)
    else:
        largest.unlink()
    with pytest.warns(UserWarning, match="checkpoint 6 in .* is damaged"):
        resumed = train(checkpoint_dir=folder, resume=True)
    assert same(whole, resumed)


KILLED = """
import sys, time
import numpy as np, jax
sys.path[:0] = [{tests!r}, {tests!r} + "/fitting"]
from test_loop import train
from probdiff.fitting import checkpoints
update = checkpoints.Checkpoints.save
def save(self, check, tree):
    update(self, check, tree)
    print(check, flush=True)
    time.sleep(0.3)
checkpoints.Checkpoints.save = save
train(checkpoint_dir={folder!r}, resume=True)
print("done", flush=True)
"""


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(whole, tmp_path):
    """SIGKILL at several moments, in the middle of a write among them; every run but the last is killed."""
    script = KILLED.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    for delay in (0.0, 0.31):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert same(whole, train(checkpoint_dir=tmp_path, resume=True))


def test_a_folder_with_a_run_is_not_overwritten(folder):
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(checkpoint_dir=folder)
    other = training.Settings(num_steps=50, batch_size=16, num_chains=2, check_every=10, times="even")
    with pytest.raises(ValueError, match="its num_steps is 60, this one's is 50"):
        train(other, checkpoint_dir=folder, resume=True)
    with pytest.raises(
        ValueError, match="another configuration: its diffusion schedule class is LearnedBetas, this one's is Fixed"
    ):
        training.train(
            mlp_diffusion(schedule=schedules.cosine(5)), X, SETTINGS, rng_key=KEY, checkpoint_dir=folder, resume=True
        )
    with pytest.raises(ValueError, match="another configuration: its x"):
        training.train(mlp_diffusion(), X + 1, SETTINGS, rng_key=KEY, checkpoint_dir=folder, resume=True)


def test_a_run_with_an_optimiser_of_its_own_resumes_with_that_alone(tmp_path):
    options = {"num_steps": 30, "batch_size": 16, "num_chains": 1, "check_every": 10, "times": "even"}

    def settings(rate):
        return training.Settings(**options, optimizer=optax.adamw(optax.cosine_decay_schedule(rate, 30)))

    def resume(settings):
        return train(settings, light_diffusion(), checkpoint_dir=tmp_path, resume=True)

    mine = settings(1e-2)
    with stopped_after(2):
        train(mine, light_diffusion(), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="another configuration: its optimizer"):
        resume(settings(2e-2))
    with pytest.raises(ValueError, match="another configuration: its learning_rate"):
        resume(training.Settings(**options))
    assert same(resume(mine), train(mine, light_diffusion()))


def described(d):
    return configuration({}, d, np.zeros((2, 2)), (0.0, 1.0), None, jax.random.key(0), {})


def test_a_diffusion_is_the_same_wherever_its_parts_lie_in_memory():
    """Of a recipe without a `repr` of its own."""

    class Recipe:
        def __init__(self, width):
            self.width = width

        def build(self, *_): ...

    made = [GaussianDiffusion((2,), schedules.linear(3), Recipe(width)) for width in (4, 4, 5)]
    assert repr(made[0]) != repr(made[1])
    first, second, other = map(described, made)
    assert first == second
    assert first != other


DIFFERENT = {
    "covariance": [mlp_diffusion("full"), mlp_diffusion("diagonal")],
    "width": [mlp_diffusion(width=8), mlp_diffusion(width=9)],
    "schedule": [mlp_diffusion(schedule=schedules.cosine(5)), mlp_diffusion(schedule=schedules.linear(5))],
    "T": [mlp_diffusion(schedule=schedules.harmonic(5)), mlp_diffusion(schedule=schedules.harmonic(6))],
    "an array of a module": [linear_diffusion("fixed", seed=0), linear_diffusion("fixed", seed=1)],
    "base rate": [BinomialDiffusion((2,), schedules.harmonic(3), networks.ResidualMLP(), r) for r in (0.1, 0.2)],
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_every_part_of_a_diffusion_tells_it_apart(case):
    first, second = map(described, DIFFERENT[case])
    assert first == described(DIFFERENT[case][0])
    assert first["diffusion"] != second["diffusion"]


def test_what_an_earlier_version_did_not_write_is_not_compared(folder, whole):
    """Its diffusion was text; of "times" it knew nothing; and the optimiser was always Adam."""
    file = folder / "configuration.json"
    held = json.loads(file.read_text())
    held["diffusion"] = "GaussianDiffusion(event_shape=(2,), …)"
    del held["times"], held["optimizer"]
    file.write_text(json.dumps(held))
    assert same(whole, train(checkpoint_dir=folder, resume=True))
    adamw = training.Settings(num_steps=60, batch_size=16, num_chains=2, check_every=10, times="even", optimizer=OWN)
    with pytest.raises(ValueError, match="another configuration"):
        train(adamw, checkpoint_dir=folder, resume=True)


def test_the_digest_of_an_array_stays_as_it_is():
    """Else no checkpoint of today could be resumed later."""
    digest = description(jnp.arange(4, dtype=jnp.float32))["sha256"]
    assert digest == "6727e74080cc70b4194dd6e3f8a531a1d14284b2e3c42363d3e462e401f44875"
