"""Judges that compare two models' answers behind one interface."""
