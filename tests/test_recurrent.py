"""Recurrent cells and the language model against numbers recorded from the original."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recorded_rnn import NODES, close, inputs_of, params_of, running_of

from darts_jax import language_model, recurrent, relaxation
from darts_jax.genotype import PUBLISHED_RECURRENT, RNN_PRIMITIVES, RecurrentGenotype
from darts_jax.language_model import Batch, Dropout, Inputs
from darts_jax.operations import Moments
from darts_jax.recurrent import ACTIVATIONS, Masks

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def recorded(oracle_path):
    return dict(np.load(oracle_path / "rnn.npz"))


@pytest.fixture(scope="module")
def params(recorded, unpack):
    with jax.enable_x64(True):
        return params_of(unpack(recorded, "search/w"))


@pytest.fixture(scope="module")
def running(recorded, unpack):
    return running_of(recorded, unpack)


@pytest.fixture(scope="module")
def inputs(recorded, unpack):
    """`inputs("train")`: the recorded batch and hidden states."""
    return functools.partial(inputs_of, recorded, unpack)


@pytest.fixture(scope="module")
def training(recorded, params, inputs):
    """Loss, aux and gradients of the training batch."""
    with jax.enable_x64(True):
        differentiate = jax.value_and_grad(language_model.make_loss(), (0, 1), has_aux=True)
        return jax.jit(differentiate)(params, recorded["search/alpha"], inputs("train"))


# The relaxed cell.


def test_recorded_training(recorded, training):
    (loss, aux), (gradient, alpha_gradient) = training
    prefix = "search/out/train"
    close(jax.nn.log_softmax(aux.logits), recorded[f"{prefix}/log_probs"])
    close(loss, recorded[f"{prefix}/loss"])
    close(aux.hidden, recorded[f"{prefix}/hidden_new"][0])
    for ours, kind in zip(aux.running, ("mean", "var"), strict=True):
        close(ours, recorded[f"{prefix}/buf_after/rnns.0.bn.running_{kind}"])
    grads = {k.split("grad/")[1]: v for k, v in recorded.items() if k.startswith(f"{prefix}/grad/")}
    jax.tree.map(close, gradient, params_of(grads))
    close(alpha_gradient, recorded[f"{prefix}/grad_alpha"])
    close(optax.tree.norm(gradient), recorded[f"{prefix}/grad_norm_global"])


@pytest.mark.parametrize("relax", [relaxation.concrete(0.5), relaxation.dirichlet])
def test_a_relaxation_takes_the_context_of_the_batch(relax, recorded, params, inputs):
    """Value and gradient in w are those at the weights that it gives there; alpha's is not zero."""
    given, alpha = inputs("train"), jnp.asarray(recorded["search/alpha"])
    context = relaxation.Context(jax.random.key(0), 0.5)
    given = given._replace(batch=given.batch._replace(context=context))

    def differentiate(relax, alpha):
        loss = language_model.make_loss(relax=relax)
        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, alpha, given)

    (value, _), (gradient, alpha_gradient) = differentiate(relax, alpha)
    (expected, _), (expected_gradient, of_weights) = differentiate(
        relaxation.as_they_are, relax(alpha, context)
    )
    close(value, expected)
    jax.tree.map(close, gradient, expected_gradient)
    _, pull_back = jax.vjp(lambda alpha: relax(alpha, context), alpha)
    close(alpha_gradient, pull_back(of_weights)[0])
    assert abs(alpha_gradient).max() > 1e-6


def test_recorded_slowness(recorded, params, inputs):
    weight = float(recorded["cfg/tar_beta"])
    loss = language_model.make_loss(slowness_weight=weight)
    (value, aux), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        params, recorded["search/alpha"], inputs("train")
    )
    close(value - aux.cross_entropy, recorded["search/out/train/tar_term"], 1e-8)
    close(optax.tree.norm(gradient), recorded["search/out/train/grad_norm_global_with_tar"])


def test_recorded_hidden_states(recorded, params, inputs, running):
    weights = relaxation.softmax(recorded["search/alpha"])
    cell = language_model.relaxed_cell(running, weights, train=True)
    given = inputs("train")
    output = jax.jit(lambda: language_model.apply(params, given.batch.tokens, given.hidden, cell))()
    close(output.trajectory.hiddens, recorded["search/out/train/hiddens"])


def test_recorded_evaluation(recorded, params, inputs, running):
    weights = relaxation.softmax(recorded["search/alpha"])
    cell = language_model.relaxed_cell(running, weights, train=False)
    given = inputs("train")
    output = jax.jit(lambda: language_model.apply(params, given.batch.tokens, given.hidden, cell))()
    prefix = "search/out/evalmode"
    close(jax.nn.log_softmax(output.logits), recorded[f"{prefix}/log_probs"])
    close(output.trajectory.last, recorded[f"{prefix}/hidden_new"][0])
    total, count = language_model.cross_entropies(
        output.logits, given.batch.targets, given.batch.valid
    )
    close(total / count, recorded[f"{prefix}/loss"])
    jax.tree.map(np.testing.assert_array_equal, output.trajectory.running, running)


def test_recorded_masks(recorded, params, inputs, running):
    masks = language_model.ModelMasks(
        jnp.ones((50, 1)),
        jnp.ones(16),
        jnp.ones(16),
        Masks(recorded["mask/x_mask"], recorded["mask/h_mask"]),
    )
    given = inputs("train")
    weights = relaxation.softmax(recorded["search/alpha"])
    cell = language_model.relaxed_cell(running, weights, train=True)
    tokens = given.batch.tokens
    output = jax.jit(lambda: language_model.apply(params, tokens, given.hidden, cell, masks))()
    close(jax.nn.log_softmax(output.logits), recorded["mask/search/log_probs"])
    close(output.trajectory.last, recorded["mask/search/hidden_new"][0])


# The discrete cell.


def discrete_run(recorded, unpack, inputs, masks=None):
    own = params_of(unpack(recorded, "eval/DARTS_V2/w"))
    cell = language_model.discrete_cell(PUBLISHED_RECURRENT["DARTS_V2"])
    given = inputs("train")
    tokens = given.batch.tokens
    return jax.jit(lambda: language_model.apply(own, tokens, given.hidden, cell, masks))()


def test_recorded_discrete_cell(recorded, unpack, inputs):
    output = discrete_run(recorded, unpack, inputs)
    prefix = "eval/DARTS_V2/out"
    close(jax.nn.log_softmax(output.logits), recorded[f"{prefix}/log_probs"])
    close(output.trajectory.hiddens, recorded[f"{prefix}/hiddens"])
    close(output.trajectory.last, recorded[f"{prefix}/hidden_new"][0])


def test_recorded_discrete_gradients(recorded, unpack, inputs):
    own = params_of(unpack(recorded, "eval/DARTS_V2/w"))
    cell = language_model.discrete_cell(PUBLISHED_RECURRENT["DARTS_V2"])
    loss = language_model.make_discrete_loss(cell)
    (value, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(own, inputs("train"))
    prefix = "eval/DARTS_V2/out"
    close(value, recorded[f"{prefix}/loss"])
    grads = {k.split("grad/")[1]: v for k, v in recorded.items() if k.startswith(f"{prefix}/grad/")}
    jax.tree.map(close, gradient, params_of(grads))


def test_recorded_discrete_masks(recorded, unpack, inputs):
    masks = language_model.ModelMasks(
        jnp.ones((50, 1)),
        jnp.ones(16),
        jnp.ones(16),
        Masks(recorded["mask/x_mask"], recorded["mask/h_mask"]),
    )
    output = discrete_run(recorded, unpack, inputs, masks)
    close(jax.nn.log_softmax(output.logits), recorded["mask/eval/DARTS_V2/log_probs"])
    close(output.trajectory.last, recorded["mask/eval/DARTS_V2/hidden_new"][0])


@pytest.mark.parametrize(
    ("group", "vocabulary", "size"),
    [("eval_rnn_850_vocab10000", 10000, 850), ("eval_rnn_700_vocab33278", 33278, 700)],
)
@pytest.mark.parametrize("name", PUBLISHED_RECURRENT)
def test_parameter_counts(oracle, group, vocabulary, size, name):
    shapes = language_model.shapes(vocabulary, size, len(PUBLISHED_RECURRENT[name].recurrent))
    assert count(shapes) == oracle("params.json")[group][name]["params"]


def test_parameter_count_of_the_search(oracle):
    recorded = oracle("params.json")["search_rnn_300_vocab10000"]["params"]
    assert count(language_model.shapes(10000, 300, NODES)) == recorded == 4_810_000


def count(shapes):
    leaves = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return sum(int(np.prod(shape)) for shape in leaves)


# Invariants.


def test_is_the_discrete_cell_with_one_hot_weights():
    """By running statistics of mean 0 and variance 1 - 1e-5, batch norm is the identity."""
    rng = np.random.default_rng(0)
    recorded_cell = (("tanh", 0), ("relu", 0), ("sigmoid", 1), ("identity", 2))
    cell = RecurrentGenotype(recorded_cell, (1, 2, 3, 4))
    params = {
        name: jnp.asarray(rng.normal(size=shape))
        for name, shape in recurrent.shapes(3, 5, len(recorded_cell)).items()
    }
    x, hidden = jnp.asarray(rng.normal(size=(4, 2, 3))), jnp.asarray(rng.normal(size=(2, 5)))
    rows = []
    for i, (name, source) in enumerate(recorded_cell):
        for j in range(i + 1):
            rows.append(RNN_PRIMITIVES.index(name if j == source else "none"))
    found = recurrent.relaxed(
        params,
        Moments(jnp.zeros(5), jnp.full(5, 1 - 1e-5)),
        x,
        hidden,
        jnp.eye(5)[np.array(rows)],
        train=False,
        activations=ACTIVATIONS,
        columns={name: RNN_PRIMITIVES.index(name) for name in ACTIVATIONS},
    )
    expected = recurrent.discrete(params, x, hidden, cell, activations=ACTIVATIONS)
    close(found.hiddens, expected.hiddens)
    close(found.last, expected.last)


@pytest.mark.parametrize("kind", ["relaxed", "discrete"])
def test_padding_changes_nothing(kind):
    rng = np.random.default_rng(0)
    cell = RecurrentGenotype((("tanh", 0), ("sigmoid", 1)), (1, 2))
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape)),
        language_model.shapes(10, 4, 2),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    alpha, hidden = jnp.asarray(rng.normal(size=(3, 5))), jnp.asarray(rng.normal(size=(3, 4)))
    tokens, targets = rng.integers(0, 10, (2, 11, 3))
    options = {"dropout": Dropout(0.1, 0.2, 0.3, 0.4, 0.5), "slowness_weight": 0.01}
    running = None
    loss = language_model.make_discrete_loss(language_model.discrete_cell(cell), **options)
    if kind == "relaxed":
        running, relaxed_loss = recurrent.running_statistics(4), language_model.make_loss(**options)

        def loss(params, inputs):
            return relaxed_loss(params, alpha, inputs)

    def run(length, valid):
        batch = Batch(
            tokens[:length], targets[:length], np.arange(length) < valid, jax.random.key(0)
        )
        differentiate = jax.jit(jax.value_and_grad(loss, has_aux=True))
        return differentiate(params, Inputs(batch, hidden, running))

    (expected, aux), gradient = run(7, 7)
    (value, padded), padded_gradient = run(11, 7)
    close(value, expected, 1e-12)
    close(padded.cross_entropy, aux.cross_entropy, 1e-12)
    close(padded.hidden, aux.hidden, 1e-12)
    close(padded.logits[:7], aux.logits, 1e-12)
    jax.tree.map(functools.partial(close, rtol=1e-12), padded.running, aux.running)
    jax.tree.map(functools.partial(close, rtol=1e-11), padded_gradient, gradient)


def test_masks_drop_what_they_say():
    dropout = Dropout(words=0.1, embedding=0.2, input=0.3, hidden=0.4, output=0.5)
    masks = language_model.draw_masks(jax.random.key(0), dropout, 40, 50, 3000)
    pairs = [
        (masks.words, dropout.words),
        (masks.embedding, dropout.embedding),
        (masks.cell.input, dropout.input),
        (masks.cell.hidden, dropout.hidden),
        (masks.output, dropout.output),
    ]
    for mask, rate in pairs:
        np.testing.assert_allclose(np.unique(mask), [0, 1 / (1 - rate)], rtol=1e-6)
        np.testing.assert_allclose((mask == 0).mean(), rate, atol=0.04)
    assert masks.words.shape == (3000, 1)  # all of a word at once
    drawn = [np.asarray(mask > 0).tobytes() for mask, _ in pairs[1:]]
    assert len(set(drawn)) == 4


def test_evaluation_goes_on_from_window_to_window(params):
    rng = np.random.default_rng(0)
    text = rng.integers(0, 50, (12, 3))
    cell = language_model.discrete_cell(PUBLISHED_RECURRENT["DARTS_V2"])
    whole = jnp.zeros((3, 16))
    output = language_model.apply(params, text[:-1], whole, cell)
    total, tokens = language_model.cross_entropies(output.logits, text[1:], np.ones(11, bool))
    windows = [np.concatenate([part, np.zeros((1, 3), int)]) for part in (text[:-1], text[1:])]
    found = language_model.evaluate(
        params,
        cell,
        whole,
        *(x.reshape(3, 4, 3) for x in windows),
        (np.arange(12) < 11).reshape(3, 4),
    )
    close(found[0], total, 1e-12)
    assert found[1] == tokens == 33


def test_initial_parameters():
    params = language_model.init_params(jax.random.key(0), 100, 12, 4)
    shapes = language_model.shapes(100, 12, 4)
    assert jax.tree.map(jnp.shape, params) == shapes
    assert not params["bias"].any()
    drawn = [params["embedding"], params["cell"]["start"], params["cell"]["nodes"]]
    for leaf in drawn:
        assert 0.039 < jnp.abs(leaf).max() < 0.04
        assert abs(leaf.mean()) < 0.003


# The LSTM, to compare with.


def test_lstm_by_hand():
    """Hochreiter and Schmidhuber with a forget gate; the mask is on what the gates read alone."""
    params = recurrent.lstm_params(jax.random.key(0), 3, 4)
    params = jax.tree.map(lambda p: p + 0.1, params)  # biases that are not zero
    x, hidden = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(5, 2, 3), (2, 8)]))
    masks = Masks(jnp.array([[0, 2, 1], [1, 0, 2]]), jnp.array([[2, 0, 1, 1], [0, 1, 2, 1]]))
    found = recurrent.lstm(params, x, hidden, masks=masks, valid=jnp.arange(5) < 4)
    memory, output = jnp.split(hidden, 2, axis=1)
    for t in range(4):

        def gate(name, t=t, output=output):
            product = (x[t] * masks.input) @ params[f"i{name}"]["kernel"]
            recurrence = params[f"h{name}"]
            return product + output * masks.hidden @ recurrence["kernel"] + recurrence["bias"]

        i, f, o = (jax.nn.sigmoid(gate(name)) for name in "ifo")
        memory = f * memory + i * jnp.tanh(gate("g"))
        output = o * jnp.tanh(memory)
        close(found.hiddens[t], output, 1e-12)
    close(found.last, jnp.concatenate([memory, output], axis=1), 1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_precisions(dtype, params, inputs, recorded):
    """The loss of everything in a narrower dtype, dropout too; statistics stay of float32."""
    loss = language_model.make_loss(Dropout(0.1, 0.1, 0.1, 0.1, 0.1))
    arguments = params, jnp.asarray(recorded["search/alpha"]), inputs("train")
    exact, _ = loss(*arguments)
    narrow = jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, arguments
    )
    value, aux = loss(*narrow)
    assert aux.logits.dtype == aux.hidden.dtype == dtype
    assert aux.running.mean.dtype == "float32"
    np.testing.assert_allclose(value, exact, rtol={"bfloat16": 1e-2, "float32": 1e-6}[dtype])
