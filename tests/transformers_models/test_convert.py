"""Old weight files made into safetensors: nothing is lost, and nothing removed before its copy has been read back."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hici_kernels.checkpoints import convert


def test_convert_loses_nothing(tmp_path):
    x = torch.randn(4, 6)
    for name in ("model.bin", "pytorch_model.bin"):
        torch.save({"x": x}, tmp_path / name)
    with pytest.raises(ValueError, match="would both become"):
        convert(tmp_path, remove=True)
    wrapped = tmp_path / "more" / "last.bin"
    wrapped.parent.mkdir()
    torch.save({"state_dict": {"x": x}, "epoch": torch.tensor(3)}, wrapped)
    with pytest.raises(ValueError, match="'epoch' beside its tensors"):
        convert(wrapped, remove=True)
    assert wrapped.exists() and len(list(tmp_path.glob("*.bin"))) == 2
    odd = tmp_path / "odd" / "a.binary.bin"
    odd.parent.mkdir()
    torch.save({"x": x}, odd)
    assert [w.name for w in convert(odd)] == ["a.binary.safetensors"]
    tied = tmp_path / "tied" / "pytorch_model.bin"
    tied.parent.mkdir()
    torch.save({"embed": x, "head": x, "tail": x[1:]}, tied)
    (written,) = convert(tied)
    back = load_file(written)
    assert torch.equal(back["head"], x) and torch.equal(back["embed"], x) and torch.equal(back["tail"], x[1:])


def test_convert(tmp_path):
    x = torch.randn(4, 6)
    tensors = {
        "a": x,
        "b": x.t(),
        "shared": x[:2],
        "half": x.bfloat16(),
        "scalar": torch.tensor(2.5),
        "i": torch.arange(3),
    }
    torch.save(tensors, tmp_path / "trainable_params.bin")
    torch.save({"n": torch.tensor([float("nan")])}, tmp_path / "pytorch_model-00001-of-00001.bin")
    torch.save({"lr": 1.0}, tmp_path / "training_args.bin")
    index = {"metadata": {"total_size": 4}, "weight_map": {"n": "pytorch_model-00001-of-00001.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    lines: list[str] = []
    written = convert(tmp_path, remove=True, progress=lines.append)
    assert sorted(p.name for p in written) == [
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "trainable_params.safetensors",
    ]
    assert len(lines) == 2 and sorted(p.name for p in tmp_path.glob("*.bin")) == ["training_args.bin"]
    back = load_file(tmp_path / "trainable_params.safetensors")
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in tensors.items())
    named = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert named["weight_map"] == {"n": "model-00001-of-00001.safetensors"}
    with pytest.raises(ValueError, match=r"no \.bin file"):
        convert(tmp_path)
    torch.save(tensors, tmp_path / "trainable_params.bin")
    with pytest.raises(ValueError, match="exists already"):
        convert(tmp_path / "trainable_params.bin")
    assert not list(tmp_path.glob(".*tmp"))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"a": torch.eye(3).to_sparse()}, "'a', which is sparse_coo"),
        ({"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, "'a', which is quantised"),
        ({"__metadata__": torch.ones(3)}, "a tensor named '__metadata__'"),
        (None, "cannot be read as plain data"),
    ],
)
def test_what_has_no_place_in_a_safetensors_file_is_refused(tensors, says, tmp_path):
    if tensors is None:
        (tmp_path / "a.bin").write_bytes(b"")
    else:
        torch.save(tensors, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=says):
        convert(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("index", ["{}", "[", '{"weight_map": {"n": 3}}'])
def test_an_index_is_read_before_anything_is_written(index, tmp_path):
    torch.save({"n": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00001.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin\.index\.json"):
        convert(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
