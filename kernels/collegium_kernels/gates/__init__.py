"""Every gate by name. Importing this imports none of them."""

from importlib import import_module
from typing import Any

from collegium_kernels.errors import KernelInputError
from collegium_kernels.gates.base import Card

# A gate is made with (width, num_experts) and options.
GATES = {
    "switch": "switch:SwitchGate",
    "gshard": "gshard:GShardGate",
    "mixtral": "mixtral:MixtralGate",
    "deepseek": "deepseek:DeepSeekGate",
    "yuan": "yuan:YuanGate",
    "expert_choice": "expert_choice:ExpertChoiceGate",
    "stable_moe": "stable_moe:StableMoEGate",
    "hash": "hashed:HashGate",
    "thor": "thor:RandomGate",
    "dselect_k": "dselect_k:DSelectKGate",
    "comet": "comet:CometGate",
    "remoe": "remoe:ReMoEGate",
    "dynmoe": "dynmoe:DynMoEGate",
    "top_p": "top_p:TopPGate",
    "adamoe": "adamoe:AdaMoEGate",
    "moe_plus_plus": "moe_plus_plus:MoEPlusPlusGate",
    "xmoe": "xmoe:XMoEGate",
    "adaptive": "adaptive:AdaptiveGate",
    "da_moe": "da_moe:DAMoEGate",
    "rmoe": "rmoe:RMoEGate",
    "pregated": "pregated:PreGate",
    "read_me": "read_me:ReadMeGate",
    "mowe": "mowe:WordGate",
    "smile": "smile:SmileGate",
    "sparse_mixer": "sparse_mixer:SparseMixerGate",
    "mask_moe": "mask_moe:MaskMoEGate",
}
# Not a gate before ordinary experts, but a layer, a loss or a way to decode: each has its own call.
OTHERS = {
    "aoe": "aoe:AoELayer",
    "vqmoe": "vqmoe:VQMoELayer",
    "cartesian": "cartesian:CartesianLayer",
    "mh_moe": "mh_moe:MultiHeadMoELayer",
    "peer": "peer:PeerLayer",
    "ultramem": "ultramem:UltraMemLayer",
    "mod": "mod:MoDLayer",
    "moa": "moa:MixtureOfHeads",
    "moba": "moba:moba_attention",
    "mixture_of_tokens": "mixture_of_tokens:MixtureOfTokens",
    "meo": "meo:MergedExperts",
    "shortcut": "shortcut:ShortcutLayer",
    "task_level": "task_level:TaskLevelGate",
    "balance_loss": "losses:balance_loss",
    "z_loss": "losses:z_loss",
    "global_balance_loss": "losses:global_balance_loss",
    "mutual_information_loss": "losses:mutual_information_loss",
    "scmoe": "scmoe:self_contrast",
}
CARDS = {
    "balance_loss": "losses:BALANCE_CARD",
    "z_loss": "losses:Z_CARD",
    "global_balance_loss": "losses:GLOBAL_CARD",
    "mutual_information_loss": "losses:MUTUAL_CARD",
}


def load(name: str) -> Any:
    """The class or function behind a name. Raises KernelInputError, with all of them, for a name that is none."""
    return _load(_target(name))


def card(name: str) -> Card:
    """What docs/gates.md says of it."""
    found: Card = _load(CARDS.get(name) or _target(name).partition(":")[0] + ":CARD")
    return found


def _target(name: str) -> str:
    known = GATES | OTHERS
    if name not in known:
        raise KernelInputError(f"gate '{name}' is not one of {', '.join(sorted(known))}.")
    return known[name]


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(import_module(f"collegium_kernels.gates.{module}"), attribute)
