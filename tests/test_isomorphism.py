"""Which architectures are the same."""

import itertools

import jax
import numpy as np
import pytest

from darts_jax import isomorphism
from darts_jax.isomorphism import canonical
from darts_jax.spaces import nasbench201, nasbench201_small
from darts_jax.spaces._dag import from_string

EDGES, PRIMITIVES = nasbench201.EDGES, nasbench201.PRIMITIVES


def form(text):
    return canonical(from_string(text, EDGES, PRIMITIVES), EDGES, PRIMITIVES)


def test_the_published_count():
    every = isomorphism.choices(len(EDGES), len(PRIMITIVES))
    assert len(every) == 15625
    # arXiv 2001.00326, section 2.1
    assert len({nasbench201.unique_string(choice) for choice in every.tolist()}) == 6466


def test_the_small_space():
    edges, primitives = nasbench201_small.EDGES, nasbench201_small.PRIMITIVES
    representatives, class_of = isomorphism.classes(edges, primitives)
    assert representatives.shape == (306, 5) and class_of.shape == (1024,)
    forms = [canonical(choice, edges, primitives) for choice in representatives.tolist()]
    assert len(set(forms)) == 306
    every = isomorphism.choices(5, 4)
    for number in (0, 1, 500, 1023):
        assert canonical(every[number], edges, primitives) == forms[class_of[number]]


def test_classes_are_those_of_what_is_computed():
    """Of every way to give five sets of parameters to the edges, the outputs, in whatever order."""
    edges, primitives = nasbench201_small.EDGES, nasbench201_small.PRIMITIVES
    orders = np.array(list(itertools.permutations(range(5))))
    slopes = np.random.default_rng(0).uniform(0.5, 2, (len(primitives), 5, 2))

    def outputs(choice):
        states = [np.ones(len(orders)), *[None] * 3]  # None: nothing enters
        for e, (source, destination) in sorted(enumerate(edges), key=lambda edge: edge[1]):
            x, name = states[source], primitives[choice[e]]
            if name == "none" or x is None:
                continue
            if name != "skip_connect":
                inner, outer = slopes[choice[e], orders[:, e]].T
                x = outer * np.sin(inner * x)
            before = states[destination]
            states[destination] = x if before is None else before + x
        last = np.zeros(len(orders)) if states[-1] is None else states[-1]
        return tuple(np.sort(last).round(9) + 0.0)

    found = [outputs(choice) for choice in isomorphism.choices(5, 4).tolist()]
    numbers: dict = {}
    expected = [numbers.setdefault(own, len(numbers)) for own in found]
    np.testing.assert_array_equal(isomorphism.classes(edges, primitives)[1], expected)


SAME = [
    # States 1 and 2 exchanged.
    (
        "|nor_conv_3x3~0|+|none~0|none~1|+|none~0|nor_conv_1x1~1|none~2|",
        "|none~0|+|nor_conv_3x3~0|none~1|+|none~0|none~1|nor_conv_1x1~2|",
    ),
    # What does not reach the output, or starts from nothing.
    (
        "|nor_conv_3x3~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|",
        "|none~0|+|none~0|nor_conv_1x1~1|+|skip_connect~0|avg_pool_3x3~1|nor_conv_3x3~2|",
    ),
    # The mean of a sum is the sum of means.
    (
        "|nor_conv_3x3~0|+|skip_connect~0|skip_connect~1|+|none~0|none~1|avg_pool_3x3~2|",
        "|nor_conv_3x3~0|+|none~0|none~1|+|avg_pool_3x3~0|avg_pool_3x3~1|none~2|",
    ),
]
DIFFERENT = [
    # One convolution that is read twice, and two.
    (
        "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|none~0|nor_conv_1x1~1|skip_connect~2|",
        "|nor_conv_3x3~0|+|nor_conv_3x3~0|none~1|+|none~0|nor_conv_1x1~1|skip_connect~2|",
    ),
    # An identity, and twice the identity.
    (
        "|skip_connect~0|+|none~0|none~1|+|skip_connect~0|skip_connect~1|none~2|",
        "|skip_connect~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|",
    ),
    (
        "|nor_conv_3x3~0|+|none~0|none~1|+|none~0|skip_connect~1|none~2|",
        "|nor_conv_1x1~0|+|none~0|none~1|+|none~0|skip_connect~1|none~2|",
    ),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same(one, other):
    assert form(one) == form(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different(one, other):
    assert form(one) != form(other)


@pytest.mark.parametrize(("one", "other"), SAME[1:])
def test_the_same_compute_the_same(one, other):
    """With the parameters of one relaxed network, whose edges these two happen to share."""
    space = nasbench201.SPACE
    network = space.relaxed(num_classes=3, channels=2, stages=1, cells=1)
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    variables = network.init(jax.random.key(1), x, space.encode(one), train=True)
    outputs = [
        network.apply(variables, x, space.encode(text), train=True, mutable=["batch_stats"])[0]
        for text in (one, other)
    ]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)
