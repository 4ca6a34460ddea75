"""A random Llama that vLLM's attention of CPUs takes, and the options of vLLM for it."""

import torch
from tiny_llama import EOS, VOCABULARY
from transformers import AutoModelForCausalLM, LlamaConfig

CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the least that vLLM's attention of CPUs has
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    # Drift of one rounding from position to position stays small.
    "initializer_range": 0.08,
    "tie_word_embeddings": True,
}
OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 256,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 2**22,
    "max_logprobs": 64,
    "disable_log_stats": True,
    "additional_config": {"softgrpo": True},
}


def random_model(seed=0, **changes):
    torch.manual_seed(seed)
    config = LlamaConfig(**(CONFIG | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
