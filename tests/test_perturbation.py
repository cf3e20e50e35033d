"""Selection by perturbation, of supernets whose accuracy is a formula."""

import numpy as np
import pytest

from darts_jax import genotype, perturbation

NAMES = ("none", "skip_connect", "max_pool_3x3", "sep_conv_3x3")
SHAPE = (5, 4)  # two nodes


def supernet(seed=0):
    rng = np.random.default_rng(seed)
    return {
        cell: rng.uniform(0.1, 1, SHAPE) * np.array([0, 1, 1, 1]) for cell in ("normal", "reduce")
    }


def weigh(state):
    return {cell: np.full(SHAPE, 0.25) for cell in state}


def accuracy(state, weights):
    """Additive: every operation adds its value times its weight."""
    return sum((state[cell] * weights[cell]).sum() for cell in state)


def best(values):
    """Operations of the largest values; of three edges into the second node the best two."""
    strength, columns = values.max(-1), values.argmax(-1)
    kept = sorted(2 + np.argsort(-strength[2:])[:2])
    edges = [(0, 0), (1, 1), *((e, e - 2) for e in kept)]
    return tuple((NAMES[columns[edge]], int(source)) for edge, source in edges)


@pytest.mark.parametrize("seed", range(5))
def test_keeps_what_is_missed_most(seed):
    """In whatever order, if every operation adds its own to the accuracy."""
    state = supernet(seed)
    found = perturbation.select(state, weigh, accuracy, np.random.default_rng(seed), NAMES)
    assert found == genotype.validate(
        genotype.Genotype(best(state["normal"]), (2, 3), best(state["reduce"]), (2, 3))
    )


def test_alphas_do_not_matter_where_the_accuracy_says_otherwise():
    """The example of the paper: the skip connection has the largest weight, and is not missed."""
    state = {cell: np.tile([0.0, 0.0, 0.2, 0.5], (5, 1)) for cell in ("normal", "reduce")}

    def skips(state):
        return {cell: np.tile([0.0, 0.9, 0.05, 0.05], (5, 1)) for cell in state}

    found = perturbation.select(state, skips, accuracy, np.random.default_rng(0), NAMES)
    assert {name for name, _ in found.normal + found.reduce} == {"sep_conv_3x3"}


def test_an_operation_without_weight_is_not_kept():
    """Even where the others do harm."""
    state = {cell: np.tile([0.0, 0.0, -1.0, -2.0], (5, 1)) for cell in ("normal", "reduce")}

    def shrunk(state):
        return {cell: np.tile([0.0, 0.0, 0.5, 0.5], (5, 1)) for cell in state}

    found = perturbation.select(state, shrunk, accuracy, np.random.default_rng(0), NAMES)
    assert {name for name, _ in found.normal + found.reduce} == {"max_pool_3x3"}


def test_what_is_evaluated():
    """One operation of one edge away at a time; decided edges are one-hot, or gone."""
    seen = []

    def watch(state, weights):
        seen.append({cell: values.copy() for cell, values in weights.items()})
        return accuracy(state, weights)

    perturbation.select(supernet(), weigh, watch, np.random.default_rng(0), NAMES)
    assert len(seen) == 2 * 5 * 3 + 2 * 3
    for i, weights in enumerate(seen[:30]):
        turn, cell = i // 6, ("normal", "reduce")[i // 3 % 2]
        decided = (weights[cell] == 1).sum(-1) == 1
        assert decided.sum() == turn
        removed = (weights[cell][~decided] == 0).any(-1)
        assert removed.sum() == 1 and (weights[cell][~decided][~removed] == 0.25).all()
    for weights in seen[30:]:
        gone = sum(int((weights[cell].sum(-1) == 0).sum()) for cell in weights)
        assert 1 <= gone <= 2


def test_tuning_goes_on_from_decision_to_decision():
    calls = []

    def tune(state, kept):
        calls.append({cell: int((left.sum(-1) == 1).sum()) for cell, left in kept.items()})
        return {cell: values.copy() for cell, values in state.items()}

    rng = np.random.default_rng(0)
    tuned = perturbation.select(supernet(), weigh, accuracy, rng, NAMES, tune)
    assert [call["normal"] for call in calls[:5]] == [1, 2, 3, 4, 5]
    assert calls[-1] == {"normal": 4, "reduce": 4}
    plain = perturbation.select(supernet(), weigh, accuracy, np.random.default_rng(0), NAMES)
    assert tuned == plain


def test_edge_weights_stay_as_they_are():
    kept = {"normal": np.array([[True, False], [True, True], [False, False]])}
    weights = {"normal": np.full((3, 2), 0.5, np.float32), "normal_edges": np.ones(3)}
    found = perturbation.projected(weights, kept)
    np.testing.assert_array_equal(found["normal"], [[1, 0], [0.5, 0.5], [0, 0]])
    np.testing.assert_array_equal(found["normal_edges"], np.ones(3))
    assert found["normal"].dtype == np.float32
