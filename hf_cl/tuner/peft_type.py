"""Add a member to PEFT's closed enum of methods, from outside.

PEFT has no entry point for this: `register_peft_method` asks for an existing `PeftType` member. A `str`
enum cannot be subclassed, so the member is built the way `EnumType` builds one. Idempotent, also across
reloads of this module; a test runs on each supported Python.
"""

from peft import PeftType


def extend_peft_type(name: str) -> PeftType:
    """Return the `PeftType` member called `name`, made if there is none."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # Python 3.11 looks members up in the map alone; from 3.12 they are class attributes too.
    type.__setattr__(PeftType, name, member)
    return member
