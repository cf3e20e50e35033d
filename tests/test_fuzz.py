"""Whatever a file holds that a user loads: a valid object, or an error of one line."""

import dataclasses
import json
import typing
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stand_in import Config

from darts_jax import files, genotype, prediction
from experiments import search_config, select_cnn
from experiments import workdir as workdirs
from experiments.errors import UserError
from experiments.run_config import RunConfig

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
    max_leaves=16,
)
# Made once, since making a strategy takes longer than drawing from it.
INDEX, COUNT, TEXT = st.integers(0, 2**16), st.integers(1, 3), st.text()
ACTION = st.sampled_from(["replace", "remove", "add"])


def places(value, path=()):
    """The paths of all values inside of a value."""
    yield path
    children = dict(enumerate(value)) if isinstance(value, list) else value
    for key, child in children.items() if isinstance(children, dict) else ():
        yield from places(child, (*path, key))


@st.composite
def mutated(draw, valid):
    """A valid object in which a few values are replaced, removed, or given other names."""
    found = json.loads(json.dumps(valid[draw(INDEX) % len(valid)]))
    for _ in range(draw(COUNT)):
        paths = [path for path in places(found) if path]
        if not paths:
            break
        *outer, last = paths[draw(INDEX) % len(paths)]
        parent = found
        for key in outer:
            parent = parent[key]
        action = draw(ACTION)
        if action == "replace":
            parent[last] = draw(VALUES)
        elif action == "remove":
            del parent[last]
        elif isinstance(parent, dict):
            parent[draw(TEXT)] = draw(VALUES)
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


def write(path, content):
    path.unlink(missing_ok=True)  # a file that is written over may wait for the disk
    path.write_bytes(content)


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
SEARCHES = [
    {**workdirs._fields(config), "facts": {"version": "0.1.0", "train images": "abc"}}
    for _, config in search_config.PRESETS.values()
]


def check_genotype(tmp_path, content):
    path = tmp_path / "genotype.json"
    write(path, content)
    for kind in (genotype.CNN, genotype.RNN):
        try:
            found = genotype.load(path, kind=kind)
        except ValueError as error:
            one_line(error)
        else:
            assert genotype.from_json(genotype.to_json(found), kind=kind) == found


def check_network(tmp_path, content):
    path = tmp_path / "model.json"
    write(path, content)
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
    write(path, content)
    try:
        workdirs.write_config(Config(), tmp_path, {"data": "abc"})
    except UserError as error:
        one_line(error)
        assert path.read_bytes() == content
    else:
        assert json.loads(path.read_text())["epochs"] == Config().epochs


def check_search(tmp_path, content):
    """All that the file says is there, of the types that the fields have."""
    path = tmp_path / "config.json"
    write(path, content)
    try:
        found = select_cnn.read_config(tmp_path)
    except ValueError as error:
        one_line(error)
    else:
        assert_typed(found)
        fields = workdirs.flatten(workdirs._fields(found))
        for name, value in workdirs.flatten(files.read_json(path)).items():
            assert name not in fields or fields[name] == value


def assert_typed(value):
    """The fields of a dataclass are of their types."""
    kinds = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        own, kind = getattr(value, field.name), kinds[field.name]
        if dataclasses.is_dataclass(own):
            assert_typed(own)
        elif typing.get_origin(kind) is typing.Literal:
            assert own in typing.get_args(kind)
        elif typing.get_origin(kind) is tuple:
            assert tuple(map(type, own)) == typing.get_args(kind)
        else:
            assert type(own) is not bool or kind is bool
            assert isinstance(own, kind)


@dataclass(frozen=True)
class Case:
    check: object
    valid: list


CASES = {
    "genotype": Case(check_genotype, [*GENOTYPES, *RECURRENT]),
    "network": Case(check_network, NETWORKS),
    "config": Case(check_config, [CONFIG]),
    "search": Case(check_search, SEARCHES),
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
    if name == "search":
        last = [config for _, config in search_config.PRESETS.values()][-1]
        assert select_cnn.read_config(tmp_path) == dataclasses.replace(last, run=RunConfig())
    if name == "network":
        assert prediction._parse(NETWORKS[0]).image_shape == (8, 8, 1)
