"""Files of `torch.save` made by hand, opcode by opcode: what is read, and all that is refused.

That the reader agrees with `torch.load` is tested among the parity tests.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion.randomness import generator
from weights import torch_file
from weights.files import WeightsError

# ---- an assembler for pickles: every function returns the opcodes of a value

NONE, TRUE, FALSE, NEW_DICT = b"N", b"\x88", b"\x89", b"}"
CALL, STOP = b"R", b"."


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def items(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def numbers(*values: int) -> bytes:
    return items(*map(number, values))


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def dictionary(values: Mapping[str, bytes]) -> bytes:
    pairs = b"".join(text(name) + value for name, value in values.items())
    return NEW_DICT + b"(" + pairs + b"u"


def storage(key: str, count: int, kind: str = "FloatStorage", view: bytes = NONE) -> bytes:
    parts = (text("storage"), named("torch", kind), text(key), text("cpu"), number(count), view)
    return items(*parts) + b"Q"


HOOKS = named("collections", "OrderedDict") + b")" + CALL


def tensor(stored: bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    arguments = (stored, number(offset), numbers(*shape), numbers(*strides), FALSE, HOOKS)
    return named("torch._utils", "_rebuild_tensor_v2") + items(*arguments) + CALL


def program(value: bytes) -> bytes:
    return b"\x80\x02" + value + STOP


VALUES = np.arange(6, dtype=np.float32)
STORAGES = {"one": VALUES}
STATE = {
    "whole": tensor(storage("one", 6), 0, (2, 3), (3, 1)),
    "turned": tensor(storage("one", 6), 0, (3, 2), (1, 3)),
    "part": tensor(storage("one", 6), 4, (2,), (1,)),
    "scalar": tensor(storage("one", 6), 5, (), ()),
    "empty": tensor(storage("one", 6), 0, (0, 3), (3, 1)),
}
EXPECTED = {
    "whole": VALUES.reshape(2, 3),
    "turned": VALUES.reshape(2, 3).T,
    "part": VALUES[4:],
    "scalar": VALUES[5],
    "empty": np.zeros((0, 3), np.float32),
}


def legacy(
    value: bytes,
    storages: Mapping[str, np.ndarray] = STORAGES,
    little: bytes = TRUE,
    protocol: int = torch_file.PROTOCOL,
    magic: int = torch_file.MAGIC,
) -> bytes:
    machine = dictionary({"protocol_version": number(protocol), "little_endian": little})
    keys = b"](" + b"".join(map(text, storages)) + b"e"
    head = b"".join(map(program, (number(magic), number(protocol), machine, value, keys)))
    return head + b"".join(struct.pack("<q", a.size) + a.tobytes() for a in storages.values())


def archive(
    value: bytes, storages: Mapping[str, np.ndarray] = STORAGES, compression: int = 0, **more: bytes
) -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w", compression) as zipped:
        zipped.writestr("state/data.pkl", program(value))
        for name, content in more.items():
            zipped.writestr(f"state/{name}", content)
        for key, array in storages.items():
            zipped.writestr(f"state/data/{key}", array.tobytes())
    return file.getvalue()


LAYOUTS = pytest.mark.parametrize("layout", [legacy, archive], ids=["legacy", "zip"])


def load(folder: Path, content: bytes) -> dict[str, np.ndarray]:
    path = folder / "weights.pth"
    path.write_bytes(content)
    return torch_file.load(path)


def refused(folder: Path, content: bytes) -> str:
    """What is said, after "found"; nothing but WeightsError is raised."""
    with pytest.raises(WeightsError) as caught:
        load(folder, content)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'weights.pth'}: expected a state dict of torch.save")
    assert "\n" not in message
    return message.partition(", found ")[2]


# ---- what is read


@LAYOUTS
def test_tensors_are_cut_from_their_storages(layout: Any, tmp_path: Path) -> None:
    found = load(tmp_path, layout(dictionary(STATE)))
    assert list(found) == list(EXPECTED)
    for name, array in EXPECTED.items():
        assert found[name].dtype == np.float32
        assert np.array_equal(found[name], array), name
        assert found[name].flags.c_contiguous
        assert found[name].flags.writeable


@LAYOUTS
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("HalfStorage", "f2"), ("DoubleStorage", "f8"), ("LongStorage", "i8"), ("ByteStorage", "u1")],
)
def test_dtypes_are_kept(layout: Any, kind: str, dtype: str, tmp_path: Path) -> None:
    values = np.array([0, 1, 250], dtype)
    state = {"x": tensor(storage("0", 3, kind), 0, (3,), (1,))}
    found = load(tmp_path, layout(dictionary(state), {"0": values}))
    assert found["x"].dtype == np.dtype(dtype)
    assert np.array_equal(found["x"], values)


@LAYOUTS
def test_bfloat16_is_widened(layout: Any, tmp_path: Path) -> None:
    bits = np.array([0x3F80, 0xC040], np.uint16)
    state = {"x": tensor(storage("0", 2, "BFloat16Storage"), 0, (2,), (1,))}
    found = load(tmp_path, layout(dictionary(state), {"0": bits}))
    assert found["x"].dtype == np.float32
    assert found["x"].tolist() == [1.0, -3.0]


def test_a_parameter_and_the_attributes_of_a_state_dict_are_read(tmp_path: Path) -> None:
    inner = tensor(storage("one", 6), 0, (6,), (1,))
    parameter = named("torch._utils", "_rebuild_parameter") + items(inner, TRUE, HOOKS) + CALL
    versions = dictionary({"_metadata": dictionary({"": dictionary({"version": number(1)})})})
    state = HOOKS + b"(" + text("weight") + parameter + b"u" + versions + b"b"
    assert np.array_equal(load(tmp_path, legacy(state))["weight"], VALUES)


# ---- what is refused


class Harmful:
    """What a pickle that does harm looks like."""

    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


HARM = "echo harm > harmed"
HARMFUL = {
    "os.system": pickle.dumps(Harmful(os.system, HARM), 2),
    "eval": pickle.dumps({"w": Harmful(eval, f"__import__('os').system({HARM!r})")}, 2),
    "protocol 0": pickle.dumps(Harmful(os.system, HARM), 0),
    "protocol 4": pickle.dumps(Harmful(os.system, HARM), 4),
    "INST": b"(S'" + HARM.encode() + b"'\nios\nsystem\n.",
    "OBJ": b"(" + named("os", "system") + text(HARM) + b"o.",
    "NEWOBJ": program(named("os", "system") + items(text(HARM)) + b"\x81"),
    "STACK_GLOBAL": program(text("os") + text("system") + b"\x93" + items(text(HARM)) + CALL),
    "a module of torch": program(named("torch", "load") + items(text("other.pth")) + CALL),
    "an attribute": program(named("collections", "OrderedDict.fromkeys") + b")" + CALL),
    "an extension": program(b"\x82\x01"),
    "a text id": b"Pstorage\n.",
}


@pytest.mark.parametrize("name", HARMFUL)
@pytest.mark.parametrize("where", ["alone", "legacy", "zip"])
def test_nothing_is_run(
    name: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    harmful = HARMFUL[name]
    start = 2 if harmful.startswith(b"\x80") else 0
    content = {"alone": lambda: harmful, "legacy": lambda: legacy(harmful[start:-1]),
               "zip": lambda: archive(harmful[start:-1])}[where]()  # fmt: skip
    said = refused(tmp_path, content)
    assert "asks for" in said or "step" in said or "damaged" in said
    assert not (tmp_path / "harmed").exists()


def test_what_a_refused_pickle_asked_for_is_said(tmp_path: Path) -> None:
    assert "asks for posix.system" in refused(tmp_path, HARMFUL["os.system"])


ORDERED = named("collections", "OrderedDict")
REBUILD = named("torch._utils", "_rebuild_tensor_v2")
STRANGE = {
    "called with something": ORDERED + items(number(1)) + CALL,
    "called with too little": REBUILD + items(storage("one", 6)) + CALL,
    "called without a tuple": ORDERED + b"]" + CALL,
    "a dictionary called": NEW_DICT + b")" + CALL,
    "a storage type called": named("torch", "FloatStorage") + b")" + CALL,
    "no storage": REBUILD + items(NONE, number(0), numbers(1), numbers(1), FALSE, HOOKS) + CALL,
    "a storage of nothing": items(text("storage")) + b"Q",
    "a storage that is a module": items(text("module"), *[NONE] * 5) + b"Q",
    "a storage with a view": storage("one", 6, view=numbers(0)),
    "a storage of a strange type": storage("one", 6, "QInt8Storage"),
    "a storage below zero": storage("one", -1),
    "a list": b"]",
    "a number": number(1),
    "a storage": storage("one", 6),
    "keys that are numbers": NEW_DICT + b"(" + number(1) + number(1) + b"u",
    "half a pair": NEW_DICT + b"(" + text("a") + b"u",
    "numbers in a state dict": dictionary({"epoch": number(3)}),
    "a state dict in another": dictionary({"state_dict": dictionary(STATE)}),
    "nothing": b"",
    "more marks than values": b"t",
    "an unknown memory": b"h\x07",
    "below a mark": number(1) + b"(" + b"0",
    "a tuple over a mark": number(1) + b"(" + b"\x85",
}


@LAYOUTS
@pytest.mark.parametrize("name", STRANGE)
def test_what_no_state_dict_has_is_refused(layout: Any, name: str, tmp_path: Path) -> None:
    assert refused(tmp_path, layout(STRANGE[name]))


HUGE = (1 << 62) - 1
BEYOND = {
    "longer than the storage": ((7,), (1,), 0),
    "offset beyond it": ((3,), (1,), 4),
    "stride beyond it": ((2, 2), (5, 1), 0),
    "offset below zero": ((1,), (1,), -1),
    "shape below zero": ((-1,), (1,), 0),
    "stride below zero": ((2,), (-1,), 1),
    "huge": ((HUGE, HUGE), (1, 1), 0),
    "huge without strides": ((1 << 40, 1 << 40), (0, 0), 0),
    "empty and huge": ((0, 1 << 40, 1 << 40), (1, 1, 1), 0),
    "repeated": ((1 << 30,), (0,), 0),
    "many axes": ((1,) * 40, (1,) * 40, 0),
    "shape and strides of two lengths": ((2, 3), (1,), 0),
}


@LAYOUTS
@pytest.mark.parametrize("name", BEYOND)
def test_tensors_that_cannot_be_are_refused(layout: Any, name: str, tmp_path: Path) -> None:
    shape, strides, offset = BEYOND[name]
    state = {"x": tensor(storage("one", 6), offset, shape, strides)}
    assert refused(tmp_path, layout(dictionary(state)))


@LAYOUTS
def test_many_names_for_the_same_elements_are_refused(layout: Any, tmp_path: Path) -> None:
    """A file of some kilobytes must not become gigabytes."""
    values = np.zeros(10_000, np.float32)
    one = tensor(storage("0", values.size), 0, values.shape, (1,))
    state = dictionary({f"{i}": one for i in range(1000)})
    assert "bytes of tensors in a file of" in refused(tmp_path, layout(state, {"0": values}))


@LAYOUTS
def test_a_storage_is_as_long_as_its_tensors_say(layout: Any, tmp_path: Path) -> None:
    for length in (5, 7, 1 << 47, HUGE):
        state = {"x": tensor(storage("one", length), 0, (1,), (1,))}
        assert "storage" in refused(tmp_path, layout(dictionary(state)))


@LAYOUTS
def test_one_storage_has_one_type_and_length(layout: Any, tmp_path: Path) -> None:
    for other in (storage("one", 5), storage("one", 6, "IntStorage")):
        state = STATE | {"x": tensor(other, 0, (1,), (1,))}
        assert "of two types or lengths" in refused(tmp_path, layout(dictionary(state)))


@LAYOUTS
def test_a_storage_that_is_not_there_is_missed(layout: Any, tmp_path: Path) -> None:
    assert "no data of" in refused(tmp_path, layout(dictionary(STATE), {}))


def test_a_legacy_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    value = dictionary(STATE)
    assert "magic" in refused(tmp_path, legacy(value, magic=1))
    assert "version" in refused(tmp_path, legacy(value, protocol=1002))
    assert "big-endian" in refused(tmp_path, legacy(value, little=FALSE))
    assert "strange" in refused(tmp_path, legacy(value, {"one": VALUES, "two": VALUES}))


def test_an_archive_of_another_kind_is_refused(tmp_path: Path) -> None:
    value = dictionary(STATE)
    assert "big-endian" in refused(tmp_path, archive(value, byteorder=b"big"))
    assert "compressed" in refused(tmp_path, archive(value, compression=zipfile.ZIP_DEFLATED))
    other = BytesIO()
    with zipfile.ZipFile(other, "w") as zipped:
        zipped.writestr("other.txt", "")
    assert "0 files data.pkl" in refused(tmp_path, other.getvalue())


def test_deep_nesting_and_endless_pickles_are_refused(tmp_path: Path) -> None:
    deep = b"]" * 100_000 + b"a" * 99_999
    assert "a list" in refused(tmp_path, legacy(deep))
    itself = b"]q\x00h\x00a"  # a list that contains itself
    assert "a list" in refused(tmp_path, legacy(dictionary({"x": itself})))
    assert "steps" in refused(tmp_path, legacy(b"N" * (1 << 21)))
    laughs = b"]q\x00"  # each list holds the one before it ten times
    for i in range(60):
        laughs += b"](" + 10 * (b"h" + bytes([i])) + b"eq" + bytes([i + 1])
    assert "a list" in refused(tmp_path, legacy(laughs))


@LAYOUTS
def test_every_truncation_is_refused(layout: Any, tmp_path: Path) -> None:
    content = layout(dictionary(STATE))
    for length in range(1, len(content)):
        assert refused(tmp_path, content[:length])


@LAYOUTS
def test_damage_ends_in_one_sentence_or_in_other_numbers(layout: Any, tmp_path: Path) -> None:
    content = layout(dictionary(STATE))
    random = generator(0, "damage")
    for _ in range(500):
        damaged = bytearray(content)
        for place in random.integers(len(content), size=random.integers(1, 4)):
            damaged[place] = random.integers(256)
        try:
            load(tmp_path, bytes(damaged))
        except WeightsError as error:
            assert "\n" not in str(error)


def test_a_file_that_is_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no such weight file"):
        torch_file.load(tmp_path / "missing.pth")
    with pytest.raises(WeightsError, match="there is no such weight file"):
        torch_file.load(tmp_path)
    (tmp_path / "empty.pth").touch()
    with pytest.raises(WeightsError, match="cannot be read"):
        torch_file.load(tmp_path / "empty.pth")
