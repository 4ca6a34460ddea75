"""Times GRPO steps of TRL for train_step.py: run by the interpreter that has TRL.

Settings on stdin. Prints one JSON line: {"seconds": [of a step, ...], "peak_gib": ...}.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

# This folder's kernels.py is not the package of that name that transformers looks for.
sys.path[:] = [path for path in sys.path if path != str(Path(__file__).resolve().parent)]


def main() -> None:
    settings = json.loads(sys.stdin.read())
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(settings["threads"])

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *args, **options) -> None:  # noqa: ANN002, ANN003
            self.start = time.perf_counter()

        def on_step_end(self, *args, **options) -> None:  # noqa: ANN002, ANN003
            self.seconds.append(time.perf_counter() - self.start)

    def reward(completions: list[str], **columns: list) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]

    clock = Clock()
    samples, group = settings["prompts"] * settings["group_size"], settings["group_size"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            max_steps=settings["steps"] + 1,
            per_device_train_batch_size=group,
            gradient_accumulation_steps=samples // group,
            num_generations=group,
            max_completion_length=settings["new_tokens"],
            generation_kwargs={"min_new_tokens": settings["new_tokens"]},
            temperature=1.0,
            top_k=5,
            top_p=0.95,
            beta=0.0,
            bf16=settings["dtype"] == "bfloat16",
            use_cpu=True,
            learning_rate=1e-6,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": settings["dtype"]},
        )
        rows = [{"prompt": text} for text in settings["texts"]]
        trainer = GRPOTrainer(
            settings["model"],
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            callbacks=[clock],
        )
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": clock.seconds[1:], "peak_gib": peak}), flush=True)


if __name__ == "__main__":
    main()
