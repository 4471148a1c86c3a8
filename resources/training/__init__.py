"""Training runs with TRL and PEFT: what they are, how they are built, started and resumed."""
