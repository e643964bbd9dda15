"""A pytest plugin: statsmodels' own tests of MixedLM find dmixed's names where its own stand."""

import dmixed


def pytest_configure() -> None:
    import statsmodels.formula.api
    from statsmodels.regression import mixed_linear_model

    for name in ("MixedLM", "MixedLMParams", "VCSpec"):
        setattr(mixed_linear_model, name, getattr(dmixed, name))
    statsmodels.formula.api.mixedlm = dmixed.mixedlm
