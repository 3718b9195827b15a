"""Privacy accounting: epsilon of Poisson-subsampled Gaussian steps, and the noise for a budget."""
