"""Records of soft requests: asked of vLLM, compared, and replayed through transformers."""

import torch
from torch import Tensor

from softgrpo_kernels import gumbel_noise, soft_weights
from softgrpo_kernels.reference import soft_embedding as reference

SEED = 2**63 + 5


def keys(**settings):
    """The flat keys of SoftParams."""
    names = {"max_soft_tokens": "soft_max_tokens", "min_soft_tokens": "soft_min_tokens"}
    clip = settings.pop("noise_clip", None)
    found = {names.get(name, f"soft_{name}"): value for name, value in settings.items()}
    if clip:
        found |= {"soft_clip_low": clip[0], "soft_clip_high": clip[1]}
    return {"soft": 1} | found


def asked(uid, sampling=None, **soft):
    """vLLM's parameters of a soft request."""
    from vllm import SamplingParams

    extra = keys(**({"end_of_thinking": 2} | soft)) | {"soft_seed": SEED, "soft_uid": uid}
    options = {"temperature": 1.0, "top_k": 5, "max_tokens": 12, "logprobs": 8} | (sampling or {})
    return SamplingParams(flat_logprobs=True, detokenize=False, extra_args=extra, **options)


def generate(llm, prompts, params):
    """The outputs of requests, in order."""
    requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return [out.outputs[0] for out in llm.generate(requests, params, use_tqdm=False)]


def records(llm, prompts, params):
    from softgrpo_vllm.output import soft_record

    return [soft_record(output) for output in generate(llm, prompts, params)]


def same(record, soft, atol):
    """Whether two records have the same tokens, candidates and kinds, and g' up to so much."""
    width = min(soft.ids.shape[1], record.ids.shape[1])
    for name in ("token", "kind", "forced"):
        if not torch.equal(getattr(record, name), getattr(soft, name)):
            return False
    if not torch.equal(record.ids[:, :width], soft.ids[:, :width]):
        return False
    return torch.allclose(record.gprime[:, :width], soft.gprime[:, :width], rtol=0, atol=atol)


@torch.no_grad()
def replay_error(hf, prompt, record, uid, *, tau=0.1, temperature=1.0) -> float:
    """The largest |log p of a soft candidate by transformers - (g' - noise)| with Gumbel noise, the
    recorded mixtures fed."""
    embed_VH = hf.get_input_embeddings().weight
    weights = soft_weights(record.gprime, record.kind, tau)
    mixtures = reference.soft_embedding(record.ids, weights, embed_VH)
    inputs = torch.cat([embed_VH[torch.tensor(prompt)], mixtures])[None, :-1]
    logits = hf(inputs_embeds=inputs).logits[0, -len(record.ids) :].float() / temperature
    listed = logits.gather(1, record.ids.long().clamp(min=0)).masked_fill(
        record.ids < 0, -torch.inf
    )
    position = torch.arange(len(prompt), len(prompt) + len(record.ids))
    key = torch.full_like(position, SEED - 2**64)
    noise: Tensor = gumbel_noise(
        record.ids.clamp(min=0), key, position, torch.full_like(position, uid), 0 * position
    )
    known = (record.kind == 1)[:, None] & (record.ids >= 0)
    return float((listed.log_softmax(-1) - (record.gprime - noise))[known].abs().max())
