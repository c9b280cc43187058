"""What an input that has grown adds to a manifest, and what becomes of the rows there were."""

import contextlib
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import write_tree

from stego_core.config.schema import PredictConfig
from stego_core.distributed.shards import NEXT, Shards, extend, finish_extension, unread_images
from stego_core.errors import SchemaError
from stego_core.masks.table import SCHEMA, to_parquet
from stego_core.masks.verify import SUCCESS, main, mask_files, part_name, verify_output
from stego_core.storage import fs
from stego_core.storage.extend import compare, read_shards
from stego_core.storage.manifest import (
    digest_files,
    image_id,
    list_images,
    manifest_table,
    read_manifest,
    write_manifest,
)
from stego_core.storage.run import RunDirectory

PREDICT = PredictConfig(unit_images=2, shard_batches=2)


@pytest.fixture
def source(tmp_path):
    return write_tree(tmp_path / "in", {f"{n}.png": b"x" * (n + 1) for n in range(7)})


@pytest.fixture
def run(source, tmp_path):
    """A complete output: two parts of four and three rows."""
    run = RunDirectory(str(tmp_path / "out"), job="segment")
    files = list_images(str(source))
    write_manifest(run.path("manifest.parquet"), files, unit_images=2)
    do_pending(run)
    return run


def shards(run):
    uri = run.path("manifest.parquet")
    return Shards(
        run.uri, uri, per_shard=PREDICT.shard_batches, metadata={"stego.fingerprint": "f0"}
    )


def do_pending(run):
    """Write what a job would write for the pending units; return them."""
    todo, manifest = shards(run), read_manifest(run.path("manifest.parquet"))
    pending = todo.pending()
    for unit in pending:
        rows = [
            {name: row.get(name) for name in SCHEMA.names} | {"status": "ok"}
            for row in manifest.read_unit(unit).to_pylist()
        ]
        assert len(rows) == todo.num_images(unit)
        data = to_parquet(pa.Table.from_pylist(rows, SCHEMA), {})
        fs.write_bytes(fs.join(todo.folder, f"unit-{unit:08d}.parquet"), data)
        todo.unit_done(unit)
    run.write_json(SUCCESS, verify_output(run.uri).record())
    return pending


def parts(run):
    names = fs.list_names(run.path("masks"))
    tables = [pq.read_table(run.path("masks", n), partitioning=None) for n in names]
    return {
        n: [u.rpartition("/")[2] for u in t["image_uri"].to_pylist()]
        for n, t in zip(names, tables, strict=True)
    }


def grow(run, source, again=()):
    extend(run, list_images(str(source)), predict=PREDICT, again=np.array(again, np.int64))


def test_an_output_of_two_settings_is_no_output(run):
    part = run.path("masks", "part-00001.parquet")
    table = fs.read_table(part)
    assert verify_output(run.uri).record()["fingerprint"] == "f0"
    fs.write_bytes(part, to_parquet(table, {"stego.fingerprint": "f1"}))
    with pytest.raises(SchemaError, match="files of several runs"):
        verify_output(run.uri)


def unit_file(run, names):
    """Return a unit's file of these images, as another run may have written it."""
    rows = [dict.fromkeys(SCHEMA.names) | {"image_id": image_id(n), "status": "ok"} for n in names]
    return to_parquet(pa.Table.from_pylist(rows, SCHEMA), {})


@pytest.mark.parametrize("settings", ["f0", "f1"])
def test_a_unit_that_comes_late_is_of_no_other_manifest_or_settings(run, source, settings):
    late = fs.join(shards(run).folder, "unit-00000002.parquet")
    (source / "7.png").write_bytes(b"new")
    grow(run, source)
    if settings == "f0":  # of the manifest before
        fs.write_bytes(late, unit_file(run, ["4.png", "5.png"]))
    else:  # of a job before `--overwrite`, of the same manifest
        uri = run.path("manifest.parquet")
        other = Shards(run.uri, uri, per_shard=2, metadata={"stego.fingerprint": settings})
        number = shards(run).pending()[0]
        name = f"unit-{number:08d}.parquet"
        fs.write_bytes(fs.join(other.folder, name), unit_file(run, ["7.png"]))
    do_pending(run)
    assert verify_output(run.uri).is_ordered
    assert parts(run)["part-00002.parquet"] == ["7.png"]
    assert not fs.exists(late)


def test_a_part_or_unit_that_was_cut_off_is_made_again(run):
    manifest = read_manifest(run.path("manifest.parquet"))
    todo, whole = shards(run), fs.read_bytes(run.path("masks", "part-00000.parquet"))
    for unit in (0, 1):
        names = [row["path"] for row in manifest.read_unit(unit).to_pylist()]
        fs.write_bytes(fs.join(todo.folder, f"unit-{unit:08d}.parquet"), unit_file(run, names))
    fs.write_bytes(run.path("masks", "part-00000.parquet"), whole[:-20])
    assert not shards(run).pending()
    assert verify_output(run.uri).is_ordered
    fs.delete(run.path("masks", "part-00000.parquet"))
    fs.write_bytes(fs.join(todo.folder, "unit-00000000.parquet"), whole[:-20])
    names = [row["path"] for row in manifest.read_unit(1).to_pylist()]
    fs.write_bytes(fs.join(todo.folder, "unit-00000001.parquet"), unit_file(run, names))
    assert shards(run).pending() == [0]
    assert do_pending(run) == [0]
    assert verify_output(run.uri).is_ordered


def test_files_that_no_job_made_stay_and_are_not_read(run, source):
    names = ["notes.txt", "x.parquet", "part-00000.parquet.bak", "part-x.parquet"]
    for name in names:
        fs.write_bytes(run.path("masks", name), b"a user's own")
    (source / "7.png").write_bytes(b"new")
    grow(run, source)
    do_pending(run)
    assert verify_output(run.uri).is_ordered
    assert all(fs.read_bytes(run.path("masks", name)) == b"a user's own" for name in names)


def test_parts_come_in_the_order_of_their_numbers(run):
    for part in (99_999, 100_000):
        fs.write_bytes(run.path("masks", part_name(part)), b"")
    assert [uri.rpartition("-")[2] for uri in mask_files(run.uri)][2:] == [
        "99999.parquet",
        "100000.parquet",
    ]


def test_images_that_could_not_be_read_are_found_and_done_again(run, source):
    part = run.path("masks", "part-00000.parquet")
    rows = pq.read_table(part).to_pylist()
    for row, status in zip(rows, ["read_denied", "truncated", "vanished"], strict=False):
        row["status"] = status
    rows[3] |= {"status": "too_many_pixels", "detail": "not enough memory to decode it"}
    told = {"stego.fingerprint": "f0"}
    fs.write_bytes(part, to_parquet(pa.Table.from_pylist(rows, SCHEMA), told))
    again = unread_images(run.uri, list_images(str(source)))
    assert again.tolist() == [rows[n]["image_id"] for n in (0, 2, 3)]
    (source / "2.png").unlink()  # what has vanished for good keeps its row
    grow(run, source, again)
    assert do_pending(run) == [2]
    assert parts(run) == {
        "part-00000.parquet": ["1.png", "2.png"],
        "part-00001.parquet": ["4.png", "5.png", "6.png"],
        "part-00002.parquet": ["0.png", "3.png"],
    }
    assert not len(unread_images(run.uri, list_images(str(source))))  # a retry has nothing to do


def test_new_and_changed_images_are_done_and_the_others_stay_where_they_are(run, source):
    before = fs.read_bytes(run.path("masks", "part-00001.parquet"))
    (source / "1.png").write_bytes(b"changed")
    (source / "0a.png").write_bytes(b"new")
    (source / "5.png").unlink()
    grow(run, source)
    assert not fs.exists(run.path(SUCCESS))
    assert do_pending(run) == [2]
    assert parts(run) == {
        "part-00000.parquet": ["0.png", "2.png", "3.png"],
        "part-00001.parquet": ["4.png", "5.png", "6.png"],
        "part-00002.parquet": ["0a.png", "1.png"],
    }
    assert fs.read_bytes(run.path("masks", "part-00001.parquet")) == before
    gone = pq.read_table(run.path("gone.parquet"))["path"].to_pylist()
    assert gone == ["5.png"]
    found = verify_output(run.uri)
    assert (found.is_ordered, found.rows, found.expected) == (True, 8, 8)
    event = next(e for e in events(run) if e["event"] == "segment/changed")
    assert (event["added"], event["changed"], event["gone"]) == (1, 1, 1)


def events(run):
    return [json.loads(line) for line in fs.read_bytes(run.path("events.jsonl")).splitlines()]


def test_growing_again_and_again_never_uses_the_number_of_a_file_twice(run, source):
    for name in ("4.png", "5.png", "6.png"):
        (source / name).write_bytes(b"all of the second part")
    grow(run, source)
    assert do_pending(run) == [1, 2]
    assert list(parts(run)) == ["part-00000.parquet", "part-00002.parquet"]
    for number in range(20, 27):
        (source / f"{number}.png").write_bytes(b"more")
    grow(run, source)
    do_pending(run)
    assert [len(rows) for rows in parts(run).values()] == [4, 3, 4, 3]
    assert verify_output(run.uri).is_ordered
    assert main([run.uri]) == 0


@pytest.mark.parametrize("writes", range(5))
def test_an_extension_that_dies_after_any_write_is_carried_out_by_the_next_start(
    writes, run, source, monkeypatch
):
    (source / "1.png").write_bytes(b"changed")
    (source / "6.png").write_bytes(b"changed too")
    (source / "7.png").write_bytes(b"new")
    write, left = fs.write_bytes, [writes]

    def dies(uri, data):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        write(uri, data)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(fs, "write_bytes", dies)
        grow(run, source)
    finish_extension(run)
    files = list_images(str(source))
    if read_manifest(run.path("manifest.parquet")).digest != digest_files(files):
        grow(run, source)
    do_pending(run)
    assert verify_output(run.uri).is_ordered
    assert {name for rows in parts(run).values() for name in rows} == {f"{n}.png" for n in range(8)}
    assert not fs.exists(run.path(NEXT))


def test_nothing_has_changed_between_a_manifest_and_its_own_listing(source):
    table = manifest_table(list_images(str(source)))
    assert compare(table, table).counts() == {"added": 0, "changed": 0, "gone": 0}


def test_shards_of_a_plain_manifest_are_cut_by_number(run):
    found = read_shards(run.path("manifest.parquet"), per_shard=3)
    assert [(s.part, list(s.units), s.sizes) for s in found] == [
        (0, [0, 1, 2], (2, 2, 2)),
        (1, [3], (1,)),
    ]


def test_verifying_counts_what_is_lost_and_what_is_there_twice(run, capsys):
    assert main([run.uri]) == 0
    table = pq.read_table(run.path("masks", "part-00000.parquet"))
    buffer = io.BytesIO()
    pq.write_table(table.take(np.array([0, 0, 1, 2])), buffer)
    fs.write_bytes(run.path("masks", "part-00000.parquet"), buffer.getvalue())
    found = verify_output(run.uri)
    assert (found.lost, found.duplicated, found.foreign, found.is_ordered) == (1, 1, 0, False)
    assert main([run.uri]) == 1
    assert "1 lost, 1 duplicated" in capsys.readouterr().out
    assert main([run.uri + "x"]) == 2
