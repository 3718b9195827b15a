"""The private step: clipping, noise, sums over micro-batches and ranks."""
