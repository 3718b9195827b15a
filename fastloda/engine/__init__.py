"""Opacus's interface: private model, optimizer and loader around a training loop that stays as it is."""
