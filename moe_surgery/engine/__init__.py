"""Moves bytes from source files to output files, independently of models and file formats."""
