"""This machine: what it is, what was measured of it, and how fast a model will run on it."""
