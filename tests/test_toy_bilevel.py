"""The toy problem's command: every estimator settles at the fixed point of its xi."""

import pytest

from experiments import toy_bilevel


@pytest.mark.parametrize("xi", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("name", ["unrolled", "finite_difference"])
def test_settles_at_the_fixed_point(name, xi):
    w, alpha = toy_bilevel.search(name, xi, toy_bilevel.Config())
    assert w == pytest.approx(2 / (1 + 2 * xi), abs=1e-3)
    assert alpha == pytest.approx(2 / (1 + 2 * xi), abs=1e-3)


def test_command(capsys):
    assert toy_bilevel.main(["smoke", "--xi", "0.5"]) == 0
    assert "(1.0000, 1.0000)" in capsys.readouterr().out


def test_unknown_preset(capsys):
    assert toy_bilevel.main(["smok"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--xi", "-0.5"], "--xi is -0.5; give more than 0"),
        (["--num-steps", "0"], "--num-steps is 0; give at least 1"),
    ],
)
def test_bad_input(argv, message, capsys):
    assert toy_bilevel.main(argv) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
