"""Pairs and models for others: cards, export forms, the hub."""
