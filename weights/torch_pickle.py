"""The pickle of a state dict, interpreted without running anything.

A pickle is a program. Here a short list of its opcodes is known, `GLOBAL` may name what `_GLOBALS`
holds and nothing else, and no name is ever looked up in Python. What comes out is made of numbers,
text, tuples, lists, dictionaries and descriptions of tensors, whose sizes have been checked
against each other but not yet against the file.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

_STORAGES = {
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch FloatStorage": "float32",
    "torch DoubleStorage": "float64",
    "torch ByteStorage": "uint8",
    "torch CharStorage": "int8",
    "torch ShortStorage": "int16",
    "torch IntStorage": "int32",
    "torch LongStorage": "int64",
}
_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_GLOBALS = {_DICT, _TENSOR, _PARAMETER, *_STORAGES}

_MOST_OPCODES = 1 << 20
"""A thousand tensors take some forty thousand."""


class Refused(ValueError):
    """What was found instead of a state dict."""


@dataclass(eq=False)
class _Global:
    name: str


@dataclass(eq=False)
class Storage:
    """Elements that tensors share: its key, its dtype and its length."""

    key: str
    dtype: str
    numel: int

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize


@dataclass(eq=False)
class Tensor:
    """A part of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    """A tensor whose elements all lie in its storage."""
    whole = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
    if not (isinstance(storage, Storage) and whole and len(shape) <= 32):
        raise Refused("a tensor without a storage, a shape and strides")
    if not all(map(_is_size, (offset, *shape, *strides))):
        raise Refused("a tensor with a shape, offset or stride that cannot be")
    tensor = Tensor(storage, offset, shape, strides)
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if tensor.numel and offset + reach >= storage.numel:
        raise Refused(f"a tensor of shape {shape} that goes beyond its {storage.numel} elements")
    if math.prod(size or 1 for size in shape) >= 1 << 48:
        raise Refused(f"a tensor of shape {shape}")
    return tensor


@dataclass
class Pickle:
    """One pickle, read from where the stream stands; afterwards the stream stands behind it."""

    stream: IO[bytes]
    storages: dict[str, Storage] = field(default_factory=dict)
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def value(self) -> Any:
        """What the pickle describes. Raises Refused for whatever a state dict does not need."""
        try:
            for count, (opcode, argument, position) in enumerate(pickletools.genops(self.stream)):
                if count == _MOST_OPCODES:
                    raise Refused(f"a pickle of more than {_MOST_OPCODES} steps")
                if opcode.name == "STOP":
                    return self._pop()
                step = _STEPS.get(opcode.name)
                if step is None:
                    raise Refused(f"the pickle step {opcode.name} at byte {position}")
                step(self, argument)
        except Refused:
            raise
        except (ValueError, IndexError, KeyError, OverflowError, EOFError) as error:
            raise Refused(f"a damaged or truncated pickle ({str(error)[:80]})") from error
        raise Refused("a pickle without an end")

    def _pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Refused("a pickle that takes more than it has")
        return self.stack.pop()

    def _top(self, kind: type) -> Any:
        """The container that is being filled."""
        if not self.stack or type(self.stack[-1]) is not kind:
            raise Refused(f"a pickle that fills something other than a {kind.__name__}")
        return self.stack[-1]

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def put(self, index: int) -> None:
        value = self._pop()
        self.stack.append(value)
        self.memo[index] = value

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def tuple_of_marked(self, _: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def tuple_of(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def append(self, _: Any) -> None:
        item = self._pop()
        self._top(list).append(item)

    def appends(self, _: Any) -> None:
        items = self._since_mark()
        self._top(list).extend(items)

    def set_items(self, _: Any) -> None:
        self._set(self._since_mark())

    def set_item(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def _set(self, items: Sequence[Any]) -> None:
        target = self._top(dict)
        if len(items) % 2 or not all(isinstance(key, str) for key in items[::2]):
            raise Refused("a dictionary whose keys are not text")
        target.update(zip(items[::2], items[1::2], strict=True))

    def global_(self, name: str) -> None:
        if name not in _GLOBALS:
            raise Refused(f"a pickle that asks for {name[:80].replace(' ', '.')}")
        self.stack.append(_Global(name))

    def build(self, _: Any) -> None:
        """A state dict carries the versions of its modules as an attribute; nobody needs it."""
        attributes = self._pop()
        if not isinstance(attributes, dict):
            raise Refused("attributes that are not a dictionary")
        self._top(dict)

    def reduce(self, _: Any) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise Refused("a pickle that calls something else than it may")
        if function.name == _DICT and not arguments:
            self.stack.append({})
        elif function.name == _TENSOR and 6 <= len(arguments) <= 7:
            self.stack.append(_tensor(*arguments[:4]))
        elif function.name == _PARAMETER and arguments and isinstance(arguments[0], Tensor):
            self.stack.append(arguments[0])
        else:
            raise Refused(f"a call of {function.name.replace(' ', '.')} in another form than known")

    def persistent_id(self, _: Any) -> None:
        """Stands for a storage: ("storage", its type, its key, where it was, its length, None)."""
        found = self._pop()
        parts = found if isinstance(found, tuple) else ()
        if len(parts) not in (5, 6) or parts[0] != "storage" or any(parts[5:]):
            raise Refused("a storage in another form than known")
        kind, key, numel = parts[1], parts[2], parts[4]
        if not (isinstance(kind, _Global) and kind.name in _STORAGES and isinstance(key, str)):
            raise Refused("a storage without a type and a key")
        if not _is_size(numel):
            raise Refused(f"a storage {key[:40]!r} without a length")
        storage = Storage(key, _STORAGES[kind.name], numel)
        known = self.storages.setdefault(key, storage)
        if (known.dtype, known.numel) != (storage.dtype, storage.numel):
            raise Refused(f"a storage {key[:40]!r} of two types or lengths")
        self.stack.append(known)


def _value(constant: Any) -> Callable[[Pickle, Any], None]:
    """A step that pushes a constant."""
    return lambda pickle, _: pickle.push(constant)


_STEPS: Mapping[str, Callable[[Pickle, Any], None]] = {
    "PROTO": lambda pickle, version: None,
    "MARK": Pickle.mark,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), Pickle.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), Pickle.get),
    **dict.fromkeys(("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
                    Pickle.push),
    "NONE": _value(None),
    "NEWTRUE": _value(True),
    "NEWFALSE": _value(False),
    "EMPTY_TUPLE": _value(()),
    "EMPTY_LIST": lambda pickle, _: pickle.push([]),
    "EMPTY_DICT": lambda pickle, _: pickle.push({}),
    "TUPLE": Pickle.tuple_of_marked,
    "TUPLE1": lambda pickle, _: pickle.tuple_of(1),
    "TUPLE2": lambda pickle, _: pickle.tuple_of(2),
    "TUPLE3": lambda pickle, _: pickle.tuple_of(3),
    "APPEND": Pickle.append,
    "APPENDS": Pickle.appends,
    "SETITEM": Pickle.set_item,
    "SETITEMS": Pickle.set_items,
    "GLOBAL": Pickle.global_,
    "REDUCE": Pickle.reduce,
    "BUILD": Pickle.build,
    "BINPERSID": Pickle.persistent_id,
}  # fmt: skip
