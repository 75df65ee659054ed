"""Layers of any family, computed by transformers' own modules with weights that are read when they are needed."""
