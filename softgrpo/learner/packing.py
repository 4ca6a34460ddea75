"""How the tokens of a pass lie one behind the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softgrpo.rollout.batch import RolloutBatch


@dataclass(frozen=True)
class PackedInputs:
    """Layout of a pass: ``[prompt | response | response | ...]`` for every group.

    The last token of a response predicts nothing and is not fed. token_ids, positions: int64
    [T_in], what is read at each packed row and where it stands in its sequence. predictors: int64
    [T], the packed row that predicts each response token; the first tokens of a group share the
    last row of their prompt. mixed: int64 [M], the packed rows whose input is a mixture;
    mixed_from: int64 [M], the response tokens that they were mixed for.
    """

    prompt_lens: list[int]
    response_lens: list[list[int]]
    token_ids: Tensor
    positions: Tensor
    predictors: Tensor
    mixed: Tensor
    mixed_from: Tensor

    @staticmethod
    def of(batch: RolloutBatch) -> PackedInputs:
        """Of a batch, on the host as it is."""
        prompt_lens = batch.prompt_lens.tolist()
        group, lens = batch.group.tolist(), batch.response_lens.tolist()
        prompts, tokens = batch.prompt_ids.long(), batch.soft.token.long()
        fed: list[list[int]] = [[] for _ in prompt_lens]
        token_ids, positions, predictors = [], [], []
        source = []  # the response token of a packed row, -1 in a prompt
        row = prompt_start = token_start = sample = 0
        for g, prompt_len in enumerate(prompt_lens):
            positions.append(torch.arange(prompt_len))
            token_ids.append(prompts[prompt_start : prompt_start + prompt_len])
            source.append(torch.full((prompt_len,), -1))
            prompt_start += prompt_len
            row += prompt_len
            last_prompt_row = row - 1
            while sample < len(group) and group[sample] == g:
                length = lens[sample]
                inputs = max(length - 1, 0)
                fed[g].append(inputs)
                positions.append(torch.arange(prompt_len, prompt_len + inputs))
                token_ids.append(tokens[token_start : token_start + inputs])
                source.append(torch.arange(token_start, token_start + inputs))
                if length:
                    predictors.append(torch.tensor([last_prompt_row]))
                predictors.append(torch.arange(row, row + inputs))
                row += inputs
                token_start += length
                sample += 1
        source_T = torch.cat(source)
        mixed = ((source_T >= 0) & batch.soft.kind.bool()[source_T]).nonzero()[:, 0]
        return PackedInputs(
            prompt_lens,
            fed,
            torch.cat(token_ids),
            torch.cat(positions),
            torch.cat(predictors),
            mixed,
            source_T[mixed],
        )
