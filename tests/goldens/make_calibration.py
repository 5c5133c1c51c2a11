"""Writes calibration.npz: what the solver of `jaxbnb.calibration` should choose.

This is the algorithm once more, column by column, in float64 NumPy, without jaxbnb. It
prints how close the closest decision was, relative to the scale: float32 errs by about
1e-6. Run `python tests/goldens/make_calibration.py`.
"""

import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent
NF4 = np.load(FOLDER / "codebooks.npz")["nf4"].astype(np.float64)
LEVELS = {"nf4": NF4, "int8": np.arange(-127, 128) / 127}
SHARES = np.linspace(0.6, 1.1, 21)
BLOCK, SWEEPS, DAMPING = 32, 4, 0.01


class Rounding:
    """The nearest level, and the margin of the closest decision so far."""

    def __init__(self, levels):
        self.levels, self.points = levels, (levels[1:] + levels[:-1]) / 2
        self.margin = np.inf

    def __call__(self, x, scale, counts=True):
        if counts:
            self.margin = min(self.margin, np.abs(x / scale - self.points).min())
        return self.levels[np.searchsorted(self.points, x / scale)]


def solve(w, moment, nearest):
    """Returns levels and scales of one output: its weights ``w``."""
    n = len(w)
    h = moment + DAMPING * np.trace(moment) / n * np.eye(n)
    blocks = sorted(
        np.split(np.arange(n), n // BLOCK), key=lambda b: -np.diag(h)[b].sum()
    )
    order = np.concatenate(
        [b[np.argsort(-np.diag(h)[b], kind="stable")] for b in blocks]
    )
    h, target = h[np.ix_(order, order)], w[order].copy()
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    x, q, scales = target.copy(), np.zeros(n), np.zeros(n // BLOCK)

    def round_block(first, scale, counts=False):
        y, chosen, cost = x.copy(), [], 0.0
        for i in range(first, first + BLOCK):
            chosen.append(nearest(y[i], scale, counts))
            error = (y[i] - chosen[-1] * scale) / u[i, i]
            y[i:] -= error * u[i, i:]
            cost += error**2
        return cost, y, chosen

    for b, first in enumerate(range(0, n, BLOCK)):
        trials = SHARES * np.abs(x[first : first + BLOCK]).max()
        costs = [round_block(first, scale)[0] for scale in trials]
        best, second = np.sort(costs)[:2]
        nearest.margin = min(nearest.margin, (second - best) / best)
        scales[b] = trials[np.argmin(costs)]
        _, x, chosen = round_block(first, scales[b], counts=True)
        q[first : first + BLOCK] = chosen
    for _ in range(SWEEPS):
        for b, first in enumerate(range(0, n, BLOCK)):
            block = slice(first, first + BLOCK)
            for i in range(first, first + BLOCK):
                error = q * np.repeat(scales, BLOCK) - target
                best = q[i] * scales[b] - h[i] @ error / h[i, i]
                q[i] = nearest(best, scales[b])
            error = q * np.repeat(scales, BLOCK) - target
            curve = q[block] @ h[block, block] @ q[block]
            step = q[block] @ (h[block] @ error) / curve
            assert scales[b] > step
            scales[b] -= step
    levels, absmax = np.zeros(n), np.zeros(n // BLOCK)
    levels[order] = q
    absmax[order[::BLOCK] // BLOCK] = scales
    return levels, absmax


def main():
    rng = np.random.default_rng(11)
    kernel = rng.integers(-50, 51, (64, 4)).astype(np.int8)
    inputs = rng.integers(-9, 10, (40, 64)) * rng.integers(1, 9, 64)
    inputs[:, 1::2] += inputs[:, ::2]
    arrays = {"kernel": kernel, "inputs": inputs.astype(np.int16)}
    moment = inputs.T @ inputs / len(inputs)
    for name, levels in LEVELS.items():
        nearest = Rounding(levels)
        columns = [solve(w, moment, nearest) for w in kernel.T.astype(np.float64)]
        chosen, absmax = map(np.array, zip(*columns, strict=True))
        arrays[f"{name}_codes"] = np.searchsorted(levels, chosen).astype(np.uint8)
        arrays[f"{name}_absmax"] = absmax.astype(np.float32)
        print(f"{name}: the closest decision by {nearest.margin:.1e}")
    np.savez_compressed(FOLDER / "calibration.npz", **arrays)


if __name__ == "__main__":
    main()
