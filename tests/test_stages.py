import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from darts_jax import hypergradient
from experiments.stages import compile_stages

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
PROBLEM = hypergradient.Bilevel(
    lambda w, alpha, x: jnp.sum(jnp.tanh(w["a"] * alpha + x) ** 2) + w["b"] ** 2,
    lambda w, alpha, x: jnp.sum(jnp.sin(w["a"]) * x) + w["b"] * alpha.sum(),
)
ESTIMATORS = {
    "first_order": hypergradient.first_order(PROBLEM),
    "unrolled": hypergradient.unrolled(PROBLEM, OPTIMIZER),
    "finite_difference": hypergradient.finite_difference(PROBLEM, OPTIMIZER),
    "neumann": hypergradient.neumann(PROBLEM, OPTIMIZER),
}


def arguments(seed=0):
    rng = np.random.default_rng(seed)
    w = {"a": jnp.asarray(rng.normal(size=3)), "b": jnp.asarray(rng.normal())}
    alpha, *batches = (jnp.asarray(rng.normal(size=3)) for _ in range(3))
    return alpha, w, OPTIMIZER.init(w), *batches


@pytest.mark.parametrize("name", ESTIMATORS)
def test_same_result_as_the_function(x64, name):
    program = compile_stages(ESTIMATORS[name], arguments(), {})
    for seed in (0, 1):
        found = program.call(*arguments(seed))
        expected = ESTIMATORS[name](*arguments(seed))
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15), found, expected
        )


def test_stages_are_shared():
    compiled, said = {}, []

    def say(name, seconds=None):
        said.append((name, seconds is None))

    unrolled = compile_stages(ESTIMATORS["unrolled"], arguments(), compiled, say)
    names = [name for name, begins in said if begins]
    assert names.count("value and gradient") == 2  # of the training and of the validation loss
    assert "mixed product" in names
    assert names == [name for name, begins in said if not begins]
    stages = set(compiled.values())
    assert unrolled.compile_seconds == pytest.approx(sum(s.compile_seconds for s in stages))
    assert unrolled.temp_bytes == max(stage.temp_bytes for stage in stages)

    said.clear()
    difference = compile_stages(ESTIMATORS["finite_difference"], arguments(), compiled, say)
    assert {name for name, _ in said} == {"points", "alpha gradient", "quotient"}
    added = set(compiled.values()) - stages
    assert difference.compile_seconds > sum(stage.compile_seconds for stage in added)

    said.clear()
    compile_stages(ESTIMATORS["finite_difference"], arguments(1), compiled, say)
    assert not said


def test_scratch_memory_is_that_of_the_largest_stage():
    def product(n):
        @jax.jit
        def product(x):
            return (x[:, None] * x[None, :n]).sort().sum()  # an array that cannot be fused away

        return product

    small, large = product(10), product(1000)
    x = jnp.ones(1000)
    both = compile_stages(lambda x: small(x) + large(x), (x,), {})
    alone = [compile_stages(function, (x,), {}).temp_bytes for function in (small, large)]
    assert both.temp_bytes == max(alone) >= 4 * 1000 * 1000 > min(alone)


def test_programs_are_shared_by_what_they_compute():
    """Another function of the same text shares one; that of another argument does not."""

    def pick(index):
        @jax.jit
        def pick(*args):
            return 2 * args[index]

        return pick

    compiled = {}
    for index in (0, 1, 0):
        program = compile_stages(pick(index), (jnp.ones(2), jnp.zeros(2)), compiled)
        assert (
            program.call(jnp.array([3.0, 4.0]), jnp.array([5.0, 6.0])).tolist()
            == ([[6.0, 8.0], [10.0, 12.0]][index])
        )
    assert len(set(compiled.values())) == 2
