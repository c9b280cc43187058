"""Hostile and damaged checkpoints: one clear error each, and nothing of them ever runs."""

from __future__ import annotations

import builtins
import collections
import os
import pickle
import pickletools
import struct
import sys
import types
import zipfile

import pytest
import torch
from lightning_files import foreign_packages, omega_tree, write_archive

from stego_core.errors import CheckpointError, InputError
from stego_core.model import safe_pickle, torch_archive
from stego_core.model.safe_pickle import Record, TensorSpec
from stego_core.model.torch_archive import open_archive


class Call:
    """Pickles as a call of any function: what an attacker writes."""

    def __init__(self, function, *args):
        self._call = (function, args)

    def __reduce__(self):
        return self._call


class Build:
    """Pickles as an object that is given a state after it was made."""

    def __init__(self, function, args, state):
        self._parts = (function, args, state)

    def __reduce__(self):
        return self._parts


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as caught, open_archive(str(path)):
        pass
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists()


def hostile(kind, marker):
    code = f"open({str(marker)!r}, 'w').close()"
    loads = getattr(pickle, "loads")  # noqa: B009 - as an attacker would name it
    return {
        "posix.system": Call(os.system, f"touch {marker}"),
        "builtins.eval": Call(eval, code),
        "builtins.exec": Call(exec, code),
        "builtins.getattr": Call(getattr, [], "append"),
        "builtins.__import__": Call(builtins.__import__, "antigravity"),
        "pickle.loads": Call(loads, pickle.dumps(Call(os.system, f"touch {marker}"))),
        "torch.serialization.load": Call(torch.load, str(marker)),
        "torch._utils._rebuild_qtensor": Call(torch._utils._rebuild_qtensor),
        "collections.Counter": collections.Counter("ab"),
        "pathlib": marker,
    }[kind]


KINDS = (
    "posix.system builtins.eval builtins.exec builtins.getattr builtins.__import__ pickle.loads "
    "torch.serialization.load torch._utils._rebuild_qtensor collections.Counter pathlib"
).split()


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_is_no_data_is_refused_and_named(kind, protocol, marker, tmp_path):
    content = {"state_dict": {}, "hyper_parameters": hostile(kind, marker)}
    data = pickle.dumps(content, protocol)
    assert kind in refusal(write_archive(tmp_path / "h.ckpt", data))


def test_the_same_files_do_run_when_python_reads_them(tmp_path):
    """Without this the tests above could pass with pickles that never did any harm."""
    marker = tmp_path / "it-ran"
    for kind in ("posix.system", "builtins.eval", "builtins.exec", "pickle.loads"):
        pickle.loads(pickle.dumps(hostile(kind, marker), 2))
        assert marker.exists(), kind
        marker.unlink()


def test_a_stand_ins_constructor_and_reduce_only_keep_their_arguments(marker, tmp_path):
    with foreign_packages() as modules:
        armed = modules["omegaconf.dictconfig"].DictConfig
        # A class that does harm when it is made, called, given a state or an item.
        run = lambda *_: marker.touch()  # noqa: E731
        for name in ("__init__", "__setstate__", "__reduce_ex__"):
            setattr(armed, name, lambda self, *_: run())
        made = modules["omegaconf.nodes"].AnyNode
        content = {"made": Build(made, ("echo",), {"_val": 3}), "kind": armed}
        data = pickle.dumps(content, 2)
        with open_archive(str(write_archive(tmp_path / "h.ckpt", data))) as archive:
            found = archive.content
    assert found["made"].args == ("echo",)
    assert found["made"].state == {"_val": 3}
    assert found["kind"].origin == "omegaconf.dictconfig.DictConfig"
    assert issubclass(found["kind"], Record)


def test_a_call_hidden_in_a_stand_ins_arguments_is_refused(marker, tmp_path):
    with foreign_packages() as modules:
        made = modules["omegaconf.nodes"].AnyNode
        data = pickle.dumps(Call(made, Call(os.system, f"touch {marker}")), 2)
    assert "posix.system" in refusal(write_archive(tmp_path / "h.ckpt", data))


def test_a_name_of_the_configs_packages_is_never_imported(tmp_path, monkeypatch):
    """Even where OmegaConf is installed, nothing of it takes part."""
    folder = tmp_path / "omegaconf"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    data = b"\x80\x02comegaconf.evil\nsystem\nX\x04\x00\x00\x00echo\x85R."
    with open_archive(str(write_archive(tmp_path / "h.ckpt", data))) as archive:
        assert archive.content.args == ("echo",)
    assert "omegaconf" not in sys.modules
    lookalike = data.replace(b"omegaconf.evil", b"omegaconfx")
    assert "omegaconfx.system" in refusal(write_archive(tmp_path / "h2.ckpt", lookalike))


def test_a_tree_of_omegaconf_comes_back_as_records(tmp_path):
    with foreign_packages() as modules:
        data = pickle.dumps(omega_tree({"dim": 90, "deep": None}, modules), 2)
    with open_archive(str(write_archive(tmp_path / "c.ckpt", data))) as archive:
        tree = archive.content
    assert tree.state["_content"]["dim"].state["_val"] == 90
    assert tree.state["_content"]["dim"].state["_parent"] is tree
    assert tree.state["_metadata"].state["resolver_cache"] == {}


@pytest.mark.parametrize(
    "target", ["torch._utils\n_rebuild_tensor_v2", "torch\nFloatStorage", "__builtin__\ndict"]
)
@pytest.mark.parametrize("state", [{"run": 1}, (None, {"run": 1})])
def test_what_stands_for_torch_cant_be_changed_by_a_state(target, state, tmp_path):
    body = pickle.dumps(state, 2)[2:-1]
    data = b"\x80\x02c" + target.encode() + b"\n" + body + b"b."
    refusal(write_archive(tmp_path / "h.ckpt", data))
    good = {"w": torch.arange(6.0).reshape(2, 3)}
    torch.save(good, tmp_path / "g.ckpt")
    with open_archive(str(tmp_path / "g.ckpt")) as archive:
        assert torch.equal(archive.read(archive.content["w"]), good["w"])


@pytest.mark.parametrize("dtype", list(safe_pickle._STORAGES.values()), ids=str)
def test_tensors_of_every_type_and_stride_are_those_that_were_saved(dtype, tmp_path):
    base = (torch.arange(24) % 2 if dtype == torch.bool else torch.arange(24)).to(dtype)
    saved = {
        "plain": base.reshape(2, 3, 4),
        "turned": base.reshape(4, 6).T,
        "part": base[5:17:3],
        "scalar": base[7],
        "empty": base[:0].reshape(0, 3),
        "parameter": torch.nn.Parameter(base.reshape(6, 4), requires_grad=False),
    }
    torch.save(saved, tmp_path / "t.ckpt")
    with open_archive(str(tmp_path / "t.ckpt")) as archive:
        for name, expected in saved.items():
            found = archive.read(archive.content[name])
            assert found.dtype == dtype
            assert found.is_contiguous()
            assert torch.equal(found, expected.detach()), name


def tensor_pickle(offset, size, stride, *, count=4, key="0"):
    """A pickle of one float tensor with any geometry."""
    kind = types.SimpleNamespace  # replaced below: torch's storages pickle by persistent id only

    class Pickler(pickle._Pickler):
        def persistent_id(self, value):
            if value is kind:
                return ("storage", torch.FloatStorage, key, "cpu", count)
            return None

    import io

    buffer = io.BytesIO()
    hooks = collections.OrderedDict()
    call = Call(torch._utils._rebuild_tensor_v2, kind, offset, size, stride, False, hooks)
    Pickler(buffer, 2).dump({"w": call})
    return buffer.getvalue()


FOUR = {"0": struct.pack("<4f", 1, 2, 3, 4)}


def test_the_pickles_of_tensors_made_here_are_well_formed(tmp_path):
    path = write_archive(tmp_path / "t.ckpt", tensor_pickle(1, (3,), (1,)), FOUR)
    with open_archive(str(path)) as archive:
        assert archive.read(archive.content["w"]).tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (4, (1,), (1,)),
        (0, (2, 2), (3, 1)),
        (0, (2,), (2**61,)),
        (0, (10**9, 10**9), (0, 0)),
        (-1, (1,), (1,)),
        (3, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, (2.0,), (1,)),
        (0, (1,) * 40, (1,) * 40),
        (True, (1,), (1,)),
    ],
)
def test_a_tensor_that_reads_outside_its_storage_is_refused(offset, size, stride, tmp_path):
    path = write_archive(tmp_path / "t.ckpt", tensor_pickle(offset, size, stride), FOUR)
    assert "tensor" in refusal(path)


@pytest.mark.parametrize(("count", "key"), [(3, "0"), (2**40, "0"), (4, "1"), (4, "../data.pkl")])
def test_a_storage_of_another_size_or_name_is_refused(count, key, tmp_path):
    data = tensor_pickle(0, (1,), (1,), count=count, key=key)
    assert "storage" in refusal(write_archive(tmp_path / "t.ckpt", data, FOUR))


# Sixty tuples, each of which holds the one before twice: hashing the last would take for ever.
NEST = b"K\x01" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(60))


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "damaged"),
        (b"\x80\x02}", "damaged"),
        (b"\x80\x02R.", "damaged"),
        (b"\x80\x02K\x01K\x02R.", "damaged"),
        (b"cos\nsystem\n(S'true'\ntR.", "STRING"),
        (b"(S'true'\nios\nsystem\n.", "STRING"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", "damaged"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "memo index"),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.", "frame"),
        (b"\x80\x02}N" + b"\x85" * 200_000 + b"Ns.", "a tuple as the key"),
        (b"\x80\x02}(K\x01K\x01" + NEST + b"Nu.", "a tuple as the key"),
        (b"\x80\x04\x8f(" + NEST + b"\x90.", "in a set"),
        (b"\x80\x04(" + NEST + b"\x91.", "in a set"),
        (b"\x80\x02ccollections\nOrderedDict\n]]" + NEST + b"aNaa\x85R.", "made of arguments"),
        (b"\x80\x02Pabc\n.", "PERSID"),
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "reference"),
    ],
)
def test_pickles_that_would_exhaust_or_break_the_reader_are_refused(data, word, tmp_path):
    assert word in refusal(write_archive(tmp_path / "p.ckpt", data))


def test_lists_in_lists_are_no_danger(tmp_path):
    data = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    with open_archive(str(write_archive(tmp_path / "p.ckpt", data))) as archive:
        assert len(archive.content) == 1


def test_a_pickle_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_pickle, "MAX_PICKLE_BYTES", 100)
    data = pickle.dumps("x" * 200, 2)
    assert "more than 100" in refusal(write_archive(tmp_path / "p.ckpt", data))


def test_a_truncated_archive_is_refused_wherever_it_ends(tmp_path):
    torch.save({"w": torch.arange(600.0)}, tmp_path / "whole.ckpt")
    whole = (tmp_path / "whole.ckpt").read_bytes()
    cut = tmp_path / "cut.ckpt"
    for length in [0, 3, 4, 30, *range(100, len(whole) - 1, 211), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        refusal(cut)


def test_damaged_numbers_are_noticed_when_they_are_read(tmp_path):
    torch.save({"w": torch.full((600,), 7.0)}, tmp_path / "t.ckpt")
    data = bytearray((tmp_path / "t.ckpt").read_bytes())
    data[data.index(struct.pack("<2f", 7, 7)) + 5] ^= 1
    (tmp_path / "t.ckpt").write_bytes(data)
    with (
        pytest.raises(CheckpointError, match="damaged"),
        open_archive(str(tmp_path / "t.ckpt")) as archive,
    ):
        archive.read(archive.content["w"])


@pytest.mark.parametrize(
    "name", ["/etc/x", "model/../../x", "../x", "model\\..\\x", "other/x", "model//x", "model/./x"]
)
def test_entries_whose_names_leave_the_archives_folder_are_refused(name, tmp_path):
    path = write_archive(tmp_path / "n.ckpt", pickle.dumps({}, 2))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "x")
    assert "not named as torch.save" in refusal(path)


def test_an_entry_that_is_there_twice_is_refused(tmp_path):
    path = write_archive(tmp_path / "n.ckpt", pickle.dumps({}, 2))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("model/data.pkl", pickle.dumps([], 2))
    assert "twice" in refusal(path)


@pytest.mark.parametrize(("length", "word"), [(1_000_000, "claim more"), (1, "not stored")])
def test_a_compressed_entry_is_refused_as_it_may_be_a_bomb(length, word, tmp_path):
    with zipfile.ZipFile(tmp_path / "z.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", pickle.dumps("x" * length, 2))
    assert word in refusal(tmp_path / "z.ckpt")


def rewrite_directory(path, change):
    """Change the central directory's first entry: `change(fields)` of struct <4s6H3I5H2I."""
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\x01\x02")
    layout = struct.Struct("<4s6H3I5H2I")
    fields = list(layout.unpack_from(data, start))
    change(fields)
    layout.pack_into(data, start, *fields)
    path.write_bytes(data)


@pytest.mark.parametrize("sizes", [(2**31, 2**31), (40, 2**31), (10**6, 40), (0, 0), (5, 5)])
def test_a_directory_that_lies_about_sizes_is_refused(sizes, tmp_path):
    path = write_archive(tmp_path / "s.ckpt", pickle.dumps({"state_dict": {}}, 2))

    def lie(fields):
        fields[8], fields[9] = sizes

    rewrite_directory(path, lie)
    refusal(path)


def test_a_directory_that_points_outside_the_file_is_refused(tmp_path):
    path = write_archive(tmp_path / "s.ckpt", pickle.dumps({"state_dict": {}}, 2))

    def lie(fields):
        fields[16] = 2**31

    rewrite_directory(path, lie)
    refusal(path)


def test_archives_of_too_many_or_too_large_entries_are_refused(tmp_path, monkeypatch):
    path = write_archive(tmp_path / "m.ckpt", pickle.dumps({}, 2), {"0": b"", "1": b""})
    monkeypatch.setattr(torch_archive, "MAX_ENTRIES", 3)
    assert "more than 3" in refusal(path)
    monkeypatch.setattr(torch_archive, "_MAX_DIRECTORY_BYTES", 100)
    assert "directory of" in refusal(path)
    monkeypatch.setattr(torch_archive, "MAX_FILE_BYTES", 100)
    assert "more than 100" in refusal(path)


def test_numbers_of_a_big_endian_machine_are_refused(tmp_path):
    path = write_archive(tmp_path / "b.ckpt", pickle.dumps({}, 2))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/byteorder", "big")
    assert "little-endian" in refusal(path)


def test_a_file_of_old_torch_is_refused_with_the_way_to_convert_it(tmp_path):
    torch.save({"a": 1}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert "torch.save(torch.load(OLD" in refusal(tmp_path / "old.ckpt")


def test_a_file_that_is_not_there_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="can't be read"), open_archive(str(tmp_path / "no.ckpt")):
        pass


def test_every_operation_that_torch_writes_is_known(tmp_path):
    torch.save({"a": [torch.zeros(2), {1, 2}, 2**80, -1, 3.5, (), (1, 2, 3, 4)]}, tmp_path / "t")
    with zipfile.ZipFile(tmp_path / "t") as archive:
        operations = {op.name for op, _, _ in pickletools.genops(archive.read("t/data.pkl"))}
    assert operations <= safe_pickle._OPERATIONS


def test_a_spec_keeps_no_memory_and_no_numbers(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "t.ckpt")
    with open_archive(str(tmp_path / "t.ckpt")) as archive:
        assert type(archive.content["w"]) is TensorSpec
