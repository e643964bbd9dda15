"""Starts and steps of the optimiser where models are extreme: dwarfed noise, overlapping bars."""

import numpy as np
import pandas as pd
import pytest

import dmixed
from dmixed.newton import trust_region_step

RATIOS = (1, 10, 100, 1000)


def dwarfed(q: int, G: int, ratio: float, seed: int) -> tuple[str, pd.DataFrame]:
    """Unequal groups hardly larger than q; group effects `ratio` times the noise, rotated."""
    rng = np.random.default_rng([q, G, int(ratio), seed])
    g = np.repeat(np.arange(G), rng.integers(q + 1, 3 * q + 3, G))
    X = rng.standard_normal((len(g), q - 1))
    Z = np.column_stack([np.ones(len(g)), X])
    rotation = np.linalg.qr(rng.standard_normal((q, q)))[0]
    b = ratio * rng.standard_normal((G, q)) @ (rotation * 10.0 ** np.linspace(0, -1.5, q)).T
    y = 1 + X.sum(axis=1) + (Z * b[g]).sum(axis=1) + rng.standard_normal(len(g))
    names = [f"x{j}" for j in range(1, q)]
    terms = " + ".join(names)
    data = pd.DataFrame(X, columns=names).assign(g=g, y=y)
    return f"y ~ {terms} + (1 + {terms} | g)", data


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("q", [2, 3, 4])
def test_group_effects_that_dwarf_the_noise(q, ratio):
    """Few evaluations and a certificate, whatever the size of the group effects."""
    counts = []
    for G in (8, 25, 100):
        for seed in range(3):
            formula, data = dwarfed(q, G, ratio, seed)
            found = dmixed.lmer(formula, data).optimizer_summary
            assert found.certificate, (G, seed, found.reason)
            counts.append(found.evaluations)
    assert np.mean(counts) <= 10
    assert max(counts) <= 20


def overlapping(seed: int = 1) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    g = rng.permutation(np.arange(400) % 40)
    f = np.array(["a", "b", "c"])[rng.integers(0, 3, 400)]
    x = rng.normal(3, 2, 400)
    b = rng.standard_normal((40, 2))
    y = 1 + 0.5 * x + (f == "b") + b[g, 0] + 0.4 * b[g, 1] * x + rng.standard_normal(400)
    return pd.DataFrame({"y": y, "x": x, "f": f, "g": g})


@pytest.mark.parametrize(
    ("formula", "larger", "held"),
    [
        ("y ~ f + (1 + f || g)", "y ~ f + (0 + f | g)", "g"),
        ("y ~ x + (1 | g) + (1 + x | g)", "y ~ x + (1 + x | g)", "g"),
        ("y ~ f + (f | g) + (1 | g)", "y ~ f + (f | g)", "g.1"),
        ("y ~ x + (x | g) + (0 + x | g)", "y ~ x + (x | g)", "g.1"),
    ],
)
@pytest.mark.parametrize("reml", [True, False])
def test_a_bar_inside_another_is_held_at_zero(formula, larger, held, reml):
    """The likelihood cannot split what two such bars share: the larger takes all of it."""
    data = overlapping()
    both = dmixed.lmer(formula, data, reml=reml)
    alone = dmixed.lmer(larger, data, reml=reml)
    assert both.converged
    assert both.singular
    assert both.llf == pytest.approx(alone.llf, abs=1e-8)
    assert not both.varcorr()[held].to_numpy().any()
    rest = next(cov for label, cov in both.varcorr().items() if label != held)
    assert np.allclose(rest, alone.varcorr()["g"], rtol=1e-6, atol=1e-8)
    assert np.allclose(both.bse_fe, alone.bse_fe, rtol=1e-7)


def test_a_bar_inside_another_still_counts_in_the_criterion():
    data = overlapping()
    model = dmixed.MixedLM._of(
        dmixed.model.parse("y ~ f + (1 + f || g)"), data, None, None, "drop", None, None, None
    )
    theta = np.array([0.3, 1.0, 0.1, 0.2, 0.8, 0.1, 0.5])
    other = theta.copy()
    other[0] = 0.9
    assert model.criterion(theta)[0] != pytest.approx(model.criterion(other)[0], abs=1e-3)


@pytest.mark.parametrize(
    ("g", "w", "radius"),
    [
        ([0.0, 1e-8, 1e-4], [0.0, 1e-6, 1e9], 10.0),
        ([1.0, 0.0], [-1.0, 2.0], 1.0),
        ([0.0, 1.0], [-1.0, 2.0], 3.0),
        ([0.0, 0.0], [0.0, 0.0], 1.0),
        ([1e-3, 1.0], [1e-16, 1.0], 0.5),
    ],
)
def test_trust_region_step_is_inside_and_no_worse_than_cauchy(g, w, radius):
    g, w = np.array(g), np.array(w)
    step = trust_region_step(g, w, np.eye(len(g)), radius)
    assert np.linalg.norm(step) <= radius * (1 + 1e-8)

    def model(s):
        return g @ s + 0.5 * s @ (w * s)

    size = np.linalg.norm(g)
    along = [0.0] if size == 0 else np.linspace(0, radius / size, 200)
    assert model(step) <= min(model(-t * g) for t in along) + 1e-9  # the boundary is met to 1e-10


def test_trust_region_step_never_fails():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        n = rng.integers(1, 5)
        w = np.sort(rng.choice([-1, 0, 1, 1], n) * 10.0 ** rng.uniform(-16, 9, n))
        g = rng.standard_normal(n) * 10.0 ** rng.uniform(-12, 5, n)
        radius = 10.0 ** rng.uniform(-6, 6)
        step = trust_region_step(g, w, np.eye(n), radius)
        assert np.isfinite(step).all()
        assert np.linalg.norm(step) <= radius * (1 + 1e-6)


def test_large_groups_with_weights_keep_their_digits():
    """Equal weights change nothing but the scale, also with 1e5 rows a group."""
    rng = np.random.default_rng(3)
    n = 500_000
    g = np.arange(n) % 5
    x = rng.standard_normal(n)
    y = x + rng.standard_normal(5)[g] + rng.standard_normal(n)
    data = pd.DataFrame({"y": y, "x": x, "g": g, "w": np.full(n, 0.1)})
    plain = dmixed.lmer("y ~ x + (1 | g)", data)
    weighted = dmixed.lmer("y ~ x + (1 | g)", data, weights="w")
    assert np.allclose(weighted.bse_fe, plain.bse_fe, rtol=1e-7)
    assert weighted.scale == pytest.approx(0.1 * plain.scale, rel=1e-9)
