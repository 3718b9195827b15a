"""What has been spent: epsilon of Poisson-subsampled Gaussian steps, and the noise for a budget."""
