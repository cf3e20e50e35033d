import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from darts_jax import genotype
from darts_jax.genotype import CNN_PRIMITIVES, PUBLISHED, Genotype

ORACLE = pathlib.Path(__file__).parent / "oracle"
PARAMS = json.loads((ORACLE / "params.json").read_text())


@pytest.fixture(scope="module")
def recorded():
    cases = json.loads((ORACLE / "genotypes.json").read_text())
    with np.load(ORACLE / "genotypes.npz") as alphas:
        return cases, dict(alphas)


def as_pairs(cell):
    return tuple((operation, source) for operation, source in cell)


def test_edges_are_ordered_by_destination_then_source():
    assert genotype.edges(2) == ((0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
    assert genotype.edges(3, num_inputs=1) == ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
    assert len(genotype.edges(4)) == 14
    assert len(genotype.edges(8, num_inputs=1)) == 36


@pytest.mark.parametrize("num_inputs", [1, 2, 3])
@pytest.mark.parametrize("num_nodes", [1, 2, 5, 8])
def test_count_nodes_inverts_edges(num_nodes, num_inputs):
    assert genotype.count_nodes(len(genotype.edges(num_nodes, num_inputs)), num_inputs) == num_nodes


def test_derive_reproduces_every_recorded_convolutional_genotype(recorded):
    cases, alphas = recorded
    assert tuple(cases["cnn"]["primitives"]) == CNN_PRIMITIVES
    assert len(cases["cnn"]["cases"]) == len(alphas["cnn_alphas"]) == 200
    for case, (normal, reduce) in zip(cases["cnn"]["cases"], alphas["cnn_alphas"], strict=True):
        expected = case["genotype_f64"]
        found = genotype.derive({"normal": normal, "reduce": reduce})
        assert found == Genotype(
            as_pairs(expected["normal"]),
            tuple(expected["normal_concat"]),
            as_pairs(expected["reduce"]),
            tuple(expected["reduce_concat"]),
        ), case["kind"]
        assert genotype.validate(found) == found


def test_derive_cell_reproduces_every_recorded_recurrent_genotype(recorded):
    cases, alphas = recorded
    assert len(cases["rnn"]["cases"]) == len(alphas["rnn_alphas"]) == 200
    for case, (alpha,) in zip(cases["rnn"]["cases"], alphas["rnn_alphas"], strict=True):
        cell = genotype.derive_cell(alpha, cases["rnn"]["primitives"], 1, 1)
        assert cell == as_pairs(case["genotype_f64"]["recurrent"]), case["kind"]


@pytest.mark.parametrize("none", [30.0, 800.0])
def test_none_counts_in_the_denominator_only(none):
    # Source 1 has the larger alpha, but `none` takes its mass; 800 underflows a plain softmax.
    alpha = np.array([[0.0, 1.0, 0.0], [none, 2.0, 0.0]])
    cell = genotype.derive_cell(alpha, ("none", "a", "b"), 2, 2)
    assert cell == (("a", 0), ("a", 1))
    alpha = np.array([[none + 2.0, 1.0, 0.0], [none, 0.0, 2.0]])
    assert genotype.derive_cell(alpha, ("none", "a", "b"), 2, 2) == (("b", 1), ("a", 0))


def test_rows_with_the_same_numbers_tie_exactly():
    rng = np.random.default_rng(0)
    # 0.1 + 0.2 + 0.3 depends on the order of the sum; the order of operations must not matter.
    for _ in range(200):
        row = rng.normal(size=8)
        alpha = np.stack([rng.permutation(row), rng.permutation(row)])
        cell = genotype.derive_cell(alpha, [f"op{i}" for i in range(8)], 2, 2)
        assert [source for _, source in cell] == [0, 1]


def test_derive_takes_any_number_of_nodes_and_other_primitives():
    normal, reduce = np.eye(5)[:, :3], np.eye(2, 3)
    found = genotype.derive({"normal": normal, "reduce": reduce}, ("a", "none", "b"))
    assert found.normal_concat == (2, 3) and found.reduce_concat == (2,)
    # [1, 0, 0] prefers a with the mass e / (e + 2), [0, 1, 0] has a at 1 / (e + 2).
    assert found.reduce == (("a", 0), ("a", 1))


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        ({"normal": np.zeros((14, 8))}, r"cells \['normal'\]; it needs 'normal' and 'reduce'"),
        ({"normal": np.zeros((14, 8)), "reduce": np.zeros((14, 7))}, r"alpha\['reduce'\].*14, 7"),
        ({"normal": np.zeros((13, 8)), "reduce": np.zeros((14, 8))}, r"13 edges fit no cell.*14"),
        ({"normal": np.zeros((0, 8)), "reduce": np.zeros((14, 8))}, "0 edges fit no cell"),
        ({"normal": np.zeros(14), "reduce": np.zeros((14, 8))}, r"shape \[14\]"),
        ({"normal": [["x"] * 8] * 14, "reduce": np.zeros((14, 8))}, "not an array of real numbers"),
        ({"normal": np.full((14, 8), np.nan), "reduce": np.zeros((14, 8))}, r"\[0, 0\] is nan"),
        ({"normal": np.full((14, 8), -np.inf), "reduce": np.zeros((14, 8))}, "is -inf"),
    ],
)
def test_derive_refuses_a_bad_alpha_in_one_line(alpha, message):
    with pytest.raises(ValueError, match=message) as error:
        genotype.derive(alpha)
    assert "\n" not in str(error.value)


def test_derive_cell_refuses_more_edges_than_the_first_node_has():
    with pytest.raises(ValueError, match="keep 1 to 1 per node"):
        genotype.derive_cell(np.zeros((36, 5)), [*"abcde"], edges_per_node=2, num_inputs=1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_json_round_trip_is_exact(name, tmp_path):
    cell = PUBLISHED[name]
    assert genotype.validate(cell) == cell
    assert genotype.from_json(genotype.to_json(cell)) == cell
    path = tmp_path / "genotype.json"
    genotype.save(cell, path)
    assert genotype.load(path) == genotype.load(str(path)) == genotype.load(name) == cell
    assert list(tmp_path.iterdir()) == [path]
    assert set(json.loads(path.read_text())) == set(Genotype._fields)


def test_validate_turns_sequences_into_tuples():
    listed = Genotype(*(list(field) for field in genotype.DARTS_V2))
    ranged = listed._replace(normal_concat=range(2, 6), normal=[list(e) for e in listed.normal])
    assert genotype.validate(listed) == genotype.validate(ranged) == genotype.DARTS_V2


def test_save_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "genotype.json"
    genotype.save(genotype.DARTS_V1, path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        genotype.save(genotype.DARTS_V2, path)
    with pytest.raises(ValueError, match="unknown operation"):
        genotype.save(genotype.DARTS_V2._replace(normal=(("conv", 0), ("conv", 1))), path)
    assert genotype.load(path) == genotype.DARTS_V1
    assert list(tmp_path.iterdir()) == [path]


FIELDS = json.loads(genotype.to_json(genotype.DARTS_V2))
NORMAL = FIELDS["normal"]


def changed(**fields):
    return json.dumps(FIELDS | fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"not JSON .*; write genotypes with `save`"),
        ("{'normal': 1}", "not JSON"),
        ("[" * 200_000, "not JSON"),
        ('{"normal": ' + "9" * 5000 + "}", "not JSON"),
        ("[1, 2]", "is a JSON object with the fields normal, .*"),
        ('"DARTS_V2"', "is a JSON object"),
        (json.dumps({k: v for k, v in FIELDS.items() if k != "reduce"}), "'reduce' is missing"),
        (changed(normal_conct=[2]), "unknown field 'normal_conct'.*normal_concat"),
        (changed()[:-1] + ', "normal": []}', "'normal' is given twice; keep one"),
        (changed(normal="sep_conv_3x3"), "'normal' is 'sep_conv_3x3'; it needs a list"),
        (changed(normal={"skip_connect": 0, "none": 1}), "'normal' is {.*; it needs a list"),
        (changed(normal=None), "'normal' is None"),
        (changed(normal=[]), "'normal' has 0 edges; it needs 2 per node"),
        (changed(normal=NORMAL[:-1]), "'normal' has 7 edges; it needs 2 per node"),
        (changed(reduce=[["skip_connect"]] * 8), r"'reduce', edge 0 is \['skip_connect'\]"),
        (changed(reduce=[["skip_connect", 0.0]] * 8), "'reduce', edge 0 is .*0.0"),
        (changed(reduce=[["skip_connect", True]] * 8), "'reduce', edge 0 is .*True"),
        (changed(reduce=[[0, "skip_connect"]] * 8), r"it needs \[operation, source\]"),
        (changed(reduce=["ab"] * 8), "'reduce', edge 0 is 'ab'"),
        (changed(normal=[["sep_conv_3x3", 0], ["SEP_CONV_3X3", 1]]), "edge 1: .*: sep_conv_3x3, "),
        (changed(normal=[["sep_conv\n3x3", 0]] * 2), r"'sep_conv\\n3x3'; use one of: sep_conv_3x3"),
        (changed(normal=[["q" * 10**5, 0]] * 2), "use one of: none, max_pool_3x3, .*"),
        (changed(normal=[*NORMAL[:-1], ["skip_connect", 5]]), "edge 7: source 5 .* use 0 to 4"),
        (changed(normal=[["skip_connect", -1], *NORMAL[1:]]), "edge 0: source -1 .* use 0 to 1"),
        (changed(normal_concat=[]), "'normal_concat' is .*; it needs different nodes from 2 to 5"),
        (changed(normal_concat=3), "'normal_concat' is 3"),
        (changed(normal_concat=[2, 3, 4, 6]), "'normal_concat' holds 6"),
        (changed(normal_concat=[1, 2]), "'normal_concat' holds 1"),
        (changed(normal_concat=[2, "3"]), "'normal_concat' holds '3'"),
        (changed(normal_concat=[2, 3, 3]), "'normal_concat' holds a node twice"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_it(text, message, tmp_path):
    path = tmp_path / "found.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        genotype.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(path)) + 300
    with pytest.raises(ValueError, match=message):
        genotype.from_json(text)


def test_load_refuses_what_is_not_a_genotype_file(tmp_path):
    large, binary = tmp_path / "large.json", tmp_path / "binary.json"
    large.write_bytes(genotype.to_json(genotype.DARTS_V2).encode() + b" " * 1_000_000)
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in [
        (large, f"{large}: larger than 1 MB"),
        (binary, f"{binary}: not UTF-8 text"),
        (tmp_path, f"{tmp_path}: Is a directory; give the path"),
        (tmp_path / "absent.json", "no genotype file or published cell '.*absent.json'"),
    ]:
        with pytest.raises(ValueError, match=message):
            genotype.load(path)


@pytest.mark.parametrize(
    ("name", "names"),
    [("darts_v3", "DARTS_V2, DARTS_V1"), ("nasnet", "NASNet, AmoebaNet"), ("", "DARTS_V1, .*Net$")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, names):
    assert genotype.nearest("amebanet", PUBLISHED).startswith("AmoebaNet")
    if name:
        with pytest.raises(ValueError, match=f"published cell {name!r}; .* one of: {names}"):
            genotype.load(name)
    else:
        assert genotype.nearest("zzz", PUBLISHED) == ", ".join(PUBLISHED)


def test_reading_a_genotype_needs_no_jax():
    code = "import sys; sys.modules['jax'] = None; import runpy; runpy.run_path(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, genotype.__file__], check=True)


# (trainable parameters, parameter tensors) of each part of the evaluation network, written down
# from the paper's description, so that a wrong operation, source or concat shows in the totals.


def batch_norm(channels):
    return 2 * channels, 2


def convolution(channels_in, channels_out, kernel=1):
    return channels_in * channels_out * kernel, 1


def total(*parts):
    return tuple(map(sum, zip((0, 0), *parts, strict=True)))


def relu_conv_bn(channels_in, channels_out):
    return total(convolution(channels_in, channels_out), batch_norm(channels_out))


def factorised_reduce(channels_in, channels_out):
    half = convolution(channels_in, channels_out // 2)
    return total(half, half, batch_norm(channels_out))


def operation(name, channels, stride):
    kind, size = name.split("_")[0], int(name[-1]) if name[-1].isdigit() else 0
    block = total((channels * size**2, 1), relu_conv_bn(channels, channels))
    if name == "conv_7x1_1x7":
        strip = convolution(channels, channels, 7)
        return total(strip, strip, batch_norm(channels))
    if name == "skip_connect":
        return factorised_reduce(channels, channels) if stride == 2 else (0, 0)
    return {"sep": total(block, block), "dil": block, "max": (0, 0), "avg": (0, 0)}[kind]


def cells(cell, channels, layers, before, before_before, reduced):
    parts = []
    for layer in range(layers):
        reduction = layer in (layers // 3, 2 * layers // 3)
        channels *= 1 + reduction
        preprocess = factorised_reduce if reduced else relu_conv_bn
        parts += [preprocess(before_before, channels), relu_conv_bn(before, channels)]
        edges, concat = cell[2:] if reduction else cell[:2]
        for name, source in edges:
            parts.append(operation(name, channels, 2 if reduction and source < 2 else 1))
        before_before, before, reduced = before, channels * len(concat), reduction
        if layer == 2 * layers // 3:
            at_auxiliary = before
    return total(*parts), before, at_auxiliary


def linear(features, classes):
    return features * classes + classes, 2


def auxiliary(channels, classes, last_norm):
    return total(
        relu_conv_bn(channels, 128),
        convolution(128, 768, 4),
        batch_norm(768) if last_norm else (0, 0),
        linear(768, classes),
    )


def cifar(cell, classes=10, channels=36, layers=20):
    stem = total(convolution(3, 3 * channels, 9), batch_norm(3 * channels))
    body, features, at = cells(cell, channels, layers, 3 * channels, 3 * channels, False)
    return total(stem, body, linear(features, classes)), auxiliary(at, classes, True)


def imagenet(cell, classes=1000, channels=48, layers=14):
    widths = [3, channels // 2, channels, channels]
    steps = zip(widths, widths[1:], strict=False)
    stem = [total(convolution(i, o, 9), batch_norm(o)) for i, o in steps]
    body, features, at = cells(cell, channels, layers, channels, channels, True)
    return total(*stem, body, linear(features, classes)), auxiliary(at, classes, False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_cells_have_the_recorded_parameter_counts(name):
    recorded = PARAMS["eval_cifar"][name], PARAMS["eval_imagenet"][name]
    for prefix, (network, head), expected in [
        ("", cifar(PUBLISHED[name]), recorded[0]),
        ("cifar100_", cifar(PUBLISHED[name], classes=100), recorded[0]),
        ("", imagenet(PUBLISHED[name]), recorded[1]),
    ]:
        without = expected[f"{prefix}auxiliary_False"]
        assert network == (without["all"], without["num_param_tensors"])
        whole = expected[f"{prefix}auxiliary_True"]
        assert total(network, head) == (whole["all"], whole["num_param_tensors"])
        assert head[0] == whole["auxiliary"]


@pytest.mark.parametrize("name", ["NASNet", "AmoebaNet"])
def test_cells_of_the_nasnet_space_concatenate_the_nodes_that_no_node_uses(name):
    normal, normal_concat, reduce, reduce_concat = PUBLISHED[name]
    for cell, concat in [(normal, normal_concat), (reduce, reduce_concat)]:
        used = {source for _, source in cell}
        assert concat == tuple(state for state in range(2, 7) if state not in used)
