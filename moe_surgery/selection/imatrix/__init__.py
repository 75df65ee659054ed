"""Importance matrices of llama.cpp (imatrix files): reading, counts, checks, statistics, and cutting them."""

from moe_surgery.selection.imatrix.matrix import Entry, Imatrix
from moe_surgery.selection.imatrix.reader import load_imatrix

__all__ = ["Entry", "Imatrix", "load_imatrix"]
