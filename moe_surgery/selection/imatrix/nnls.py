"""Least squares with coefficients that are not negative, in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["nnls"]

Floats = npt.NDArray[np.float64]

_TOLERANCE = 1e-12
_TRIES = 3


def nnls(a: Floats, b: Floats) -> Floats:
    """The x >= 0 [n] with the smallest |a x - b|, for a [m, n] with m >= n and b [m].

    Block principal pivoting (Kim and Park, SIAM J. Sci. Comput. 33, 2011) on the triangular factor of a,
    starting from the solution without bounds: most coefficients are positive here. Where several x are equally
    good, that of the smallest norm among the free coefficients.
    """
    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1.0
    q, r = np.linalg.qr(a / scale)
    y = q.T @ b
    size = float(np.linalg.norm(y)) or 1.0
    free = np.ones(a.shape[1], bool)
    fewest, tries = a.shape[1] + 1, _TRIES
    for _ in range(50 * a.shape[1] + 100):
        x = np.zeros(a.shape[1])
        if free.any():
            x[free] = np.linalg.lstsq(r[:, free], y, rcond=None)[0]
        gradient = r.T @ (r @ x - y)
        wrong = (free & (x < -_TOLERANCE * size)) | (~free & (gradient < -_TOLERANCE * size))
        if not wrong.any():
            break
        count = int(wrong.sum())
        if count < fewest:
            fewest, tries = count, _TRIES
        elif tries:
            tries -= 1
        else:  # one at a time, which ends for certain
            last = int(np.flatnonzero(wrong)[-1])
            wrong = np.zeros_like(wrong)
            wrong[last] = True
        free ^= wrong
    return np.asarray(np.maximum(x, 0.0) / scale)
