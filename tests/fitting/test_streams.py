import jax
import numpy as np
import pandas as pd
import pytest
from helpers.diffusions import light_diffusion
from helpers.stopped import stopped_after

import probdiff
from probdiff import streams
from probdiff.units import Units

X = np.random.default_rng(0).normal([3.0, -1.0], [2.0, 0.1], size=(1000, 2))
UNITS = Units(X.mean(0), X.std(0))


@pytest.fixture(params=["npy", "parquet"])
def path(request, tmp_path):
    if request.param == "npy":
        np.save(tmp_path / "x.npy", X)
    else:
        pd.DataFrame(X, columns=["a", "b"]).to_parquet(tmp_path / "x.parquet", row_group_size=90)
    return tmp_path / f"x.{request.param}"


def test_moments_are_those_of_the_whole(path):
    loc, scale, low, high = streams.stream(path, block_rows=90).moments()
    np.testing.assert_allclose(loc, X.mean(0), rtol=1e-12)
    np.testing.assert_allclose(scale, X.std(0), rtol=1e-12)
    np.testing.assert_array_equal([low, high], [X.min(0), X.max(0)])


def test_columns_come_in_the_order_in_which_they_are_named(tmp_path):
    pd.DataFrame(X, columns=["a", "b"]).to_parquet(tmp_path / "x.parquet")
    stream = streams.stream(tmp_path / "x.parquet", columns=["b", "a"])
    np.testing.assert_array_equal(stream[0], X[:, ::-1].astype(np.float32))


def test_each_pass_has_every_row_once_in_another_order(path):
    stream = streams.stream(path, block_rows=90)
    buffers = stream.standardised(UNITS).buffers(num_rows=80)
    held = [next(buffers) for _ in range(24)]
    passes = [np.concatenate(held[:12]), np.concatenate(held[12:])]
    wanted = ((X - X.mean(0)) / X.std(0)).astype(np.float32)
    for one in passes:
        np.testing.assert_array_equal(np.sort(one, axis=0), np.sort(wanted, axis=0))
    assert not np.array_equal(*passes)
    later = stream.standardised(UNITS).buffers(num_rows=80, first=3)
    np.testing.assert_array_equal(next(later), held[3])
    assert max(len(rows) for rows in held) <= stream.buffer_rows(80)


def test_a_stream_of_one_buffer_fits_as_the_array_does(tmp_path):
    """One block, so that the buffer is the array: the same batches, and the same losses to rounding."""
    np.save(tmp_path / "x.npy", X)
    options = {
        "rng_key": jax.random.key(0),
        "num_steps": 40,
        "batch_size": 16,
        "check_every": 20,
        "progress_bar": False,
        "times": "even",
    }
    whole = probdiff.fit(light_diffusion(), X, validation=0.0, **options)
    streamed = probdiff.fit(light_diffusion(), streams.stream(tmp_path / "x.npy"), **options)
    np.testing.assert_allclose(streamed.losses, whole.losses, rtol=1e-5)


def test_a_stopped_fit_of_a_stream_goes_on_with_the_same_bits(tmp_path):
    np.save(tmp_path / "x.npy", X)
    stream = streams.stream(tmp_path / "x.npy", block_rows=50)
    options = {
        "rng_key": jax.random.key(0),
        "num_steps": 60,
        "batch_size": 8,
        "check_every": 10,
        "progress_bar": False,
        "times": "even",
    }
    whole = probdiff.fit(light_diffusion(), stream, **options)
    with stopped_after(2):
        probdiff.fit(light_diffusion(), stream, checkpoint_dir=tmp_path / "run", **options)
    resumed = probdiff.fit(light_diffusion(), stream, checkpoint_dir=tmp_path / "run", resume=True, **options)
    np.testing.assert_array_equal(resumed.losses, whole.losses)


def test_blocks_and_buffers_are_bounded_in_bytes(tmp_path, monkeypatch):
    """Rows of 4 KiB: blocks of 16 KiB have 4, buffers of 64 KiB 16, and the pass for the moments reads as little."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(100, 1024)).astype(np.float32))
    monkeypatch.setattr(streams, "_READ_BYTES", 2**14)
    monkeypatch.setattr(streams, "_BUFFER_BYTES", 2**16 + 1)
    stream = streams.stream(tmp_path / "x.npy")
    assert stream[0].shape == (4, 1024)
    assert stream.buffer_rows(10**6) == 16
    assert stream.buffer_rows(15) == 12
    read, sizes = streams.Stream._read, []
    monkeypatch.setattr(
        streams.Stream, "_read", lambda self, first, last: (sizes.append(last - first), read(self, first, last))[1]
    )
    stream.moments()
    assert sizes == [1] * 25


def test_a_checkpoint_of_other_blocks_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", X)
    options = {"rng_key": jax.random.key(0), "num_steps": 2, "batch_size": 8, "progress_bar": False, "times": "even"}
    folder = tmp_path / "run"
    probdiff.fit(light_diffusion(), streams.stream(tmp_path / "x.npy", block_rows=50), checkpoint_dir=folder, **options)
    other = streams.stream(tmp_path / "x.npy", block_rows=100)
    with pytest.raises(ValueError, match="holds a run of another configuration: its x is another"):
        probdiff.fit(light_diffusion(), other, checkpoint_dir=folder, resume=True, **options)


def bad(tmp_path, name, x):
    np.save(tmp_path / name, x)
    return tmp_path / name


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.where(np.arange(2000).reshape(1000, 2) == 1501, np.nan, X), "from row 0 has 1 entries that are NaN"),
        (X * [1.0, 0.0], "feature 1 is the same in every row"),
    ],
)
def test_bad_rows_are_refused_in_the_pass_for_the_moments(tmp_path, x, words):
    with pytest.raises(ValueError, match=words):
        probdiff.fit(light_diffusion(), streams.stream(bad(tmp_path, "x.npy", x)), rng_key=jax.random.key(0))


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"absent.npy is no .npy or .parquet file that exists"):
        streams.stream(tmp_path / "absent.npy")
    with pytest.raises(TypeError, match="dtype int64"):
        streams.stream(bad(tmp_path, "whole.npy", np.arange(10).reshape(5, 2)))
    with pytest.raises(ValueError, match=r"has shape \(5,\)"):
        streams.stream(bad(tmp_path, "flat.npy", np.arange(5.0)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "flat.npy").read_bytes()[:30])
    with pytest.raises(ValueError, match="could not be read"):
        streams.stream(tmp_path / "cut.npy")
    pd.DataFrame({"a": [1.0, 2.0], "word": ["x", "y"]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="column 'word' does not hold numbers"):
        streams.stream(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="has no column 'b'; its columns are a, word"):
        streams.stream(tmp_path / "t.parquet", columns=["b"])


def test_a_stream_of_another_shape_and_a_share_to_hold_out_are_refused(tmp_path):
    stream = streams.stream(bad(tmp_path, "x.npy", X[:, :1]))
    with pytest.raises(ValueError, match=r"x is a stream of shape \(1000, 1\); this diffusion has event_shape \(2,\)"):
        probdiff.fit(light_diffusion(), stream, rng_key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"validation is 0.1; of a stream no share is held out"):
        probdiff.fit(
            light_diffusion(), streams.stream(bad(tmp_path, "y.npy", X)), rng_key=jax.random.key(0), validation=0.1
        )


def test_of_a_stream_of_many_features_and_few_rows_none_are_held_out(tmp_path, monkeypatch):
    class HandedOver(Exception):
        pass

    def hand_over(*_, **options):
        raise HandedOver(options["validation"])

    monkeypatch.setattr("probdiff.fitting.fit.train", hand_over)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32))
    d = light_diffusion(event_shape=(8,))
    with pytest.raises(HandedOver) as caught:
        probdiff.fit(d, streams.stream(tmp_path / "x.npy"), rng_key=jax.random.key(0))
    assert caught.value.args == (None,)
