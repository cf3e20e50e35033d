import json
import pathlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from darts_jax import genotype
from darts_jax.genotype import CNN_PRIMITIVES, PUBLISHED, Genotype

DARTS_V1, DARTS_V2 = PUBLISHED["DARTS_V1"], PUBLISHED["DARTS_V2"]
ORACLE = pathlib.Path(__file__).parent / "oracle"


@pytest.fixture(scope="module")
def recorded():
    cases = json.loads((ORACLE / "genotypes.json").read_text())
    with np.load(ORACLE / "genotypes.npz") as alphas:
        return cases, dict(alphas)


def as_pairs(cell):
    return tuple((operation, source) for operation, source in cell)


def test_a_recurrent_cell_has_no_none():
    with pytest.raises(ValueError, match="none"):
        genotype.validate(genotype.RecurrentGenotype((("tanh", 0), ("none", 1)), (1, 2)))


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


def test_none_can_be_chosen_too():
    alpha = np.array([[0.0, 1.0, 0.0], [3.0, 2.0, 0.0]])
    cell = genotype.derive_cell(alpha, ("none", "a", "b"), 2, 2, with_none=True)
    assert cell == (("none", 1), ("a", 0))
    cells = genotype.derive({"normal": alpha, "reduce": alpha}, ("none", "a", "b"), with_none=True)
    assert cells.normal == cells.reduce == cell


def test_edge_weights_multiply_the_strengths():
    """PC-DARTS: softmax(alpha)_o times the softmax of beta over the edges into the node."""
    rng = np.random.default_rng(0)
    alpha, beta = rng.normal(size=(9, 4)), 2 * rng.normal(size=9)
    names, expected, row = ("none", "a", "b", "c"), [], 0
    for count in (2, 3, 4):
        of_node = slice(row, row + count)
        share = np.exp(beta[of_node]) / np.exp(beta[of_node]).sum()
        power = np.exp(alpha[of_node])
        strength = (power / power.sum(1, keepdims=True))[:, 1:] * share[:, None]
        for source in np.argsort(-strength.max(1))[:2]:
            expected.append((names[1 + strength[source].argmax()], int(source)))
        row += count
    assert genotype.derive_cell(alpha, names, 2, 2, edge_alpha=beta) == tuple(expected)
    assert genotype.derive_cell(alpha, names, 2, 2) != tuple(expected)
    alphas = {"normal": alpha, "reduce": alpha, "normal_edges": beta, "reduce_edges": np.zeros(9)}
    found = genotype.derive(alphas, names)
    assert found.normal == tuple(expected)
    assert found.reduce == genotype.derive_cell(alpha, names, 2, 2)


def test_an_operation_of_minus_infinity_is_not_chosen():
    alpha = np.array([[0.0, -np.inf, -5.0], [0.0, 2.0, -np.inf]])
    assert genotype.derive_cell(alpha, ("none", "a", "b"), 2, 2) == (("a", 1), ("b", 0))


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
    listed = Genotype(*(list(field) for field in DARTS_V2))
    ranged = listed._replace(normal_concat=range(2, 6), normal=[list(e) for e in listed.normal])
    assert genotype.validate(listed) == genotype.validate(ranged) == DARTS_V2


def test_save_writes_nothing_that_is_not_valid(tmp_path):
    path = tmp_path / "genotype.json"
    genotype.save(DARTS_V1, path)
    with pytest.raises(ValueError, match="unknown operation"):
        genotype.save(DARTS_V2._replace(normal=(("conv", 0), ("conv", 1))), path)
    assert genotype.load(path) == DARTS_V1
    assert list(tmp_path.iterdir()) == [path]


def test_other_operations_are_saved_and_loaded_where_they_are_named(tmp_path):
    path, operations = tmp_path / "genotype.json", (*CNN_PRIMITIVES, "conv_1x1")
    found = DARTS_V2._replace(normal=(("conv_1x1", 0), ("conv_1x1", 1)), normal_concat=(2,))
    genotype.save(found, path, operations)
    assert genotype.load(path, operations) == found
    assert genotype.from_json(genotype.to_json(found, operations), operations) == found
    for read in (genotype.load, lambda path: genotype.from_json(path.read_text())):
        with pytest.raises(ValueError, match="edge 0: unknown operation 'conv_1x1'; use one of: c"):
            read(path)
    # And only what is named there can be used.
    with pytest.raises(ValueError, match="'reduce', edge 0: unknown operation 'max_pool_3x3'"):
        genotype.validate(found, ("conv_1x1", "skip_connect"))


FIELDS = json.loads(genotype.to_json(DARTS_V2))
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
    large.write_bytes(genotype.to_json(DARTS_V2).encode() + b" " * 1_000_000)
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
    [
        ("darts_v3", "DARTS_V2, DARTS_V1"),
        ("nasnet", "NASNet, .*AmoebaNet"),
        ("", "DARTS_V1, .*Net$"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, names):
    assert genotype.nearest("amebanet", PUBLISHED).startswith("AmoebaNet")
    if name:
        with pytest.raises(ValueError, match=f"published cell {name!r}; .* one of: {names}"):
            genotype.load(name)
    else:
        assert genotype.nearest("zzz", PUBLISHED) == ", ".join(PUBLISHED)


def test_reading_a_genotype_needs_no_jax():
    code = """
import sys
sys.modules["jax"] = None
from darts_jax import genotype
genotype.load("DARTS_V2")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sampled_cells_are_uniform_over_the_space():
    rng = np.random.default_rng(0)
    found = [genotype.sample(rng, num_nodes=2) for _ in range(3000)]
    assert all(genotype.validate(each) == each for each in found)
    for cell in ("normal", "reduce"):
        pairs = Counter(tuple(source for _, source in getattr(g, cell)[2:]) for g in found)
        assert set(pairs) == {(0, 1), (0, 2), (1, 2)}
        operations = Counter(name for g in found for name, _ in getattr(g, cell))
        assert set(operations) == set(genotype.CNN_PRIMITIVES) - {"none"}
        for counts, total in ((pairs, 3000), (operations, 12000)):
            share = 1 / len(counts)
            bound = 5 * np.sqrt(share * (1 - share) / total)  # standard deviations
            assert all(abs(n / total - share) < bound for n in counts.values())
    again = genotype.sample(np.random.default_rng(0), num_nodes=2)
    assert again == found[0]


def test_sampled_recurrent_cells_are_uniform_over_the_space():
    rng = np.random.default_rng(0)
    found = [genotype.sample_recurrent(rng, num_nodes=3) for _ in range(3000)]
    assert all(genotype.validate(cell) == cell and cell.concat == (1, 2, 3) for cell in found)
    for node in range(3):
        counts = Counter(cell.recurrent[node] for cell in found)
        assert len(counts) == 4 * (node + 1)
        np.testing.assert_allclose(list(counts.values()), 3000 / len(counts), rtol=0.25)
