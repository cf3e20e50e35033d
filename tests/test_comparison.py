"""The measures between hypergradients, and the loop, against closed forms."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from darts_jax.genotype import CNN, CNN_PRIMITIVES, PUBLISHED
from darts_jax.hypergradient import Bilevel
from experiments import comparison
from experiments.comparison_estimators import EXACT, Settings, methods
from experiments.comparison_problems import CleaningConfig, ToyConfig, make
from experiments.metrics import NonFinite

NAMES = (
    "first_order",
    "finite_difference",
    "finite_difference_small",
    "t1_t2",
    "neumann",
    "conjugate_gradient",
    "unrolled_3",
)
SETTINGS = Settings(small_radius=1e-3, neumann_terms=4, cg_steps=3)
XI = 0.2


def quiet(*_):
    pass


def test_agreement():
    estimate, exact = {"a": jnp.array([3.0]), "b": jnp.array(4.0)}, {"a": [4.0], "b": 3.0}
    found = comparison.agreement(estimate, jax.tree.map(jnp.asarray, exact))
    assert found == pytest.approx(
        {"cosine": 24 / 25, "relative_error": np.sqrt(2) / 5, "norm_ratio": 1}
    )
    found = comparison.agreement(jnp.array([0.0, -2.0]), jnp.array([0.0, 4.0]))
    assert found == {"cosine": -1, "relative_error": 1.5, "norm_ratio": 0.5}


@pytest.mark.parametrize(
    ("estimate", "exact", "expected"),
    [
        ([0.0, 0.0], [1.0, 0.0], (None, 1, 0)),
        ([1.0, 0.0], [0.0, 0.0], (None, None, None)),
        ([np.nan, 0.0], [1.0, 0.0], (None, None, None)),
    ],
)
def test_agreement_of_what_has_no_direction(estimate, exact, expected):
    found = comparison.agreement(jnp.array(estimate), jnp.array(exact))
    assert tuple(found.values()) == expected


def test_sign_agreement():
    estimate, exact = jnp.array([1.0, -2.0, 0.0, 3.0]), jnp.array([5.0, 1.0, 0.0, 0.1])
    assert comparison.sign_agreement(estimate, exact) == 0.75


def test_top_operations_leave_out_none():
    alpha = {name: np.zeros((2, 8)) for name in ("reduce", "normal")}
    alpha["normal"][0, [0, 3]] = 9, 1  # none is first, but no operation to keep
    alpha["normal"][1, 1] = 1
    alpha["reduce"][0, 7] = 1
    np.testing.assert_array_equal(comparison.top_operations(alpha, CNN_PRIMITIVES), [2, 0, 6, 0])


def test_genotype_distance():
    one = PUBLISHED["DARTS_V2"]
    assert comparison.genotype_distance(one, one, CNN) == {
        "edges_differ": 0,
        "operations_differ": 0,
    }
    (operation, source), *others = one.normal
    swapped = one._replace(normal=(*one.normal[1::-1], *one.normal[2:]))
    assert set(comparison.genotype_distance(one, swapped, CNN).values()) == {0}
    renamed = one._replace(normal=(("max_pool_3x3", source), *others))
    assert comparison.genotype_distance(one, renamed, CNN) == {
        "edges_differ": 0,
        "operations_differ": 1 / 16,
    }
    *others, (operation, source) = one.reduce
    moved = one._replace(reduce=(*others, (operation, 4)))
    assert comparison.genotype_distance(one, moved, CNN) == {
        "edges_differ": 1 / 16,
        "operations_differ": 1 / 16,
    }


def programs_of(problem, names=NAMES):
    state, compiled = problem.init(0), {}
    point = comparison.start(problem, 0)
    chosen = methods(names, SETTINGS)
    return comparison.make_programs(problem, chosen, point, compiled, quiet), compiled, state, point


def test_each_estimator_on_the_toy_problem():
    """L_val = a w - 2a + 1, L_train = (w - a)^2: every implicit term is a multiple of a."""
    problem = make(ToyConfig(xi=XI, start=(0.5, 3.0)))
    programs, _, state, point = programs_of(problem)
    lines = comparison.compare(problem, programs, state, point)
    assert [line["estimator"] for line in lines] == [EXACT, *NAMES]

    a, w, q = 3.0, 0.5, 1 - 2 * XI
    after = {k: a + q**k * (w - a) for k in (0, 1, 3)}
    expected = {  # direct and implicit term
        EXACT: (after[1] - 2, 2 * XI * a),
        "first_order": (w - 2, 0),
        "finite_difference": (after[1] - 2, 2 * XI * a),
        "finite_difference_small": (after[1] - 2, 2 * XI * a),
        "t1_t2": (w - 2, 2 * XI * a),
        "neumann": (w - 2, (1 - q**4) * a),
        "conjugate_gradient": (w - 2, a),
        "unrolled_3": (after[3] - 2, (1 - q**3) * a),
    }
    exact = sum(expected[EXACT])
    for line in lines:
        direct, implicit = expected[line["estimator"]]
        whole, ratio = direct + implicit, implicit / (2 * XI * a)
        close = {"rel": 1e-4, "abs": 1e-3 if "small" in line["estimator"] else 1e-4}
        assert line["gradient_norm_ratio"] == pytest.approx(abs(whole / exact), **close)
        assert line["gradient_relative_error"] == pytest.approx(abs(whole / exact - 1), **close)
        assert line["implicit_norm_ratio"] == pytest.approx(ratio, **close)
        assert line["implicit_relative_error"] == pytest.approx(abs(ratio - 1), **close)
        assert line["gradient_cosine"] == pytest.approx(np.sign(whole * exact))
        assert line["implicit_cosine"] == (pytest.approx(1) if implicit else None)
        assert line["sign_agreement"] == (whole * exact > 0)
        assert line["seconds"] > 0
        assert "top_agreement" not in line


@pytest.mark.parametrize(
    ("name", "end"),
    [(EXACT, 2 / (1 + 2 * XI)), ("first_order", 2), ("conjugate_gradient", 1)],
)
def test_a_search_settles_where_its_estimator_says(name, end):
    problem = make(ToyConfig(xi=XI, steps=400))
    programs, compiled, _, _ = programs_of(problem, (name,))
    seen = []

    def observe(step, state, point):
        assert int(state.step) == step
        seen.append((step, point is None))

    state = comparison.run_search(problem, programs[name], compiled, 0, observe)
    np.testing.assert_allclose([state.w, state.alpha], end, rtol=1e-4)
    assert seen == [*((step, False) for step in range(400)), (400, True)]
    assert problem.evaluate(state) == pytest.approx(end * end - 2 * end + 1, abs=1e-4)


def test_a_search_that_diverges():
    problem = make(ToyConfig(xi=30.0))
    programs, compiled, _, _ = programs_of(problem, ())
    with pytest.raises(NonFinite, match=r"step \d+ of seed 0: the training loss is (inf|nan)"):
        comparison.run_search(problem, programs[EXACT], compiled, 0, quiet)


# Cost: how often the losses are evaluated. A product with second derivatives is one evaluation,
# and counts as two gradients.
@pytest.mark.parametrize(
    ("name", "gradients", "products"),
    [
        (EXACT, 2, 1),
        ("first_order", 1, 0),
        ("finite_difference", 4, 0),
        ("t1_t2", 2, 1),
        ("neumann", 2, SETTINGS.neumann_terms),
        ("conjugate_gradient", 2, SETTINGS.cg_steps + 2),
        ("unrolled_3", 4, 3),
    ],
)
def test_gradient_evaluations(name, gradients, products):
    evaluations = 0

    def count(_):
        nonlocal evaluations
        evaluations += 1

    def loss(w, alpha, _):
        jax.debug.callback(count, w)  # of w, or a loop would call it once
        scales = jnp.arange(1.0, 9.0)  # more eigenvalues than steps of conjugate gradients
        return jnp.sum(scales * (w - alpha) ** 2) + jnp.sum(w**4)

    w = jnp.linspace(-1, 1, 8)
    optimizer = optax.sgd(0.01)
    problem = SimpleNamespace(bilevel=Bilevel(loss, loss), w_optimizer=optimizer, weight_decay=0.0)
    method = methods((name,), SETTINGS)[name]
    estimate = method.make(problem)
    jax.block_until_ready(estimate(w + 1, w, optimizer.init(w), jnp.ones(()), jnp.ones(())))
    jax.effects_barrier()
    assert evaluations == gradients + products
    # The finite difference has no product, and two of its gradients are in alpha alone.
    assert method.gradient_evaluations == gradients + 2 * products


def test_radius_sweep():
    """On a smooth loss: second order in the radius in float64, rounding in the others."""
    problem = make(CleaningConfig(images=40))
    point = comparison.start(problem, 0)
    lines = comparison.radius_sweep(
        problem, point, (1.0, 1e-1, 1e-2, 1e-8), comparison.PRECISIONS, {}, quiet
    )
    errors = {(line["precision"], line["radius"]): line["relative_error"] for line in lines}
    assert errors["float64", None] == 0
    assert 0 < errors["float32", None] < 1e-5 < errors["bfloat16", None] < 0.1
    assert errors["float64", 1e-1] / errors["float64", 1e-2] == pytest.approx(100, rel=0.02)
    assert errors["float32", 1.0] == pytest.approx(errors["float64", 1.0], rel=1e-2)
    assert errors["float32", 1e-8] > 0.1  # the movement is lost in rounding
    assert errors["bfloat16", 1e-8] == 1
    assert errors["float64", 1e-8] < 1e-4
    assert not jax.config.jax_enable_x64


def test_cast():
    key = jax.random.key(0)
    tree = {"x": jnp.ones(2), "label": jnp.arange(2), "key": key}
    found = comparison.cast(tree, "bfloat16")
    assert found["x"].dtype == jnp.bfloat16
    assert found["label"] is tree["label"]
    assert found["key"] is key
