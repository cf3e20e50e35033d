"""The documentation: its examples run, and what it names exists."""

import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_network import TinyNetwork

import darts_jax
from darts_jax import cells, genotype, operations, search
from darts_jax.hypergradient import Bilevel
from experiments import evaluate_cnn, search_cnn

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def run_examples(page: Path) -> dict:
    """Runs the Python blocks of a page, one after the other; returns their names."""
    blocks = python_blocks(page)
    assert blocks
    names: dict = {"__name__": page.stem}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    return names


@pytest.fixture(scope="module")
def extending():
    return run_examples(ROOT / "docs" / "extending.md")


def test_new_operation(extending):
    """The mixed operation applies it: ReLU, 1x1 convolution, batch norm."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (2, 4, 4, 3))
    kernel = jax.random.normal(keys[1], (2, 1, 1, 3, 3))
    new = {"conv_1x1": extending["network"].operations["conv_1x1"]}
    y, _ = cells.mixed_operation(
        kernels={"conv_1x1": {"kernel": kernel}},
        weights=jnp.ones((2, 1)),
        running=None,
        x=x,
        stride=2,
        operations=new,
    )
    raw = np.einsum("nhwc,kcd->nhwkd", np.maximum(x, 0)[:, ::2, ::2], kernel[:, 0, 0])
    expected = (raw - raw.mean((0, 1, 2))) / np.sqrt(raw.var((0, 1, 2)) + operations.EPSILON)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_new_operation_in_a_network(extending, tmp_path, monkeypatch):
    """It has parameters on every edge and a column of alpha; what is found is saved and drawn."""
    network = extending["network"].clone(channels=2, layers=3)
    optimizers = extending["w_optimizer"], extending["alpha_optimizer"]
    state = jax.eval_shape(
        lambda key: search.init(key, network, *optimizers, (8, 8, 1)), jax.random.key(0)
    )
    assert state.alpha["normal"].shape == (14, 9)
    assert state.w["cell_0"]["edges"]["conv_1x1"]["kernel"].shape == (14, 1, 1, 2, 2)
    alpha = {name: np.eye(9)[np.full(14, 8)] for name in ("normal", "reduce")}
    monkeypatch.setenv("PATH", "")  # no graphviz
    found = extending["report"](alpha, tmp_path)
    assert {name for name, _ in found.normal} == {"conv_1x1"}
    assert "conv_1x1" in (tmp_path / "normal.svg").read_text()


def test_new_relaxation(extending):
    alpha = {"normal": jnp.array([[0.0, np.log(3)]])}
    np.testing.assert_allclose(extending["sigmoid"](alpha)["normal"], [[0.5, 0.75]], rtol=1e-6)


def test_new_estimator(extending, x64):
    """It is exact at the optimum of a training loss whose Hessian is the identity."""
    rng = np.random.default_rng(0)
    matrix, target = jnp.asarray(rng.normal(size=(4, 3))), jnp.asarray(rng.normal(size=4))
    problem = Bilevel(
        train_loss=lambda w, alpha, _: ((w - matrix @ alpha) ** 2).sum() / 2,
        val_loss=lambda w, alpha, _: ((w - target) ** 2).sum() + (w.sum() * alpha**2).sum(),
    )
    alpha = jnp.asarray(rng.normal(size=3))
    optimum = matrix @ alpha
    found = extending["constant_curvature"](problem, inverse=1.0)(alpha, optimum, (), None, None)
    expected = jax.grad(lambda alpha: problem.val_loss(matrix @ alpha, alpha, None))(alpha)
    np.testing.assert_allclose(found.gradient, expected, rtol=1e-12)
    np.testing.assert_allclose(found.direct + found.implicit, expected, rtol=1e-12)
    assert np.abs(found.implicit).min() > 0.1


def test_selection_from_a_supernet():
    """docs/remedies.md, on a network that compiles quickly."""
    select = run_examples(ROOT / "docs" / "remedies.md")["select"]
    network, optimizer = TinyNetwork(2, 3, 10, nodes=1), optax.sgd(0.1)
    state = search.init(jax.random.key(0), network, optimizer, optimizer, (4, 4, 1))
    image = jax.random.normal(jax.random.key(1), (16, 4, 4, 1))
    found = select(network, state, [search.Batch(image, jnp.arange(16) % 10)])
    assert genotype.validate(found) == found
    assert "none" not in {name for name, _ in found.normal + found.reduce}


def test_regret_by_published_accuracies(tmp_path):
    """docs/ground_truth.md, by accuracies that are the architectures' numbers."""
    blocks = python_blocks(ROOT / "docs" / "ground_truth.md")
    names: dict = {}
    exec(compile(blocks[-1], "ground_truth.md", "exec"), names)
    percent = np.broadcast_to(np.linspace(0, 100, 5**6)[:, None, None], (5**6, 3, 2))
    np.save(tmp_path / "accuracies.npy", percent)
    alpha = np.zeros((2, 3, 6, 5))
    alpha[1, :, :, 4] = 1  # the last of all
    found = names["regret_of_searches"](tmp_path / "accuracies.npy", alpha)
    np.testing.assert_allclose(found, [[1.0] * 3, [0.0] * 3], atol=1e-6)


def test_the_readme_example_is_short():
    (block,) = python_blocks(ROOT / "README.md")
    assert len(block.splitlines()) <= 20


@pytest.mark.slow
def test_readme_example(capsys):
    names = run_examples(ROOT / "README.md")
    assert names["state"].step == 2
    assert all(np.isfinite(metric) for metric in names["metrics"])
    text = capsys.readouterr().out
    assert genotype.from_json(text[text.index("{") :]) == genotype.derive(names["state"].alpha)


@PAGE
def test_names_exist(page):
    """Every `module.name` of the library, file and command that a page gives."""
    text = page.read_text()
    for module, name in re.findall(r"`(\w+)\.(\w+)[`(]", text):
        if module in darts_jax.__all__:
            assert hasattr(getattr(darts_jax, module), name), f"{module}.{name}"
    for path in re.findall(r"`((?:docs|tests|\.ci)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m ((?:experiments|benchmarks)\.[a-z_]+)", text):
        assert find_spec(module), module


@PAGE
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_presets():
    """README names them all, and docs/experiments.md gives their sizes."""
    assert set(re.findall(r"^\| `(\w+)`", (ROOT / "README.md").read_text(), re.MULTILINE)) >= set(
        search_cnn.PRESETS
    )
    for experiment, sizes in ((search_cnn, "search"), (evaluate_cnn, "train")):
        assert written_presets(experiment) == {
            name: (
                config.network.channels,
                config.network.layers,
                getattr(config, sizes).batch_size,
                getattr(config, sizes).epochs,
            )
            for name, (_, config) in experiment.PRESETS.items()
        }


def written_presets(experiment) -> dict[str, tuple[int, ...]]:
    """The numbers of the table in an experiment's section, by preset."""
    page = (ROOT / "docs" / "experiments.md").read_text()
    _, section = page.split(f"## {experiment.MODULE.removeprefix('experiments.')}\n")
    rows = re.findall(r"^\| `(\w+)` \|[^|]*((?:\| \d+ )+)\|$", section.split("\n## ")[0], re.M)
    return {name: tuple(map(int, re.findall(r"\d+", numbers))) for name, numbers in rows}


def test_import_is_light():
    heavy = ["matplotlib", "orbax.checkpoint", "tensorflow_datasets", "sklearn", "mlxtend"]
    code = f"""
import sys, darts_jax
assert 'jax' not in sys.modules
for name in darts_jax.__all__:
    getattr(darts_jax, name)
assert not set({heavy}) & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name():
    with pytest.raises(AttributeError, match="'darts_jax' has no attribute 'nothing'"):
        darts_jax.nothing  # noqa: B018
    assert set(darts_jax.__all__) <= set(dir(darts_jax))


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_example_scripts(script):
    names = runpy.run_path(str(script))
    if script.stem == "own_loop":  # the clean data count, the mislabelled do not
        assert jax.nn.softmax(names["alpha"])[0] > 0.9
    else:  # the wrong labels call for more decay than there was at the start
        assert min(names["decay"].values()) > 2e-3
        assert names["accuracy"] > 0.55


def test_example_scripts_are_short():
    for script in (ROOT / "examples").glob("*.py"):
        code = script.read_text().split('"""', 2)[2]
        lines = [line for line in code.splitlines() if line.strip() and not line.startswith("#")]
        assert len(lines) <= 40, script
