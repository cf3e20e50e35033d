"""What was recorded of the recurrent half of the original, as ours takes it."""

import jax
import jax.numpy as jnp
import numpy as np

from darts_jax.language_model import Batch, Inputs
from darts_jax.operations import Moments

RTOL = 1e-9
NODES = 8


def close(actual, expected, rtol=RTOL):
    """Relative to the largest entry: a value near zero is a difference of larger ones."""
    expected = np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def params_of(w):
    """Parameters from `{name: array}`, which may also be gradients."""
    nodes = [w[f"rnns.0._Ws.{i}"] for i in range(NODES)]
    return {
        "embedding": jnp.asarray(w["encoder.weight"]),
        "bias": jnp.asarray(w["decoder.bias"]),
        "cell": {"start": jnp.asarray(w["rnns.0._W0"]), "nodes": jnp.stack(nodes)},
    }


def running_of(recorded, unpack):
    """The recorded running statistics."""
    buffers = unpack(recorded, "search/buf")
    return Moments(*(buffers[f"rnns.0.bn.running_{kind}"] for kind in ("mean", "var")))


def inputs_of(recorded, unpack, name):
    """The recorded batch and hidden states, "train" or "val"."""
    tokens, targets = recorded[f"search/x_{name}"], recorded[f"search/y_{name}"]
    batch = Batch(tokens, targets, np.ones(len(tokens), bool), jax.random.key(0))
    return Inputs(batch, recorded[f"search/h_{name}"][0], running_of(recorded, unpack))
