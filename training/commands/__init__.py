"""Kinds of `nuwa train`: each file adds the arguments of its kinds and runs them."""
