"""Two steps on a tiny model, as a script that torchrun can start: MODEL OUTPUT."""

import json
import os
import sys
from pathlib import Path

from datasets import Dataset
from trl import GRPOConfig

from softgrpo.trl import SoftConfig, SoftGRPOTrainer


def reward(completions, **columns):
    return [float(text.count("a") + text.count("e")) for text in completions]


def main(model, output):
    """Writes the row of each step to a file; the samples of a step are eight in any case."""
    args = GRPOConfig(
        output_dir=f"{output}.run",
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", 1)),
        num_generations=4,
        max_completion_length=8,
        max_steps=2,
        learning_rate=1e-2,
        beta=0.1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    data = Dataset.from_list([{"prompt": text} for text in ("aaabac", "adaeafagah", "bb", "cacb")])
    soft = SoftConfig(tau=0.5)
    trainer = SoftGRPOTrainer(model, reward, args, data, soft=soft, objective="concrete")
    trainer.train()
    if trainer.accelerator.is_main_process:
        rows = [row for row in trainer.state.log_history if "grad_norm" in row]
        Path(output).write_text(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
