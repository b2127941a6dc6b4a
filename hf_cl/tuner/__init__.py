"""Masked adapters as a PEFT method; importing this registers it.

Without this import PEFT answers a saved masked adapter with a bare `KeyError: 'HFCL'`.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from hf_cl.tuner.config import MASK as MASK
from hf_cl.tuner.config import MaskConfig as MaskConfig
from hf_cl.tuner.layer import MaskLinear as MaskLinear
from hf_cl.tuner.model import MaskModel as MaskModel
from hf_cl.tuner.own_layer import OwnLayer as OwnLayer

if MASK not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="hfcl", config_cls=MaskConfig, model_cls=MaskModel, prefix="hfcl_")
