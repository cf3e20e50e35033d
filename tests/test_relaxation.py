import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darts_jax import relaxation

pytestmark = pytest.mark.usefixtures("x64")


def test_softmax_is_equation_2_on_every_leaf():
    rng = np.random.default_rng(0)
    alpha = {"normal": rng.normal(size=(14, 8)), "cells": [rng.normal(size=(2, 3, 5))], "none": {}}
    weights = relaxation.softmax(alpha)
    assert jax.tree.structure(weights) == jax.tree.structure(alpha)
    for leaf, weight in zip(jax.tree.leaves(alpha), jax.tree.leaves(weights), strict=True):
        exponentials = np.exp(leaf)
        expected = exponentials / exponentials.sum(-1, keepdims=True)
        np.testing.assert_allclose(weight, expected, rtol=1e-14)


def test_softmax_jacobian_is_diag_p_minus_p_p():
    p = relaxation.softmax(jnp.array([0.3, -1.0, 2.0]))
    jacobian = jax.jacobian(relaxation.softmax)(jnp.array([0.3, -1.0, 2.0]))
    np.testing.assert_allclose(jacobian, np.diag(p) - np.outer(p, p), atol=1e-15)


def test_softmax_of_large_alpha_is_one_hot():
    np.testing.assert_array_equal(relaxation.softmax(jnp.array([1e4, 0.0, -1e4])), [1, 0, 0])
