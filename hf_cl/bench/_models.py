"""Models of named sizes with random weights: plain, with finished masks, and with LoRA. Time depends on no weight."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from hf_cl import MaskConfig

SIZES = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
VOCABULARY = {"tiny": 500, "minilm": 30522, "bert-base": 30522}
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
LABELS, DENSITY, RANK = 15, 0.01, 8
UNKNOWN = "[UNK]"


def shapes(size: str) -> list[tuple[int, int]]:
    """Return the shapes of the masked linears: four of attention and two of the feed-forward part a layer."""
    sizes = SIZES[size]
    wide, inner = sizes["hidden_size"], sizes["intermediate_size"]
    return [*[(wide, wide)] * 4, (inner, wide), (wide, inner)] * sizes["num_hidden_layers"]


def masked_entries(size: str) -> int:
    """Return how many weights are masked."""
    return sum(rows * columns for rows, columns in shapes(size))


def plain(size: str, device: str = "cpu", labels: int = LABELS) -> Any:
    """Return a classifier of a named size; always the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(vocab_size=VOCABULARY[size], num_labels=labels, **SIZES[size])
        return BertForSequenceClassification(config).to(device).eval()


def batch(size: str, rows: int, length: int, device: str = "cpu") -> dict[str, Tensor]:
    """Return `rows` texts of `length` tokens, (rows, length) int64, without padding; always the same."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY[size], (rows, length), generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def masked(size: str, tasks: int, device: str = "cpu", density: float = DENSITY) -> Any:
    """Return a model with finished tasks `task0`, `task1`, ... of random masks."""
    generator, model = torch.Generator().manual_seed(0), None
    for task in range(tasks):
        config = MaskConfig(task_type="SEQ_CLS", density=density, scale=1.0, num_labels=LABELS)
        config.__dict__["arrives"] = True  # its masks are installed, so no scores are made
        if model is None:
            model = get_peft_model(plain(size, device), config, adapter_name="task0")
        else:
            model.add_adapter(f"task{task}", config)
        tuner: Any = model.base_model
        for layer in tuner.mask_layers():
            mask = torch.rand(layer.base_layer.weight.shape, generator=generator) < density
            layer.install(f"task{task}", mask.to(device), None)
        tuner.finish(f"task{task}")
    assert model is not None
    return model.eval()


def lora_config() -> LoraConfig:
    """Return LoRA of rank 8 on the layers that are masked."""
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="SEQ_CLS")


def with_lora(size: str, tasks: int, device: str = "cpu") -> Any:
    """Return a model with as many LoRA adapters, `task0`, `task1`, ..., none of which is zero."""
    model = get_peft_model(plain(size, device), lora_config(), adapter_name="task0")
    for task in range(1, tasks):
        model.add_adapter(f"task{task}", lora_config())
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    return model.eval()


def tokenizer(words: int = 0) -> Any:
    """Return a tokenizer that knows the words `w0`, `w1`, ..., numbered from 5 on."""
    vocabulary = {UNKNOWN: 0, "[PAD]": 1, **{f"w{number}": 5 + number for number in range(words)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=UNKNOWN, pad_token="[PAD]")
