"""Open a `torch.save` file from the internet without running anything in it.

A pickle is a program: it may name any function and call it. Here only tensors and plain containers are
built. Classes of training code (a pickled configuration) become inert placeholders; a name that no
checkpoint needs, such as os.system or builtins.eval, makes the file be refused before anything is built.
"""

from __future__ import annotations

import _compat_pickle
import pickletools
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

MAX_PICKLE_BYTES = 64 << 20
"""The pickle of a checkpoint holds names and shapes; the numbers lie beside it in the archive."""

# What torch's restricted unpickler builds for real. It knows more, which no checkpoint of ours needs.
_BUILT = re.compile(
    r"collections\.(OrderedDict|Counter)|builtins\.set|_codecs\.encode|torch\.(Size|Tensor|device)"
    r"|torch\.(float\d+|bfloat16|u?int\d+|bool)|torch\.(\w+Storage|storage\.(Untyped|Typed)Storage)"
    r"|torch\.nn\.parameter\.Parameter|torch\._utils\._rebuild_(tensor_v2|parameter)"
)
# Standard-library names that only describe data; as placeholders they do nothing at all.
_HARMLESS = re.compile(
    r"builtins\.(bool|bytes|dict|float|frozenset|int|list|object|range|slice|str|tuple|complex)"
    r"|(typing|enum|datetime|pathlib|decimal|fractions|uuid)\.\w+|argparse\.Namespace|types\.SimpleNamespace"
    r"|collections\.(defaultdict|deque)"
)


class UnsafePickleError(ValueError):
    """The file is no plain checkpoint; the message says why, and nothing of it was built."""


class Placeholder:
    """Stands for an object whose class is not imported; takes what the pickle says and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load_pickle(path: Path) -> tuple[Any, list[str]]:
    """Read a `torch.save` file into tensors on the CPU and plain containers.

    Returns the object and the foreign classes that became placeholders. UnsafePickleError for a file that
    would run code, is no such archive, or claims sizes that it does not hold.
    """
    check_archive(path)
    replaced = sorted(check_names(path))
    inert = [(_stand_in(name), name) for name in replaced]
    try:
        with torch.serialization.safe_globals(inert):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes made by hand can fail in every way there is
        # torch puts advice to switch its protection off before the reason.
        reason = str(error).partition("WeightsUnpickler error: ")[2] or str(error) or repr(error)
        raise UnsafePickleError(f"not a plain checkpoint: {reason.strip().splitlines()[0]}") from None
    check_sizes(value)
    return value, [name for name in replaced if name.split(".")[0] not in sys.stdlib_module_names]


def check_archive(path: Path) -> None:
    """Refuse what is no zip archive of stored members: compression could hide gigabytes in a small file."""
    if not zipfile.is_zipfile(path):
        raise UnsafePickleError("not a zip archive as torch.save writes since version 1.6")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UnsafePickleError("the archive is compressed, which torch.save never does; it may be a bomb")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise UnsafePickleError("the archive claims more bytes than the file has")
    if any(member.filename.endswith(".pkl") and member.file_size > MAX_PICKLE_BYTES for member in members):
        raise UnsafePickleError(f"its pickle is larger than {MAX_PICKLE_BYTES >> 20} MiB")


def check_names(path: Path) -> set[str]:
    """Names in the pickle that must become placeholders; UnsafePickleError if it names what could do harm."""
    replaced, refused = set(), set()
    for name in _names_in(path):
        root = name.split(".")[0]
        if _BUILT.fullmatch(name):
            continue
        harmful = root == "torch" or root in sys.stdlib_module_names
        (refused if harmful and not _HARMLESS.fullmatch(name) else replaced).add(name)
    if refused:
        raise UnsafePickleError(f"it asks to run {', '.join(sorted(refused))}, which no checkpoint needs")
    return replaced


def check_sizes(value: Any) -> None:
    """Refuse tensors that are larger than the bytes behind them (a stride of zero makes that possible)."""
    pending, seen = [value], set()
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            if (
                item.device.type != "cpu"
                or item.numel() * item.element_size() > item.untyped_storage().nbytes()
            ):
                raise UnsafePickleError(
                    f"a tensor claims the size {list(item.shape)}, which the file does not hold"
                )
        elif isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, (list, tuple, set)):
            pending += item


def _names_in(path: Path) -> set[str]:
    """Every function or class that the pickle names, in today's spelling of the module."""
    names = set()
    with zipfile.ZipFile(path) as archive:
        pickles = [member for member in archive.namelist() if member.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UnsafePickleError("the archive holds no data.pkl, so torch.save did not write it")
        data = archive.read(pickles[0])
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL":
                module, name = argument.split(" ", 1)
                module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
                names.add(f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}")
            elif opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
                raise UnsafePickleError(f"its pickle uses {opcode.name}, which torch.save never writes")
    except (ValueError, EOFError) as error:
        if isinstance(error, UnsafePickleError):
            raise
        raise UnsafePickleError(f"its pickle is damaged: {error}") from None
    return names


def _stand_in(name: str) -> Any:
    """What torch's unpickler finds under `name`: an inert class of its own; a dict for a defaultdict."""
    if name == "collections.defaultdict":
        return _plain_dict
    return type(name.rpartition(".")[2], (Placeholder,), {})


def _plain_dict(*args: Any) -> dict:
    return {}
