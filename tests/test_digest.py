import hashlib

import pytest
import torch

from hf_cl.layers.base import base_fingerprint, encoder_tensors
from hf_cl.ownership.digest import digest, tensor_bytes

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.bool,
)


def flip_lowest_bit(tensor: torch.Tensor, byte: int = 0) -> None:
    """Change one bit of a tensor in place."""
    with torch.no_grad():
        tensor.detach().view(-1).view(torch.uint8)[byte] ^= 1


def test_the_digest_of_one_tensor_is_this_literal():
    tensor = torch.tensor([[1.0, -2.0]])
    text = b"4:bert|torch.float32|(1, 2)|" + bytes.fromhex("0000803f000000c0")
    assert digest([("bert", tensor)]) == hashlib.sha256(text).hexdigest()
    assert digest([("bert", tensor)], "delta") == hashlib.sha256(b"5:delta" + text).hexdigest()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_bit_of_each_byte_counts(dtype):
    tensor = torch.tensor([0, 1, 1, 0, 1]).to(dtype)
    digests = {digest([("a", tensor)])}
    size = tensor.numel() * tensor.element_size()
    for byte in range(size):
        changed = tensor.clone()
        flip_lowest_bit(changed, byte)
        digests.add(digest([("a", changed)]))
    assert len(digests) == size + 1


def test_name_dtype_shape_order_and_text_count():
    one, other = torch.zeros(2, 3), torch.ones(4)
    digests = [
        digest([("a", one), ("b", other)]),
        digest([("b", other), ("a", one)]),  # order
        digest([("a", other), ("b", one)]),  # which name has which
        digest([("a", one), ("c", other)]),  # name
        digest([("a", one.view(3, 2)), ("b", other)]),  # shape
        digest([("a", one.view(6)), ("b", other)]),
        digest([("a", one.int()), ("b", other)]),  # dtype with the same bytes
        digest([("a", one)]),
        digest([("a", one), ("b", other)], "text"),
        digest([("a", one), ("b", other)], "te", "xt"),
        digest([("a", one), ("b", other)], ""),
        digest([]),
        digest([], "text"),
    ]
    assert len(set(digests)) == len(digests)


def test_names_and_bytes_cannot_run_into_each_other():
    a, b = torch.tensor([97], dtype=torch.uint8), torch.tensor([98], dtype=torch.uint8)
    assert digest([("1:", a)]) != digest([("1", a)])
    assert digest([("a", a), ("b", b)]) != digest([("a", torch.tensor([97, 49, 58, 98, 98], dtype=torch.uint8))])


def test_zeros_of_the_two_signs_differ():
    assert digest([("a", torch.tensor([0.0]))]) != digest([("a", torch.tensor([-0.0]))])


def test_nans_of_one_payload_are_alike():
    assert digest([("a", torch.tensor([float("nan")]))]) == digest([("a", torch.tensor([float("nan")]))])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_tensor_has_a_digest_of_its_shape_and_dtype(dtype):
    empty = torch.empty(0, dtype=dtype)
    assert bytes(tensor_bytes(empty)) == b""
    assert digest([("a", empty)]) == hashlib.sha256(f"1:a|{dtype}|(0,)|".encode()).hexdigest()
    assert digest([("a", torch.empty(0, 3, dtype=dtype))]) != digest([("a", empty)])


def test_a_number_without_axes_has_a_digest_of_its_own():
    assert digest([("a", torch.tensor(2.0))]) != digest([("a", torch.tensor([2.0]))])


def test_bfloat16_is_read_in_its_own_bytes():
    assert bytes(tensor_bytes(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))) == bytes.fromhex("803f00c0")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_layout_in_memory_does_not_count(dtype):
    square = (torch.arange(12).view(3, 4) % 2).to(dtype)
    transposed = square.t()
    strided = torch.stack([square, square], dim=-1)[..., 0]
    assert not transposed.is_contiguous() and not strided.is_contiguous()
    assert digest([("a", transposed)]) == digest([("a", transposed.contiguous())])
    assert digest([("a", strided)]) == digest([("a", square)])


def test_a_slice_is_read_where_it_lies():
    long = torch.arange(10.0)
    assert digest([("a", long[3:5])]) == digest([("a", torch.tensor([3.0, 4.0]))])


def test_a_parameter_and_its_values_are_alike():
    values = torch.randn(3, generator=torch.Generator().manual_seed(0))
    parameter = torch.nn.Parameter(values.clone())
    assert digest([("a", parameter)]) == digest([("a", values)])
    assert parameter.requires_grad


def test_the_fingerprint_of_a_base_does_not_see_its_head(tiny_model):
    model = tiny_model()
    before = base_fingerprint(model, ["classifier"])
    flip_lowest_bit(model.classifier.weight)
    flip_lowest_bit(model.classifier.bias)
    assert base_fingerprint(model, ["classifier"]) == before
    assert base_fingerprint(tiny_model(num_labels=5), ["classifier"]) == before
    assert base_fingerprint(model, []) != before


def test_the_fingerprint_of_a_base_sees_one_bit_of_everything_else(tiny_model):
    model = tiny_model()
    before = base_fingerprint(model, ["classifier"])
    names = [name for name, _ in encoder_tensors(model, ["classifier"])]
    held = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    assert names == sorted(held - {"classifier.weight", "classifier.bias"})
    assert "bert.embeddings.position_ids" in names and "bert.pooler.dense.weight" in names
    for name, tensor in encoder_tensors(model, ["classifier"]):
        flip_lowest_bit(tensor)
        assert base_fingerprint(model, ["classifier"]) != before, name
        flip_lowest_bit(tensor)
    assert base_fingerprint(model, ["classifier"]) == before


def test_a_head_of_two_layers_is_left_out_whole_and_no_namesake_with_it(tiny_model):
    model = tiny_model()
    names = [name for name, _ in encoder_tensors(model, ["bert.pooler.dense", "classifier"])]
    assert not any("pooler" in name or "classifier" in name for name in names)
    assert [name for name, _ in encoder_tensors(model, ["bert.pool", "class"])] == [
        name for name, _ in encoder_tensors(model, [])
    ]


def test_a_base_in_another_dtype_has_another_fingerprint(tiny_model):
    model = tiny_model()
    before = base_fingerprint(model, ["classifier"])
    assert base_fingerprint(model.to(torch.bfloat16), ["classifier"]) != before


def test_what_requires_a_gradient_does_not_matter(tiny_model):
    model = tiny_model()
    before = base_fingerprint(model, ["classifier"])
    assert base_fingerprint(model.requires_grad_(False), ["classifier"]) == before
