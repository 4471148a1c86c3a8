"""The stages of Algorithm 1, one module each."""
