"""Counts of routed tokens that other programs recorded, as `Statistics`."""
