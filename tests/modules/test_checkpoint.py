from __future__ import annotations

import pytest
import torch

from emf_lightning.modules.checkpoint import disagreement, first_difference, read_checkpoint


def test_a_checkpoint_is_read_with_its_tensors(tmp_path):
    torch.save({"state_dict": {"weight": torch.arange(3)}, "global_step": 7}, tmp_path / "run.ckpt")
    checkpoint = read_checkpoint(tmp_path / "run.ckpt", "ckpt_path")
    assert checkpoint["global_step"] == 7
    assert checkpoint["state_dict"]["weight"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 of a zip file", bytes(1000)])
def test_other_files_are_named_with_the_remedy(tmp_path, content):
    path = tmp_path / "run.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"init_from: {path} cannot be read .*; give the path of a \.ckpt"):
        read_checkpoint(path, "init_from")


@pytest.mark.parametrize("content", [torch.zeros(2), {"weight": torch.zeros(2)}, {"state_dict": None}])
def test_a_file_of_torch_without_a_model_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match=r"run\.ckpt holds no model's weights"):
        read_checkpoint(tmp_path / "run.ckpt", "ckpt_path")


def test_only_what_both_speak_of_can_disagree():
    assert disagreement({"prediction": "v", "step": 3}, {"prediction": "v", "time_scale": 5}) is None
    assert disagreement({"time_scale": 100, "prediction": "v"}, {"prediction": "x", "time_scale": 5}) == (
        "its prediction is v, not x"
    )


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (torch.nn.Linear(3, 4), r"^weight is .*\[4, 3\]\) there and .*\[2, 3\]\) here \(and 1 more differences\)$"),
        (torch.nn.Linear(3, 2, bias=False), "^bias is not there but here$"),
        (torch.nn.Bilinear(3, 3, 2), r"^weight is torch.Size\(\[2, 3, 3\]\) there"),
        (torch.nn.Sequential(torch.nn.Linear(3, 2)), r"^weight is not there but here \(and 3 more differences\)$"),
    ],
)
def test_the_first_difference_of_two_models_is_told(there, said):
    with pytest.raises(RuntimeError) as caught:
        torch.nn.Linear(3, 2).load_state_dict(there.state_dict())
    message = first_difference(caught.value)
    with pytest.raises(ValueError, match=said):
        raise ValueError(message)
