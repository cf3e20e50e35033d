"""The rivals of the benchmark are the network and the iteration that they claim to be."""

import json
from concurrent.futures.process import BrokenProcessPool

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import ordinary, search_step
from darts_jax import networks, relaxation, search

COUNTS = ["C4_L5", "C4_L6", "C8_L8", "C16_L8"]


def dimensions(name):
    channels, layers = name.split("_")
    return {"channels": int(channels[1:]), "layers": int(layers[1:]), "num_classes": 10}


@pytest.mark.parametrize("name", COUNTS)
def test_ordinary_has_the_originals_parameters(name, oracle):
    network = ordinary.Supernet(**dimensions(name))
    x, weights = jnp.zeros((1, 8, 8, 3)), dict.fromkeys(("normal", "reduce"), jnp.ones((14, 8)))
    variables = network.init(jax.random.key(0), x, weights, train=True)
    leaves = jax.tree.leaves(variables["params"])
    recorded = oracle("params.json")["search_cnn"][name]
    assert len(leaves) == recorded["num_param_tensors"]
    assert sum(leaf.size for leaf in leaves) == recorded["params"]


@pytest.fixture
def losses(x64):
    """The loss of both networks, and one point: cells of every kind, in double precision."""
    size = {"channels": 2, "layers": 4, "num_classes": 3}
    rng = np.random.default_rng(0)
    x, label = jnp.asarray(rng.normal(size=(3, 8, 8, 3))), jnp.arange(3)
    alpha = {name: jnp.asarray(rng.normal(size=(14, 8))) for name in ("normal", "reduce")}

    def make(network, convert):
        variables = network.init(jax.random.key(0), x, alpha, train=True)
        variables = jax.tree.map(lambda leaf: leaf.astype(x.dtype), variables)

        def loss(params, alpha):
            logits, _ = network.apply(
                variables | {"params": convert(params)},
                x,
                relaxation.softmax(alpha),
                train=True,
                mutable=["batch_stats"],
            )
            return search.cross_entropy(logits, label).mean()

        return loss, variables["params"]

    fast, params = make(networks.Supernet(**size), lambda params: params)
    plain, _ = make(ordinary.Supernet(**size), ordinary.from_supernet)
    return jax.jit(fast), plain, (params, alpha)


def test_ordinary_is_the_same_network(losses):
    fast, plain, point = losses
    np.testing.assert_allclose(plain(*point), fast(*point), rtol=1e-9)


def test_report_holds_every_case_and_what_failed(monkeypatch, tmp_path, capsys):
    seconds = [search_step.Iteration(9.0, 18.0), search_step.Iteration(2.0, 3.0)]

    def run(case, iterations, cache):
        if case.implementation == "ordinary":
            raise BrokenProcessPool
        return search_step.Run(seconds[0], seconds[1:] * iterations, 10**8, None)

    monkeypatch.setattr(search_step, "in_new_process", run)
    output = tmp_path / "new" / "report.json"
    config = search_step.Config(("S",), ("unrolled",), ("ordinary",), output=output)
    search_step.main(config)
    report = json.loads(output.read_text())
    assert report["sizes"] == {"S": {"channels": 4, "layers": 4, "batch": 16}}
    assert report["environment"]["versions"]["jax"] == jax.__version__
    measured, failed = report["measurements"]
    assert (measured["implementation"], failed["implementation"]) == ("darts_jax", "ordinary")
    assert measured["compile_seconds"] == 7 and measured["compile_cpu_seconds"] == 15
    assert measured["iteration_seconds"] == {"median": 2, "min": 2, "all": [2] * 15}
    assert measured["peak_bytes"] == 10**8
    assert "killed" in failed["error"]
    assert str(output.name) in capsys.readouterr().out.replace("\n", "")


@pytest.fixture
def torch_reference():
    """The module, in double precision."""
    torch = pytest.importorskip("torch")
    from benchmarks import torch_reference

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: threads that wait for each other cost minutes
    torch.set_default_dtype(torch.float64)
    yield torch_reference
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", COUNTS)
def test_torch_has_the_originals_parameters(name, oracle, torch_reference):
    parameters = list(torch_reference.Supernet(**dimensions(name)).parameters())
    recorded = oracle("params.json")["search_cnn"][name]
    assert len(parameters) == recorded["num_param_tensors"]
    assert sum(parameter.numel() for parameter in parameters) == recorded["params"]


@pytest.mark.parametrize("trajectory", ["first", "unrolled_fd"])
def test_torch_takes_the_originals_steps(trajectory, oracle, unpack, torch_reference):
    from torch import as_tensor, no_grad

    recorded = oracle("search_cnn.npz")
    network = torch_reference.Supernet(**dimensions("C4_L5"))
    with no_grad():
        for parameter, value in zip(
            network.parameters(), unpack(recorded, "w").values(), strict=True
        ):
            parameter.copy_(as_tensor(value))
        for alpha, name in zip(network.alphas, ("normal", "reduce"), strict=True):
            alpha.copy_(as_tensor(recorded[f"alpha/{name}"]))
    momenta = [as_tensor(value) for value in unpack(recorded, "mom").values()]
    step = torch_reference.make_step(
        network,
        second_order=trajectory == "unrolled_fd",
        learning_rate=float(recorded["traj/lr"]),
        momenta=momenta,
    )
    for i, suffix in enumerate(("", "_1", "_2")):
        prefix = f"traj/{trajectory}"
        batches = []
        for split in ("train", "val"):
            x, y = (
                recorded[f"{'traj/' if i else ''}{leaf}_{split}{suffix}"] for leaf in ("x", "y")
            )
            batches.append((as_tensor(x.astype(np.float64)), as_tensor(y)))
        loss = step(*batches)
        np.testing.assert_allclose(loss, recorded[f"{prefix}/loss"][i], rtol=1e-6)
        for alpha, name in zip(network.alphas, ("normal", "reduce"), strict=True):
            np.testing.assert_allclose(
                alpha.detach(), recorded[f"{prefix}/alpha_{name}_{i}"], rtol=1e-6
            )
