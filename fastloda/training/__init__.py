"""A lean private trainer: Poisson sampling, checkpoints, averages, schedules."""
