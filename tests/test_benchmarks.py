"""The rivals of the benchmark are the network and the iteration that they claim to be."""

import json
from concurrent.futures.process import BrokenProcessPool

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import evaluation_step, guard, ordinary, processes, rnn_step, search_step
from darts_jax import language_model, networks, recurrent, relaxation, search
from darts_jax.genotype import PUBLISHED, PUBLISHED_RECURRENT

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
    seconds = [processes.Iteration(9.0, 18.0), processes.Iteration(2.0, 3.0)]

    def run(make_iteration, case, iterations, cache):
        if case.implementation == "ordinary":
            raise BrokenProcessPool
        return processes.Run(seconds[0], seconds[1:] * iterations, 10**8, None)

    monkeypatch.setattr(processes, "in_new_process", run)
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


def test_torch_has_the_originals_evaluation_network(oracle, unpack, torch_reference):
    from torch import as_tensor, no_grad

    from benchmarks import torch_evaluation

    recorded = oracle("eval_cnn.npz")
    sizes = (int(recorded[f"cfg/{name}"]) for name in ("C", "layers", "num_classes"))
    cells = PUBLISHED[str(recorded["cfg/genotype"])]
    network = torch_evaluation.Network(cells, *sizes)
    with no_grad():
        for parameter, value in zip(
            network.parameters(), unpack(recorded, "w").values(), strict=True
        ):
            parameter.copy_(as_tensor(value))
    x, y = as_tensor(recorded["x"].astype(np.float64)), as_tensor(recorded["y"])
    main, auxiliary = network(x, 0.0)
    np.testing.assert_allclose(main.detach(), recorded["out/train/logits"], rtol=1e-9)
    np.testing.assert_allclose(auxiliary.detach(), recorded["out/train/logits_aux"], rtol=1e-9)
    step = torch_evaluation.make_step(network, learning_rate=0.025, drop=0.0)
    np.testing.assert_allclose(step((x, y)), recorded["out/train/loss_total"], rtol=1e-9)
    assert float(step((x, y))) < recorded["out/train/loss_total"]


def test_torch_drops_paths(torch_reference):
    from torch import ones

    from benchmarks import torch_evaluation

    y = torch_evaluation.drop_path(ones(1000, 2, 1, 1), 0.2)[:, :, 0, 0]
    assert set(y.unique().tolist()) == {0.0, 1.25}
    assert abs(y[:, 0].mean() - 1) < 0.1 and (y[:, 0] == y[:, 1]).all()


@pytest.mark.parametrize("relaxed", [True, False], ids=["relaxed", "discrete"])
def test_torch_has_the_same_recurrent_model(relaxed, torch_reference, x64):
    import torch

    from benchmarks import torch_recurrent

    torch.manual_seed(0)
    cell = None if relaxed else PUBLISHED_RECURRENT["DARTS_V2"]
    model = torch_recurrent.Model(vocabulary=11, size=6, nodes=8, genotype=cell)
    with torch.no_grad():
        for parameter in [*model.parameters(), *model.alphas]:
            parameter += 0.3 * torch.randn_like(parameter)
    tokens, hidden = torch.randint(11, (7, 5)), torch.randn(5, 6)
    logits, last = model(tokens, hidden)

    def array(tensor):
        return jnp.asarray(tensor.detach().numpy())

    nodes = jnp.stack(list(map(array, model.nodes)))
    params = {
        "embedding": array(model.embedding),
        "bias": array(model.bias),
        "cell": {"start": array(model.start), "nodes": nodes},
    }
    if relaxed:
        weights = relaxation.softmax(array(model.alphas[0]))
        running = recurrent.running_statistics(6)
        cell = language_model.relaxed_cell(running, weights, train=True)
    else:
        cell = language_model.discrete_cell(cell)
    output = language_model.apply(params, array(tokens), array(hidden), cell)
    np.testing.assert_allclose(output.logits, logits.detach(), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(output.trajectory.last, last.detach(), rtol=1e-9, atol=1e-10)


def test_recurrent_cases_are_those_there_are():
    cases = list(rnn_step.Config().cases("search-64"))
    assert processes.Case("search-64", "darts_jax", "unrolled") in cases
    assert ("search-64", "torch", "unrolled") not in cases
    assert {case.estimator for case in rnn_step.Config().cases("train-300")} == {"none"}


@pytest.mark.parametrize("size", ["search-64", "train-300"])
def test_recurrent_iterations(size, monkeypatch):
    monkeypatch.setitem(rnn_step.SIZES, size, rnn_step.Size(4, 2, 2, 10))
    iterate = rnn_step.make_iteration(processes.Case(size, "darts_jax", "first_order"))
    losses = [float(iterate()) for _ in range(3)]
    np.testing.assert_allclose(losses[0], np.log(10), rtol=0.05)
    assert losses[2] < losses[0]


def test_evaluation_step():
    case = processes.Case("3", "darts_jax", "none")
    assert np.isfinite(float(evaluation_step.make_iteration(2, 2, case)()))


def test_sizes_by_name():
    assert search_step.size_of("M") == search_step.size_of("C8-L5-B32") == (8, 5, 32)
    for name in ("s", "C8", "C0-L4-B16", "C8-L4-B16-"):
        with pytest.raises(ValueError, match=f"--sizes {name}: give S, M, L, or channels"):
            search_step.size_of(name)


@pytest.mark.parametrize("slow", guard.Seconds._fields)
def test_guard_names_what_is_slow(slow):
    theirs = guard.Seconds(*guard.MEASURED)
    ours = guard.Seconds(1.0, 1.0)
    assert guard.failure(ours, theirs) is None
    late = ours._replace(**{slow: 1.05 / guard.MARGIN})
    text = guard.failure(late, theirs)
    assert text.startswith(f"{slow}: ") and "\n" not in text
