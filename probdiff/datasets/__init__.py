"""Data sets with exact densities, data sets by name, and the tables in users' files."""

from probdiff.checks import check_bits, check_data, check_varies
from probdiff.datasets import transforms
from probdiff.datasets.named import BITS, Split, density, load, split
from probdiff.datasets.synthetic import Density, GaussianMixture, Heartbeat, SwissRoll, eight_gaussians
from probdiff.datasets.tables import (
    READERS,
    WRITTEN,
    dequantise,
    frame_numbers,
    integer_columns,
    read_frame,
    read_table,
)

__all__ = [
    "BITS",
    "READERS",
    "WRITTEN",
    "Density",
    "GaussianMixture",
    "Heartbeat",
    "Split",
    "SwissRoll",
    "check_bits",
    "check_data",
    "check_varies",
    "density",
    "dequantise",
    "eight_gaussians",
    "frame_numbers",
    "integer_columns",
    "load",
    "read_frame",
    "read_table",
    "split",
    "transforms",
]
