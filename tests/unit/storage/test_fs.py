from __future__ import annotations

import os
from pathlib import Path

import pytest
from factories import write_tree

from stego_core.errors import InputError
from stego_core.storage import fs


def entries(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def names(folder) -> list[str]:
    return [file.path for file in fs.list_files(str(folder))]


def test_what_is_written_is_read_back_and_replaced_as_a_whole(tmp_path):
    uri = str(tmp_path / "a" / "b" / "x.bin")
    fs.write_bytes(uri, b"first, the longer one")
    fs.write_bytes(uri, b"second")
    assert fs.read_bytes(uri) == b"second"
    assert fs.read_bytes(f"file://{uri}") == b"second"
    assert entries(tmp_path / "a" / "b") == ["x.bin"]


def test_a_write_that_fails_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    uri = str(tmp_path / "x.bin")
    fs.write_bytes(uri, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fs.write_bytes(uri, b"new")
    assert entries(tmp_path) == ["x.bin"]
    assert Path(uri).read_bytes() == b"old"


def test_two_writers_in_one_process_never_share_a_temporary_file(tmp_path, monkeypatch):
    seen = []
    sync = os.fsync

    def nested(handle):
        seen.append(set(entries(tmp_path)))
        if len(seen) == 1:
            fs.write_bytes(str(tmp_path / "x.bin"), b"inner")
        sync(handle)

    monkeypatch.setattr(os, "fsync", nested)
    fs.write_bytes(str(tmp_path / "x.bin"), b"outer")
    assert len(seen[1]) == 2  # both temporary files are there at once
    assert (tmp_path / "x.bin").read_bytes() == b"outer"
    assert entries(tmp_path) == ["x.bin"]


def test_a_written_file_has_the_permissions_that_the_umask_asks_for(tmp_path):
    before = os.umask(0o022)
    try:
        fs.write_bytes(str(tmp_path / "x"), b"")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_a_missing_file_is_none_or_an_error_as_the_caller_asks(tmp_path):
    uri = str(tmp_path / "none")
    assert fs.read_if_exists(uri) is None
    with pytest.raises(FileNotFoundError):
        fs.read_bytes(uri)


def test_a_listing_is_ordered_whatever_the_order_of_writing(tmp_path):
    files = ["b.jpg", "a/z.jpg", "a/B.jpg", "a/b/c.jpg", "a.jpg", "10.jpg", "9.jpg"]
    write_tree(tmp_path / "one", dict.fromkeys(files, b"x"))
    write_tree(tmp_path / "two", dict.fromkeys(reversed(files), b"x"))
    expected = ["10.jpg", "9.jpg", "a.jpg", "b.jpg", "a/B.jpg", "a/z.jpg", "a/b/c.jpg"]
    assert names(tmp_path / "one") == names(tmp_path / "two") == expected


def test_hidden_files_and_all_below_hidden_folders_are_passed_over(tmp_path):
    hidden = [".x.jpg", ".git/a.jpg", "a/.thumbs/b.jpg", "a/.c.jpg"]
    write_tree(tmp_path, dict.fromkeys([*hidden, "a/d.jpg"], b"x"))
    assert names(tmp_path) == ["a/d.jpg"]


def test_a_hidden_folder_above_the_root_hides_nothing(tmp_path):
    write_tree(tmp_path, {".cache/images/a.jpg": b"x"})
    assert names(tmp_path / ".cache" / "images") == ["a.jpg"]


def test_links_to_files_count_and_dangling_ones_do_not(tmp_path):
    write_tree(tmp_path, {"other/a.jpg": b"xyz"})
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link.jpg").symlink_to(tmp_path / "other" / "a.jpg")
    (tmp_path / "root" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (found,) = fs.list_files(str(tmp_path / "root"))
    assert (found.path, found.num_bytes) == ("link.jpg", 3)


def test_the_etag_changes_with_the_size_and_with_the_time(tmp_path):
    path = tmp_path / "a.jpg"
    etags = []
    for data, seconds in ((b"x", 1), (b"xy", 1), (b"x", 2), (b"x", 1)):
        path.write_bytes(data)
        os.utime(path, (seconds, seconds))
        etags += [file.etag for file in fs.list_files(str(tmp_path))]
    assert len(set(etags)) == 3
    assert etags[0] == etags[3]


def test_a_listed_uri_can_be_read_whatever_is_in_the_name(tmp_path):
    odd = ["a b.jpg", "a#b.jpg", "a?b.jpg", "100%25.jpg", "ü.jpg", "a:b.jpg", "new\nline.jpg"]
    write_tree(tmp_path, {name: name.encode() for name in odd})
    listed = {file.path: fs.read_bytes(file.uri) for file in fs.list_files(str(tmp_path))}
    assert listed == {name: name.encode() for name in odd}


def test_a_name_that_is_not_utf8_is_listed_as_a_table_can_hold_it(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    (tmp_path / "café.jpg").write_bytes(b"xy")
    found = {file.path: file.num_bytes for file in fs.list_files(str(tmp_path))}
    assert found == {"café.jpg": 2, "\\xff/caf\\xe9.jpg": 1}
    with pytest.raises(InputError, match="not UTF-8; rename") as caught:
        names(folder)
    assert str(caught.value).isascii()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        names(tmp_path / "nowhere")


@pytest.mark.parametrize("call", [fs.read_bytes, fs.exists, lambda uri: [*fs.list_files(uri)]])
def test_an_unknown_scheme_is_named(call):
    with pytest.raises(InputError, match="'nosuch://'"):
        call("nosuch://bucket/key")


def test_a_bucket_is_never_taken_for_a_local_path():
    assert not fs.is_local("s3://bucket/a")
    assert fs.is_local("file:///a")
    assert fs.is_local("a/b:c")
    assert fs.is_local("/a")
    with pytest.raises(InputError, match="not a local path"):
        fs.local_path("s3://bucket/a")


def test_keys_of_a_bucket_keep_what_a_url_parser_would_cut_off(monkeypatch):
    monkeypatch.setenv("AWS_REGION", "eu-west-1")  # so that nobody is asked for it
    for key in ("a#b.jpg", "a?b.jpg", "a b.jpg", "100%25.jpg"):
        assert fs.open_uri(f"s3://bucket/x/{key}")[1] == f"bucket/x/{key}"


def test_joining_never_doubles_a_slash_and_keeps_the_root():
    assert fs.join("s3://b/run/", "a", "b.txt") == "s3://b/run/a/b.txt"
    assert fs.join("runs/x", "y") == "runs/x/y"
    assert fs.local_path(fs.join("/", "y")) == Path("/y")


def test_files_and_folders_are_told_apart_listed_and_deleted(tmp_path):
    write_tree(tmp_path, {"run/b": b"", "run/a": b"", "run/sub/c": b""})
    run = str(tmp_path / "run")
    assert fs.is_folder(run)
    assert fs.is_folder(f"{run}/")
    assert fs.list_names(run) == ["a", "b", "sub"]
    assert fs.list_names(f"{run}/none") == []
    assert fs.exists(f"{run}/a")
    assert not fs.is_folder(f"{run}/a")
    fs.delete(f"{run}/a")
    fs.delete(f"{run}/sub")
    fs.delete(f"{run}/never-there")
    assert fs.list_names(run) == ["b"]


def test_other_filesystems_are_listed_like_folders():
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    # In the order of whole paths: "." comes before "/", and that before "0".
    names = ["a.jpg", "a/b/d.jpg", "a/c.jpg", "a0.jpg", "b.jpg"]
    for name in (*reversed(names), ".h.jpg", "a/.t/d.jpg"):
        memory.pipe(f"/test-fs/{name}", name.encode())
    try:
        found = list(fs.list_files("memory://test-fs"))
        assert [file.path for file in found] == names == sorted(names)
        assert [fs.read_bytes(file.uri) for file in found] == [name.encode() for name in names]
    finally:
        memory.rm("/test-fs", recursive=True)


def test_a_folder_that_can_not_be_read_is_told_and_not_left_out(tmp_path, monkeypatch):
    write_tree(tmp_path, {"a/1.jpg": b"x", "b/2.jpg": b"x"})
    scandir = os.scandir

    def denied(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(InputError, match=r"b can't be listed \(Permission denied\)"):
        [*fs.list_files(str(tmp_path))]


def test_links_to_files_count_and_those_to_folders_themselves_or_nothing_do_not(tmp_path, caplog):
    write_tree(tmp_path / "elsewhere", {"1.jpg": b"x"})
    root = write_tree(tmp_path / "root", {"2.jpg": b"x"})
    (root / "file.jpg").symlink_to(tmp_path / "elsewhere" / "1.jpg")
    (root / "folder").symlink_to(tmp_path / "elsewhere")
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    (root / "nothing.jpg").symlink_to(tmp_path / "nothing.jpg")
    assert [file.path for file in fs.list_files(str(root))] == ["2.jpg", "file.jpg"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{root / 'folder'} is a link to a folder: what is there is left out"
    ]
