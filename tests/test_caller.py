"""Functions that `MixedLM.from_formula` and `mixedlm` find in the caller's variables."""

from __future__ import annotations

import functools
import os
import pickle
import re
import subprocess

import numpy as np
import pandas as pd
import pytest

import dmixed
from dmixed import FormulaError, MixedLM, lmer, mixedlm


def table(n=60):
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {"y": rng.normal(size=n), "x": rng.normal(size=n), "g": np.repeat(range(10), n // 10)}
    )


def doubled(x):
    return 2.0 * x


def test_a_function_of_the_module_and_of_a_function():
    def tripled(x):
        return 3.0 * x

    plain = mixedlm("y ~ x", table(), groups="g").fit().fe_params["x"]
    for times, name in ((2, "doubled"), (3, "tripled")):
        found = mixedlm(f"y ~ {name}(x)", table(), groups="g").fit()
        assert found.fe_params[f"{name}(x)"] == pytest.approx(plain / times, rel=1e-8)
    found = MixedLM.from_formula(
        "y ~ x", table(), groups="g", re_formula="0 + tripled(x)",
        vc_formula={"v": "0 + doubled(x)"},
    )  # fmt: skip
    assert found.data.exog_re_names == ["tripled(x)"]


def test_what_is_given_counts():
    found = mixedlm("y ~ doubled(x)", table(), groups="g", context={"doubled": np.exp})
    np.testing.assert_allclose(found.exog[:, 1], np.exp(table().x))


def test_lmer_does_not_look():
    with pytest.raises(FormulaError, match="doubled"):
        lmer("y ~ doubled(x) + (1 | g)", table())


class Holder:
    """Has a method and is callable."""

    def method(self, x):
        return x

    __call__ = method


@pytest.mark.parametrize(
    "name", ["shell", "run_code", "imported", "held", "method", "partly", "made", "nothing"]
)
def test_only_plain_functions_are_found(name):
    shell, run_code, imported, nothing = os.system, eval, __import__, None
    held, made, partly = Holder(), Holder, functools.partial(doubled)
    method = held.method
    assert name in locals()
    with pytest.raises(FormulaError, match=rf"{name}\(\) is not in the vocabulary"):
        mixedlm(f"y ~ {name}(x)", table(), groups="g")


def test_no_text_of_a_formula_reaches_a_function(tmp_path):
    run = subprocess.run
    assert run
    mark = tmp_path / "mark"
    for arguments in (f"'touch {mark}'", f"['touch', '{mark}']", "x, None"):
        with pytest.raises(dmixed.DmixedError, match=re.escape("run(")):
            mixedlm(f"y ~ run({arguments}) + x", table(), groups="g")
    assert not mark.exists()


def test_attributes_and_braces_stay_refused():
    for formula in ("y ~ os.system('true')", "y ~ {doubled(x)}", "y ~ doubled.__globals__(x)"):
        with pytest.raises(FormulaError):
            mixedlm(formula, table(), groups="g")


def test_it_travels():
    model = mixedlm("y ~ doubled(x)", table(), groups="g")
    assert pickle.loads(pickle.dumps(model.spec)).context["doubled"](2.0) == 4.0
