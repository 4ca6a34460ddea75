"""Flat keys for soft tokens in a request, the same for softgrpo-serve and the plug-in of vLLM."""

# Key of a request: field of SoftParams.
INTEGERS = {
    "soft_top_k": "top_k",
    "soft_max_tokens": "max_soft_tokens",
    "soft_min_tokens": "min_soft_tokens",
    "soft_cold_stop_steps": "cold_stop_steps",
    "soft_switch_window": "switch_window",
    "soft_max_switches": "max_switches",
}
NUMBERS = {
    "soft_top_p": "top_p",
    "soft_temperature": "temperature",
    "soft_tau": "tau",
    "soft_weight_floor": "weight_floor",
    "soft_noise_scale": "noise_scale",
    "soft_eps": "eps",
    "soft_cold_stop_entropy": "cold_stop_entropy",
}
# Keys of the noise.
NAMES = ("soft_seed", "soft_uid", "soft_stream")
OTHERS = ("soft", "soft_noise", "soft_end_of_thinking", "soft_clip_low", "soft_clip_high")
SOFT_KEYS = frozenset((*INTEGERS, *NUMBERS, *NAMES, *OTHERS))
