"""A request made ready for the engine: encoded, named and checked."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

from jinja2 import TemplateError

from softgrpo.serve.errors import ApiError
from softgrpo.serve.protocol import Request
from softgrpo_engine import LLM, SamplingParams
from softgrpo_engine.requests.admission import make_groups
from softgrpo_engine.requests.prompts import Prompt, encode, uids_of_call
from softgrpo_engine.scheduling.kv_cache import PAGE_SIZE

# A longer text cannot fit: it is not even encoded, which would hold up everybody.
_CHARACTERS_A_TOKEN = 32
# Of the tokens of prompts in one answer: few bytes that are sent can ask for gigabytes of them.
_MOST_LOGPROBS = 2**22


@dataclass(frozen=True)
class Job:
    """request: what was asked for. prompts: token ids. params: with their max_tokens. uids: of the
    samples of each prompt."""

    request: Request
    prompts: list[list[int]]
    params: SamplingParams
    uids: list[list[int]]


class Preparation:
    """Makes jobs, in a thread of its own: what cannot be done is refused before it is queued."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        # The engine's thread decodes with its own at the same time.
        self.tokenizer = copy.deepcopy(llm.tokenizer)
        self._context = min(llm.max_model_len, llm.pool.num_pages * PAGE_SIZE)

    def job(self, request: Request) -> Job:
        """Raises ApiError for what no step could compute."""
        if request.is_chat and not self.tokenizer.chat_template:
            raise ApiError(400, "this model has no chat template: use /v1/completions")
        try:
            prompts = [self._encode(i, prompt) for i, prompt in enumerate(request.prompts)]
            params = self._limited(request, prompts)
            self._llm.check_fits(prompts, params)
            _check_echo(request, prompts)
            uids = self._uids(request, prompts)
            self._check_samples(request, prompts, params, uids)
        except (ValueError, TemplateError) as error:
            raise ApiError(400, " ".join(str(error).split())) from None
        return Job(request, prompts, params, uids)

    def _encode(self, index: int, prompt: Prompt) -> list[int]:
        texts = [prompt] if isinstance(prompt, str) else prompt
        length = sum(len(t) if isinstance(t, str) else _characters(t) for t in texts)
        if length > _CHARACTERS_A_TOKEN * self._llm.max_model_len:
            raise ValueError(
                f"prompt {index} has {length} characters, and the context is "
                f"{self._llm.max_model_len} tokens: shorten it"
            )
        return encode(prompt, self.tokenizer)

    def _limited(self, request: Request, prompts: list[list[int]]) -> SamplingParams:
        if request.max_tokens is not None:
            return request.params
        left = self._context - max(map(len, prompts))
        return dataclasses.replace(request.params, max_tokens=max(1, left))

    def _uids(self, request: Request, prompts: list[list[int]]) -> list[list[int]]:
        n = request.params.n
        if request.uid is None:
            return uids_of_call(prompts, n)
        return [[(request.uid + i) % 2**32 for i in range(n)]]

    def _check_samples(
        self,
        request: Request,
        prompts: list[list[int]],
        params: SamplingParams,
        uids: list[list[int]],
    ) -> None:
        """Makes them as the engine will, and lets them go."""
        llm, soft = self._llm, request.soft or None
        seed = params.seed or 0
        make_groups(
            prompts, params, soft, seed, uids, request.noise_stream, llm.config, llm.tokenizer
        )


def _check_echo(request: Request, prompts: list[list[int]]) -> None:
    if request.echo and request.logprobs is not None:
        tokens = request.params.n * sum(map(len, prompts))
        if tokens * (1 + request.logprobs) > _MOST_LOGPROBS:
            raise ValueError(
                f"echo with logprobs={request.logprobs} over {tokens} tokens: at most "
                f"{_MOST_LOGPROBS // (1 + request.logprobs)} in one request"
            )


def _characters(part: int | dict[str, str]) -> int:
    return len(part["content"]) if isinstance(part, dict) else 1
