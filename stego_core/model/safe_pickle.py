"""Read a pickle of torch.save without running any code of it.

What comes out is plain containers, numbers, strings, descriptions of tensors (`TensorSpec`) and
inert records of the configuration's classes. No object of the pickle's own choice is ever called:
names stand for classes of this file only, every other name is an error.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

import torch

from stego_core.errors import CheckpointError

MAX_PICKLE_BYTES = 64 * 2**20
_MAX_OPERATIONS = 5_000_000

# What pickle writes up to protocol 4 for data. Not in it: operations of protocol 0, of the
# extension registry and of buffers, which no torch.save writes.
_OPERATIONS = frozenset(
    """PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4
    BINFLOAT BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES EMPTY_DICT EMPTY_LIST EMPTY_TUPLE
    EMPTY_SET TUPLE TUPLE1 TUPLE2 TUPLE3 FROZENSET ADDITEMS APPEND APPENDS SETITEM SETITEMS BINPUT
    LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD
    BINPERSID""".split()
)
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_CONFIG_PACKAGES = ("omegaconf", "pytorch_lightning")
# OmegaConf notes the types of its values under these names; they are never used here. Protocol 2
# writes the names of Python 2.
_TYPE_NAMES = frozenset(
    [f"builtins.{name}" for name in "int long float str unicode bool bytes list tuple set".split()]
    + [f"typing.{name}" for name in ("Any", "Dict", "List", "Tuple", "Union", "Optional")]
)


def _no_state(_: object, state: object) -> NoReturn:
    raise pickle.UnpicklingError("state for an object that has none")


@dataclass(frozen=True, slots=True)
class StorageKind:
    """Stands for a storage class of torch."""

    dtype: torch.dtype
    __setstate__ = _no_state


@dataclass(frozen=True, slots=True)
class StorageSpec:
    """A block of numbers in the archive: its record's key, and how many of which type."""

    key: str
    dtype: torch.dtype
    count: int
    __setstate__ = _no_state


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that was not read yet; it lies within its storage."""

    storage: StorageSpec
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    __setstate__ = _no_state


class Record:
    """Stands for an object of the configuration's classes: keeps what it is given, does nothing.

    Attributes:
        origin: the class's name in the file.
        args: what it would have been made of.
        state: its attributes, usually a dict.
        items: what it holds, if it is a container: values, or pairs of key and value.
    """

    __slots__ = ("args", "items", "state")
    origin = ""
    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any) -> Record:
        """Keep the arguments."""
        record = super().__new__(cls)
        record.args, record.state, record.items = args, None, []
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        """Keep a value."""
        self.items.append(value)


class Table(dict[Any, Any]):
    """Stands for dict, OrderedDict and defaultdict; keeps pairs, not attributes or factories."""

    __slots__ = ()

    def __init__(self, *args: Any) -> None:
        super().__init__()
        if not all(isinstance(part, type) for part in args):  # a defaultdict has its factory there
            raise pickle.UnpicklingError("a dict made of arguments")

    def __setstate__(self, state: Any) -> None:
        pass  # torch notes the version of each module here


@dataclass(frozen=True, slots=True)
class _Function:
    """Stands for a function of torch; sealed, so that a pickle can't change it for others."""

    run: Callable[..., Any]
    __setstate__ = _no_state

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)


class _Unpickler(pickle.Unpickler):
    """Knows the names that a checkpoint needs, and no other."""

    def __init__(self, data: bytes, num_bytes: Callable[[str], int]) -> None:
        super().__init__(io.BytesIO(data))
        self._num_bytes = num_bytes
        self._records: dict[str, type[Record]] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        """Return what stands for a name; nothing is imported."""
        module = {"__builtin__": "builtins"}.get(module, module)
        full = f"{module}.{name}"
        if full in ("collections.OrderedDict", "collections.defaultdict", "builtins.dict"):
            return Table
        if full in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            return _Function(_rebuild_tensor)
        if full == "torch._utils._rebuild_parameter":
            return _Function(_rebuild_parameter)
        if module == "torch" and name in _STORAGES:
            return StorageKind(_STORAGES[name])
        if module.partition(".")[0] in _CONFIG_PACKAGES or full in _TYPE_NAMES:
            if full not in self._records:
                self._records[full] = type("Record", (Record,), {"__slots__": (), "origin": full})
            return self._records[full]
        raise CheckpointError(
            f"it holds {full[:100]!a}, which is neither a tensor nor plain data; none of its code "
            "was run, don't load it by other means unless you trust who made it"
        )

    def persistent_load(self, pid: Any, /) -> StorageSpec:
        """Return what describes a storage: ("storage", kind, key, place, count)."""
        if type(pid) is not tuple or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("a reference to something else than a storage")
        kind, key, count = pid[1], pid[2], pid[4]
        if type(kind) is not StorageKind or type(key) is not str or not _is_size(count):
            raise pickle.UnpicklingError("a malformed reference to a storage")
        stated, stored = count * kind.dtype.itemsize, self._num_bytes(key)
        if stated != stored:
            raise CheckpointError(f"storage {key[:40]!a} has {stored} bytes instead of {stated}")
        return StorageSpec(key, kind.dtype, count)


def load_pickle(data: bytes, num_bytes: Callable[[str], int]) -> Any:
    """Read a pickle of `torch.save`.

    Args:
        data: the archive's `data.pkl`.
        num_bytes: size of the storage of a key; raises CheckpointError if there is none.

    Returns:
        Containers (`Table` for dicts with a class), numbers, strings, `TensorSpec` and `Record`.

    Raises:
        CheckpointError: if it is damaged, or names anything beyond those; the message does not
            name the file.
    """
    try:
        _check_operations(data)
        return _Unpickler(data, num_bytes).load()
    except CheckpointError:
        raise
    except Exception as error:  # whatever a malformed pickle makes of pickle's own machinery
        reason = next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
        raise CheckpointError(f"its pickle is damaged or hostile ({reason})") from error


def _check_operations(data: bytes) -> None:
    """Refuse what could exhaust memory, stack or time before `load` meets it.

    pickle allocates a memo as long as the largest index, and hashing a tuple that is a key follows
    all that it holds, by recursion in C. So the stack is followed here, with the kind of each
    object in place of its value.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"its pickle has {len(data)} bytes, more than {MAX_PICKLE_BYTES}")
    stack: list[str] = []
    memo: dict[int, str] = {}
    argument: Any
    for number, (operation, argument, _) in enumerate(pickletools.genops(data)):
        name = operation.name
        if name not in _OPERATIONS or number > _MAX_OPERATIONS:
            raise pickle.UnpicklingError(f"operation {name} at {number} is not allowed")
        if name == "FRAME" and argument > len(data):
            raise pickle.UnpicklingError("a frame beyond the end")
        if name == "MEMOIZE" or name.endswith("BINPUT"):
            index = len(memo) if argument is None else argument
            if index > number:
                raise pickle.UnpicklingError(f"memo index {index} at operation {number}")
            memo[index] = stack[-1]
        elif name.endswith("BINGET"):
            stack.append(memo[argument])
        else:
            _follow(operation, stack)


def _follow(operation: pickletools.OpcodeInfo, stack: list[str]) -> None:
    """Do to the stack of kinds (mark, tuple, other) what the operation does to that of objects."""
    name, before = operation.name, operation.stack_before
    popped: list[str] = []  # the last object first
    count = len(before)
    if pickletools.markobject in before:
        while (kind := stack.pop()) != "mark":
            popped.append(kind)
        count = before.index(pickletools.markobject)
    popped += [stack.pop() for _ in range(count)]
    is_hashed = name in ("SETITEM", "SETITEMS", "ADDITEMS", "FROZENSET")
    if is_hashed and "tuple" in (popped[1::2] if name.startswith("SETITEM") else popped):
        raise pickle.UnpicklingError("a tuple as the key of a dict or in a set")
    kind = "mark" if name == "MARK" else "tuple" if name.startswith("TUPLE") else "other"
    stack.extend(kind for _ in operation.stack_after)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _rebuild_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, *_: Any
) -> TensorSpec:  # whether it needs a gradient, hooks and notes are of no use here
    numbers = [offset, *size, *stride]
    if type(storage) is not StorageSpec or not all(_is_size(number) for number in numbers):
        raise pickle.UnpicklingError("a malformed tensor")
    if len(size) != len(stride) or len(size) > 16:
        raise pickle.UnpicklingError("a tensor whose size and stride disagree")
    count = prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # More elements than numbers would be one number repeated: no weights, but any amount of memory.
    if count and (last >= storage.count or count > storage.count):
        raise CheckpointError(
            f"a tensor of size {tuple(size)} reads outside its storage of {storage.count} numbers"
        )
    return TensorSpec(storage, offset, tuple(size), tuple(stride))


def _rebuild_parameter(data: Any, *_: Any) -> TensorSpec:
    if type(data) is not TensorSpec:
        raise pickle.UnpicklingError("a malformed parameter")
    return data
