"""Files of tensors, compared with the package safetensors."""

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import xxhash
from safetensors import safe_open

from mythos_dist.checkpoint.pieces import Piece, overlaps
from mythos_dist.checkpoint.tensor_file import TensorFile, file_hash, write_tensors

TENSORS = {
    "parameter/a": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "parameter/a scalar": np.array(7, dtype=np.float32),
    "exp_avg/ünï": np.linspace(0, 1, 5, dtype=np.float32),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.safetensors"
    blocks = (part.data for tensor in TENSORS.values() for part in np.array_split(tensor.reshape(-1), 2))
    size, digest = write_tensors(
        path, {name: t.shape for name, t in TENSORS.items()}, blocks, metadata={"format": "pt"}
    )
    content = path.read_bytes()
    assert size == len(content) and digest == xxhash.xxh3_128_hexdigest(content) == file_hash(path)
    return path


def test_the_package_reads_our_files(file):
    loaded = safetensors.numpy.load_file(file)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert np.array_equal(loaded[name], tensor) and loaded[name].shape == tensor.shape
    with safe_open(file, "np") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_the_package_reads_our_bf16_files(tmp_path):
    tensor = torch.randn(3, 5).bfloat16()
    block = tensor.view(torch.uint8).flatten().numpy().data
    write_tensors(tmp_path / "half", {"x": (3, 5)}, [block], "BF16")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "half")["x"], tensor)


def test_we_read_any_region_of_the_packages_files(tmp_path):
    """Contiguous regions, column ranges of rows, single elements; other elements of the target keep their values."""
    full = np.random.default_rng(0).standard_normal((6, 5, 4)).astype(np.float32)
    safetensors.numpy.save_file({"before": np.ones(3, np.float32), "x": full.reshape(-1)}, tmp_path / "x")
    reader = TensorFile(tmp_path / "x")
    for start, shape in [
        ((0, 0, 0), (6, 5, 4)),
        ((1, 0, 0), (2, 5, 4)),
        ((2, 1, 1), (3, 2, 2)),
        ((5, 4, 3), (1, 1, 1)),
    ]:
        target = Piece(shape, start, 0, int(np.prod(shape)))
        out = np.full(target.last + 2, -1.0, np.float32)
        for source_region, target_region in overlaps(Piece.full(full.shape), target, full.shape):
            reader.read("x", source_region, out[1:-1], target_region)
        expected = full[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
        assert np.array_equal(out[1:-1].reshape(shape), expected) and out[0] == out[-1] == -1


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b'\x08\0\0\0\0\0\0\0{"a": 1'])
def test_other_content_raises_an_error(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        TensorFile(tmp_path / "x")
