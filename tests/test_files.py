import pytest

from darts_jax.files import MAX_JSON_DEPTH, read_json, write_text


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


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"[]", "not an object"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b'{"a": "\xff"}', "utf-8"),
        (b'{"a": ' + 100_000 * b"[", "nested too deeply"),
        (b'{"a": ' + MAX_JSON_DEPTH * b"[" + MAX_JSON_DEPTH * b"]" + b"}", "nested too deeply"),
        (b'{"a": "' + 200 * b"x" + b'"}', "more than 100 bytes"),
    ],
)
def test_json_that_is_refused(tmp_path, content, reason):
    path = tmp_path / "found.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_json(path, limit=100 if b"xx" in content else 1_000_000)


def test_json_that_is_read(tmp_path):
    path = tmp_path / "found.json"
    path.write_text('{"a": [1, {"b": null}]}')
    assert read_json(path) == {"a": [1, {"b": None}]}
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "missing.json")
