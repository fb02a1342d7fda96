"""Files that are there whole or not at all."""

import pytest

from mimicbrush_core.whole_file import whole_file


def test_the_file_takes_its_place_when_it_is_complete(tmp_path):
    path = tmp_path / "notes.json"
    path.write_text("before")
    with whole_file(path) as unfinished:
        unfinished.write_text("after")
        assert unfinished.parent == tmp_path and path.read_text() == "before"
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("before", ["before", None])
def test_what_fails_leaves_what_was(tmp_path, before):
    path = tmp_path / "notes.json"
    if before is not None:
        path.write_text(before)
    with pytest.raises(KeyboardInterrupt), whole_file(path) as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert [file.read_text() for file in tmp_path.iterdir()] == ([] if before is None else [before])
