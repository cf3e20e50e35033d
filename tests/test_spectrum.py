"""The dominant eigenvalue against a full decomposition, and the rule of early stopping."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from darts_jax import spectrum

ALPHA = {"normal": jnp.linspace(-1, 1, 12).reshape(3, 4), "reduce": jnp.zeros((1, 3))}


dominant_eigenvalue = jax.jit(spectrum.dominant_eigenvalue, static_argnums=(0, 3))


def quadratic(eigenvalues, seed=0):
    """alpha -> alpha' Q diag(eigenvalues) Q' alpha / 2 for a random rotation Q."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(len(eigenvalues), len(eigenvalues))))
    matrix = jnp.asarray(rotation @ np.diag(eigenvalues) @ rotation.T)
    return lambda alpha: ravel_pytree(alpha)[0] @ matrix @ ravel_pytree(alpha)[0] / 2


def double(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64), tree)


def loss(alpha):
    values = jnp.cos(jnp.arange(12.0)).reshape(3, 4)
    return (
        jnp.log((jax.nn.softmax(alpha["normal"]) * values**2).sum()) + (alpha["reduce"] ** 4).sum()
    )


def test_of_a_loss_is_that_of_its_hessian(x64):
    alpha = double(ALPHA)
    flat, unravel = ravel_pytree(alpha)
    hessian = jax.jit(jax.hessian(lambda flat: loss(unravel(flat))))(flat)
    found = dominant_eigenvalue(loss, alpha, jax.random.key(0))
    np.testing.assert_allclose(found, np.linalg.eigvalsh(hessian)[-1], rtol=1e-10)
    assert found.dtype == jnp.float64


@pytest.mark.parametrize(
    "eigenvalues",
    [
        np.linspace(-3, 2, 15),  # the largest, not the largest in size
        np.linspace(-3, -1, 15),
        np.repeat([2.0, 5.0, -1.0], 5),  # a basis that is complete after three iterations
        -np.repeat([2.0, 5.0, 1.0], 5),
        np.full(15, -4.0),
        1e-12 * np.arange(15),
        np.zeros(15),
    ],
)
def test_of_a_quadratic_loss(eigenvalues, x64):
    found = dominant_eigenvalue(quadratic(eigenvalues), double(ALPHA), jax.random.key(1))
    np.testing.assert_allclose(found, eigenvalues.max(), rtol=1e-9, atol=1e-25)


def test_a_few_iterations_are_near_and_never_above(x64):
    eigenvalues = np.append(np.linspace(-1, 1, 199), 3.0)
    alpha = jnp.zeros(200)
    matrix = quadratic(eigenvalues)
    errors = [3 - dominant_eigenvalue(matrix, alpha, jax.random.key(0), count) for count in (2, 12)]
    assert all(before > after > -1e-12 for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 1e-4


def test_under_vmap_in_single_precision():
    alphas = jnp.stack([jnp.linspace(0, 1, 6), jnp.linspace(1, -1, 6)])

    def curved(alpha):
        return (alpha**4).sum() + alpha.prod()

    keys = jax.random.split(jax.random.key(0))
    mapped = jax.jit(jax.vmap(partial(spectrum.dominant_eigenvalue, curved)))(alphas, keys)
    for alpha, found in zip(np.asarray(alphas, np.float64), mapped, strict=True):
        others = [[np.delete(alpha, [i, j]).prod() for j in range(6)] for i in range(6)]
        hessian = np.where(np.eye(6), np.diag(12 * alpha**2), others)
        np.testing.assert_allclose(found, np.linalg.eigvalsh(hessian)[-1], rtol=1e-5)


FLAT = [1.0] * 10


@pytest.mark.parametrize(
    ("eigenvalues", "stop"),
    [
        (FLAT, None),
        ([1.0] * 5 + [1.3] * 5, None),  # 1 / 1.3 > 0.75
        ([1.0] * 5 + [1.4] * 5, 2),  # 1 / 1.4 < 0.75: back to the middle of the first window
        ([1.0] * 5 + [1.4] * 4, None),  # the second window is not whole
        (FLAT + [1.0, 3.0], 4),  # around 9: (4 + 3) / 5 = 1.4
        (FLAT + [1.0, 3.0] + FLAT, 4),  # the first reason counts
        ([5.0] * 5 + [1.0] * 20, None),
        ([-2.0] * 5 + [-1.0] * 20, None),  # not positive
    ],
)
def test_early_stop(eigenvalues, stop):
    assert spectrum.early_stop(eigenvalues) == stop


def test_the_ratio_of_the_released_code():
    """1.3, new over old: it stops where the paper's 0.75, old over new, does not yet."""
    eigenvalues = [1.0] * 5 + [1.32] * 5
    assert spectrum.early_stop(eigenvalues) is None
    assert spectrum.early_stop(eigenvalues, ratio=1 / 1.3) == 2


def test_early_stop_by_the_formula():
    """Against a plain loop, over ratios and windows."""
    rng = np.random.default_rng(0)
    for ratio, window in ((0.75, 5), (0.9, 3), (0.5, 1)):
        values = rng.uniform(0.1, 1, 60)
        half, expected = window // 2, None
        for i in range(half + window, len(values) - half):
            mean = {c: values[c - half : c + half + 1].mean() for c in (i - window, i)}
            if mean[i - window] / mean[i] < ratio:
                expected = i - window
                break
        assert spectrum.early_stop(values, ratio, window) == expected
        assert expected is not None
