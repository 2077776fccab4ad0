import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from probdiff import devices

TESTS = str(Path(__file__).parent)

FIT = """
import sys, jax, numpy as np
from jax.sharding import Mesh
sys.path.insert(0, {tests!r})
address, index, count = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if count > 1:
    jax.distributed.initialize(address, count, index)
import test_training
from conftest import mlp_diffusion
from probdiff import training
def fit(num_chains, mesh):
    settings = training.Settings(num_steps=20, batch_size=16, num_chains=num_chains, check_every=10)
    return training.train(
        mlp_diffusion(), test_training.X[:61], settings, rng_key=test_training.KEY, validation=test_training.X[61:],
        checkpoint_dir=None if mesh or count == 1 else sys.argv[1] + "-run", progress_bar=False, mesh=mesh,
    )
local = np.array(jax.local_devices())
meshes = {meshes}
fits = [fit(num_chains, mesh) for num_chains, mesh in meshes]
leaves = [leaf for f in fits for leaf in jax.tree.leaves((f.params, f.losses, f.validation))]
np.savez(sys.argv[1] + f"-{{index}}", *leaves)
"""


def run(out, meshes, count=1, devices=1):
    """The leaves that each of `count` processes ends with."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    code = FIT.format(tests=TESTS, meshes=meshes)
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, out, address, str(i), str(count)], env=environment)
        for i in range(count)
    ]
    assert [process.wait() for process in processes] == [0] * count
    return [[held[name] for name in held] for held in (np.load(f"{out}-{i}.npz") for i in range(count))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(str(tmp_path_factory.mktemp("one") / "fit"), "[(1, None), (2, None)]")[0]


def agree(leaves, others):
    for leaf, other in zip(leaves, others, strict=True):
        np.testing.assert_allclose(leaf, other, rtol=2e-5, atol=2e-6)


def test_eight_devices_fit_as_one_does(alone, tmp_path):
    """61 rows, which eight do not divide; one chain, two chains with four devices each, and meshes that are given."""
    meshes = "[(1, None), (2, None), (1, jax.make_mesh((4,), ('data',))), (2, Mesh(local[:2], ('chain',)))]"
    agree(run(str(tmp_path / "fit"), meshes, devices=8)[0], [*alone, *alone])


def test_two_processes_fit_the_same_data_and_end_with_the_same_params(alone, tmp_path):
    """Joined by `jax.distributed` over loopback, with checkpoints that the first process writes."""
    first, second = run(str(tmp_path / "fit"), "[(1, None)]", count=2)
    for leaf, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(leaf, other)
    agree(first, alone[: len(first)])


@pytest.mark.parametrize(
    ("axes", "words"),
    [(("model",), "mesh is .*; it must be"), (("data",), "batch_size is 16"), (("chain",), "num_chains is 2")],
)
def test_bad_meshes_are_refused(axes, words, monkeypatch):
    monkeypatch.setattr(Mesh, "shape", dict.fromkeys(axes, 3))  # one device here
    with pytest.raises(ValueError, match=words):
        devices.choose_mesh(Mesh(np.array(jax.devices()), axes), 2, 16)
