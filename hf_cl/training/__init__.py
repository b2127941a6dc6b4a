"""Training one task: parameter groups, the ownership callback, evaluation."""
