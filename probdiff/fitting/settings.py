"""How a diffusion is fitted."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import optax

from probdiff.checks import check_count

Objective = Literal["at_time", "mean_field", "trace"]
Times = Literal["even", "weighted"]

_SCHEDULE_RATE = 10.0  # logits of β_t travel by several units, weights of a network by tenths


@dataclass(frozen=True)
class Settings:
    """How a diffusion is fitted.

    `objective`: "at_time" (one t per datum), "mean_field" (all t, closed-form KLs) or "trace" (all t, N17 as it is).
    `times`, of "at_time": "even", all t alike, or "weighted", by `time_probs`, anew at every check.
    Adam's learning rate falls from `learning_rate`, 2e-3, and for the schedule's params from `schedule_learning_rate`,
    ten times that, to zero along a cosine over `num_steps`; `gradient_clip`, 1, bounds the global norm of the gradient
    of the loss per datum, for bits that of the network's params alone. `optimizer`, an Optax transformation or an
    optimiser of NumPyro, takes the place of all of that; it is given the loss per datum's gradient in the unconstrained
    params. Progress, validation and checkpoints come every `check_every` steps. With `patience`, fitting stops when no
    fit's validation ELBO has risen for that many checks. With `dropout`, the losses are those of a network with units
    left out.
    Raises `ValueError` for a value out of its range, and for a learning_rate or a gradient_clip beside an optimizer;
    `TypeError` for an optimizer that is none.
    """

    num_steps: int = 20_000
    batch_size: int = 512
    num_chains: int = 1
    objective: Objective = "at_time"
    learning_rate: float | None = None
    schedule_learning_rate: float | None = None
    gradient_clip: float | None = None
    check_every: int = 500
    patience: int | None = None
    dropout: bool = False
    times: Times = "weighted"
    optimizer: Any = None

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "num_chains", "check_every", "patience"):
            value = getattr(self, name)
            if name == "patience" and value is None:
                continue
            check_count(value, name, 1)
            object.__setattr__(self, name, int(value))
        rate = 2e-3 if self.learning_rate is None else self.learning_rate
        defaults = {"learning_rate": 2e-3, "schedule_learning_rate": _SCHEDULE_RATE * rate, "gradient_clip": 1.0}
        for name, default in defaults.items():
            value = getattr(self, name)
            if self.optimizer is not None:
                if value is not None:
                    raise ValueError(f"{name} is {value}, and optimizer is given, which has its own; leave one out")
                continue
            value = default if value is None else value
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be positive and finite")
            object.__setattr__(self, name, float(value))
        _check_optimizer(self.optimizer)
        for name, kinds in (("objective", Objective), ("times", Times)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(get_args(kinds))}")


def _check_optimizer(optimizer: Any) -> None:
    if optimizer is None or isinstance(optimizer, optax.GradientTransformation):
        return
    # NumPyro's own optimisers share a class that has no public name
    if isinstance(optimizer, type) or not all(hasattr(optimizer, name) for name in ("init", "update", "get_params")):
        raise TypeError(
            f"optimizer is {optimizer!r}; it must be an Optax transformation such as optax.adamw(1e-3), "
            "or an optimiser of NumPyro"
        )
