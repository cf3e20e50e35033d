"""The picture of the eigenvalue."""

from darts_jax import spectrum_plots


def test_draws_the_same_bytes_and_marks_the_stop(tmp_path):
    for name, stop in (("a", None), ("b", None), ("c", 20)):
        files = spectrum_plots.draw_eigenvalues(
            [10, 20, 30], [0.1, 0.2, 0.9], tmp_path / name, stop
        )
        assert [file.suffix for file in files] == [".svg", ".png"]
    a, b, c = ((tmp_path / f"{name}.svg").read_text() for name in "abc")
    assert a == b
    assert "early stop" in c and "early stop" not in a
    assert "eigenvalue" in a and "step" in a
