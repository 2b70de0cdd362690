"""What stands in a PNG, and how it is read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sampler.errors import SampleError
from sampler.picture import (
    Picture,
    Setup,
    Used,
    from_record,
    parameters,
    read_record,
    record,
    write,
)

LORAS = (Used("ink@1", "ab" * 32, 0.7), Used("loras/x, y.safetensors", "cd" * 32, 1.0))
PICTURE = Picture("ein Löwe\n<script>", "blurry", 5, LORAS, 20, "dpm++2m-karras", 4.5, 64, 96)
SETUP = Setup("base/sd15", "ef" * 32, "sd15", False, "fp32", "CPU", {"mindspore": "2"})
PIXELS = np.arange(96 * 64 * 3, dtype=np.uint8).reshape(96, 64, 3)


def test_a_picture_says_everything_about_itself(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.png"
    write(path, PIXELS, PICTURE, SETUP)
    values = read_record(path)
    assert values == record(PICTURE, SETUP) | {"loras": values["loras"]}
    assert from_record(values, path) == (PICTURE, SETUP)
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), PIXELS)
    first = path.read_bytes()
    write(path, PIXELS, PICTURE, SETUP)
    assert path.read_bytes() == first


def test_parameters_are_in_the_form_of_a1111() -> None:
    assert parameters(PICTURE, SETUP).splitlines() == [
        "ein Löwe",
        "<script> <lora:ink@1:0.7> <lora:x, y.safetensors:1>",
        "Negative prompt: blurry",
        "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 4.5, Seed: 5, Size: 64x96, "
        "Model hash: efefefefef, Model: sd15, "
        'Lora hashes: "ink@1: ababababab, x, y.safetensors: cdcdcdcdcd"',
    ]


def test_what_is_no_picture_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(SampleError, match="there is no picture"):
        read_record(path)
    path.write_text("not a picture")
    with pytest.raises(SampleError, match="expected a PNG"):
        read_record(path)
    Image.fromarray(PIXELS).save(path)
    assert read_record(path) is None
    write(path, PIXELS, PICTURE, SETUP)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(SampleError, match="does not decode"):
        read_record(path)
    with pytest.raises(SampleError, match="not what this version of lora-sample writes"):
        from_record({"prompt": "a fox"}, path)
