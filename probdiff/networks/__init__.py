"""Networks of the reverse kernels, f_μ and f_Σ.

A network is an Equinox module, called for one datum as `network(x_t, log_snr)`: x_t of the event shape, or one number
for each bit, and log_snr a scalar. It gives (num_outputs,) numbers, as many as the family asks for, and is called with
`key=` too where it has dropout. A recipe, such as `ResidualMLP`, builds one for an event shape.
"""

from probdiff.networks.residual_mlp import Dense, Recipe, ResidualMLP, ResidualMLPModule, embed_log_snr, silu

__all__ = ["Dense", "Recipe", "ResidualMLP", "ResidualMLPModule", "embed_log_snr", "silu"]
