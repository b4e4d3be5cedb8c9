"""One training, twice: as PyTorch's parts run it, and down to the averaged gradients of every real step, written by hand."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def batches(count: int, amp: bool = False) -> list:
    """Pictures (4, 3, 8, 8) and two classes, always the same."""
    generator = torch.Generator().manual_seed(5)
    dtype = torch.float32 if amp else torch.float64  # mixed precision casts single precision only
    return [
        (torch.randn(4, 3, 8, 8, generator=generator, dtype=dtype), torch.randint(0, 2, (4,), generator=generator))
        for _ in range(count)
    ]


def data_of(dtype: torch.dtype | None, accumulate: int) -> list:
    """Eight batches in double precision; in mixed precision those of one step, before rounding grows."""
    return batches(8 if dtype is None else accumulate, dtype is not None)


def gradients_by_hand(
    model: nn.Module, dtype: torch.dtype | None, accumulate: int, clip: float | None, scale: float, ranks: int = 1
) -> Iterator[dict[nn.Parameter, Tensor]]:
    """Yield the gradients of every real step: averaged, unscaled, clipped; under no_grad, the model to be changed by them.

    ``ranks``: every batch comes in so many parts, each normalised alone, and gradients are their mean.
    """
    for i, (x, target) in enumerate(data_of(dtype, accumulate)):
        for part, truth in zip(x.chunk(ranks), target.chunk(ranks)):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = nn.functional.cross_entropy(model(part), truth) / accumulate / ranks
            (loss * scale).backward()
        if (i + 1) % accumulate:
            continue
        with torch.no_grad():
            grads = {p: p.grad / scale for p in model.parameters()}
            if clip:
                norm = torch.cat([g.flatten() for g in grads.values()]).norm()
                grads = {p: g * min(1.0, clip / (norm + 1e-6)) for p, g in grads.items()}
            yield grads
            for p in model.parameters():
                p.grad = None


def run_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype | None,
    accumulate: int,
    clip: float | None,
    scaler: torch.amp.GradScaler | None = None,
    rank: int | None = None,
) -> None:
    """The same with what users have; as one of two connected processes where ``rank`` says which."""
    wrapped = model if rank is None else nn.parallel.DistributedDataParallel(model)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for i, (x, target) in enumerate(data_of(dtype, accumulate)):
        if rank is not None:
            x, target = x.chunk(2)[rank], target.chunk(2)[rank]
        waits = (i + 1) % accumulate != 0
        with wrapped.no_sync() if waits and rank is not None else contextlib.nullcontext():
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = nn.functional.cross_entropy(wrapped(x), target) / accumulate
            scaler.scale(loss).backward()
        if waits:
            continue
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def new_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=256.0)
