"""The private trainer, with Poisson sampling, checkpoints, averages and learning-rate schedules."""
