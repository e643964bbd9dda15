"""The profiled criterion and its exact derivatives, against the dense oracle and differences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
from models import model_of
from oracle import Bar, difference, evaluate, second_difference, unpack


@dataclass(frozen=True)
class Design:
    """A model by formula, and the random columns its bars hold."""

    fixed: str
    bars: tuple[tuple[str, ...], ...]
    sizes: tuple[int, int] = (1, 9)
    weights: bool = False
    offset: bool = False

    @property
    def formula(self):
        bars = [
            " + ".join(("1" if "1" in bar else "0", *(c for c in bar if c != "1")))
            for bar in self.bars
        ]
        return f"y ~ {self.fixed} + " + " + ".join(f"({bar} | g)" for bar in bars)


DESIGNS = {
    "q1": Design("x + z", (("1",),)),
    "q1 slope": Design("x", (("x",),)),
    "q2": Design("x + z", (("1", "x"),)),
    "q3": Design("x + z", (("1", "x", "z"),)),
    "two bars": Design("x + z", (("1",), ("x",))),
    "three bars": Design("x", (("1",), ("x",), ("z",))),
    "mixed bars": Design("x + z", (("1", "x"), ("z",))),
    "fewer rows than effects": Design("x + z", (("1", "x", "z"),), sizes=(1, 2)),
    "singletons": Design("x", (("1", "x"),), sizes=(1, 1)),
    "weights": Design("x + z", (("1", "x"),), weights=True),
    "offset": Design("x + z", (("1", "x"),), offset=True),
    "weights and offset": Design("x", (("1",), ("z",)), weights=True, offset=True),
    "no fixed effects": Design("0", (("1", "x"),)),
    "random effects not among the fixed": Design("0 + z", (("1", "x"),)),
}


def simulated(design, seed=0):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(design.sizes[0], design.sizes[1] + 1, 16)
    codes = np.repeat(np.arange(16), sizes)
    n = len(codes)
    d = pd.DataFrame({"g": codes, "x": rng.normal(3, 2, n), "z": rng.normal(0, 1, n)})
    slope = (1 + 0.5 * rng.standard_normal(16))[codes]
    d["y"] = 7 + slope * d.x - d.z + rng.standard_normal(16)[codes] + rng.standard_normal(n)
    d["w"] = rng.uniform(0.3, 4, n)
    d["o"] = rng.normal(1, 2, n)
    return d.sample(frac=1, random_state=1, ignore_index=True)


def built(name):
    """The model, and the oracle's criterion of the same data as a function of theta."""
    design = DESIGNS[name]
    d = simulated(design)
    weights, offset = "w" if design.weights else None, "o" if design.offset else None
    model = model_of(design.formula, d, weights, offset)
    columns = {"1": np.ones(len(d)), "x": d.x.to_numpy(), "z": d.z.to_numpy()}
    terms = design.fixed.split(" + ")
    fixed = [] if terms[0] == "0" else [columns["1"]]
    fixed += [columns[c] for c in terms if c != "0"]
    X = np.column_stack(fixed) if fixed else np.empty((len(d), 0))
    Z = [np.column_stack([columns[c] for c in bar]) for bar in design.bars]

    def oracle(theta, reml=True):
        factors = unpack(theta, [z.shape[1] for z in Z])
        bars = [Bar(z, d.g.to_numpy(), L @ L.T) for z, L in zip(Z, factors, strict=True)]
        return evaluate(d.y, X, bars, reml, weights and d[weights], offset and d[offset]).criterion

    return model, oracle, [z.shape[1] for z in Z]


def points(sizes, kind, seed=5, scales=(0.05, 0.7, 10.0)):
    """Theta with a full, a singular or no covariance at all."""
    rng = np.random.default_rng(seed)
    m = sum(q * (q + 1) // 2 for q in sizes)
    if kind == "zero":
        return [np.zeros(m)]
    out = []
    for scale in scales:
        blocks = []
        for q in sizes:
            L = np.tril(rng.standard_normal((q, q)))
            if kind == "singular":
                L[:, -1] = 0  # the last column of the factor: rank q - 1
            blocks.append(np.concatenate([L[j:, j] for j in range(q)]))
        out.append(scale * np.concatenate(blocks))
    return out


@pytest.mark.parametrize("reml", [True, False], ids=["REML", "ML"])
@pytest.mark.parametrize("kind", ["full", "singular", "zero"])
@pytest.mark.parametrize("name", DESIGNS)
def test_deviance_against_the_dense_oracle(name, kind, reml):
    model, oracle, sizes = built(name)
    for theta in points(sizes, kind):
        value, _, _ = model.criterion(theta, reml)
        assert value == pytest.approx(oracle(theta, reml), abs=1e-9, rel=0)


@pytest.mark.parametrize("reml", [True, False], ids=["REML", "ML"])
@pytest.mark.parametrize("kind", ["full", "singular", "zero"])
@pytest.mark.parametrize("name", DESIGNS)
def test_derivatives_against_differences(name, kind, reml):
    model, oracle, sizes = built(name)
    for theta in points(sizes, kind, seed=6, scales=(0.05, 0.7, 3.0)):
        _, gradient, hessian = model.criterion(theta, reml)
        # the criterion varies on the scale of theta itself, or of 0.3 near zero
        scale = np.maximum(np.abs(theta), 0.3)
        expected = difference(lambda t: oracle(t, reml), theta, scale)
        assert np.allclose(gradient, expected, rtol=1e-6, atol=1e-6 * size(expected))
        # rounding of a gradient: eps cond(I + R Psi R'); R'R = Z_g'Z_g is about 70 here
        step = (np.finfo(float).eps * (1 + 70 * theta @ theta)) ** (1 / 5)
        expected = difference(lambda t: model.criterion(t, reml)[1], theta, scale, step)
        assert np.allclose(hessian, hessian.T, rtol=0, atol=1e-9 * size(hessian))
        assert np.allclose(hessian, expected, rtol=1e-6, atol=1e-6 * size(expected))


def size(a):
    """What entries of a are small against: the largest, or 1e-2 where all vanish."""
    return max(float(np.abs(a).max()), 1e-2)


@pytest.mark.parametrize("name", ["q2", "weights and offset", "fewer rows than effects"])
def test_hessian_against_differences_of_the_oracle(name):
    model, oracle, sizes = built(name)
    theta = points(sizes, "full")[1]
    expected = second_difference(oracle, theta, np.maximum(np.abs(theta), 0.3))
    hessian = model.criterion(theta, True)[2]
    assert np.allclose(hessian, expected, rtol=1e-5, atol=1e-6 * size(expected))


def test_theta_and_its_mirror_images_are_the_same_model():
    model, _, sizes = built("q2")
    a, b, c = points(sizes, "full")[1]
    value = model.criterion(np.array([a, b, c]))[0]
    for mirrored in ([-a, -b, c], [a, b, -c], [-a, -b, -c]):
        assert model.criterion(np.array(mirrored))[0] == pytest.approx(value, abs=1e-10)
