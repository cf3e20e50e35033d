"""Hypergradients of the recurrent half: ours, and the original's by the differences switched on."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recorded_rnn import close, inputs_of, params_of

from darts_jax import hypergradient, language_model, search
from darts_jax.hypergradient import problem, products
from experiments import search_rnn, texts
from experiments.config import alpha_optimizer

pytestmark = pytest.mark.usefixtures("x64")

LOSS = language_model.make_loss()
PROBLEM = hypergradient.Bilevel(LOSS, LOSS, has_aux=True)
DIFFERENTIATE = problem.value_and_grad(LOSS, True)  # (w, alpha, inputs) -> value, both gradients
PAPER = search_rnn.PRESETS["paper"][1]


@pytest.fixture(scope="module")
def recorded(oracle):
    return oracle("rnn.npz")


@pytest.fixture
def params(recorded, unpack):
    return params_of(unpack(recorded, "search/w"))


@pytest.fixture(scope="module")
def inputs(recorded, unpack):
    """`inputs("train")`: the recorded batch and hidden states."""
    return functools.partial(inputs_of, recorded, unpack)


def clip_as_pytorch(bound, constant=False):
    """The original's, which adds 1e-6 to the norm; `optax.clip_by_global_norm` does not.

    constant: it is not differentiated through.
    """

    def clip(updates, params):
        factor = jnp.minimum(1, bound / (optax.tree.norm(updates) + 1e-6))
        factor = jax.lax.stop_gradient(factor) if constant else factor
        return jax.tree.map(lambda g: factor * g, updates)

    return optax.stateless(clip)


# The embedding stays where it is, though it is trained.
FREEZE = optax.stateless(lambda updates, _: updates | {"embedding": 0 * updates["embedding"]})
STEPS = {
    "noclip": lambda clip: optax.identity(),
    "clip": clip_as_pytorch,
    "clipconst": lambda clip: clip_as_pytorch(clip, constant=True),
}
# Name of a recorded hypergradient -> how the gradient is clipped, and whether all is moved.
KINDS = {
    "noclip": ("noclip", True),
    "clip": ("clip", True),
    "clipconst": ("clipconst", True),
    "noclip_embfrozen": ("noclip", False),
    "clipconst_embfrozen": ("clipconst", False),
}


def descent(clipping, decay, rate):
    return optax.chain(clipping, optax.add_decayed_weights(decay), optax.sgd(rate))


def estimator(kind, eta, clip, decay):
    clipping, everything = KINDS[kind]
    optimizer = descent(STEPS[clipping](clip), decay, eta)
    optimizer = optimizer if everything else optax.chain(optimizer, FREEZE)
    return optimizer, hypergradient.unrolled(PROBLEM, optimizer)


def case_of(recorded, case):
    """(rate, clip, weight decay) of a recorded case."""
    return tuple(
        float(recorded[f"search/out/case{case}/{k}"]) for k in ("eta", "clip", "weight_decay")
    )


def test_recorded_first_order(recorded, params, inputs):
    estimate = hypergradient.first_order(PROBLEM)
    found = estimate(recorded["search/alpha"], params, None, inputs("train"), inputs("val"))
    close(found.gradient, recorded["search/out/hyper_first"])
    close(found.value, recorded["search/out/val/loss"])
    close(found.aux.hidden, recorded["search/out/val/hidden_new"][0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", "ABC")
def test_recorded_exact_hypergradient(recorded, params, inputs, case, kind):
    """Ours is "clip": every parameter moves, and the clip is differentiated through."""
    optimizer, estimate = estimator(kind, *case_of(recorded, case))
    found = estimate(
        recorded["search/alpha"], params, optimizer.init(params), inputs("train"), inputs("val")
    )
    prefix = f"search/out/case{case}"
    close(found.gradient, recorded[f"{prefix}/hyper_exact_{kind}"])
    close(found.value, recorded[f"{prefix}/exact_{kind}/loss_val_unrolled"])


class Original(NamedTuple):
    """What the original's recipe finds, most of it under the names of the recorded file."""

    loss_val_unrolled: Any
    hidden: Any
    moved: Any
    direct: Any
    vector_norm_raw: Any
    vector_norm_clipped: Any
    hvp: Any
    hyper: Any


def factor(tree, clip):
    """Of a clip, as the original computes it, not capped at 1."""
    return clip / (optax.tree.norm(tree) + 1e-6)


def central_difference(params, alpha, batch, vector, radius):
    """Of the gradient in alpha, along a vector over its norm, times that norm."""
    eps = radius / optax.tree.norm(vector)
    points = (optax.tree.add_scale(params, sign * eps, vector) for sign in (1, -1))
    plus, minus = (DIFFERENTIATE(point, alpha, batch)[1][1] for point in points)
    return (plus - minus) / (2 * eps)


@pytest.fixture
def original(recorded, params, inputs):
    """The original's recipe: `(eta, clip, decay, everything moves, radius) -> Original`.

    The mixed product is exact for a radius of None.
    """
    alpha, train, val = recorded["search/alpha"], inputs("train"), inputs("val")

    def run(eta, clip, decay, everything=False, radius=None):
        _, (slope, _) = DIFFERENTIATE(params, alpha, train)
        capped = jnp.minimum(1, factor(slope, clip))
        moved = jax.tree.map(lambda w, g: w - eta * (capped * g + decay * w), params, slope)
        if not everything:
            moved["embedding"] = params["embedding"]  # stays, though it is trained
        found, (raw, direct) = DIFFERENTIATE(moved, alpha, val)
        # v alone is clipped, not the direct term.
        vector = optax.tree.scale(jnp.minimum(1, factor(raw, clip)), raw)
        if radius is None:
            product = products.mixed_product(LOSS, True)(params, alpha, train, vector)
        else:
            product = central_difference(params, alpha, train, vector, radius)
        return Original(
            found.value,
            found.aux.hidden,
            moved,
            direct,
            optax.tree.norm(raw),
            optax.tree.norm(vector),
            product,
            # The derivative of the clip is taken for its factor, which may be above 1 here.
            direct - eta * factor(slope, clip) * product,
        )

    return run


MOVED = pytest.mark.parametrize(
    ("suffix", "everything"), [("", False), ("_embstepped", True)], ids=["frozen", "moved"]
)


@MOVED
@pytest.mark.parametrize("case", "ABC")
def test_the_originals_hypergradient_is_explained_by_its_differences(
    recorded, original, case, suffix, everything
):
    found = original(*case_of(recorded, case), everything)
    prefix = f"search/out/case{case}"
    names = "loss_val_unrolled direct hvp vector_norm_raw vector_norm_clipped"
    for name in names.split():
        close(getattr(found, name), recorded[f"{prefix}/ref_exacthvp{suffix}/{name}"])
    close(found.hyper, recorded[f"{prefix}/hyper_ref_exacthvp{suffix}"])


@MOVED
@pytest.mark.parametrize("case", "ABC")
def test_the_originals_finite_difference(recorded, original, case, suffix, everything):
    """Rounding, 1e-16 of the gradients, is divided by twice the radius: up to 1e-11 of them."""
    own, prefix = case_of(recorded, case), f"search/out/case{case}"
    found = original(*own, everything, radius=0.01)
    close(found.hvp, recorded[f"{prefix}/ref_exacthvp{suffix}/hvp_fd_r0.01"])
    close(found.hyper, recorded[f"{prefix}/hyper_ref_fd{suffix}"])
    small = original(*own, everything, radius=1e-5)
    close(small.hvp, recorded[f"{prefix}/ref_exacthvp{suffix}/hvp_fd_r1e-05"])


@pytest.mark.parametrize("case", "ABC")
def test_the_originals_step_of_alpha(recorded, original, params, case):
    """What else it reports of a step: how far each tensor moves, the hidden state, and Adam."""
    prefix = f"search/out/case{case}"
    found = original(*case_of(recorded, case), radius=0.01)
    close(found.hidden, recorded[f"{prefix}/hidden_val_next"][0])
    change = optax.tree.sub(found.moved, params)
    nodes = [jnp.linalg.norm(leaf) for leaf in change["cell"]["nodes"]]
    start, bias = (jnp.linalg.norm(x) for x in (change["cell"]["start"], change["bias"]))
    norms = jnp.stack([jnp.linalg.norm(change["embedding"]), start, *nodes, bias])
    close(norms, recorded[f"{prefix}/ref_unrolled_delta_norms"])
    alpha = recorded["search/alpha"]
    adam = alpha_optimizer(PAPER.search.alpha)
    updates, _ = adam.update(found.hyper, adam.init(alpha), alpha)
    close(optax.apply_updates(alpha, updates), recorded[f"{prefix}/alpha_after_adam_ref_fd"])


def test_recorded_first_step(recorded, params, inputs):
    """A search step of the experiment: alpha by the first order, then the weights."""
    config = dataclasses.replace(PAPER, dropout=texts.DropoutConfig())
    w = config.search.w
    rate = float(recorded["search/out/step_first/lr"])
    assert rate == w.learning_rate * len(recorded["search/x_train"]) / config.search.length
    w_optimizer = descent(clip_as_pytorch(w.clip), w.weight_decay, rate)
    adam = alpha_optimizer(config.search.alpha)
    alpha, train, val = jnp.asarray(recorded["search/alpha"]), inputs("train"), inputs("val")
    state = search.SearchState(
        jnp.zeros((), jnp.int32),
        jax.random.key(0),
        params,
        alpha,
        search_rnn.Carry(train.running, train.hidden, val.hidden),
        w_optimizer.init(params),
        adam.init(alpha),
    )
    step = search.make_task_step(
        search_rnn.task(config), hypergradient.first_order, w_optimizer, adam
    )
    state, metrics = step(state, train.batch, val.batch)
    prefix = "search/out/step_first"
    close(metrics.train_loss, recorded[f"{prefix}/loss_with_tar"])
    close(metrics.w_gradient_norm, recorded[f"{prefix}/gradnorm_before_clip"])
    close(state.alpha, recorded[f"{prefix}/alpha_after"])
    after = {k.split("w_after/")[1]: v for k, v in recorded.items() if f"{prefix}/w_after/" in k}
    jax.tree.map(close, state.w, params_of(after))


def test_figures_of_the_documentation(recorded):
    """The table of docs/equations.md: norm of the difference to ours over that of ours, cosine."""
    columns = (
        "hyper_ref_fd hyper_ref_exacthvp hyper_ref_exacthvp_embstepped"
        " hyper_exact_clipconst hyper_exact_clipconst_embfrozen"
    ).split()
    page = (Path(__file__).parents[1] / "docs" / "equations.md").read_text()
    rows = re.findall(r"^\| (\d), ([\d.]+) \| (.*) \|$", page, re.MULTILINE)
    assert [(float(eta), float(clip)) for eta, clip, _ in rows] == [
        case_of(recorded, case)[:2] for case in "ABC"
    ]
    for case, (_, _, cells) in zip("ABC", rows, strict=True):
        prefix = f"search/out/case{case}"
        ours = recorded[f"{prefix}/hyper_exact_clip"]
        others = [recorded[f"{prefix}/{name}"] for name in columns]
        expected = []
        for other in [*others, recorded["search/out/hyper_first"]]:
            error = np.linalg.norm(other - ours) / np.linalg.norm(ours)
            cosine = np.vdot(other, ours) / np.linalg.norm(other) / np.linalg.norm(ours)
            expected.append(f"{error:.2f}, {cosine:.2f}")
        assert cells.split(" | ") == expected
        for kind in ("ref_exacthvp", "ref_exacthvp_embstepped"):
            exact, paper, small = (
                recorded[f"{prefix}/{kind}/{name}"]
                for name in ("hvp", "hvp_fd_r0.01", "hvp_fd_r1e-05")
            )
            assert 0.08 < np.linalg.norm(paper - exact) / np.linalg.norm(exact) < 0.14
            assert np.linalg.norm(small - exact) / np.linalg.norm(exact) < 3e-9
