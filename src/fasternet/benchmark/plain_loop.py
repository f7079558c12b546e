"""The yardstick of ``bench training``: a plain training loop over timm's own parts, as one would write it today.

Network, pictures, loader, loss, average of the weights: all timm's. Only what the recipe says is set. S is the side of
the training pictures.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from fasternet.models.checkpoint import Preprocessing
from fasternet.rivals.network import is_fasternet
from fasternet.train.optim import BETAS
from fasternet.train.recipe import Recipe


class PlainLoop:
    """Trains one of timm's networks on a folder of pictures, at a constant rate.

    Args:
        name: timm's name of the network.
        folder: A folder of pictures per class.
        recipe: How to train; what ``training.find_obstacle`` refuses is not here.
        num_classes: Outputs of the network.
        preprocessing: Normalisation and interpolation of the pictures; ``input_size`` is S.
        num_workers: Processes that load pictures.
        device: Where to compute.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        recipe: Recipe,
        *,
        num_classes: int,
        preprocessing: Preprocessing,
        num_workers: int,
        device: torch.device,
    ) -> None:
        self.recipe, self.device = recipe, device
        self.layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        options = {"drop_path_rate": 0.0} if is_fasternet(name) else {}  # timm's FasterNet has 0.1 unless told
        model = timm.create_model(name, num_classes=num_classes, **options)
        self.model: nn.Module = model.to(device=device, memory_format=self.layout)
        self.average = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.effective_lr, betas=BETAS, weight_decay=recipe.weight_decay, fused=True
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.criterion = LabelSmoothingCrossEntropy(recipe.label_smoothing)
        self.num_updates = 0
        self.loader: Iterable[Any] = create_loader(
            create_dataset("", root=str(folder), search_split=False, is_training=True),
            input_size=preprocessing.input_size,
            batch_size=recipe.batch_size,
            is_training=True,
            scale=recipe.random_resized_crop,
            hflip=0.5 if recipe.flip else 0.0,
            color_jitter=0.0,
            auto_augment=recipe.rand_augment,
            interpolation=preprocessing.interpolation,
            mean=preprocessing.mean,
            std=preprocessing.std,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=device.type == "cuda",
            device=device,
        )

    def train_epoch(self, batches: Iterable[tuple[Tensor, Tensor]] | None = None) -> float:
        """Train on all pictures of the folder, or on the batches given; return the mean loss."""
        recipe, losses = self.recipe, []
        dtype = torch.float16 if recipe.precision == "fp16" else torch.bfloat16
        self.model.train()
        for images, labels in self.loader if batches is None else batches:
            images = images.to(self.device, memory_format=self.layout)  # (n, 3, S, S)
            labels = labels.to(self.device)
            with torch.autocast(self.device.type, dtype, enabled=recipe.precision != "fp32"):
                loss = self.criterion(self.model(images), labels)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            if recipe.clip_grad is not None:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_grad)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.average is not None:
                self.average.update(self.model, step=self.num_updates)
            self.num_updates += 1
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())
