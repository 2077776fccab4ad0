import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.diffusions import mlp_diffusion

from probdiff import schedules
from probdiff.fitting import checkpoints
from probdiff.fitting import loop as training
from probdiff.likelihood import elbo as likelihood
from probdiff.sampling import one_fit

SETTINGS = training.Settings(num_steps=60, batch_size=16, num_chains=2, check_every=10)
X = np.random.default_rng(0).normal(size=(64, 1)) * [1.0, -1.0] + 0.1 * np.random.default_rng(1).normal(size=(64, 2))
X = X.astype(np.float32)
KEY = jax.random.key(0)


def train(settings=SETTINGS, **kwargs):
    return training.train(mlp_diffusion(), X, settings, rng_key=KEY, progress_bar=False, **kwargs)


def same(a, b):
    leaves = zip(jax.tree.leaves((a.params, a.losses)), jax.tree.leaves((b.params, b.losses)), strict=True)
    return all(np.array_equal(u, v) for u, v in leaves)


@pytest.fixture(scope="module")
def whole():
    return train()


@pytest.fixture
def folder(whole, tmp_path_factory, tmp_path):
    """A copy of the checkpoints of a finished run."""
    made = tmp_path_factory.getbasetemp() / "made"
    if not made.exists():
        assert same(whole, train(checkpoint_dir=made))
    return shutil.copytree(made, tmp_path / "run")


def test_chains_are_independent_and_learn(whole):
    assert whole.losses.shape == (2, 60)
    assert whole.params["beta"].shape == (2, 5)
    assert not np.array_equal(whole.params["beta"][0], whole.params["beta"][1])
    longer = train(training.Settings(num_steps=400, batch_size=16, num_chains=1, check_every=400))
    assert longer.losses[0, -50:].mean() < longer.losses[0, :50].mean() - 0.1


def test_first_loss_is_that_of_svi(whole):
    """The loop is `SVI.update` and no more: one chain, done by hand. Adam's first step is the learning rate itself."""
    d = mlp_diffusion()
    svi = training.make_svi(d, SETTINGS)
    init_key, batch_key, _ = jax.random.split(KEY, 3)
    state, update = svi.init(jax.random.split(init_key, 2)[0], X[:16]), jax.jit(svi.update)
    key, before = jax.random.split(batch_key, 2)[0], svi.optim.get_params(state.optim_state)
    for i in range(3):
        if i == 1:
            after = svi.optim.get_params(state.optim_state)
        rows = jax.random.randint(jax.random.fold_in(key, i), (16,), 0, 64)
        state, loss = update(state, X[rows])
        assert float(loss) == pytest.approx(float(whole.losses[0, i]), rel=1e-5)
    change = jax.tree.map(lambda a, b: float(abs(a - b).max()), before, after)
    assert change["beta"] == pytest.approx(10 * SETTINGS.learning_rate, rel=1e-2)
    assert change["network$params"].last.bias == pytest.approx(SETTINGS.learning_rate, rel=1e-2)


def test_the_params_that_are_checked_are_an_average():
    """Of three steps, done by hand; so early the average is the plain mean."""
    settings = training.Settings(3, 16, 1, check_every=3)
    trained = train(settings, validation=X)
    svi = training.make_svi(mlp_diffusion(), settings)
    init_key, batch_key, _ = jax.random.split(KEY, 3)
    state, key = svi.init(jax.random.split(init_key, 1)[0], X[:16]), jax.random.split(batch_key, 1)[0]
    steps = []
    for i in range(3):
        rows = jax.random.randint(jax.random.fold_in(key, i), (16,), 0, 64)
        state, _ = svi.update(state, X[rows])
        steps.append(svi.get_params(state))
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *steps)
    for a, b in zip(jax.tree.leaves(one_fit(trained.params, 0)), jax.tree.leaves(mean), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_run_with_validation_and_dropout_goes_on_with_the_same_bits(monkeypatch, tmp_path):
    settings = training.Settings(60, 16, 2, check_every=10, patience=5, dropout=True)
    save = checkpoints.Checkpoints.save

    def save_and_stop(self, check, tree):
        save(self, check, tree)
        if check == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.Checkpoints, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(settings, validation=X[:20], checkpoint_dir=tmp_path)
    monkeypatch.setattr(checkpoints.Checkpoints, "save", save)
    resumed = train(settings, validation=X[:20], checkpoint_dir=tmp_path, resume=True)
    uninterrupted = train(settings, validation=X[:20])
    assert same(resumed, uninterrupted)
    np.testing.assert_array_equal(resumed.validation, uninterrupted.validation)


@pytest.mark.parametrize("objective", ["mean_field", "trace"])
def test_other_objectives_fit_too(objective):
    trained = train(training.Settings(300, 16, 1, objective, check_every=150))
    assert np.all(np.isfinite(trained.losses))
    assert trained.losses[0, -50:].mean() < trained.losses[0, :50].mean() - 0.1


def test_checkpoints_change_nothing_and_a_finished_run_resumes_at_once(whole, folder):
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
import test_loop as test_training
from probdiff.fitting import checkpoints
from probdiff.fitting import loop as training
update = checkpoints.Checkpoints.save
def save(self, check, tree):
    update(self, check, tree)
    print(check, flush=True)
    time.sleep(0.3)
checkpoints.Checkpoints.save = save
test_training.train(checkpoint_dir={folder!r}, resume=True)
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
    other = training.Settings(num_steps=50, batch_size=16, num_chains=2, check_every=10)
    with pytest.raises(ValueError, match="its num_steps is 60, this one's is 50"):
        train(other, checkpoint_dir=folder, resume=True)
    with pytest.raises(ValueError, match="another configuration: its diffusion"):
        training.train(
            mlp_diffusion(schedule=schedules.cosine(5)), X, SETTINGS, rng_key=KEY, checkpoint_dir=folder, resume=True
        )
    with pytest.raises(ValueError, match="another configuration: its x"):
        training.train(mlp_diffusion(), X + 1, SETTINGS, rng_key=KEY, checkpoint_dir=folder, resume=True)


def test_early_stopping_keeps_the_best_of_each_chain():
    settings = training.Settings(2000, 8, 2, learning_rate=0.05, check_every=20, patience=3)
    d = mlp_diffusion(width=32)
    trained = training.train(d, X[:8], settings, rng_key=KEY, validation=X[8:], progress_bar=False)
    steps, checks = trained.losses.shape[1], trained.validation.shape[1]
    assert steps < 2000
    assert checks == steps // 20
    assert np.all(checks - 1 - trained.validation.argmax(1) >= 3)
    *_, validation_key = jax.random.split(KEY, 3)
    for c in range(2):
        params = one_fit(trained.params, c)
        bound = likelihood.elbo(d, params, X[8:], rng_key=validation_key, num_draws=2)
        assert bound.mean == pytest.approx(trained.validation[c].max(), rel=1e-5)


def test_a_loss_that_is_not_finite_is_an_error():
    with pytest.raises(FloatingPointError, match="loss of chain 0 is nan at step 0"):
        training.train(mlp_diffusion(), np.full_like(X, np.nan), SETTINGS, rng_key=KEY, progress_bar=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"num_chains": 1.5}, "num_chains is 1.5"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"objective": "elbo"}, "objective is 'elbo'; it must be one of at_time, mean_field, trace"),
        ({"patience": 0}, "patience is 0"),
        ({"times": "odd"}, "times is 'odd'; it must be one of even, weighted"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        training.Settings(**options)


def test_progress_is_quiet_when_not_a_terminal(capfd):
    training.train(mlp_diffusion(), X, SETTINGS, rng_key=KEY)
    out, err = capfd.readouterr()
    assert out == err == ""
