"""An oracle for the engine: the same rollouts from transformers' own model, slowly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from softgrpo_engine.outputs import FinishReason, Output, Sample
from softgrpo_engine.params import K_MAX, SamplingParams, SoftParams
from softgrpo_engine.requests.prompts import thinking_end_id
from softgrpo_engine.soft_tokens import SoftTokens
from softgrpo_kernels import SoftToken, embedding_noise, soft_token, soft_weights
from softgrpo_kernels.embedding_noise import root_mean_square, with_noise
from softgrpo_kernels.methods import NOISES, method_of
from softgrpo_kernels.reference import soft_embedding as reference

_DISCRETE, _SOFT = 1, 2  # modes of soft_token


class HFEngine:
    """transformers' forward pass, plain PyTorch for the soft step, one prompt at a time.

    Nothing of the native engine is used: no decoder, pages, scheduler or kernel of ours. Seeds,
    uids and streams mean the same, so in float32 the rollouts are the same. model: a directory that
    transformers loads. The limits of the native engine (kv_memory, max_batch_size,
    max_batch_tokens) are accepted and have no effect.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: Any,
        dtype: str = "bfloat16",
        max_model_len: int | None = None,
        kv_memory: float | None = None,
        max_batch_size: int = 256,
        max_batch_tokens: int = 8192,
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = AutoModelForCausalLM.from_pretrained(
            str(model), dtype=getattr(torch, dtype), attn_implementation="eager"
        )
        self.model.eval().requires_grad_(False).to(self.device)
        self.tokenizer = tokenizer
        longest = self.model.config.max_position_embeddings
        self.max_model_len = max_model_len or longest
        if self.max_model_len > longest:
            raise ValueError(f"max_model_len={max_model_len} is more than the model's {longest}")
        self.weight_version = 0
        self.has_weights = True
        self._parameters = dict(self.model.named_parameters())

    def check_fits(self, prompts: Seq[list[int]], params: SamplingParams) -> None:
        """Raises ValueError, naming the prompt, unless every prompt and its answer can fit."""
        if params.stop or params.min_tokens or params.prompt_logprobs is not None:
            raise ValueError("the engine 'hf' knows no stop, min_tokens or prompt_logprobs")
        for index, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= self.max_model_len - params.max_tokens:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens; with max_tokens="
                    f"{params.max_tokens} the context of {self.max_model_len} allows 1 to "
                    f"{self.max_model_len - params.max_tokens}"
                )

    def generate_groups(
        self,
        prompts: Seq[list[int]],
        params: SamplingParams,
        soft: SoftParams | Literal[False] | None = None,
        *,
        seed: int,
        uids: Seq[Seq[int]],
        stream: int = 0,
    ) -> list[Output]:
        """Samples prompt i once for each uid of ``uids[i]``; soft False or None is discrete."""
        self.check_fits(prompts, params)
        groups = zip(prompts, uids, strict=True)
        return [o for _, o in self.iter_groups(groups, params, soft, seed=seed, stream=stream)]

    def iter_groups(
        self,
        groups: Iterable[tuple[list[int], Seq[int]]],
        params: SamplingParams,
        soft: SoftParams | Literal[False] | None = None,
        *,
        seed: int,
        stream: int = 0,
        between_steps: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, Output]]:
        """Samples (prompt, uids) one after the other; yields (place, Output)."""
        if not self.has_weights:
            raise RuntimeError("the engine has no weights since it slept: call update_weights()")
        for index, (prompt, uids) in enumerate(groups):
            self.check_fits([prompt], params)
            group = _Group(self, prompt, params, soft or None, seed, uids, stream, between_steps)
            yield index, Output(list(prompt), group.run())

    @torch.no_grad()
    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces the weights (Hugging Face names, every parameter once)."""
        missing = set(self._parameters)
        for name, tensor in named_tensors:
            parameter = self._parameters[name]
            if not self.has_weights:
                parameter.data = torch.empty(
                    parameter.shape, dtype=parameter.dtype, device=self.device
                )
            parameter.copy_(tensor)
            missing.remove(name)
        if missing:
            raise ValueError(f"update_weights without {sorted(missing)[0]!r}")
        self.weight_version = version
        self.has_weights = True

    def sleep(self, weights: bool = True) -> None:
        """Frees the weights; they come again by ``update_weights``. There is no KV cache between
        calls."""
        if weights:
            self.has_weights = False
            for parameter in self._parameters.values():  # of their shape, and one number large
                parameter.data = parameter.new_zeros(1).expand(parameter.shape)

    def wake(self) -> None:
        """Nothing: what slept comes by ``update_weights``."""

    def draw(self, logits_BV: Tensor, **arguments: Any) -> SoftToken:
        """The next position of every sample."""
        return soft_token(logits_BV, **arguments, backend="reference")

    def end_ids(self, params: SamplingParams) -> set[int]:
        """Tokens that end a sample."""
        ends = set(params.stop_token_ids)
        own = self.model.generation_config.eos_token_id
        if own is not None and not params.ignore_eos:
            ends |= {own} if isinstance(own, int) else set(own)
        return ends


class _Group:
    """The samples of one prompt, in step: all of them have the same length."""

    def __init__(
        self,
        engine: HFEngine,
        prompt: list[int],
        params: SamplingParams,
        soft: SoftParams | None,
        seed: int,
        uids: Seq[int],
        stream: int,
        between_steps: Callable[[], None],
    ) -> None:
        self._engine, self._prompt, self._params, self._soft = engine, prompt, params, soft
        self._between_steps = between_steps
        self._seed = seed - 2**64 if seed >= 2**63 else seed  # its 64 bits in a signed word
        self._uids, self._stream = list(uids), stream
        self._uids_B = torch.tensor(self._uids, device=engine.device)
        self._embed_VH = engine.model.get_input_embeddings().weight
        self._ends = engine.end_ids(params)
        end = thinking_end_id(soft.end_of_thinking, engine.tokenizer) if soft else None
        self._thinking_end = end
        self._terminal = torch.tensor([[*self._ends, -1 if end is None else end]])
        self._slots = max(
            params.top_k if 1 <= params.top_k <= K_MAX else 1, soft.top_k if soft else 1
        )
        self._soft_B = torch.full((len(self._uids),), soft is not None, device=engine.device)
        self._phases = [_Phase(soft, end) for _ in self._uids] if soft else []
        self._steps: list[_Step] = []
        self._finish: list[FinishReason | None] = [None] * len(self._uids)
        self._lengths = [params.max_tokens] * len(self._uids)

    @torch.inference_mode()
    def run(self) -> list[Sample]:
        """Draws until all have ended."""
        cache = DynamicCache()
        prompt = torch.tensor(self._prompt, device=self._engine.device)
        inputs_BTH = self._embed_VH[prompt].expand(len(self._uids), -1, -1)
        for index in range(self._params.max_tokens):
            self._between_steps()
            result = self._engine.model(
                inputs_embeds=inputs_BTH, past_key_values=cache, use_cache=True
            )
            logits_BV = result.logits[:, -1].float()
            step = self._draw(logits_BV, index)
            self._steps.append(step)
            if self._soft:
                self._choose_phases(step, logits_BV, self._soft)
            for row, token in enumerate(step.ids[:, 0].tolist()):
                if self._finish[row] is None and token in self._ends:
                    self._finish[row], self._lengths[row] = "stop", index + 1
            if all(self._finish):
                break
            inputs_BTH = self._mixtures(step, index)[:, None]
        return [self._sample(row) for row in range(len(self._uids))]

    def _draw(self, logits_BV: Tensor, index: int) -> _Step:
        """A position of every sample: what may not come yet held back, what must come forced."""
        if self._soft and index < self._soft.min_soft_tokens:
            logits_BV[:, [token for token in self._terminal[0].tolist() if token >= 0]] = -torch.inf
        drawn = self._engine.draw(
            logits_BV,
            **_parameters(self._params, self._soft, self._soft_B),
            seed=self._seed,
            position=len(self._prompt) + index,
            uid=self._uids_B,
            stream=self._stream,
            terminal_ids=self._terminal.to(logits_BV.device, torch.int32).expand(
                len(self._uids), -1
            ),
            k_max=self._slots,
            need_kept_mass=True,
        )
        assert drawn.kept_mass is not None
        forced_B = torch.zeros_like(self._soft_B)
        step = _Step(
            drawn.ids, drawn.gprime, drawn.kind, forced_B, drawn.token_logp, drawn.kept_mass
        )
        if self._thinking_end is not None:
            over = torch.tensor([phase.over for phase in self._phases], device=logits_BV.device)
            step.force(over, self._thinking_end)
        return step

    def _choose_phases(self, step: _Step, logits_BV: Tensor, soft: SoftParams) -> None:
        """Which samples draw the next position softly."""
        p_BV = torch.softmax(logits_BV.double() / soft.temperature, dim=-1)
        drawn_B = zip(
            self._phases,
            step.ids[:, 0].tolist(),
            step.kind.tolist(),
            torch.special.entr(p_BV).sum(-1).tolist(),
            strict=True,
        )
        is_soft = [phase.next_is_soft(*position) for phase, *position in drawn_B]
        self._soft_B = torch.tensor(is_soft, device=logits_BV.device)

    def _mixtures(self, step: _Step, index: int) -> Tensor:
        """What stands for the position in the next forward pass [B, H]."""
        soft = self._soft
        weights = soft_weights(step.gprime, step.kind, *(soft.mixture if soft else (1.0,)))
        mixtures_BH = reference.soft_embedding(step.ids, weights, self._embed_VH)
        if not soft or not method_of(soft.noise).adds_noise:
            return mixtures_BH
        noise_BH = embedding_noise(
            mixtures_BH.shape[1],
            self._seed,
            torch.full_like(self._uids_B, len(self._prompt) + index),
            self._uids_B,
            self._stream,
            backend="reference",
        )
        deviation = (root_mean_square(self._embed_VH) * soft.noise_scale).float()
        return with_noise(mixtures_BH, noise_BH, (deviation * step.kind)[:, None])

    def _sample(self, row: int) -> Sample:
        steps = self._steps[: self._lengths[row]]
        ids_TK = torch.stack([step.ids[row] for step in steps]).cpu()
        tokens = ids_TK[:, 0].tolist()
        return Sample(
            text=self._engine.tokenizer.decode(tokens, skip_special_tokens=True),
            token_ids=tokens,
            logprobs=torch.stack([step.logp[row] for step in steps]).cpu(),
            soft=SoftTokens(
                ids=ids_TK,
                gprime=torch.stack([step.gprime[row] for step in steps]).cpu(),
                kind=torch.stack([step.kind[row] for step in steps]).cpu(),
                forced=torch.stack([step.forced[row] for step in steps]).cpu(),
                token=ids_TK[:, 0].clone(),
            ),
            finish_reason=self._finish[row] or "length",
            uid=self._uids[row],
            kept_mass=torch.stack([step.kept_mass[row] for step in steps]).cpu()
            if self._params.kept_mass
            else None,
        )


class _Phase:
    """Of one sample: whether its next position is soft, from all that it has drawn so far.

    over: the next position is the end of thinking.
    """

    def __init__(self, soft: SoftParams, thinking_end: int | None) -> None:
        self._soft, self._thinking_end = soft, thinking_end
        self._entropies: list[float] = []
        self._switches = [0]  # positions from which on thinking is soft, discrete, soft, ...
        self._answers = self.over = False

    def next_is_soft(self, token: int, kind: int, entropy: float) -> bool:
        if self._answers:
            return False
        soft, n = self._soft, len(self._entropies) + 1
        self._entropies.append(entropy)
        was_soft = len(self._switches) % 2 == 1
        if token == self._thinking_end or (was_soft and kind == 0):
            self._answers, self.over = True, False
            return False
        over = soft.max_soft_tokens is not None and n >= soft.max_soft_tokens
        if soft.cold_stop_entropy is not None:
            last = self._entropies[-soft.cold_stop_steps :]
            cold = len(last) == soft.cold_stop_steps and max(last) < soft.cold_stop_entropy
            over |= cold and n >= soft.min_soft_tokens
        elif soft.switch_window is not None:
            since = self._switches[-1]
            reference = self._entropies[max(since - 1, 0)]
            rises = entropy > reference and n - since >= soft.switch_window
            if entropy < reference if was_soft else rises:
                if len(self._switches) - 1 == soft.max_switches:
                    over |= n >= soft.min_soft_tokens
                else:
                    self._switches.append(n)
        self.over = over and self._thinking_end is not None
        self._answers = over and self._thinking_end is None
        return len(self._switches) % 2 == 1 and not self._answers


@dataclass(frozen=True)
class _Step:
    """One position of all samples: ids, gprime [B, K]; kind, forced, logp, kept_mass [B]."""

    ids: Tensor
    gprime: Tensor
    kind: Tensor
    forced: Tensor
    logp: Tensor
    kept_mass: Tensor

    def force(self, rows_B: Tensor, token: int) -> None:
        """Puts ``token`` there, whatever was drawn."""
        self.ids[rows_B] = -1
        self.ids[rows_B, 0] = token
        self.gprime[rows_B] = -torch.inf
        self.gprime[rows_B, 0] = 0.0
        self.kind[rows_B] = 0
        self.forced[rows_B] = True
        self.logp[rows_B] = 0.0
        self.kept_mass[rows_B] = 1.0


def _parameters(params: SamplingParams, soft: SoftParams | None, soft_B: Tensor) -> dict[str, Any]:
    """Arguments of soft_token: of the soft phase where a sample is in it."""
    greedy = params.temperature == 0
    discrete = {
        "temperature": params.temperature or 1.0,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "mode": 0 if greedy else _DISCRETE,
    }
    if soft is None:
        return discrete
    of_soft = {
        "temperature": soft.temperature,
        "top_k": soft.top_k,
        "top_p": soft.top_p,
        "min_p": 0.0,
        "mode": _SOFT,
    }
    return {
        **{name: torch.where(soft_B, of_soft[name], discrete[name]) for name in discrete},
        "gumbel_tau": soft.tau,
        "weight_floor": soft.weight_floor,
        "noise": NOISES[method_of(soft.noise).code],
        "noise_scale": soft.noise_scale,
        "noise_clamp": soft.noise_clip,
        "eps": soft.eps,
    }
