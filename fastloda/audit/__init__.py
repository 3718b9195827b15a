"""Audits of private steps from outside, with any implementation: what a step does is compared with what it claims.

>>> from fastloda import audit
>>> step = audit.of_ghost_step(model, losses, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=64)
>>> claim = audit.Claim(noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=64, sample_rate=0.01, steps=1000)
>>> report = audit.audit_step(step, (images, labels), claim)
>>> print(report)
>>> report.raise_if_violated()
"""

from fastloda.audit.adapters import of_ghost_step, of_loop, of_trainer
from fastloda.audit.claim import Claim
from fastloda.audit.report import AuditReport, Check
from fastloda.audit.run import CHECKS, audit_step
from fastloda.audit.step import PrivateStep, Released, Sampler

__all__ = [
    "CHECKS",
    "AuditReport",
    "Check",
    "Claim",
    "PrivateStep",
    "Released",
    "Sampler",
    "audit_step",
    "of_ghost_step",
    "of_loop",
    "of_trainer",
]
