"""A residual multilayer perceptron, told the time by its log-SNR."""

from probdiff.networks.residual_mlp import Dense, Recipe, ResidualMLP, ResidualMLPModule, embed_log_snr, silu

__all__ = ["Dense", "Recipe", "ResidualMLP", "ResidualMLPModule", "embed_log_snr", "silu"]
