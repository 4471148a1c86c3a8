"""The method in pure functions: no Dagster, no models."""
