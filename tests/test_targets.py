from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_cl.errors import BaseModelError, ConfigError
from hf_cl.layers.families import family_of
from hf_cl.layers.targets import (
    find_head,
    find_norms,
    find_targets,
    matches,
    missing_parameters,
    refuse_unmaskable,
)

IN_A_LAYER = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
BERT = family_of(SimpleNamespace(config=SimpleNamespace(model_type="bert")))


@pytest.fixture
def bert(tiny_model):
    return tiny_model()


class Small(nn.Module):
    """Two blocks, an embedding, a head of two layers."""

    def __init__(self, model_type: str = "small") -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=model_type)
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList([nn.ModuleDict({"dense": nn.Linear(4, 4)}) for _ in range(2)])
        self.head = nn.ModuleDict({"dense": nn.Linear(4, 4), "out_proj": nn.Linear(4, 2)})


# --- what is masked -----------------------------------------------------------------------------


def test_bert_has_six_masked_linears_a_layer_in_the_models_order(bert):
    found = find_targets(bert, BERT.targets, BERT.head)
    assert found == [f"bert.encoder.layer.{layer}.{name}" for layer in (0, 1) for name in IN_A_LAYER]


def test_neither_pooler_nor_classifier_nor_embeddings_are_masked(bert):
    found = find_targets(bert, BERT.targets, BERT.head)
    rest = {name for name, module in bert.named_modules() if isinstance(module, nn.Linear)} - set(found)
    assert rest == {"bert.pooler.dense", "classifier"}


def test_a_layer_of_the_head_is_not_masked_though_its_name_matches(bert):
    found = find_targets(bert, [*IN_A_LAYER, "pooler.dense", "classifier"], ["bert.pooler.dense", "classifier"])
    assert len(found) == 12
    assert len(find_targets(bert, [*IN_A_LAYER, "pooler.dense"], ["classifier"])) == 13


def test_a_suffix_ends_at_a_dot():
    assert matches("layer.0.output.dense", ["dense"]) and matches("dense", ["dense"])
    assert not matches("layer.0.condense", ["dense"]) and not matches("dense.layer", ["dense"])
    assert not matches("dense", [])


def test_a_full_name_masks_one_linear(bert):
    name = "bert.encoder.layer.1.output.dense"
    assert find_targets(bert, [name], BERT.head) == [name]


def test_suffixes_may_come_from_a_generator(bert):
    assert len(find_targets(bert, (name for name in IN_A_LAYER), (name for name in BERT.head))) == 12


def test_suffixes_that_match_nothing_are_refused_with_what_there_is(bert):
    with pytest.raises(ConfigError) as error:
        find_targets(bert, ["q_proj", "v_proj"], BERT.head)
    message = str(error.value)
    assert message.startswith("target_modules: q_proj, v_proj match no module of BertForSequenceClassification.")
    assert "bert.encoder.layer.0.attention.self.query" in message and message.endswith(" ....")


def test_what_is_no_linear_is_refused_by_name(bert):
    with pytest.raises(ConfigError, match=r"bert\.embeddings\.LayerNorm is a LayerNorm; torch\.nn\.Linear and Conv1D"):
        find_targets(bert, ["LayerNorm"], BERT.head)


def test_a_class_derived_from_linear_is_refused():
    class Quantised(nn.Linear):
        pass

    model = Small()
    model.blocks[1]["dense"] = Quantised(4, 4)
    with pytest.raises(ConfigError, match=r"blocks\.1\.dense is a Quantised"):
        find_targets(model, ["dense"], ["head.dense", "head.out_proj"])


def test_a_tied_weight_is_refused_by_both_names():
    model = Small()
    model.blocks[1]["dense"].weight = model.blocks[0]["dense"].weight
    with pytest.raises(ConfigError, match=r"blocks\.0\.dense\.weight is tied, it is also blocks\.0.*blocks\.1\.dense"):
        find_targets(model, ["blocks.0.dense"], [])


def test_a_weight_tied_to_an_embedding_is_refused():
    model = Small()
    model.embed.weight = nn.Parameter(torch.zeros(4, 4))
    model.blocks[1]["dense"].weight = model.embed.weight
    with pytest.raises(ConfigError, match=r"blocks\.1\.dense\.weight is tied.*embed\.weight"):
        find_targets(model, ["dense"], ["head.dense", "head.out_proj"])


def test_a_layer_that_stands_in_two_places_is_refused():
    model = Small()
    model.blocks[1] = model.blocks[0]  # as ALBERT's do
    with pytest.raises(ConfigError, match=r"blocks\.0\.dense\.weight is tied.*blocks\.1\.dense\.weight"):
        find_targets(model, ["dense"], ["head.dense", "head.out_proj"])


def test_weights_tied_elsewhere_do_not_matter():
    model = Small()
    model.head["dense"].weight = model.blocks[1]["dense"].weight
    assert find_targets(model, ["blocks.0.dense"], []) == ["blocks.0.dense"]


def test_an_unknown_family_is_refused_with_its_linears_and_the_way_out():
    with pytest.raises(BaseModelError) as error:
        family_of(Small())
    message = str(error.value)
    assert "Small: the family 'small' is not in the table (albert, bert, " in message
    assert "`target_modules`" in message and "`head_modules`" in message
    assert "blocks.0.dense, blocks.1.dense, head.dense, head.out_proj." in message


# --- the head -----------------------------------------------------------------------------------


def test_the_family_knows_the_head_where_nobody_else_does(bert):
    assert find_head(bert, None, []) == ["classifier"]


def test_what_the_base_did_not_bring_is_the_head_in_the_models_order(bert):
    missing = ["classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    assert find_head(bert, None, missing) == ["bert.pooler.dense", "classifier"]
    assert find_head(Small(), None, ["head.out_proj.weight", "head.dense.bias"]) == ["head.dense", "head.out_proj"]


def test_what_the_user_names_comes_first(bert):
    missing = ["classifier.weight", "bert.pooler.dense.weight"]
    assert find_head(bert, ["classifier"], missing) == ["classifier"]
    assert find_head(bert, ("bert.pooler.dense", "classifier"), []) == ["bert.pooler.dense", "classifier"]


def test_a_named_head_needs_no_known_family():
    assert find_head(Small(), ["head.dense", "head.out_proj"], []) == ["head.dense", "head.out_proj"]
    with pytest.raises(BaseModelError, match="not in the table"):
        find_head(Small(), None, [])


def test_a_head_that_does_not_exist_is_refused_with_what_there_is(bert):
    with pytest.raises(
        ConfigError, match=r"head_modules: 'score' is no module of Bert.*it has bert, dropout, classifier"
    ):
        find_head(bert, ["score"], [])


@pytest.mark.parametrize("named", [["bert"], ["classifier", "bert.embeddings.LayerNorm"], []])
def test_a_head_that_does_not_end_in_a_linear_is_refused(bert, named):
    with pytest.raises(ConfigError, match="does not end in a linear classifier"):
        find_head(bert, named, [])


def test_loading_info_names_missing_and_mismatched_parameters_once_and_sorted():
    info = {
        "missing_keys": {"classifier.weight", "bert.pooler.dense.bias"},
        "mismatched_keys": [("classifier.bias", torch.Size([3]), torch.Size([2])), "classifier.weight"],
        "unexpected_keys": ["cls.predictions.bias"],
    }
    assert missing_parameters(info) == ["bert.pooler.dense.bias", "classifier.bias", "classifier.weight"]
    assert missing_parameters({}) == []


# --- norms --------------------------------------------------------------------------------------


def test_bert_has_two_norms_a_layer_and_the_embeddings_one_stays(bert):
    norms = find_norms(bert, find_targets(bert, BERT.targets, BERT.head))
    expected = ["attention.output.LayerNorm", "output.LayerNorm"]
    assert norms == [f"bert.encoder.layer.{layer}.{name}" for layer in (0, 1) for name in expected]


def test_only_blocks_that_hold_a_masked_linear_give_norms(bert):
    norms = find_norms(bert, ["bert.encoder.layer.1.output.dense"])
    assert norms and all(name.startswith("bert.encoder.layer.1.") for name in norms)
    assert find_norms(bert, []) == []


def test_block_ten_is_not_block_one():
    model = nn.Module()
    model.layer = nn.ModuleList([nn.ModuleDict({"norm": nn.RMSNorm(2), "dense": nn.Linear(2, 2)}) for _ in range(11)])
    assert find_norms(model, ["layer.1.dense"]) == ["layer.1.norm"]


# --- what cannot be masked ------------------------------------------------------------------------


def test_a_plain_model_can_be_masked(bert):
    refuse_unmaskable(bert)
    bert.hf_device_map = {"": "cpu"}
    refuse_unmaskable(bert)


def test_weights_without_values_are_refused_by_name(bert):
    bert.bert.encoder.layer[1].output.dense.to("meta")
    with pytest.raises(BaseModelError, match=r"bert\.encoder\.layer\.1\.output\.dense\.weight is on the meta device"):
        refuse_unmaskable(bert)


@pytest.mark.parametrize("attribute", ["quantization_method", "is_quantized"])
def test_a_quantised_base_is_refused(bert, attribute):
    setattr(bert, attribute, "bitsandbytes")
    with pytest.raises(BaseModelError, match=r"is quantised; masks need its real weights\. Load it without"):
        refuse_unmaskable(bert)


def test_a_base_on_several_devices_is_refused_with_their_names(bert):
    bert.hf_device_map = {"bert": 0, "classifier": "cpu"}
    with pytest.raises(BaseModelError, match=r"is spread over 0, cpu\. Load it without `device_map`"):
        refuse_unmaskable(bert)
