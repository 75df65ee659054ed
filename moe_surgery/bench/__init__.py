"""Measurements of speed and memory; `moe-surgery bench` prints them and benchmarks/ calls them."""
