"""Shapes and symbols: the legend for every docstring in the package.

| letter | meaning                                  |
|--------|------------------------------------------|
| N      | data                                     |
| B      | batch                                    |
| T      | time steps of the chain                  |
| D      | event size                               |
| S      | particles or draws                       |
| C      | chains, i.e. independent fits            |

x_0 is data and x_T is noise. `beta[t - 1]` is β_t. Log densities are in nats.
"""

from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

type Key = PRNGKeyArray
type Time = int | Int[Array, "..."]
type Event = Float[Array, "*batch *event"]
type Data = Float[Array | np.ndarray, "N *event"]
type Params = dict[str, Any]
