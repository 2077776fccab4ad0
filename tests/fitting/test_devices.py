import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.diffusions import light_diffusion, mlp_diffusion
from jax.sharding import Mesh
from test_loop import KEY, X

from probdiff.fitting import devices
from probdiff.fitting import loop as training

TESTS = str(Path(__file__).parents[1])


def fit(num_chains=1, mesh=None, x=X[:61], d=None, **options):
    settings = training.Settings(num_steps=20, batch_size=16, num_chains=num_chains, check_every=10, times="even")
    options = {"rng_key": KEY, "validation": X[61:], "progress_bar": False, "mesh": mesh, **options}
    return training.train(d or light_diffusion(), x, settings, **options)


def save(name, *trees):
    np.savez(name, *jax.tree.leaves(trees))


def kept(fits):
    return [(f.params, f.losses, f.validation) for f in fits]


PROGRAM = """
import sys, jax
sys.path[:0] = [{tests!r}, {tests!r} + "/fitting"]
out, address, index, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if count > 1:
    jax.distributed.initialize(address, count, index)
from test_devices import *
out_of_this = out + f"-{{index}}"
"""


def run(out, code, count=1, devices=1):
    """What each of `count` processes saves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    program = PROGRAM.format(tests=TESTS) + code
    processes = [
        subprocess.Popen([sys.executable, "-c", program, out, address, str(i), str(count)], env=environment)
        for i in range(count)
    ]
    try:
        assert [process.wait(120) for process in processes] == [0] * count
    finally:
        for process in processes:
            process.kill()
    return [[held[name] for name in held] for held in (np.load(f"{out}-{i}.npz") for i in range(count))]


@pytest.fixture(scope="module")
def alone():
    return jax.tree.leaves(kept([fit(1), fit(2)]))


def agree(leaves, others):
    for leaf, other in zip(leaves, others, strict=True):
        np.testing.assert_allclose(leaf, other, rtol=2e-5, atol=2e-6)


SPREAD = """
seen = {}
run_steps = training.run_steps
def spying(d, settings, mesh, state, average, x, *rest):
    results = run_steps(d, settings, mesh, state, average, x, *rest)
    size = len(jax.tree.leaves(results[1])[0])  # chains
    seen[settings.num_chains] = [len(x.sharding.device_set), x.addressable_shards[0].data.shape[0],
        size // len({s.index for s in jax.tree.leaves(results[1])[0].addressable_shards})]
    return results
training.run_steps = spying
"""


@pytest.mark.slow
def test_eight_devices_fit_as_one_does(alone, tmp_path):
    """61 rows, which eight do not divide; one chain, and two chains with four devices each.

    The rows lie spread out: 8 of 64 on each of eight devices for one chain, 16 on each of four for each of two.
    """
    code = SPREAD + "save(out_of_this, kept([fit(1), fit(2)]), np.array([seen[1], seen[2]]))"
    *leaves, where = run(str(tmp_path / "fit"), code, devices=8)[0]
    agree(leaves, alone)
    np.testing.assert_array_equal(where, [[8, 8, 1], [8, 16, 1]])  # devices, rows on each, chains on each


@pytest.mark.slow
def test_devices_of_a_mesh_that_is_given_fit_as_one_does(tmp_path):
    """A diffusion whose β_t and whole covariance are learned."""
    meshes = "jax.make_mesh((4,), ('data',)), Mesh(np.array(jax.local_devices()[:2]), ('chain',))"
    code = f"save(out_of_this, kept(fit(c, mesh, d=mlp_diffusion()) for c, mesh in zip((1, 2), ({meshes}))))"
    alone = jax.tree.leaves(kept(fit(c, d=mlp_diffusion()) for c in (1, 2)))
    agree(run(str(tmp_path / "fit"), code, devices=8)[0], alone)


TWO = """
import probdiff
from probdiff.fitting import checkpoints
from probdiff.likelihood import result
whole = fit(checkpoint_dir=out + "-whole")
save_one = checkpoints.Checkpoints.save
def stopping(self, check, tree):
    save_one(self, check, tree)
    raise RuntimeError("stopped")
checkpoints.Checkpoints.save = stopping
try:
    fit(checkpoint_dir=out + "-run")
except RuntimeError:
    pass
checkpoints.Checkpoints.save = save_one
resumed = fit(checkpoint_dir=out + "-run", resume=True)
said = []
def wrong(kind, fit=fit, **options):
    try:
        fit(**options)
    except kind as error:
        said.append(str(error))
wrong(ValueError, x=X[:61] + index)
def fit_in_units(x):
    options = {"num_steps": 20, "batch_size": 16, "check_every": 10, "times": "even", "dropout": False}
    return probdiff.fit(light_diffusion(), x, rng_key=KEY, validation=0.0, **options)
wrong(ValueError, fit_in_units, x=X * 2.0**index)  # the same, but for their units
wrong(FileExistsError, checkpoint_dir=out + "-run")
if index == 0:
    training.elbo = lambda *_, **__: result.LogLikelihood(np.array([np.nan]), np.zeros(1), "lower bound")
wrong(FloatingPointError)
save(out_of_this, kept([whole, resumed]), np.array(said))
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes, joined by `jax.distributed` over loopback, fits and is told."""
    return run(str(tmp_path_factory.mktemp("two") / "fit"), TWO, count=2)


@pytest.mark.slow
def test_two_processes_fit_the_same_data_and_end_with_the_same_params(alone, two):
    """Stopped after one check, they go on to the same bits."""
    (*first, _), (*second, _) = two
    for leaf, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(leaf, other)
    whole, resumed = first[: len(first) // 2], first[len(first) // 2 :]
    for leaf, other in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(leaf, other)
    agree(whole, alone[: len(whole)])


@pytest.mark.slow
def test_an_error_of_one_process_is_that_of_all(two):
    """Other data in the second process; a folder that holds a run; validation that the first finds not finite."""
    for *_, said in two:
        assert said[0].startswith("x is not the same in every process: process 1 has another")
        assert said[1] == said[0]
        assert "already holds a run" in said[2]
        assert said[3].startswith("the validation ELBO is [nan] at step 10")


@pytest.mark.parametrize(
    ("axes", "words"),
    [(("model",), "mesh is .*; it must be"), (("data",), "batch_size is 16"), (("chain",), "num_chains is 2")],
)
def test_bad_meshes_are_refused(axes, words, monkeypatch):
    monkeypatch.setattr(Mesh, "shape", dict.fromkeys(axes, 3))  # one device here
    with pytest.raises(ValueError, match=words):
        devices.choose_mesh(Mesh(np.array(jax.devices()), axes), 2, 16)


def test_devices_left_idle_are_told(monkeypatch):
    one = jax.devices()[0]
    monkeypatch.setattr(jax, "devices", lambda: [one] * 8)
    with pytest.warns(UserWarning, match="for 8 devices to be used batch_size must be a multiple of 8; 4 are used"):
        assert devices.choose_mesh(None, 1, 20).size == 4


@pytest.mark.parametrize(("num_chains", "wanted"), [(1, 1), (2, 2), (3, 3), (5, 1), (6, 3)])
def test_each_fit_has_a_device_of_its_own(num_chains, wanted, monkeypatch):
    asked = {}
    monkeypatch.setattr(jax.config, "update", asked.__setitem__)
    monkeypatch.setattr("os.process_cpu_count", lambda: 4, raising=False)
    devices.one_for_each_fit(num_chains)
    assert asked == {"jax_num_cpu_devices": wanted}


def test_where_jax_has_been_used_its_devices_stay():
    before = jax.devices()
    devices.one_for_each_fit(2)
    assert jax.devices() == before
