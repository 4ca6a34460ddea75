"""Times vLLM for rollout_throughput.py: run by the interpreter that has vLLM, settings on stdin.

With `soft_tau` it draws soft tokens by our plug-in, which that interpreter has too.

Prints one JSON line: {mode: {batch: [seconds of a repeat, ...]}}.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

# This folder's kernels.py is not the package of that name that transformers looks for.
sys.path[:] = [path for path in sys.path if path != str(Path(__file__).resolve().parent)]
# Two threads without pinning: elsewhere vLLM binds them to cores that this process may not have.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")


def main() -> None:
    settings = json.loads(sys.stdin.read())
    from vllm import LLM, SamplingParams

    sampling = settings["sampling"]
    top_k = sampling["top_k"] if sampling["top_k"] > 0 else 0
    modes = {
        "discrete": sampling | {"top_k": top_k},
        "greedy": {"temperature": 0.0},
    }
    tau, plugin = settings["soft_tau"], {}
    if tau is not None:
        keys = {f"soft_{name}": value for name, value in sampling.items()}
        keys |= {"soft": 1, "soft_tau": tau, "soft_end_of_thinking": -1}
        record = {"logprobs": top_k, "flat_logprobs": True, "extra_args": keys}
        modes = {"soft": sampling | {"top_k": top_k} | record}
        plugin = {"additional_config": {"softgrpo": True}, "max_logprobs": 64}
    llm = LLM(
        settings["model"],
        dtype="bfloat16",
        max_model_len=settings["prompt_tokens"] + settings["new_tokens"],
        max_num_seqs=max(settings["batch_sizes"]),
        enable_prefix_caching=False,
        disable_log_stats=True,
        **plugin,
    )
    draw = random.Random(0)
    seconds: dict[str, dict[int, list[float]]] = {}
    for repeat in range(-1, settings["repeats"]):  # the first round only warms up
        for mode, options in modes.items():
            for batch in settings["batch_sizes"]:
                prompts = [
                    {
                        "prompt_token_ids": draw.choices(
                            range(1000, 40000), k=settings["prompt_tokens"]
                        )
                    }
                    for _ in range(batch)
                ]
                params = SamplingParams(
                    max_tokens=settings["new_tokens"], ignore_eos=True, detokenize=False, **options
                )
                start = time.perf_counter()
                llm.generate(prompts, params, use_tqdm=False)
                if repeat >= 0:
                    taken = seconds.setdefault(mode, {}).setdefault(batch, [])
                    taken.append(time.perf_counter() - start)
    print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
