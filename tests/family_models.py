"""A tiny random sequence classifier of every family of the table; equal seeds give equal weights."""

import torch
import transformers
from transformers import AutoModelForSequenceClassification

VOCAB, PAD, EOS = 60, 0, 1
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
}
_ENDS = {"bos_token_id": EOS, "eos_token_id": EOS}
_GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
CONFIGS = {
    "albert": ("AlbertConfig", _SIZES | {"embedding_size": 8, "num_hidden_layers": 3}),
    "bert": ("BertConfig", _SIZES),
    # As the v3 checkpoints: relative positions both ways, through the masked query and key projections.
    "deberta-v2": (
        "DebertaV2Config",
        _SIZES
        | {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
    "distilbert": (
        "DistilBertConfig",
        {"vocab_size": VOCAB, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 40},
    ),
    "electra": ("ElectraConfig", _SIZES | {"embedding_size": 8}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "pad_token_id": PAD} | _ENDS,
    ),
    "llama": ("LlamaConfig", _SIZES | _GROUPED),
    "modernbert": ("ModernBertConfig", _SIZES | _ENDS | {"local_attention": 4, "cls_token_id": 2, "sep_token_id": 3}),
    "qwen2": ("Qwen2Config", _SIZES | _GROUPED),
    "roberta": ("RobertaConfig", _SIZES),
    "t5": (
        "T5Config",
        {
            "vocab_size": VOCAB,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "decoder_start_token_id": PAD,
        },
    ),
}


def make(family, seed=0, **changes):
    """Return the family's classifier with two labels, in evaluation mode."""
    name, options = CONFIGS[family]
    wide = {} if family == "t5" else {"initializer_range": 0.2}  # a tiny base then answers differently to texts
    config = getattr(transformers, name)(**(options | wide | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_config(config).eval()


def batch(seed=9, rows=4, length=8):
    """Return token ids with right padding that differs by row; each text ends in the end token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        end = length - 1 - row % 3
        ids[row, end] = EOS
        ids[row, end + 1 :] = PAD
        mask[row, end + 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model, adapter=None, inputs=None):
    """Return the logits of one task (None: whoever answers) on fixed texts."""
    if adapter is not None:
        model.set_adapter(adapter)
    model.eval()
    with torch.no_grad():
        return model(**(inputs or batch())).logits
