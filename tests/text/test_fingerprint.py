import torch
from torch import nn

from emf_lightning.text.fingerprint import fingerprint, weights_digest


def layer(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).to(dtype)


def test_equal_weights_have_equal_digests_whatever_their_memory_layout():
    other = layer()
    other[0].weight.data = other[0].weight.data.T.contiguous().T
    assert not other[0].weight.is_contiguous()
    assert weights_digest(layer()) == weights_digest(other)


def test_the_least_change_of_a_weight_changes_the_digest():
    for dtype in (torch.float32, torch.bfloat16):
        other = layer(dtype)
        before = other[0].bias.data[1]
        other[0].bias.data[1] = torch.nextafter(before, before.new_tensor(9.0))
        assert weights_digest(layer(dtype)) != weights_digest(other)


def test_names_shapes_and_dtypes_are_part_of_the_digest():
    values = torch.arange(4.0)
    digests = []
    for name, tensor in [("a", values), ("b", values), ("a", values.view(2, 2)), ("a", values.view(torch.int32))]:
        module = nn.Module()
        module.register_buffer(name, tensor)
        digests.append(weights_digest(module))
    scalar = nn.Module()
    scalar.register_buffer("a", torch.tensor(1.0))
    digests.append(weights_digest(scalar))
    assert len(set(digests)) == len(digests)


def test_a_fingerprint_names_its_parts():
    assert fingerprint(a=1, b="2") == fingerprint(b="2", a=1)
    assert fingerprint(a=1, b="2") != fingerprint(a="2", b=1)
    assert len(fingerprint(a=1)) == 64
