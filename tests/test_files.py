import pytest

from darts_jax.files import write_text


def test_the_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "found.txt"
    for text in ("old\n", "1 → 2\n"):
        write_text(str(path), text)
        assert path.read_bytes() == text.encode()
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_is_kept_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "found.txt"
    write_text(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
