"""Models that compare answers behind one interface."""
