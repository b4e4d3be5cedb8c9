"""A bilinear classifier: pooling and linear layer in one module, so that one owner can fold both."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rep_plugin.arguments import Channels, Classes, Fraction, checked
from rep_plugin.bilinear.pooling import BilinearPooling
from rep_plugin.errors import ArgumentError

INIT_STD = 0.01


@checked
class BilinearHead(nn.Module):
    """Bilinear pooling, dropout, linear layer: tuple of maps -> logits (N, num_classes).

    The linear layer starts at a standard deviation of 0.01. On features of unit norm it needs large weights: give it about
    100 times the learning rate of the rest. A larger start is no substitute: the gradient of the weights does not depend on
    their size, while the backbone's grows with it (by C times the deviation, 5 at C = 512).

    Args:
        in_channels: channels of the map(s); with ``method=None`` the length of the features.
        num_classes: outputs of the linear layer; 0 leaves it out.
        method: as in :class:`rep_plugin.bilinear.pooling.BilinearPooling`; None: the features come pooled, from a neck.
        drop_rate: probability of the dropout.
        deploy: build what :meth:`switch_to_deploy` leaves.
        pooling: other arguments of :class:`rep_plugin.bilinear.pooling.BilinearPooling`.

    Raises:
        ArgumentError: num_classes < 0, or as the pooling does.

    Example:
        >>> import torch
        >>> from rep_plugin.bilinear import BilinearHead
        >>> head, maps = BilinearHead(8, num_classes=5).eval(), (torch.ones(2, 8, 7, 7),)
        >>> logits = head(maps)
        >>> head.switch_to_deploy()
        >>> head.fc.in_features, torch.allclose(head(maps), logits, atol=1e-5)
        (36, True)
    """

    def __init__(
        self,
        in_channels: Channels | Sequence[Channels],
        num_classes: Classes,
        method: str | None = "full",
        drop_rate: Fraction = 0.0,
        deploy: bool = False,
        **pooling,
    ):
        super().__init__()
        if method is None:
            if pooling:
                raise ArgumentError(f"method=None takes pooled features, got pooling options {sorted(pooling)}")
            self.pool, self.in_features = None, in_channels
        else:
            self.pool = BilinearPooling(in_channels, method, deploy=deploy, **pooling)
            self.in_features = self.pool.out_channels
        self.drop = nn.Dropout(drop_rate)
        self.reset_classes(num_classes)

    def reset_classes(self, num_classes: int) -> None:
        """Put a new linear layer in place; 0 classes: none. Raises ArgumentError for num_classes < 0."""
        if num_classes < 0:
            raise ArgumentError(f"num_classes must be >= 0, got {num_classes}")
        old = getattr(self, "fc", None)
        self.num_classes = num_classes
        self.fc = nn.Linear(self.in_features, num_classes) if num_classes else nn.Identity()
        if num_classes:
            nn.init.normal_(self.fc.weight, std=INIT_STD)
            nn.init.zeros_(self.fc.bias)
        if isinstance(old, nn.Linear):
            self.fc.to(old.weight.device, old.weight.dtype)

    @property
    def foldable(self) -> bool:
        """True while :meth:`switch_to_deploy` has something to fold."""
        has_both = self.pool is not None and isinstance(self.fc, nn.Linear)
        return has_both and self.pool.method == "full" and self.pool.symmetric

    def pre_logits(self, feats: Sequence[Tensor]) -> Tensor:
        """Return the features before the linear layer, (N, D)."""
        return feats[-1] if self.pool is None else self.pool(feats)[-1]

    def forward(self, feats: Sequence[Tensor]) -> Tensor:
        return self.fc(self.drop(self.pre_logits(feats)))

    def switch_to_deploy(self) -> None:
        """Fold a symmetric full head to its upper triangle, half the weights, the same logits.

        A second call, or one on another kind of head, changes nothing. The folded layer stays trainable.
        """
        if self.foldable:
            self.pool.fold_to_triangle_(self.fc)
            self.in_features = self.fc.in_features

    @torch.no_grad()
    def keep_channels_(self, keep: Sequence[int], keep_second: Sequence[int] | None = None) -> None:
        """Go on with these channels of the map(s) alone: pooling and linear layer lose the rest, in place.

        Exact where the others are zero everywhere. The linear layer's parameters stay the same objects.

        Args:
            keep: ascending indices of the first map.
            keep_second: of the second map; None: all.

        Raises:
            ArgumentError: no or unknown indices, or features that come pooled.
        """
        if self.pool is None:
            raise ArgumentError(
                "method=None pools nothing: call keep_channels_ of the neck, which names the columns to keep"
            )
        columns = self.pool.keep_channels_(keep, keep_second)
        self.in_features = self.pool.out_channels
        if isinstance(self.fc, nn.Linear):
            self.fc.weight.data = self.fc.weight.data[:, columns.to(self.fc.weight.device)]
            self.fc.weight.grad, self.fc.in_features = None, self.in_features


@checked
def fold_bilinear_head(model: nn.Module) -> None:
    """Fold the classifier of a model to the upper triangle, in place and without loss; a folded model is left as it is.

    Serves models with a :class:`BilinearHead` (as ``model.head``), and those with a :class:`BilinearPooling` neck and any
    head that has one linear layer ``fc``, such as mmpretrain's ``LinearClsHead``.

    Raises:
        ArgumentError: the model has neither, or the pooling is not a symmetric ``full`` one.

    Example:
        >>> from torch import nn
        >>> from rep_plugin.bilinear import BilinearHead, fold_bilinear_head
        >>> model = nn.ModuleDict({"head": BilinearHead(8, num_classes=5)})
        >>> fold_bilinear_head(model)
        >>> model.head.fc.in_features
        36
    """
    neck, head = getattr(model, "neck", None), getattr(model, "head", None)
    if isinstance(neck, BilinearPooling) and isinstance(getattr(head, "fc", None), nn.Linear):
        if neck.method == "triu":
            return
        neck.fold_to_triangle_(head.fc)
        for name in ("in_channels", "in_features"):
            if hasattr(head, name):
                setattr(head, name, head.fc.in_features)
        return
    if isinstance(head, BilinearHead) and head.pool is not None:
        if not head.foldable and head.pool.method != "triu":
            raise ArgumentError(f"only a symmetric 'full' head folds, got {head.pool.extra_repr()}")
        head.switch_to_deploy()
        return
    raise ArgumentError(
        f"{type(model).__name__} has no bilinear classifier: expected a BilinearHead, or a BilinearPooling neck and a "
        f"head with fc, got neck {type(neck).__name__} and head {type(head).__name__}"
    )
