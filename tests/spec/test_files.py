"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
import shutil

import pytest

from nuwa.spec import files


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path):
    path = tmp_path / "kept.json"
    files.write_text(path, "é")
    with files.replacing(path) as partial:
        partial.write_bytes(b"half")
        assert path.read_text(encoding="utf-8") == "é"
    assert path.read_bytes() == b"half" and os.listdir(tmp_path) == ["kept.json"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_what_fails_leaves_the_file_of_before_and_nothing_else(tmp_path, error):
    path = tmp_path / "kept"
    path.write_text("before")
    with pytest.raises(type(error)), files.replacing(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["kept"]


def test_what_a_killed_writer_left_is_overwritten(tmp_path):
    path = tmp_path / "kept"
    files.partial_of(path).write_text("much more than there will be")
    files.write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["kept"]


def test_a_full_disk_is_told_by_name_whatever_the_library_says(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    path = tmp_path / "state.pt"
    told = pytest.raises(OSError, match="No space left on device: .*state.pt")
    with told as caught, files.replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError("unexpected pos 768 vs 662")
    assert caught.value.errno == errno.ENOSPC and not os.listdir(tmp_path)


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no/.kept.partial"):
        files.write_text(tmp_path / "no" / "kept", "new")


def test_a_link_stays_one_and_a_device_is_written_to(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    files.write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    files.write_text(files.Path("/dev/null"), "gone")
    assert not files.Path("/dev/null").is_file()


def test_a_folder_of_results_is_made_or_told(tmp_path):
    folder = tmp_path / "deep" / "results"
    assert files.make_writable(folder) == folder and folder.is_dir()
    (folder / "file").write_text("")
    with pytest.raises(ValueError, match="file cannot be written to: File exists"):
        files.make_writable(folder / "file")
