"""Whatever a file holds that a user loads: a valid object, or an error of one line."""

import copy
import json
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stand_in import Config

from darts_jax import files, genotype, prediction
from experiments import workdir as workdirs
from experiments.errors import UserError

FEW, MANY = 200, 10_000
# The same examples each time; a file that a test writes is written anew for each.
STEADY = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 6)
    | st.floats()
    | st.text()
    | st.sampled_from([*genotype.CNN_OPERATIONS, *genotype.RNN_PRIMITIVES, "cifar", "\n", "\ud800"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


def places(value, path=()):
    """The paths of all values inside of a value."""
    yield path
    children = dict(enumerate(value)) if isinstance(value, list) else value
    for key, child in children.items() if isinstance(children, dict) else ():
        yield from places(child, (*path, key))


@st.composite
def mutated(draw, valid):
    """A valid object in which a few values are replaced, removed, or given other names."""
    found = copy.deepcopy(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([p for p in places(found) if p] or [()]))
        if not path:
            break
        *outer, last = path
        parent = found
        for key in outer:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "replace":
            parent[last] = draw(VALUES)
        elif action == "remove":
            del parent[last]
        elif isinstance(parent, dict):
            parent[draw(st.text())] = draw(VALUES)
        else:
            parent.insert(last, draw(VALUES))
    return found


def contents(valid):
    """Bytes of a file: any, any JSON, a valid one that was changed, or cut short."""
    whole = st.sampled_from(valid).map(lambda value: json.dumps(value).encode())
    return (
        st.binary()
        | VALUES.map(lambda value: json.dumps(value).encode())
        | mutated(valid).map(lambda value: json.dumps(value).encode())
        | st.tuples(whole, st.integers(0, 300)).map(lambda pair: pair[0][: pair[1]])
    )


def one_line(error):
    text = str(error)
    text.encode()  # so that it can be printed
    assert "\n" not in text
    assert len(text) < 2000


def described(cells):
    return json.loads(genotype.to_json(cells))


GENOTYPES = [described(cells) for cells in genotype.PUBLISHED.values()]
RECURRENT = [described(cell) for cell in genotype.PUBLISHED_RECURRENT.values()]
NETWORKS = [
    {
        "genotype": cells,
        "channels": 8,
        "layers": 5,
        "num_classes": 10,
        "stem": "cifar",
        "image_shape": [8, 8, 1],
        "mean": [0.3],
        "std": [0.2],
        "count": 2,
    }
    for cells in GENOTYPES
]
CONFIG = {**workdirs.computed(Config()), "facts": {"version": "0.1.0", "data": "abc"}}


def check_genotype(tmp_path, content):
    path = tmp_path / "genotype.json"
    path.write_bytes(content)
    for kind in (genotype.CNN, genotype.RNN):
        try:
            found = genotype.load(path, kind=kind)
        except ValueError as error:
            one_line(error)
        else:
            assert genotype.from_json(genotype.to_json(found), kind=kind) == found


def check_network(tmp_path, content):
    path = tmp_path / "model.json"
    path.write_bytes(content)
    try:
        found = prediction._parse(files.read_json(path))
    except ValueError as error:
        one_line(error)
    else:
        assert found.count >= 1
        assert genotype.validate(found.network.genotype) == found.network.genotype


def check_config(tmp_path, content):
    """It is this very config, or refused, and written back or left as it is."""
    path = tmp_path / "config.json"
    path.write_bytes(content)
    try:
        workdirs.write_config(Config(), tmp_path, {"data": "abc"})
    except UserError as error:
        one_line(error)
        assert path.read_bytes() == content
    else:
        assert json.loads(path.read_text())["epochs"] == Config().epochs


@dataclass(frozen=True)
class Case:
    check: object
    valid: list


CASES = {
    "genotype": Case(check_genotype, [*GENOTYPES, *RECURRENT]),
    "network": Case(check_network, NETWORKS),
    "config": Case(check_config, [CONFIG]),
}


@pytest.mark.parametrize(
    "examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.parametrize("name", CASES)
def test_any_file(tmp_path, name, examples):
    case = CASES[name]

    @settings(STEADY, max_examples=examples)
    @given(contents(case.valid))
    def run(content):
        case.check(tmp_path, content)

    run()


@pytest.mark.parametrize("name", CASES)
def test_what_is_valid_is_taken(tmp_path, name):
    case = CASES[name]
    for value in case.valid:
        case.check(tmp_path, json.dumps(value).encode())
    if name == "config":
        workdirs.check(tmp_path, Config())
    if name == "network":
        assert prediction._parse(NETWORKS[0]).image_shape == (8, 8, 1)
