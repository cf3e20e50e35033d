import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darts_jax import averaging


def test_mean_of_all_weights_since_the_start(x64):
    rng = np.random.default_rng(0)
    seen = rng.normal(size=(7, 3))
    average = averaging.init({"w": jnp.zeros(3)})
    for i, w in enumerate(seen):
        average = jax.jit(averaging.update)(average, {"w": jnp.asarray(w)}, i >= 2)
        expected = w if i < 2 else seen[2 : i + 1].mean(0)
        np.testing.assert_allclose(average.mean["w"], expected, rtol=1e-12)
        assert average.count == max(0, i - 1)


def test_the_originals_average_lacks_the_first_weights(oracle, x64):
    recorded = {name: oracle("misc.npz")[f"opt/asgd/{name}"] for name in ("p", "average")}
    average = averaging.init(jnp.zeros(6))
    for i, params in enumerate(recorded["p"]):
        average = averaging.update(average, jnp.asarray(params))
        theirs = recorded["average"][i]
        if i:  # ours is (first + i * theirs) / (i + 1)
            expected = (recorded["p"][0] + i * theirs) / (i + 1)
            np.testing.assert_allclose(average.mean, expected, rtol=1e-12)
        else:
            np.testing.assert_allclose(average.mean, params, rtol=1e-12)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], False),
        ([5.0, 4.0, 3.0, 3.1, 3.2], False),  # not enough of them yet
        ([5.0, 4.0, 3.0, 2.9, 2.8, 2.7], False),
        ([3.0, 3.1, 3.1, 3.1, 3.1, 3.1], True),
        ([3.0, 2.0, 3.1, 3.1, 3.1, 2.5], False),  # below the best of what is old enough
        ([3.0, 2.0, 3.1, 3.1, 3.1, 3.1, 2.5], True),
    ],
)
def test_starts_without_progress(losses, expected):
    assert averaging.should_start(losses) is expected
