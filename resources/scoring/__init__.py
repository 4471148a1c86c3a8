"""Scorers behind one interface: reward models and pair rankers."""
