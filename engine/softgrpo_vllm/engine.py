"""The trainer's `RolloutEngine` on vLLM, which runs in processes of its own."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from softgrpo_engine.outputs import Output, Sample
from softgrpo_engine.params import K_MAX, SamplingParams, SoftParams
from softgrpo_vllm import why_not
from softgrpo_vllm.alive import asking, starting, watch
from softgrpo_vllm.keys import keys_of
from softgrpo_vllm.output import soft_record

if TYPE_CHECKING:
    from vllm import RequestOutput
    from vllm import SamplingParams as Params

if find_spec("vllm") is None:
    raise ImportError("vLLM is not installed: pip install 'softgrpo[vllm]'")

BLOCK_SIZE = 32  # positions of the KV cache that are taken at a time
LEAST_TEMPERATURE = 0.01  # vLLM raises smaller ones to it
FILE_BYTES = 2**30  # weights that lie in memory at a time on their way to vLLM
# What torchrun tells a process of its own group, which vLLM's are not of.
_OF_TORCHRUN = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
                "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # fmt: skip


class VLLMEngine:
    """Rollouts by stock vLLM with the plug-in: the samples that `softgrpo_engine.LLM` draws.

    model: a directory. tensor_parallel: GPUs, from that of this process on. kv_memory: GiB of the
    KV cache on each of them; math.inf or None: what max_batch_size samples of max_model_len need.
    The others are those of `LLM`.
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
        tensor_parallel: int = 1,
    ) -> None:
        from vllm import LLM

        if reason := why_not():
            raise ValueError(reason)
        self.tokenizer, self.weight_version = tokenizer, 0
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.max_batch_size, self.dtype = max_batch_size, getattr(torch, dtype)
        on_gpu = self.device.type == "cuda"
        options: dict[str, Any] = {"max_model_len": max_model_len} if max_model_len else {}
        if kv_memory is None or math.isinf(kv_memory):
            sizes = max_model_len, max_batch_size, tensor_parallel
            kv_memory = kv_gibibytes(model, dtype, *sizes)
        with _own_process_group(self.device, tensor_parallel), starting():
            self.llm = LLM(
                str(model),
                dtype=dtype,
                max_num_seqs=max_batch_size,
                max_num_batched_tokens=max(max_batch_tokens, max_batch_size),
                block_size=BLOCK_SIZE,
                # By itself vLLM would want most of a GPU to be free.
                gpu_memory_utilization=0.01,
                kv_cache_memory_bytes=max(1, int(kv_memory * 2**30)),
                tensor_parallel_size=tensor_parallel,
                max_logprobs=K_MAX,
                enforce_eager=not on_gpu,
                enable_sleep_mode=on_gpu,
                disable_log_stats=True,
                generation_config="vllm",
                additional_config={"softgrpo": True},
                # Logits as the trainer has them: fp32, on any number of GPUs, scaled or capped.
                hf_overrides={"head_dtype": "float32"},
                weight_transfer_config={"backend": "softgrpo_file"},
                **options,
            )
        watch(self.llm.llm_engine.engine_core)
        self.llm.init_weight_transfer_engine({"init_info": {}})
        self.max_model_len: int = self.llm.model_config.max_model_len
        self._vocabulary = self.llm.model_config.get_vocab_size()
        self._ends = _end_ids(model)
        self._ids = itertools.count()

    def check_fits(self, prompts: Seq[list[int]], params: SamplingParams) -> None:
        """Raises ValueError, naming the prompt, unless every prompt and its answer can fit."""
        if params.stop or params.prompt_logprobs is not None:
            raise ValueError("the engine 'vllm' knows no stop strings or prompt_logprobs here")
        if 0 < params.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature={params.temperature:g}: vLLM takes it for {LEAST_TEMPERATURE}, and "
                "the trainer would score other tokens: raise it, or take the engine 'native'"
            )
        for index, prompt in enumerate(prompts):
            most = self.max_model_len - params.max_tokens
            if not 0 < len(prompt) <= most:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens; with max_tokens="
                    f"{params.max_tokens} the context of {self.max_model_len} allows 1 to {most}"
                )

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
        """As `softgrpo.rollout.engines.RolloutEngine` says."""
        engine, coming = self.llm.llm_engine, enumerate(groups)
        keys = self._keys(soft or None, params) | {"soft_seed": seed, "soft_stream": stream}
        opened: dict[int, tuple[list[int], Seq[int], dict[int, Sample]]] = {}
        running: dict[str, tuple[int, int]] = {}  # request: group, place in it
        try:
            while True:
                while len(running) < self.max_batch_size and (new := next(coming, None)):
                    number, (prompt, uids) = new
                    self.check_fits([prompt], params)
                    opened[number] = (prompt, uids, {})
                    for place, uid in enumerate(uids):
                        request_id = f"softgrpo-{next(self._ids)}"
                        running[request_id] = number, place
                        own = self._params(params, keys | {"soft_uid": uid})
                        with asking():
                            engine.add_request(request_id, {"prompt_token_ids": list(prompt)}, own)
                if not running:
                    return
                between_steps()
                with asking():
                    finished = engine.step()
                for output in finished:
                    if not output.finished:
                        continue
                    number, place = running.pop(output.request_id)
                    _, uids, samples = opened[number]
                    samples[place] = self._sample(output, uids[place], number, soft, params)
                for number, (prompt, uids, samples) in list(opened.items()):
                    if len(samples) < len(uids):
                        continue
                    del opened[number]
                    in_order = [sample for _, sample in sorted(samples.items())]
                    yield number, Output(list(prompt), in_order)
        finally:
            engine.abort_request(list(running))

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces the weights (Hugging Face names, every parameter once), through files in memory.
        The engine may sleep."""
        with asking():
            if self.device.type == "cuda" and self.llm.llm_engine.is_sleeping():
                torch.cuda.empty_cache()  # vLLM takes it in a process of its own
                self.llm.wake_up(tags=["weights"])
            self.llm.start_weight_update()
            for part in self._parts(named_tensors):
                with _in_memory(save(part)) as path:
                    self.llm.update_weights({"update_info": {"path": path}})
            self.llm.finish_weight_update(str(version))
            if not self.llm.reset_prefix_cache():
                raise RuntimeError(
                    "vLLM keeps blocks that were computed with the old weights: a request still "
                    "runs; end all samples before an update"
                )
        self.weight_version = version

    def sleep(self, weights: bool = True) -> None:
        """Frees the KV cache and, on the GPU, the weights; those that do not come by
        ``update_weights`` wait in the host's memory. On a CPU vLLM cannot."""
        if self.device.type == "cuda":
            with asking():
                self.llm.sleep(level=2 if weights else 1)

    def wake(self) -> None:
        """Takes the memory again."""
        if self.device.type == "cuda":
            with asking():
                if self.llm.llm_engine.is_sleeping():
                    torch.cuda.empty_cache()
                    self.llm.wake_up()

    def _parts(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """The weights in the engine's dtype, so many bytes at a time."""
        part: dict[str, Tensor] = {}
        size = 0
        for name, tensor in named_tensors:
            part[name] = tensor.detach().to("cpu", self.dtype, copy=True).contiguous()
            size += part[name].nbytes
            if size >= FILE_BYTES:
                yield part
                part, size = {}, 0
        if part:
            yield part

    def _keys(self, soft: SoftParams | None, params: SamplingParams) -> dict[str, Any]:
        """The flat keys of these settings."""
        mass = {"soft_kept_mass": int(params.kept_mass)}
        if soft is None:
            return {"soft": 1, "soft_max_tokens": 0} | mass
        keys = keys_of(soft, self.tokenizer)
        if (end := keys["soft_end_of_thinking"]) >= self._vocabulary:
            raise ValueError(f"end_of_thinking is {end}, outside of {self._vocabulary} tokens")
        return keys | mass

    def _params(self, params: SamplingParams, keys: dict[str, Any]) -> Params:
        from vllm import SamplingParams as Params
        from vllm.sampling_params import RequestOutputKind

        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else self._ends)
        discrete = params.top_k if 1 <= params.top_k <= K_MAX else 1
        return Params(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=max(params.top_k, 0),
            min_p=params.min_p,
            max_tokens=params.max_tokens,
            min_tokens=params.min_tokens,
            stop_token_ids=sorted(ends),
            ignore_eos=True,  # those that end it are named
            logprobs=max(discrete, keys.get("soft_top_k", 1)),
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=keys,
        )

    def _sample(
        self,
        request: RequestOutput,
        uid: int,
        group: int,
        soft: SoftParams | Literal[False] | None,
        params: SamplingParams,
    ) -> Sample:
        output = request.outputs[0]
        record, tokens = soft_record(output), list(output.token_ids)
        mass = None
        if params.kept_mass:
            mass = record.kept_mass.masked_fill(record.soft.kind == 1, torch.nan)
        text = self.tokenizer.decode(tokens, skip_special_tokens=True) if self.tokenizer else ""
        reason: Any = output.finish_reason
        return Sample(text, tokens, record.logprobs, record.soft, reason, uid, group, mass)


def kv_gibibytes(
    model: str | Path,
    dtype: str,
    max_model_len: int | None,
    max_batch_size: int,
    tensor_parallel: int = 1,
) -> float:
    """What the keys and values of so many samples at full length take on each GPU."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(model))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    on_each = -(-heads // tensor_parallel)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    length = max_model_len or config.max_position_embeddings
    blocks = -(-length // BLOCK_SIZE) * max_batch_size + 1
    position = 2 * config.num_hidden_layers * on_each * width * getattr(torch, dtype).itemsize
    return blocks * BLOCK_SIZE * position / 2**30


def _end_ids(model: str | Path) -> set[int]:
    """Tokens that end a sample, as the model's settings have them."""
    from transformers import AutoConfig, GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(str(model)).eos_token_id
    except OSError:
        ends = None
    if ends is None:
        ends = AutoConfig.from_pretrained(str(model)).eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


@contextmanager
def _in_memory(data: bytes) -> Iterator[str]:
    """A path to these bytes for other processes. A file without a name: nothing is left behind by
    a process that is killed, and no mount bounds it (a container's /dev/shm often has 64 MiB)."""
    with open(os.memfd_create("softgrpo-weights"), "wb") as file:
        file.write(data)
        file.flush()
        yield f"/proc/{os.getpid()}/fd/{file.fileno()}"


@contextmanager
def _own_process_group(device: torch.device, gpus: int = 1) -> Iterator[None]:
    """vLLM's processes are fresh ones, of no group of ours, on so many GPUs from that of this one
    on."""
    changes: dict[str, str | None] = dict.fromkeys(_OF_TORCHRUN)
    changes["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    if device.type == "cuda":
        first, visible = torch.cuda.current_device(), os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
        changes["CUDA_VISIBLE_DEVICES"] = ",".join(names[first : first + gpus])
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        yield
    finally:
        _set(before)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
