"""Every family of the table goes through a task's whole life: wrapped, trained, saved, reloaded, mixed, merged.

The names of linears, norms and heads below are written out by hand, so that the table is checked against them.
"""

import copy
import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from family_models import CONFIGS, EOS, batch, logits, make
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from test_tuner import finish, move
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    OPTConfig,
    Trainer,
    TrainerCallback,
    XLMRobertaConfig,
    default_data_collator,
)

from hf_cl import MaskConfig, OwnershipCallback, plugins
from hf_cl.errors import BaseModelError
from hf_cl.layers.base import Base
from hf_cl.layers.families import FAMILIES, head_features
from hf_cl.layers.linear import is_maskable
from hf_cl.layers.store import MaskStore
from hf_cl.layers.targets import find_head, find_targets
from hf_cl.ownership.owner import FREE
from hf_cl.training.kkt_start import KKT, start_by_kkt

pytest_plugins = ["tiny"]

NAMES = {"query": ("red", "green", "blue"), "0": ("a", "b", "c", "d", "e")}
"""Adapters with the labels of their tasks; called like parts of tensor names, which PEFT alone would lose."""
BERT = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
DEBERTA = (
    "attention.self.query_proj",
    "attention.self.key_proj",
    "attention.self.value_proj",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
DISTILBERT = (
    "attention.q_lin",
    "attention.k_lin",
    "attention.v_lin",
    "attention.out_lin",
    "ffn.lin1",
    "ffn.lin2",
)
LLAMA = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
T5_ENCODER = (
    "layer.0.SelfAttention.q",
    "layer.0.SelfAttention.k",
    "layer.0.SelfAttention.v",
    "layer.0.SelfAttention.o",
    "layer.1.DenseReluDense.wi",
    "layer.1.DenseReluDense.wo",
)
T5_DECODER = (
    "layer.0.SelfAttention.q",
    "layer.0.SelfAttention.k",
    "layer.0.SelfAttention.v",
    "layer.0.SelfAttention.o",
    "layer.1.EncDecAttention.q",
    "layer.1.EncDecAttention.k",
    "layer.1.EncDecAttention.v",
    "layer.1.EncDecAttention.o",
    "layer.2.DenseReluDense.wi",
    "layer.2.DenseReluDense.wo",
)
ALBERT_LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0"
BLOCKS = {
    "albert": {
        ALBERT_LAYER: ("attention.query", "attention.key", "attention.value", "attention.dense", "ffn", "ffn_output")
    },
    "bert": {"bert.encoder.layer.{}": BERT},
    "deberta-v2": {"deberta.encoder.layer.{}": DEBERTA},
    "distilbert": {"distilbert.transformer.layer.{}": DISTILBERT},
    "electra": {"electra.encoder.layer.{}": BERT},
    "gpt2": {"transformer.h.{}": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
    "llama": {"model.layers.{}": LLAMA},
    "modernbert": {"model.layers.{}": ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")},
    "qwen2": {"model.layers.{}": LLAMA},
    "roberta": {"roberta.encoder.layer.{}": BERT},
    "t5": {"transformer.encoder.block.{}": T5_ENCODER, "transformer.decoder.block.{}": T5_DECODER},
}
"""All linears of attention and feed-forward, block by block; two blocks each, but ALBERT shares one."""
HEADS = {
    "albert": ["classifier"],
    "bert": ["classifier"],
    "deberta-v2": ["pooler.dense", "classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "electra": ["classifier.dense", "classifier.out_proj"],
    "gpt2": ["score"],
    "llama": ["score"],
    "modernbert": ["classifier"],
    "qwen2": ["score"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
    "t5": ["classification_head.dense", "classification_head.out_proj"],
}
BESIDE = {
    "albert": ["albert.encoder.embedding_hidden_mapping_in", "albert.pooler"],
    "bert": ["bert.pooler.dense"],
    "electra": ["electra.embeddings_project"],
    "modernbert": ["head.dense"],
}
"""Linears that stay the base's own: embeddings' projections, and poolers that checkpoints bring along."""
MISSING = HEADS | {"modernbert": ["head.dense", "head.norm", "classifier"]}
"""What a checkpoint of the bare encoder lacks; only a masked language model's brings ModernBERT's `head`."""
BERT_NORMS = ("attention.output.LayerNorm", "output.LayerNorm")
LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
NORMS = {
    "albert": [f"{ALBERT_LAYER}.full_layer_layer_norm", f"{ALBERT_LAYER}.attention.LayerNorm"],
    "bert": [f"bert.encoder.layer.{n}.{norm}" for n in (0, 1) for norm in BERT_NORMS],
    "deberta-v2": [f"deberta.encoder.layer.{n}.{norm}" for n in (0, 1) for norm in BERT_NORMS],
    "distilbert": [
        f"distilbert.transformer.layer.{n}.{norm}" for n in (0, 1) for norm in ("sa_layer_norm", "output_layer_norm")
    ],
    "electra": [f"electra.encoder.layer.{n}.{norm}" for n in (0, 1) for norm in BERT_NORMS],
    "gpt2": [f"transformer.h.{n}.{norm}" for n in (0, 1) for norm in ("ln_1", "ln_2")],
    "llama": [f"model.layers.{n}.{norm}" for n in (0, 1) for norm in LLAMA_NORMS],
    # Its first block has no norm before attention: the embeddings' norm comes right before it.
    "modernbert": ["model.layers.0.mlp_norm", "model.layers.1.attn_norm", "model.layers.1.mlp_norm"],
    "qwen2": [f"model.layers.{n}.{norm}" for n in (0, 1) for norm in LLAMA_NORMS],
    "roberta": [f"roberta.encoder.layer.{n}.{norm}" for n in (0, 1) for norm in BERT_NORMS],
    "t5": [f"transformer.encoder.block.{n}.layer.{part}.layer_norm" for n in (0, 1) for part in (0, 1)]
    + [f"transformer.decoder.block.{n}.layer.{part}.layer_norm" for n in (0, 1) for part in (0, 1, 2)],
}
READS = {family: "first" for family in CONFIGS} | {"gpt2": "last", "llama": "last", "qwen2": "last", "t5": "eos"}
POOLED = ("albert", "bert", "modernbert")
"""Families that pass the text through a layer of the base's own before the head reads it."""


def targets_of(family):
    """Return the names of the linears that are to be masked, by the lists above."""
    stems = [(stem.format(n), names) for stem, names in BLOCKS[family].items() for n in range(1 + ("{}" in stem))]
    return [f"{stem}.{name}" for stem, names in stems for name in names]


def config(adapter="query", **options):
    return MaskConfig(
        **({"task_type": "SEQ_CLS", "density": 0.2, "trains": "claimed", "id2label": labels_of(adapter)} | options)
    )


def labels_of(adapter):
    return dict(enumerate(NAMES[adapter]))


def wrap(family, **options):
    return get_peft_model(make(family), config(**options), adapter_name="query")


def load(base, folder, names, **options):
    first, *rest = names
    model = PeftModel.from_pretrained(base, folder / first, adapter_name=first, **options)
    for name in rest:
        model.load_adapter(folder / name, adapter_name=name, **options)
    return model


def hidden(model, adapter=None):
    """Return the encoder's last hidden states, which no head has a part in."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    seen = []
    handle = plain.base_model.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    try:
        logits(model, adapter)
    finally:
        handle.remove()
    return seen[0]


def rows(classes, seed, count=16):
    """Return texts whose first token tells the class."""
    inputs, labels = batch(seed, count), torch.arange(count) % classes
    inputs["input_ids"][:, 0] = 10 + labels
    return Dataset.from_dict({name: tensor.tolist() for name, tensor in (inputs | {"labels": labels}).items()})


def part(inputs, places):
    return {name: tensor[places] for name, tensor in inputs.items()}


def tensors_of(model, adapter):
    return {name: tensor.clone() for name, tensor in model.base_model.task_tensors(adapter)}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@dataclasses.dataclass
class Learned:
    """Two trained tasks: the wrapped model, where it was saved, and what was seen on the way."""

    family: str
    model: PeftModel
    base_folder: Path
    folder: Path
    first_logits: torch.Tensor
    first_tensors: dict
    logits: dict
    untrained: dict

    def load(self, names=tuple(NAMES), **options):
        return load(make(self.family), self.folder, names, **options)


@pytest.fixture(params=sorted(CONFIGS))
def family(request):
    return request.param


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="session")
def learn(root, arguments):
    """Train two tasks on a family, once."""

    @functools.cache
    def learn(family):
        base_folder, folder = root / family / "base", root / family / "bank"
        base = make(family)
        base.save_pretrained(base_folder)
        model, untrained = None, {}
        for seed, (name, labels) in enumerate(NAMES.items()):
            if model is None:
                model = get_peft_model(base, config(name), adapter_name=name)
            else:
                first_logits, first_tensors = logits(model, "query"), tensors_of(model, "query")
                model.add_adapter(name, config(name))
                model.set_adapter(name)
            untrained[name] = hidden(model)
            callback = OwnershipCallback(name, mask_share=0.5)
            Trainer(model, arguments(), train_dataset=rows(len(labels), seed), callbacks=[callback]).train()
        model.save_pretrained(folder)
        after = {name: logits(model, name) for name in NAMES}
        return Learned(family, model, base_folder, folder, first_logits, first_tensors, after, untrained)

    return learn


@pytest.fixture
def learned(family, learn):
    return learn(family)


# --- the table ----------------------------------------------------------------------------------------------------


def test_every_family_of_the_table_has_a_tiny_model_and_is_written_out_here():
    assert set(FAMILIES) == set(CONFIGS) == set(BLOCKS) == set(HEADS) == set(NORMS)
    assert {family: entry.pooling for family, entry in FAMILIES.items()} == READS
    assert {family: list(entry.head) for family, entry in FAMILIES.items()} == HEADS


def test_all_of_attention_and_feed_forward_is_masked_and_nothing_else(family):
    model, entry = make(family), FAMILIES[family]
    assert model.config.model_type == family
    found = find_targets(model, entry.targets, entry.head)
    assert found == targets_of(family)
    rest = {name for name, module in model.named_modules() if is_maskable(module)} - set(found)
    assert rest == {*HEADS[family], *BESIDE.get(family, ())}


def test_a_gated_feed_forward_is_masked_too():
    model = make("t5", feed_forward_proj="gated-gelu")
    found = find_targets(model, FAMILIES["t5"].targets, HEADS["t5"])
    assert len(found) == 2 * 7 + 2 * 11
    assert {name.rpartition(".")[2] for name in found} == {"q", "k", "v", "o", "wi_0", "wi_1", "wo"}


def test_the_head_is_what_a_checkpoint_of_the_encoder_lacks(family, tmp_path):
    with torch.random.fork_rng():
        AutoModel.from_config(make(family).config).save_pretrained(tmp_path)
        model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    missing = MaskConfig.from_loading_info(info).missing_modules
    assert missing
    assert find_head(model, None, missing) == MISSING[family]
    assert {name.rpartition(".")[0] for name in missing} == set(MISSING[family])
    assert find_head(make(family), None, ()) == HEADS[family]
    assert type(model.get_submodule(HEADS[family][-1])) is torch.nn.Linear


def drawn(folder, seed):
    """Return a classifier whose checkpoint lacks layers, drawn by a seed, and its loading info."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)


def test_a_norm_in_the_head_lives_with_the_task(tmp_path):
    make("modernbert").model.save_pretrained(tmp_path / "base")
    (base, info), (other, _) = drawn(tmp_path / "base", 1), drawn(tmp_path / "base", 2)
    assert not torch.equal(base.head.dense.weight, other.head.dense.weight)
    options = {"task_type": "SEQ_CLS", "density": 0.2, "trains": "claimed", "num_labels": 3}
    model = get_peft_model(base, MaskConfig.from_loading_info(info, **options), adapter_name="query")
    assert [layer.name for layer in model.base_model.own_layers()] == MISSING["modernbert"]
    finish(model, "query")
    after = logits(model)
    assert not torch.equal(model.base_model.own_tensors("query")["head.norm.weight"], base.head.norm.base_layer.weight)
    model.save_pretrained(tmp_path / "bank")
    again = load(other, tmp_path / "bank", ["query"])
    assert torch.equal(logits(again), after)
    assert torch.equal(logits(again.merge_and_unload()), after)


def test_a_layer_that_is_drawn_anew_and_is_not_the_tasks_own_is_refused_at_reload(tmp_path):
    make("modernbert").model.save_pretrained(tmp_path / "base")
    (base, _), (other, _) = drawn(tmp_path / "base", 1), drawn(tmp_path / "base", 2)
    model = get_peft_model(base, config(), adapter_name="query")
    finish(model, "query")
    model.save_pretrained(tmp_path / "bank")
    with pytest.raises(BaseModelError, match="other weights, another revision"):
        load(other, tmp_path / "bank", ["query"])


# --- where a text is read -----------------------------------------------------------------------------------------


def texts():
    """Return right-padded texts whose end token is neither their last nor their first; and the places of all."""
    inputs = batch()
    inputs["input_ids"][inputs["input_ids"] == EOS] = 7
    inputs["input_ids"][:, 2] = EOS
    count = len(inputs["input_ids"])
    last = inputs["attention_mask"].sum(1) - 1
    assert len(last.unique()) > 1
    return inputs, {"first": torch.zeros(count, dtype=int), "last": last, "eos": torch.full((count,), 2)}


def test_the_logits_depend_on_the_position_that_the_table_names(family):
    model, (inputs, places) = make(family), texts()
    seen = []

    def keep(module, given, output):
        output[0].retain_grad()
        seen.append(output[0])

    model.base_model.register_forward_hook(keep)
    model(**inputs).logits.sum().backward()
    expected = torch.nn.functional.one_hot(places[READS[family]], inputs["input_ids"].shape[1]).bool()
    assert torch.equal(seen[0].grad.abs().sum(-1) > 0, expected)


def test_what_the_head_reads_is_found(family):
    model, (inputs, places) = make(family), texts()
    head = model.get_submodule(HEADS[family][0])
    states = []
    model.base_model.register_forward_hook(lambda module, given, output: states.append(output[0]))
    with torch.no_grad():
        found = head_features(head, lambda: model(**inputs), inputs["attention_mask"])
        at = states[0][torch.arange(len(found)), places[READS[family]]]
        if family in POOLED:
            # The same layer on the same rows: a matrix product may sum in another order with other sizes.
            torch.testing.assert_close(head(found), model(**inputs).logits, rtol=0, atol=1e-6)
            assert not torch.equal(found, at)
        else:
            assert torch.equal(found, at)


@pytest.mark.parametrize("family", [family for family in CONFIGS if READS[family] == "last"])
def test_a_decoder_reads_the_last_token_of_a_text_padded_on_the_left(family):
    model, inputs = make(family), {name: tensor.flip(1) for name, tensor in batch().items()}
    states = []
    model.base_model.register_forward_hook(lambda module, given, output: states.append(output[0]))
    with torch.no_grad():
        found = head_features(model.score, lambda: model(**inputs), inputs["attention_mask"])
        assert torch.equal(found, states[0][:, -1])
        torch.testing.assert_close(model.score(found), model(**inputs).logits, rtol=0, atol=1e-6)


# --- wrapping -----------------------------------------------------------------------------------------------------


def test_wrapping_masks_each_linear_once_and_leaves_the_base_below(family):
    plain, states = logits(make(family)), hidden(make(family))
    model = wrap(family)
    layers = model.base_model.mask_layers()
    assert [name for name, module in model.base_model.model.named_modules() if module in layers] == targets_of(family)
    assert len({id(layer.store) for layer in layers}) == len(targets_of(family))
    assert [layer.name for layer in model.base_model.own_layers()] == HEADS[family]
    assert not torch.equal(hidden(model), states)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
        assert torch.equal(hidden(model), states)


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_albert_keeps_one_store_a_linear_however_many_layers_share_it(layers):
    model = get_peft_model(make("albert", num_hidden_layers=layers), config(), adapter_name="query")
    calls = []
    model.base_model.mask_layers()[0].register_forward_hook(lambda *_: calls.append(1))
    logits(model)
    assert (len(calls), len(model.base_model.mask_layers())) == (layers, 6)


def test_train_norms_finds_the_norms_of_the_blocks(family, tmp_path):
    model = wrap(family, train_norms=True)
    norms = [layer.name for layer in model.base_model.own_layers() if layer.is_norm]
    assert sorted(norms) == sorted(NORMS[family])
    finish(model, "query")
    after = logits(model)
    base = make(family)
    own = model.base_model.own_tensors("query")
    assert not any(torch.equal(own[f"{name}.weight"], base.get_submodule(name).weight) for name in norms)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(base, tmp_path, ["query"])), after)


def test_random_values_are_scaled_by_how_many_inputs_a_linear_sums(family, tmp_path):
    model = wrap(family, compose="random", rank="magnitude")
    layers, widths = model.base_model.mask_layers(), {}
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, inputs: widths.update({module.path: inputs[0].shape[-1]}))
    finish(model, "query")
    after = logits(model)
    for layer in layers:
        assert layer.store.scale == pytest.approx((2 / widths[layer.path]) ** 0.5, rel=1e-6)  # stored as float32
        assert torch.equal(layer.store.weight != 0, layer.mask("query"))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(make(family), tmp_path, ["query"])), after)


# --- learning -----------------------------------------------------------------------------------------------------


def test_a_second_task_leaves_the_first_as_it_was(learned):
    assert torch.equal(learned.logits["query"], learned.first_logits)
    assert equal(tensors_of(learned.model, "query"), learned.first_tensors)
    assert [value.shape[1] for value in learned.logits.values()] == [3, 5]
    assert all(learned.model.base_model.phase(name) == "committed" for name in NAMES)


def test_training_moves_what_a_task_computes_and_tasks_differ_from_each_other_and_the_base(learned):
    states = [hidden(make(learned.family)), *(hidden(learned.model, name) for name in NAMES)]
    states += learned.untrained.values()
    for place, one in enumerate(states):
        assert one.isfinite().all()
        assert not any(torch.equal(one, other) for other in states[:place])


def test_each_task_owns_entries_whose_values_it_trained(learned):
    layers = learned.model.base_model.mask_layers()
    start = torch.cat([layer.store.start(layer.base_weight).view(-1) for layer in layers])
    values = torch.cat([layer.store.values.view(-1) for layer in layers])
    owner = torch.cat([layer.store.owner.view(-1) for layer in layers])
    moved = values != start.bfloat16()  # a commit rounds whatever it finds
    for index in range(2):
        # Not all of them: a neuron of T5's that answers no text has no gradient.
        assert moved[owner == index].float().mean() > 0.9
    assert torch.equal(values[owner == FREE], start[owner == FREE])
    assert learned.model.base_model.facts("0")["overlap"] > 0.1


def test_the_audit_sees_one_owned_value_that_was_overwritten(learned):
    model = learned.load()
    tuner = model.base_model
    before = tuner.owned_digest(2)
    layer = tuner.mask_layers()[-1]
    values = layer.store.values.view(-1)
    free, owned = ((layer.store.owner.view(-1) == owner).nonzero()[0] for owner in (FREE, 0))
    values[free] += 1
    assert tuner.owned_digest(2) == before
    kept = values[owned].clone()
    values[owned] += 1
    assert tuner.owned_digest(2) != before
    assert not equal(tensors_of(model, "query"), learned.first_tensors)
    values[owned] = kept
    assert tuner.owned_digest(2) == before


def test_gradients_of_scores_are_those_of_the_plain_weights(family):
    model = wrap(family)
    move(model, "query")
    plain = copy.deepcopy(model).merge_and_unload()
    weights = [plain.get_submodule(name).weight.requires_grad_(True) for name in targets_of(family)]
    labels = torch.tensor([0, 1, 2, 0])
    losses = [each.eval()(**batch(), labels=labels).loss for each in (model, plain)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for weight, layer in zip(weights, model.base_model.mask_layers(), strict=True):
        expected = weight.grad * layer.store.values
        assert expected.any()
        # A layer that is read several times sums before or after the product with V.
        torch.testing.assert_close(layer.hfcl_scores["query"].grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", [family for family in sorted(CONFIGS) if family != "albert"])
def test_gradient_checkpointing_gives_the_same_gradients(family):
    def gradients(checkpointing):
        given = make(family).config.to_dict()
        quiet = {name: 0.0 for name, value in given.items() if "drop" in name and isinstance(value, float)}
        base = make(family, **quiet)
        if family == "t5":
            # Its fused attention, with a bias in place of a mask, gives other bits while checkpointed, masked or not.
            base.set_attn_implementation("eager")
        model = get_peft_model(base, config(), adapter_name="query")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        move(model, "query")
        calls = []
        model.base_model.mask_layers()[0].register_forward_hook(lambda *_: calls.append(1))
        model.train()
        model(**batch(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        return len(calls), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    (calls, plain), (more, checkpointed) = gradients(False), gradients(True)
    assert more == 2 * calls
    assert sum(".hfcl_scores." in name for name in plain) == len(targets_of(family))
    assert equal(plain, checkpointed)


def test_albert_cannot_be_checkpointed_with_masks_or_without():
    for model in (make("albert"), wrap("albert")):
        with pytest.raises(ValueError, match="does not support"):
            model.gradient_checkpointing_enable()


class Shown(TrainerCallback):
    """Counts how often each layer is composed, in each forward and in each step."""

    def __init__(self, monkeypatch, model):
        self.now, self.steps, self.inside, self.reads = [], [], 0, 0
        show = MaskStore.show

        def counted(store, *given):
            self.now.append(store.path)
            show(store, *given)

        monkeypatch.setattr(MaskStore, "show", counted)
        model.base_model.model.register_forward_pre_hook(lambda *_: setattr(self, "before", len(self.now)))
        model.base_model.model.register_forward_hook(self.count)
        model.base_model.mask_layers()[0].register_forward_hook(lambda *_: setattr(self, "reads", self.reads + 1))

    def count(self, *_):
        self.inside += len(self.now) - self.before

    def on_step_begin(self, args, state, control, **kwargs):
        self.now.clear()
        self.reads = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append((self.reads, sorted(self.now)))


def test_albert_composes_a_layer_once_a_step_though_it_is_read_several_times(monkeypatch, arguments):
    model = wrap("albert")
    shown = Shown(monkeypatch, model)
    callbacks = [OwnershipCallback("query", mask_share=0.5), shown]
    Trainer(model, arguments(max_steps=6), train_dataset=rows(3, 0), callbacks=callbacks).train()
    paths = sorted(layer.path for layer in model.base_model.mask_layers())
    assert shown.inside == 0
    # Three steps train the mask, the third fixes it; from then on the values are written in place.
    assert shown.steps == [(3, paths)] * 3 + [(3, [])] * 3


def test_kkt_asks_every_earlier_task(learned):
    model = learned.load()
    model.add_adapter("next", config(id2label=None, num_labels=4))
    model.set_adapter("next")
    loader = DataLoader(rows(4, 7), batch_size=5, collate_fn=default_data_collator)
    options = KKT(k=3, sample=12, margin=2.0, means={})
    choice = start_by_kkt(model.base_model, "next", loader, options, 0.02, torch.device("cpu"))
    assert set(choice.accuracies) == {0, 1}
    assert options.means[2].isfinite().all()
    for name in NAMES:
        assert torch.equal(logits(model, name), learned.logits[name])


# --- saving and loading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["query", "0"], ["0", "query"], ["query"], ["0"]], ids=" then ".join)
def test_tasks_load_in_every_order_with_equal_logits(learned, names):
    base = AutoModelForSequenceClassification.from_pretrained(learned.base_folder)
    model = load(base, learned.folder, names)
    for name in [*names, names[0]]:
        assert torch.equal(logits(model, name), learned.logits[name])
    if len(names) == 2:
        assert all(equal(tensors_of(model, name), tensors_of(learned.model, name)) for name in names)


def test_a_file_names_each_linear_by_its_whole_path_whatever_the_task_is_called(learned):
    for name in NAMES:
        keys = load_file(learned.folder / name / "adapter_model.safetensors")
        found = {key for key in keys if key.endswith(".hfcl_bits")}
        assert found == {f"base_model.model.{target}.hfcl_bits" for target in targets_of(learned.family)}


SCRIPT = """
import sys
from pathlib import Path

import torch
from family_models import logits
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

import hf_cl.tuner

torch.set_num_threads(1)
found = {}
for place in sorted(Path(sys.argv[1]).glob("*/bank")):
    base = AutoModelForSequenceClassification.from_pretrained(place.parent / "base")
    model = PeftModel.from_pretrained(base, place / "0", adapter_name="0")
    model.load_adapter(place / "query", adapter_name="query")
    for name in ("query", "0"):
        found[f"{place.parent.name} {name}"] = logits(model, name)
save_file(found, sys.argv[2])
"""


@pytest.fixture(scope="session")
def elsewhere(learn, root, tmp_path_factory):
    """Logits of all families' tasks as another process computes them from the saved folders."""
    for family in CONFIGS:
        learn(family)
    out = tmp_path_factory.mktemp("elsewhere") / "logits.safetensors"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, root, out], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(out)


def test_another_process_gives_equal_logits(learned, elsewhere):
    for name in NAMES:
        assert torch.equal(elsewhere[f"{learned.family} {name}"], learned.logits[name])


def test_a_bf16_base_keeps_a_float32_store_and_reloads_exactly(family, tmp_path):
    def base():
        return make(family).to(torch.bfloat16)

    plain = logits(base())
    model = get_peft_model(base(), config(), adapter_name="query")
    finish(model, "query")
    after = logits(model)
    assert after.isfinite().all()
    assert hidden(model).dtype == torch.bfloat16
    for layer in model.base_model.mask_layers():
        assert (layer.store.values.dtype, layer.store.weight.dtype) == (torch.float32, torch.bfloat16)
    assert {tensor.dtype for tensor in model.base_model.own_tensors("query").values()} == {torch.float32}
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        assert torch.equal(logits(load(base(), tmp_path, ["query"], **options)), after)
    with pytest.raises(BaseModelError, match="another dtype"):
        load(make(family), tmp_path, ["query"])


# --- PEFT's verbs -------------------------------------------------------------------------------------------------


def test_setting_tasks_active_in_turn_gives_each_its_logits(learned):
    model = learned.load()
    for name in ("query", "0", "query", "query", "0"):
        assert torch.equal(logits(model, name), learned.logits[name])
        assert model.config.id2label == labels_of(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_deleted_task_leaves_the_other_as_it_was(learned, name):
    (other,) = set(NAMES) - {name}
    model = learned.load()
    model.set_adapter(other)
    model.delete_adapter(name)
    assert list(model.peft_config) == [other]
    assert torch.equal(logits(model, other), learned.logits[other])


@pytest.mark.parametrize("name", NAMES)
def test_a_merged_task_is_a_plain_model_with_equal_logits_and_its_labels(learned, name):
    merged = learned.load().merge_and_unload(adapter_names=[name])
    assert torch.equal(logits(merged), learned.logits[name])
    assert merged.config.id2label == labels_of(name)
    assert type(merged) is type(make(learned.family))
    assert not [module for module in merged.modules() if isinstance(module, BaseTunerLayer)]
    assert merged.state_dict().keys() == make(learned.family).state_dict().keys()


def test_a_merged_task_that_is_saved_loads_as_a_plain_model(learned, tmp_path):
    learned.load().merge_and_unload(adapter_names=["0"]).save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(plain), learned.logits["0"])
    assert plain.config.id2label == labels_of("0")


def test_unloading_gives_the_base_back(learned):
    base = make(learned.family)
    unloaded = learned.load().unload()
    assert torch.equal(logits(unloaded), logits(base))
    assert equal(unloaded.state_dict(), base.state_dict())
    assert unloaded.config.id2label == base.config.id2label


@pytest.mark.parametrize("name", NAMES)
def test_unmerging_gives_the_base_its_very_bits_back(learned, name):
    model = learned.load()
    tuner = model.base_model
    before = {key: tensor.clone() for key, tensor in tuner.base_tensors()}
    tuner.merge_adapter([name])
    assert torch.equal(logits(model), learned.logits[name])
    merged = [tuner.model.get_submodule(target).base_layer.weight for target in targets_of(learned.family)]
    plain = [before[f"{target}.weight"] for target in targets_of(learned.family)]
    assert not any(torch.equal(one, other) for one, other in zip(merged, plain, strict=True))
    assert equal(dict(tuner.base_tensors()), before)
    tuner.unmerge_adapter()
    assert equal(dict(tuner.base_tensors()), before)
    for other in NAMES:
        assert torch.equal(logits(model, other), learned.logits[other])
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(make(learned.family)))


def test_a_bank_that_is_saved_while_a_task_is_merged_is_the_same_bank(learned, tmp_path):
    model = learned.load()
    model.set_adapter("query")
    model.base_model.merge_adapter()
    model.save_pretrained(tmp_path)
    again = load(make(learned.family), tmp_path, ["0", "query"])
    for name in NAMES:
        assert torch.equal(logits(again, name), learned.logits[name])


def test_a_mixed_batch_answers_each_row_by_its_own_task(learned):
    model, inputs = learned.load(), batch()
    names = ["query", "0", "__base__", "query"]
    single = {name: logits(model, name) for name in NAMES}
    with model.disable_adapter():
        single["__base__"] = logits(model)
    model.set_adapter("0")
    out = logits(model, None, {**inputs, "adapter_names": names})
    assert out.shape == (4, 5)
    for row, name in enumerate(names):
        width = single[name].shape[1]
        # Fewer rows go through the model at once, and another size of a product sums in another order.
        torch.testing.assert_close(out[row, :width], single[name][row], rtol=0, atol=1e-5)
        assert (out[row, width:] == -torch.inf).all()
        others = [single[name][other] for other in range(4) if other != row]
        assert all((single[name][row] - other).abs().max() > 1e-4 for other in others)
    model.base_model.share_products = False  # apart, rows have the bits of a batch of their own
    out = logits(model, None, {**inputs, "adapter_names": names})
    assert torch.equal(out[[0, 3], :3], logits(model, "query", part(inputs, [0, 3])))
    assert torch.equal(out[[1]], logits(model, "0", part(inputs, [1])))
    assert torch.equal(logits(model, "0"), learned.logits["0"])


# --- LoRA beside it -----------------------------------------------------------------------------------------------


def lora(family, head=None):
    module = plugins.load("methods", "lora")
    base = Base(make(family), None, "tiny", tuple(head or HEADS[family]))
    return module.build(base, module.Options(r=2), 0)


def test_lora_learns_the_same_linears_packs_and_restores(family, arguments):
    method, labels = lora(family), NAMES["query"]
    assert method.settled()["target_modules"] == targets_of(family)
    method.begin(0, labels)
    Trainer(method.model, arguments(), train_dataset=rows(3, 0), callbacks=method.callbacks()).train()
    method.commit(0)
    method.activate(0)
    after = logits(method.model)
    assert not torch.equal(hidden(method.model), hidden(make(family)))
    again = lora(family)
    again.restore(0, labels, method.pack(0))
    again.begin(1, NAMES["0"])
    assert logits(again.model).shape[1] == 5
    again.activate(0)
    assert torch.equal(logits(again.model), after)
    assert again.parts(0) == method.parts(0)


@pytest.mark.filterwarnings("error:fan_in_fan_out")
def test_lora_wraps_transposed_linears_without_a_warning():
    lora("gpt2").begin(0, NAMES["query"])


def test_lora_takes_a_head_with_a_norm_in_it():
    method = lora("modernbert", MISSING["modernbert"])
    method.begin(0, NAMES["query"])
    method.commit(0)
    again = lora("modernbert", MISSING["modernbert"])
    again.restore(0, NAMES["query"], method.pack(0))
    assert torch.equal(logits(again.model), logits(method.model))


# --- families that are not in the table ---------------------------------------------------------------------------


SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
OTHERS = {
    "xlm-roberta": (
        XLMRobertaConfig(**SMALL, intermediate_size=32, max_position_embeddings=40),
        ["attention.self.query", "output.dense"],
        ["classifier.dense", "classifier.out_proj"],
        2 * 3,
    ),
    "opt": (
        OPTConfig(**SMALL, ffn_dim=32, max_position_embeddings=40, word_embed_proj_dim=16),
        ["fc1", "fc2", "self_attn.v_proj"],
        ["score"],
        2 * 3,
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_an_unknown_family_is_refused_with_its_linears_and_works_when_they_are_named(kind, tmp_path):
    settings, targets, head, count = OTHERS[kind]

    def base():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return AutoModelForSequenceClassification.from_config(copy.deepcopy(settings)).eval()

    with pytest.raises(BaseModelError) as error:
        get_peft_model(base(), config())
    for text in (
        f"the family '{kind}' is not in the table",
        "`target_modules`",
        "`head_modules`",
        targets[0],
        head[-1],
    ):
        assert text in str(error.value)
    model = get_peft_model(base(), config(target_modules=targets, head_modules=head), adapter_name="query")
    assert len(model.base_model.mask_layers()) == count
    finish(model, "query")
    after = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(base(), tmp_path, ["query"])), after)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))
