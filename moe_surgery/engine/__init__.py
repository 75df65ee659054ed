"""Moves bytes from source files to output files; knows neither models nor formats of files."""
