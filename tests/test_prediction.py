"""Trained networks in files: they come back, and run without the library."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap_cells import CHEAP

from darts_jax import prediction
from darts_jax.augment import normalize
from darts_jax.evaluation import EvaluationNetwork

SHAPE, MEAN, STD = (8, 8, 1), (0.4,), (0.3,)


@pytest.fixture(scope="module")
def network():
    return EvaluationNetwork(CHEAP, 2, 3, 10)


@pytest.fixture(scope="module")
def variables(network):
    """Of two networks, stacked, with statistics that are not those of the start."""
    pair = [network.init(jax.random.key(i), jnp.zeros((1, *SHAPE)), train=True) for i in (0, 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *pair)
    stats = jax.tree.map(lambda x: 0.5 * x + 0.25, stacked["batch_stats"])
    return {**stacked, "batch_stats": stats}


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (3, *SHAPE), np.uint8)


@pytest.fixture
def saved(tmp_path, network, variables):
    prediction.save(tmp_path, network, variables, SHAPE, MEAN, STD)
    return tmp_path


@pytest.mark.parametrize("index", [0, 1])
def test_what_is_loaded_is_what_was_saved(saved, network, variables, images, index):
    trained = prediction.load(saved, index)
    assert trained.network == network
    assert trained.image_shape == SHAPE
    expected = jax.tree.map(lambda x: x[index], variables)
    jax.tree.map(np.testing.assert_array_equal, trained.variables, expected)
    logits = trained.apply(trained.variables, images)
    direct = network.apply(expected, normalize(images, MEAN, STD), train=False).main
    np.testing.assert_allclose(logits, direct, rtol=1e-5, atol=1e-5)


def test_exported_file_runs_in_a_process_without_the_library(saved, images, tmp_path):
    trained = prediction.load(saved)
    prediction.export(trained, tmp_path / "network")
    np.save(tmp_path / "images.npy", images)
    script = (
        "import sys; sys.modules['darts_jax'] = None\n"  # an import of it fails
        "import jax.export, numpy as np\n"
        "network = jax.export.deserialize(bytearray(open('network', 'rb').read()))\n"
        "images = np.load('images.npy')\n"
        "np.savez('logits.npz', all=network.call(images), one=network.call(images[:1]))\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    logits = np.load(tmp_path / "logits.npz")
    expected = trained.apply(trained.variables, images)
    np.testing.assert_allclose(logits["all"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits["one"], expected[:1], rtol=1e-5, atol=1e-5)


def test_bad_input_is_one_line(saved, tmp_path):
    def refused(message, *args):
        with pytest.raises(ValueError, match=message) as error:
            prediction.load(*args)
        assert "\n" not in str(error.value)

    refused("holds 2 networks; give an index from 0 to 1", saved, 2)
    refused("holds no trained network .*evaluate_cnn", tmp_path / "nowhere")
    description = saved / "model.json"
    fields = json.loads(description.read_text())
    description.write_text(json.dumps(fields | {"channels": 4}))  # of another architecture
    refused("model/.* holds another state: .* there, .* here", saved)
    description.write_text(json.dumps({k: v for k, v in fields.items() if k != "mean"}))
    refused("model.json cannot be read.*'mean'", saved)
    description.write_text("{")
    refused("model.json cannot be read", saved)
