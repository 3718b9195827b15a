"""Exact per-sample gradients of any model: the graph read, one backward pass, norms and weighted sums."""
