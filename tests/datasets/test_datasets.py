import gzip

import jax
import numpy as np
import pandas as pd
import pytest
import scipy.integrate
import scipy.stats

from probdiff import datasets

KEY = jax.random.key(0)


@pytest.mark.parametrize("noise", [0.2, 0.5, 2.0])
def test_swiss_roll_density_is_the_quadrature_of_its_definition(noise):
    roll = datasets.SwissRoll(noise)
    # moments of the spiral by quadrature, not by the closed forms of the package
    s_of = {0: lambda s: s * np.cos(s), 1: lambda s: s * np.sin(s)}
    low, high = 1.5 * np.pi, 4.5 * np.pi
    mean, std = np.empty(2), np.empty(2)
    for i, f in s_of.items():
        mean[i] = scipy.integrate.quad(f, low, high)[0] / (high - low)
        second = scipy.integrate.quad(lambda s, f=f: f(s) ** 2, low, high)[0] / (high - low)
        std[i] = np.sqrt(second - mean[i] ** 2 + noise**2)
    with jax.enable_x64(True):
        x = np.concatenate([np.asarray(roll.sample(KEY, 5)), [[0.0, 0.0], [2.0, -1.5]]])
        got = roll.log_prob(x)
    for point, value in zip(x, got, strict=True):
        raw = point * std + mean

        def density(s, raw=raw):
            return np.prod([scipy.stats.norm.pdf(raw[i], f(s), noise) for i, f in s_of.items()])

        nearest = np.linspace(low, high, 200)[np.argmax([density(s) for s in np.linspace(low, high, 200)])]
        total = scipy.integrate.quad(density, low, high, points=[nearest], limit=500, epsabs=0, epsrel=1e-10)[0]
        assert value == pytest.approx(np.log(total / (high - low) * np.prod(std)), abs=1e-8)


@pytest.mark.slow
def test_swiss_roll_has_unit_variance_and_the_density_it_says():
    roll = datasets.SwissRoll(0.5)
    x = np.asarray(roll.sample(KEY, 100_000), np.float64)
    np.testing.assert_allclose(x.mean(0), 0, atol=4 / np.sqrt(1e5))
    np.testing.assert_allclose(x.var(0), 1, atol=4 * np.sqrt(2 / 1e5))
    axis = np.linspace(-3, 3, 401)
    grid = np.stack(np.meshgrid(axis, axis), -1)
    density = np.exp(np.asarray(roll.log_prob(grid), np.float64))
    assert density.sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=1e-5)
    # goodness of fit in 20 bins of the log density: fails by chance once in 10,000 seeds
    drawn = np.asarray(roll.log_prob(x[:20_000]))
    edges = np.quantile(drawn, np.linspace(0, 1, 21)[1:-1])
    expected = np.bincount(np.digitize(np.log(density), edges).ravel(), weights=density.ravel(), minlength=20)
    counts = np.bincount(np.digitize(roll.log_prob(x[20_000:40_000]), edges), minlength=20)
    assert scipy.stats.chisquare(counts, expected / expected.sum() * counts.sum()).pvalue > 1e-4


@pytest.mark.parametrize("num_features", [1, 2, 5])
def test_mixture_density_is_that_of_scipy(num_features):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(3, num_features, num_features))
    covariances = root @ np.swapaxes(root, 1, 2) + np.eye(num_features)
    mixture = datasets.GaussianMixture([0.2, 0.5, 0.3], rng.normal(size=(3, num_features)), covariances)
    x = rng.normal(size=(7, num_features))
    expected = np.log(
        sum(
            w * scipy.stats.multivariate_normal.pdf(x, m, c).reshape(7)
            for w, m, c in zip(mixture.weights, mixture.means, covariances, strict=True)
        )
    )
    np.testing.assert_allclose(mixture.log_prob(x), expected, rtol=1e-4, atol=1e-5)
    draws = np.asarray(mixture.sample(KEY, 50_000))
    mean = np.asarray(mixture.weights) @ mixture.means
    np.testing.assert_allclose(draws.mean(0), mean, atol=5 * draws.std() / np.sqrt(50_000))


def test_eight_gaussians_have_the_entropy_of_the_ring():
    ring = datasets.eight_gaussians()
    x = ring.sample(KEY, 200_000)
    log_prob = np.asarray(ring.log_prob(x), np.float64)
    # neighbours are ten standard deviations apart: log 8 + log(2πe·σ²)
    entropy = np.log(8) + np.log(2 * np.pi * np.e * 0.15**2)
    assert -log_prob.mean() == pytest.approx(entropy, abs=4 * log_prob.std() / np.sqrt(200_000))
    np.testing.assert_allclose(np.hypot(*np.asarray(ring.means).T), 2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: datasets.SwissRoll(0.0), "noise is 0.0"),
        (lambda: datasets.SwissRoll(float("nan")), "noise is nan"),
        (lambda: datasets.GaussianMixture([0.5, 0.6], [[0.0], [1.0]], np.ones((2, 1, 1))), "sum to 1"),
        (lambda: datasets.GaussianMixture([0.5, 0.5], [[0.0], [1.0]], np.ones((2, 2, 2))), "covariances has shape"),
        (lambda: datasets.GaussianMixture([0.5, 0.5], [0.0, 1.0], np.ones((2, 1, 1))), "means has shape"),
        (lambda: datasets.GaussianMixture([1.0], [[0.0]], [[[-1.0]]]), "positive definite"),
        (lambda: datasets.dequantise([0.5], KEY), "not integers"),
        (lambda: datasets.load("swiss-rolls", rng_key=KEY), "no data set is called 'swiss-rolls'"),
        (lambda: datasets.load("nothing.csv", rng_key=KEY), "does not exist"),
        (lambda: datasets.split(np.zeros((3, 1)), ["a"], KEY), "3 row"),
    ],
)
def test_bad_data_sets_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("name", "rows", "features"), [("digits", 1797, 64), ("wine", 178, 13), ("breast-cancer", 569, 30)]
)
def test_real_data_are_split_by_seed(name, rows, features):
    one, same, other = (datasets.load(name, rng_key=jax.random.key(seed)) for seed in (0, 0, 1))
    assert len(one.train) + len(one.test) == rows
    assert len(one.test) == round(0.2 * rows)
    assert len(one.features) == one.train.shape[1] == features
    np.testing.assert_array_equal(one.train, same.train)
    assert not np.array_equal(one.train, other.train)
    assert not set(map(bytes, one.train)) & set(map(bytes, one.test))
    if name == "digits":
        assert one.train.min() >= 0
        assert 16 < one.train.max() < 17
        assert np.all(one.train.std(0) > 0.2)


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".parquet"])
def test_tables_are_read_as_they_were_written(tmp_path, suffix):
    x = np.random.default_rng(0).normal(size=(6, 3))
    frame, path = pd.DataFrame(x, columns=["a", "b", "c"]), tmp_path / f"table{suffix}"
    if suffix == ".npy":
        np.save(path, x)
    else:
        frame.to_csv(path, index=False) if suffix == ".csv" else frame.to_parquet(path)
    array, names = datasets.read_table(path)
    np.testing.assert_allclose(array, x, rtol=1e-14)
    assert names == (["0", "1", "2"] if suffix == ".npy" else ["a", "b", "c"])
    one, _ = datasets.read_table(path, [names[2]])
    np.testing.assert_allclose(one, x[:, 2:], rtol=1e-14)


TEXTS = {
    "rows that end in a comma": ("table.csv", "a,b\n1.5,2.5,\n3.5,4.5,\n"),
    "semicolons": ("table.csv", "a;b\n1.5;2.5\n3.5;4.5\n"),
    "decimal commas": ("table.csv", "a;b\n1,5;2,5\n3,5;4,5\n"),
    "tabs": ("table.tsv", "a\tb\n1.5\t2.5\n3.5\t4.5\n"),
    "bars and a blank line": ("table.csv", "\na|b\n1.5|2.5\n3.5|4.5\n"),
    "a byte order mark": ("table.csv", "\ufeffa,b\n1.5,2.5\n3.5,4.5\n"),
    "upper case": ("table.CSV", "a,b\n1.5,2.5\n3.5,4.5\n"),
    "gzip": ("table.csv.gz", "a,b\n1.5,2.5\n3.5,4.5\n"),
    "exponents": ("table.csv", "a;b\n15e-1;2,5\n3,5;45e-1\n"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_text_is_read_whatever_separates_its_fields(tmp_path, case):
    name, text = TEXTS[case]
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    array, names = datasets.read_table(tmp_path / name)
    assert names == ["a", "b"]
    np.testing.assert_array_equal(array, [[1.5, 2.5], [3.5, 4.5]])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("5.9,1.3\n4.3,2.1\n", "first row holds numbers, 5.9, 1.3, where the names"),
        ("5,9;1,3\n4,3;2,1\n", "first row holds numbers, 5,9, 1,3, where the names"),
        ("a,b,a\n1.5,2.5,3.5\n", "two of its columns are called 'a'"),
        ("a,b\n1.5,2.5,3.5\n", "rows have 3 fields, and its first row has 2 names"),
        ("weight\n60,0\n61,1\n62,2\n", "rows have 2 fields, and its first row has 1 names"),
        ("a,b\n1,1.5,2.5\n2,3.5,4.5\n", "rows have 3 fields, and its first row has 2 names"),
        ("a,b\n5,9,1,3\n", "rows have 4 fields, and its first row has 2 names"),
        ("a,b\n1.5,20%\n", "column 'b' does not hold numbers .'20%'."),
        ("\n\n", "it is empty"),
    ],
)
def test_text_that_would_be_misread_is_refused(tmp_path, text, words):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        datasets.read_table(tmp_path / "table.csv")


@pytest.mark.parametrize(
    "text",
    [
        "year,temp\n1900,50.5,\n1901,49.5,\n1902,51.5,\n",  # evenly spaced, as an index is
        "year,temp,\n1900,50.5,\n1901,49.5,\n1902,51.5,\n",
        "year;temp\n1900;50,5;\n1901;49,5;\n1902;51,5;\n",
        "year, temp\n1900, 50.5\n1901, 49.5\n1902, 51.5\n",
        " year;temp \n1900;50,5\n1901;49,5\n1902;51,5\n",
    ],
)
def test_columns_stay_under_their_names(tmp_path, text):
    (tmp_path / "table.csv").write_text(text)
    array, names = datasets.read_table(tmp_path / "table.csv", integers=True)
    assert names == ["year", "temp"]
    np.testing.assert_array_equal(array, [[1900, 50.5], [1901, 49.5], [1902, 51.5]])


def test_a_short_row_of_semicolons_is_one_with_an_empty_cell(tmp_path):
    (tmp_path / "table.csv").write_text("a;b\n1,5;2,5\n3,5\n")
    array, names = datasets.read_table(tmp_path / "table.csv")
    assert names == ["a", "b"]
    np.testing.assert_array_equal(array, [[1.5, 2.5], [3.5, np.nan]])


def test_counted_columns_are_names(tmp_path):
    pd.DataFrame(np.zeros((3, 2))).to_csv(tmp_path / "table.csv", index=False)
    assert datasets.read_table(tmp_path / "table.csv")[1] == ["0", "1"]
    with pytest.raises(ValueError, match="columns are 0, 0; each must be named once"):
        datasets.read_table(tmp_path / "table.csv", ["0", "0"])


def test_nullable_columns_are_numbers(tmp_path):
    frame = pd.DataFrame({"a": pd.array([1.5, None], "Float64"), "b": pd.array([2.5, 4.5], "double[pyarrow]")})
    frame.to_parquet(tmp_path / "table.parquet")
    np.testing.assert_array_equal(datasets.read_table(tmp_path / "table.parquet")[0], [[1.5, 2.5], [np.nan, 4.5]])


def test_columns_of_integers_are_dequantised_and_no_others(tmp_path):
    frame = pd.DataFrame({"a": [0.5, 1.5, 2.5], "n": [3, 1, 2], "yes": [True, False, True]})
    frame.to_csv(tmp_path / "mixed.csv", index=False)
    with pytest.raises(ValueError, match="column 'n' holds integers"):
        datasets.read_table(tmp_path / "mixed.csv")
    array, _ = datasets.read_table(tmp_path / "mixed.csv", dequantise_key=KEY)
    np.testing.assert_array_equal(array[:, 0], frame["a"])
    np.testing.assert_array_equal(np.floor(array[:, 1:]), frame[["n", "yes"]].astype(float))
    assert np.all(array[:, 1:] > frame[["n", "yes"]].astype(float))


@pytest.mark.parametrize("density", [datasets.SwissRoll(), datasets.eight_gaussians()])
@pytest.mark.parametrize("shape", [(4, 1), (4, 3), ()])
def test_points_of_another_size_have_no_density(density, shape):
    with pytest.raises(ValueError, match="last axis must be of length 2"):
        density.log_prob(np.zeros(shape))


def test_tables_that_cannot_be_used_are_refused(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("a,b,word\n1.0,2.0,x\n3.0,4.0,y\n")
    for columns, words in ((None, "column 'word' does not hold numbers"), (["a", "z"], "no column 'z'")):
        with pytest.raises(ValueError, match=words):
            datasets.read_table(table, columns)
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"not a table")
    (tmp_path / "damaged.npy").write_bytes(b"not an array")
    (tmp_path / "empty.csv").write_text("")
    for name in ("damaged.parquet", "damaged.npy", "empty.csv"):
        with pytest.raises(ValueError, match=f"{name} could not be read"):
            datasets.read_table(tmp_path / name)
    np.save(tmp_path / "flat.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        datasets.read_table(tmp_path / "flat.npy")
    with pytest.raises(ValueError, match="the files read are"):
        datasets.read_table(tmp_path / "table.xlsx")
