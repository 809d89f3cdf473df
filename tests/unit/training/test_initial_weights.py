"""Weights as DeepSpeed takes them, wherever a checkpoint's file has them."""

import torch
from safetensors.torch import load_file, save_file

from training.initial_weights import align


def test_weights_in_the_memory_of_a_file_begin_where_partitions_may(tmp_path):
    saved = {"a": torch.arange(3.0).bfloat16(), "b": torch.arange(3.0, 7.0).bfloat16()}
    save_file(saved, tmp_path / "weights.safetensors")
    module = torch.nn.ParameterDict(load_file(tmp_path / "weights.safetensors"))
    assert any(weight.data_ptr() % 4 for weight in module.values()), "the file has both aligned, choose other sizes"
    align(module)
    assert not any(weight.data_ptr() % 16 for weight in module.values())
    assert all(torch.equal(module[name], tensor) for name, tensor in saved.items())
