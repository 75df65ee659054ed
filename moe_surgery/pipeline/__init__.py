"""Whole jobs, one module each, so that a command imports only what its job needs."""
