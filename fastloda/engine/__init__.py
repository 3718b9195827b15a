"""Opacus's interface: a private model, optimizer and data loader for a training loop that stays as it is."""
