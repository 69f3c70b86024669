"""Run as a program, also under torchrun: train from a YAML file and save the first gradients."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from mlip.training.config import load_config
from mlip.training.module import TrainingModule
from mlip.training.run import train


def main(path: str) -> None:
    """Train; the gradients of every rank at step 1 go to gradients-<rank>.safetensors."""
    clip = TrainingModule.configure_gradient_clipping

    def clip_and_dump(module: TrainingModule, *args: object, **kwargs: object) -> None:
        if module.position.global_step == 0:
            found = module.potential.named_parameters()
            gradients = {n: p.grad.clone() for n, p in found if p.grad is not None}
            folder = Path(path).parent
            save_file(gradients, folder / f"gradients-{module.global_rank}.safetensors")
        clip(module, *args, **kwargs)

    TrainingModule.configure_gradient_clipping = clip_and_dump
    train(load_config(path))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
