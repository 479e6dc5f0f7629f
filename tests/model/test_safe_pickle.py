"""Opening pickles from strangers."""

import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import pytest
import torch

from groupvit_fast.model.safe_pickle import MAX_PICKLE_BYTES, Placeholder, UnsafePickleError, load_pickle


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def foreign_class(monkeypatch):
    """A function: a class of a module which exists only while pickling, as omegaconf does at the authors'."""

    def make(module_name, class_name):
        module = types.ModuleType(module_name)
        made = type(class_name, (), {"__module__": module_name})
        setattr(module, class_name, made)
        monkeypatch.setitem(
            sys.modules, module_name.split(".")[0], types.ModuleType(module_name.split(".")[0])
        )
        monkeypatch.setitem(sys.modules, module_name, module)
        return made

    return make


@pytest.fixture
def rewrite(tmp_path):
    """A function: a torch.save file whose members were edited by hand."""

    def build(edit, *, value=None, compression=zipfile.ZIP_STORED):
        plain, changed = tmp_path / "plain.pth", tmp_path / "changed.pth"
        torch.save({"weight": torch.ones(4)} if value is None else value, plain)
        with zipfile.ZipFile(plain) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        members = edit({name.split("/", 1)[1]: data for name, data in members.items()})
        with zipfile.ZipFile(changed, "w", compression) as archive:
            for name, data in members.items():
                archive.writestr(f"plain/{name}", data)
        return changed

    return build


def test_plain_values_come_back(tmp_path):
    value = {
        "model": OrderedDict(a=torch.arange(3), b=torch.ones(2, dtype=torch.bfloat16)),
        "best": (1, 2.5, "text", None, True, [1], {2}),
        "counts": defaultdict(int, {"x": 1}),
        "dtype": torch.float16,
    }
    torch.save(value, tmp_path / "plain.pth")
    loaded, placeholders = load_pickle(tmp_path / "plain.pth")
    assert placeholders == []
    assert torch.equal(loaded["model"]["a"], value["model"]["a"])
    assert loaded["model"]["b"].dtype is torch.bfloat16
    assert {name: loaded[name] for name in ("best", "counts", "dtype")} == {
        "best": value["best"],
        "counts": {"x": 1},
        "dtype": torch.float16,
    }


def test_configuration_object_becomes_an_inert_placeholder(tmp_path, foreign_class, monkeypatch):
    config = foreign_class("omegaconf.dictconfig", "DictConfig")()
    config.__dict__["_content"] = {"model": {"depths": [6, 3, 3]}, "root": Path("/data")}
    torch.save({"model": {"a": torch.ones(2)}, "config": config}, tmp_path / "official.pth")
    monkeypatch.delitem(sys.modules, "omegaconf.dictconfig")
    monkeypatch.delitem(sys.modules, "omegaconf")
    loaded, placeholders = load_pickle(tmp_path / "official.pth")
    assert placeholders == ["omegaconf.dictconfig.DictConfig"]
    assert isinstance(loaded["config"], Placeholder)
    assert not vars(loaded["config"])
    assert "omegaconf" not in sys.modules
    assert torch.equal(loaded["model"]["a"], torch.ones(2))


def test_foreign_function_is_not_called(tmp_path, foreign_class, monkeypatch):
    """A module that no rule knows: its function must not be found, imported or run."""
    called = []
    helper = foreign_class("helpful_training_code", "run")
    helper.__new__ = lambda cls, *arguments: called.append(arguments)
    torch.save({"model": {}, "extra": Call(helper, "rm -rf")}, tmp_path / "file.pth")
    loaded, placeholders = load_pickle(tmp_path / "file.pth")
    assert called == []
    assert placeholders == ["helpful_training_code.run"]
    assert isinstance(loaded["extra"], Placeholder)


# (module, name, arguments as pickle opcodes): each would do harm when called.
_ATTACKS = [
    ("os", "system", b"X\x06\x00\x00\x00touch \x85"),
    ("posix", "system", b"X\x01\x00\x00\x00x\x85"),
    ("nt", "system", b"X\x01\x00\x00\x00x\x85"),
    ("subprocess", "Popen", b"X\x01\x00\x00\x00x\x85"),
    ("builtins", "eval", b"X\x01\x00\x00\x001\x85"),
    ("__builtin__", "eval", b"X\x01\x00\x00\x001\x85"),
    ("builtins", "exec", b"X\x01\x00\x00\x001\x85"),
    ("builtins", "getattr", b"X\x01\x00\x00\x001\x85"),
    ("builtins", "bytearray", b"J\xff\xff\xff\x7f\x85"),
    ("importlib", "import_module", b"X\x01\x00\x00\x00x\x85"),
    ("runpy", "run_path", b"X\x01\x00\x00\x00x\x85"),
    ("pickle", "loads", b"X\x01\x00\x00\x00x\x85"),
    ("shutil", "rmtree", b"X\x01\x00\x00\x00x\x85"),
    ("torch.hub", "load", b"X\x01\x00\x00\x00x\x85"),
    ("torch", "load", b"X\x01\x00\x00\x00x\x85"),
    ("torch.storage", "_load_from_bytes", b"X\x01\x00\x00\x00x\x85"),
    ("collections", "namedtuple", b"X\x01\x00\x00\x00x\x85"),
]


@pytest.mark.parametrize(("module", "name", "arguments"), _ATTACKS)
def test_attack_is_refused_and_named(rewrite, module, name, arguments):
    attack = b"\x80\x02c" + f"{module}\n{name}\n".encode() + arguments + b"R."
    path = rewrite(lambda members: {**members, "data.pkl": attack})
    with pytest.raises(UnsafePickleError, match=rf"asks to run \S*{name}"):
        load_pickle(path)


@pytest.mark.parametrize(
    "outer", ["collections\nOrderedDict", "torch._utils\n_rebuild_tensor_v2", "some\nclass"]
)
def test_attack_inside_the_arguments_of_a_call_is_refused(rewrite, outer):
    inner = b"cos\nsystem\nX\x06\x00\x00\x00touch \x85R"
    nested = b"\x80\x02c" + outer.encode() + b"\n(" + inner + b"tR."
    path = rewrite(lambda members: {**members, "data.pkl": nested})
    with pytest.raises(UnsafePickleError, match=r"asks to run \S*system"):
        load_pickle(path)


def test_attack_leaves_no_trace(tmp_path):
    import os

    torch.save({"model": {}, "config": Call(os.system, f"touch {tmp_path / 'owned'}")}, tmp_path / "evil.pth")
    with pytest.raises(UnsafePickleError, match=r"\.system"):
        load_pickle(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("protocol", [0, 1, 4, 5])
def test_other_pickle_protocols_are_no_way_around(tmp_path, rewrite, protocol):
    attack = pickle.dumps(Call(eval, f"open({str(tmp_path / 'owned')!r}, 'w')"), protocol)
    path = rewrite(lambda members: {**members, "data.pkl": attack})
    with pytest.raises(UnsafePickleError):
        load_pickle(path)
    assert not (tmp_path / "owned").exists()


def test_call_of_a_method_is_refused(rewrite):
    """BUILD and REDUCE on an allowed class must not reach anything else."""
    attack = b"\x80\x02ctorch\nTensor\n}X\x09\x00\x00\x00__class__X\x01\x00\x00\x00xsb."
    with pytest.raises(UnsafePickleError, match="Can only build Tensor"):
        load_pickle(rewrite(lambda members: {**members, "data.pkl": attack}))


def test_compressed_archive_is_refused(rewrite):
    path = rewrite(lambda members: {**members, "data/0": bytes(50_000_000)}, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(UnsafePickleError, match="bomb"):
        load_pickle(path)


def test_archive_claiming_more_bytes_than_it_has_is_refused(rewrite):
    """The directory at the end of the archive says 4 GB for a member of 16 bytes."""
    path = rewrite(lambda members: members)
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"data/0"))
    data[entry + 20 : entry + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    path.write_bytes(data)
    with pytest.raises(UnsafePickleError, match="more bytes than the file has"):
        load_pickle(path)


def test_huge_pickle_is_refused(rewrite):
    path = rewrite(lambda members: {**members, "data.pkl": bytes(MAX_PICKLE_BYTES + 1)})
    with pytest.raises(UnsafePickleError, match="larger than"):
        load_pickle(path)


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(1).expand(10**12), torch.ones(2, 1).expand(2, 10**9), torch.empty(10**6, device="meta")],
)
def test_tensor_larger_than_its_bytes_is_refused(tmp_path, tensor):
    torch.save({"model": {"weight": tensor}}, tmp_path / "big.pth")
    with pytest.raises(UnsafePickleError, match=r"claims the size|asks to run"):
        load_pickle(tmp_path / "big.pth")


def test_storage_shorter_than_claimed_is_refused(rewrite):
    path = rewrite(lambda members: {**members, "data/0": members["data/0"][:4]}, value=torch.ones(1000))
    with pytest.raises(UnsafePickleError, match="record size"):
        load_pickle(path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x05\x06" + bytes(18)])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(UnsafePickleError):
        load_pickle(path)


def test_old_format_is_refused_with_a_reason(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafePickleError, match=r"since version 1\.6"):
        load_pickle(tmp_path / "old.pth")


@pytest.mark.parametrize("keep", [1, 40, 300])
def test_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "cut.pth"
    torch.save({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-keep])
    with pytest.raises(UnsafePickleError):
        load_pickle(path)
