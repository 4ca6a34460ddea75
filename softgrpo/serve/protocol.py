"""Bodies of requests: what is asked for, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from softgrpo.serve.errors import ApiError
from softgrpo.serve.fields import Fields, read_object, wrong
from softgrpo.serve.soft_keys import soft_fields, soft_params
from softgrpo_engine import SamplingParams, SoftParams
from softgrpo_engine.params import K_MAX
from softgrpo_engine.requests.prompts import Prompt

# Stop strings are looked for at every token, in the event loop too: long ones would hold it up.
_MOST_STOPS, _LONGEST_STOP, _MOST_PROMPTS = 16, 256, 2048
# What the engine does not do: a request that leaves it at this value asks for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "suffix": ("",),
    "use_beam_search": (False,),
    "best_of": (1,),
    "length_penalty": (1,),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "tools": ([],),
    "functions": ([],),
    "modalities": (["text"],),
    "web_search_options": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "truncate_prompt_tokens": (),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
}
# OpenAI's newer name. The templates of models know the older one, and may drop a role they do not.
_ROLES = {"developer": "system"}


@dataclass(frozen=True)
class Request:
    """One body of /v1/chat/completions (is_chat) or /v1/completions.

    params: its max_tokens counts only where max_tokens is given; else the rest of the context.
    uid: the name of the first sample, None for names from the prompt. noise_stream: `stream` of
    `LLM.submit`. logprobs: alternatives shown at a position, None for no log-probabilities at all.
    echo: the prompt comes before the answer, with its log-probabilities. tokens_as_ids: tokens are
    written "token_id:33". return_soft: the record. return_positions: every position as in
    samples.jsonl.
    """

    is_chat: bool
    model: str | None
    prompts: list[Prompt]
    params: SamplingParams
    max_tokens: int | None
    soft: SoftParams | Literal[False]
    uid: int | None
    noise_stream: int
    stream: bool
    include_usage: bool
    logprobs: int | None
    echo: bool
    tokens_as_ids: bool
    return_soft: bool
    return_positions: bool


def parse_request(body: bytes, *, is_chat: bool, default_soft: SoftParams | None) -> Request:
    """Reads a body; unknown fields are ignored, apart from soft ones. Raises ApiError."""
    fields = Fields(read_object(body))
    for name, allowed in _UNSUPPORTED.items():
        if name in fields and fields.values[name] not in allowed:
            raise ApiError(400, f"{name} is not supported by this server: leave it out", name)
    keys = soft_fields(fields)
    is_streamed, echo = fields.boolean("stream"), fields.boolean("echo") and not is_chat
    if echo and is_streamed:
        raise ApiError(400, "echo and stream do not go together: leave one of them out", "echo")
    prompts = _messages(fields) if is_chat else _prompts(fields)
    uid = keys.integer("soft_uid")
    if uid is not None and uid < 0:
        raise wrong("soft_uid", uid, ">= 0 and < 2^32")
    if uid is not None and len(prompts) > 1:
        raise ApiError(400, "soft_uid names the samples of one prompt: send one", "soft_uid")
    logprobs = _logprobs(fields, is_chat)
    max_tokens = _max_tokens(fields, is_chat)
    try:
        params = _sampling_params(fields, keys, max_tokens, logprobs if echo else None)
        soft = soft_params(keys, default_soft)
    except ValueError as error:
        raise ApiError(400, str(error)) from None
    return Request(
        is_chat=is_chat,
        model=fields.string("model"),
        prompts=prompts,
        params=params,
        max_tokens=max_tokens,
        soft=soft,
        uid=uid,
        noise_stream=keys.integer("soft_stream") or 0,
        stream=is_streamed,
        include_usage=_includes_usage(fields),
        logprobs=logprobs,
        echo=echo,
        tokens_as_ids=fields.boolean("return_tokens_as_token_ids"),
        return_soft=fields.boolean("return_soft"),
        return_positions=fields.boolean("return_positions"),
    )


def _sampling_params(
    fields: Fields, keys: Fields, max_tokens: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    # A seed may be any integer, also below zero.
    seed = keys.values.get("soft_seed", fields.values.get("seed"))
    if seed is not None and type(seed) is not int:
        raise wrong("seed", seed, "an integer")
    given: dict[str, Any] = {
        "n": fields.integer("n"),
        "temperature": fields.number("temperature"),
        "top_p": fields.number("top_p"),
        "top_k": fields.integer("top_k"),
        "min_p": fields.number("min_p"),
        "min_tokens": fields.integer("min_tokens"),
        "seed": None if seed is None else seed % 2**64,
        "stop": fields.strings("stop", _MOST_STOPS, _LONGEST_STOP),
        "stop_token_ids": fields.integers("stop_token_ids"),
        "ignore_eos": fields.boolean("ignore_eos"),
        "prompt_logprobs": prompt_logprobs,
    }
    limit = 2**31 - 1 if max_tokens is None else max(1, max_tokens)
    values = {name: value for name, value in given.items() if value is not None}
    return SamplingParams(max_tokens=limit, **values)


def _max_tokens(fields: Fields, is_chat: bool) -> int | None:
    """None for what is left of the context. 0 asks for a prompt's log-probabilities alone."""
    name = "max_tokens"
    if is_chat and "max_completion_tokens" in fields:
        name = "max_completion_tokens"
    value = fields.integer(name)
    if value is None and not is_chat:
        value = 16  # OpenAI's
    least = 0 if fields.boolean("echo") and not is_chat else 1
    if value is not None and value < least:
        raise wrong(name, value, f">= {least}")
    return value


def _logprobs(fields: Fields, is_chat: bool) -> int | None:
    name = "top_logprobs" if is_chat else "logprobs"
    value = fields.integer(name)
    if is_chat and not fields.boolean("logprobs"):
        if value:
            raise ApiError(400, f"{name}={value} needs logprobs=true", name)
        return None
    if value is not None and not 0 <= value <= K_MAX:
        raise wrong(name, value, f">= 0 and <= {K_MAX}")
    return value or 0 if is_chat else value


def _includes_usage(fields: Fields) -> bool:
    options = fields.values.get("stream_options", {})
    if not isinstance(options, dict):
        raise wrong("stream_options", options, "an object")
    return Fields(options).boolean("include_usage")


def _prompts(fields: Fields) -> list[Prompt]:
    """A text, token ids, or a list of these."""
    value = fields.values.get("prompt")
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if len(value) > _MOST_PROMPTS:
            raise ApiError(400, f"{len(value)} prompts: at most {_MOST_PROMPTS} at once", "prompt")
        if all(isinstance(item, str) or _is_ids(item) for item in value):
            return list(value)
    allowed = "a text, a list of token ids, or a list of these"
    raise wrong("prompt", value, allowed)


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _messages(fields: Fields) -> list[Prompt]:
    value = fields.values.get("messages")
    if not isinstance(value, list) or not value:
        raise wrong("messages", value, "a non-empty list")
    return [[_message(i, message) for i, message in enumerate(value)]]


def _message(index: int, message: object) -> dict[str, str]:
    """Role and text, the parts of a text joined."""
    where = f"messages[{index}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError(400, f"{where} must be an object with a role and a content", where)
    if message.get("tool_calls"):
        raise ApiError(400, f"{where}.tool_calls is not supported by this server", where)
    role, content = str(message["role"]), message.get("content")
    if content is None and role == "assistant":
        content = ""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise ApiError(400, f"{where}.content must be a text: this model reads nothing else", where)
    return {"role": _ROLES.get(role, role), "content": "".join(text for text in texts if text)}
