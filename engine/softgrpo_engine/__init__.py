"""A small paged engine for soft-thinking language models."""

from softgrpo_engine.async_llm import AsyncLLM
from softgrpo_engine.llm import LLM
from softgrpo_engine.outputs import Output, Sample
from softgrpo_engine.params import SamplingParams, SoftParams
from softgrpo_engine.soft_tokens import SoftTokens

__all__ = ["LLM", "AsyncLLM", "Output", "Sample", "SamplingParams", "SoftParams", "SoftTokens"]
