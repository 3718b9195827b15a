"""Per-sample gradients of layers without a rule, exact but slower, and the registration of a user's own rules."""
