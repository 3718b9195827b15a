"""Exact but slower ways to per-sample gradients, for layers without a rule, and rules of a user's own."""
