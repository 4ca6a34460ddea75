"""The gradient that a score cannot have: of the right answer's probability, through the mixtures.

The thoughts are deterministic mixtures of the policy's own distributions, so that the expected
reward of a question is the probability of its answer, and its gradient is ordinary: backpropagation
through a pass for each thought, each over the whole sequence so far (a short budget; no cache).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softgrpo_engine.model.decoder import Decoder
from softgrpo_engine.training.group_attention import GroupAttention


def answer_logits(
    decoder: Decoder, prompts: Sequence[list[int]], thoughts: int, dtype: torch.dtype
) -> Tensor:
    """Logits [B, V], float32, after so many thoughts; prompts of one length. Differentiable,
    through the thoughts too. dtype: of the layers."""
    config, table_VH = decoder.config, decoder.embed_weight
    device = table_VH.device
    embeds_BTH = table_VH[torch.tensor(prompts, device=device)]
    for thought in range(thoughts + 1):
        batch, length, width = embeds_BTH.shape
        attention = GroupAttention(
            [length] * batch, [()] * batch, config.num_heads, config.num_kv_heads, device
        )
        positions = torch.arange(length, device=device).repeat(batch)
        hidden_TH = decoder(embeds_BTH.reshape(-1, width).to(dtype), positions, attention)
        hidden_BH = hidden_TH.view(batch, length, width)[:, -1].float()
        logits_BV = decoder.logits(hidden_BH)
        if thought < thoughts:
            mixture_BH = logits_BV.softmax(-1) @ table_VH
            embeds_BTH = torch.cat((embeds_BTH, mixture_BH[:, None]), dim=1)
    return logits_BV


def train(
    decoder: Decoder,
    questions: Sequence[tuple[list[int], int]],
    *,
    thoughts: int,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> list[float]:
    """Raises the expected reward by AdamW; returns it step by step.

    questions: (prompt, id of the answer). The gradient of an expectation: no samples are drawn.
    """
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    rewards = []
    for _ in range(steps):
        chosen = torch.randint(len(questions), (batch,), generator=generator).tolist()
        prompts, answers = zip(*(questions[i] for i in chosen), strict=True)
        logits_BV = answer_logits(decoder, prompts, thoughts, dtype)
        answers_B = torch.tensor(answers, device=logits_BV.device)
        p_B = logits_BV.softmax(-1).gather(1, answers_B[:, None])[:, 0]
        optimizer.zero_grad(set_to_none=True)
        (-p_B.mean()).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        rewards.append(p_B.mean().item())
    return rewards
