"""Which layers are masked, which are a task's own, and loading the base. Knows nothing of PEFT."""
