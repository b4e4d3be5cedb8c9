"""timm's classifier interface for our backbones: one mixin, nothing of it copied for each network."""

from typing import TYPE_CHECKING, Annotated

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from rep_plugin.arguments import Channels, Classes, Fraction, OneOf, checked
from rep_plugin.errors import ArgumentError

FAST = ("fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax")
Pool = Annotated[
    str, OneOf(("avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax", ""))
]


@checked
class ClassifierMixin(nn.Module):
    """Give a :class:`rep_plugin.backbones.staged.StagedNetwork` timm's interface: write it before the network.

    (N, in_chans, H, W) -> logits (N, num_classes).

    Args:
        num_classes: classes, 0 for pooled features.
        in_chans: channels of the images.
        global_pool: one of timm's pools, or "" for none, which needs ``num_classes=0``.
        drop_rate: dropout before the classifier.
        **backbone_args: the network's own arguments; ``output_stride`` is 32 by default, as timm's.
    """

    if TYPE_CHECKING:  # TorchScript reads annotations of a class, and knows no containers
        global_pool: nn.Module
        stages: nn.Sequential

    def __init__(
        self,
        num_classes: Classes = 1000,
        in_chans: Channels = 3,
        global_pool: Pool = "avg",
        drop_rate: Fraction = 0.0,
        **backbone_args,
    ):
        super().__init__(in_channels=in_chans, **backbone_args)
        self.in_chans, self.drop_rate, self.grad_checkpointing = in_chans, drop_rate, False
        self.num_features = self.head_hidden_size = self.out_channels[-1]
        # As timm's own networks: the last part before each step down, and of the network, dilated or not.
        parts = [(self.stem_channels, self.stem_reduction, "stem")]
        for index, step in enumerate(self.steps):
            if step.stride == 1 and not step.unstrided:
                parts.pop()
            parts.append((self.out_channels[index], self.reductions[index], f"stages.{index}"))
        self.feature_info = [
            {"num_chs": channels, "reduction": reduction, "module": module} for channels, reduction, module in parts
        ]
        self.reset_classifier(num_classes, global_pool)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's parameter groups for layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages in the backward pass instead of keeping their maps."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier layer."""
        return self.classifier

    @checked
    def reset_classifier(self, num_classes: Classes, global_pool: Pool | None = None) -> None:
        """Put a fresh classifier of ``num_classes`` (0: none, the model then returns pooled features).

        Args:
            num_classes: classes.
            global_pool: one of timm's pools, or "" for none; None keeps the present one.

        Raises:
            ArgumentError: a classifier without pooling; the model stays as it was.
        """
        pools = self.global_pool.pool_type if global_pool is None else global_pool
        if num_classes and not pools:
            raise ArgumentError(f"without pooling there is no classifier: num_classes must be 0, got {num_classes}")
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        width = self.num_features * (self.global_pool.feat_mult() if num_classes > 0 else 1)
        like = next(self.parameters())
        self.classifier = nn.Linear(width, num_classes) if num_classes > 0 else nn.Identity()
        self.classifier.to(like.device, like.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map, (N, num_features, H', W')."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x, flatten=True)
        else:
            x = self.stages(x)
        return self.finish(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits.

        Args:
            x: the last map, (N, num_features, H', W').
            pre_logits: return the pooled features (N, num_features) instead.
        """
        x = self.global_pool(x)
        x = nn.functional.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """Return the final map and the chosen intermediate ones.

        Args:
            x: images, (N, in_chans, H, W).
            indices: indices into ``feature_info``, or how many of its last entries; None for all.
            norm: give the last stage's map as it leaves the network.
            stop_early: run no stage that is not needed; the final map is then the last one that was run.
            output_fmt: NCHW.
            intermediates_only: return the list of maps alone.

        Raises:
            ArgumentError: another ``output_fmt``.
        """
        if output_fmt != "NCHW":
            raise ArgumentError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        take, stop = {self._stages_up_to(i) for i in wanted}, self._stages_up_to(last)
        x = self.stem(x)
        intermediates = [x] if 0 in take else []
        for count, stage in enumerate(self.stages[:stop] if stop_early else self.stages, 1):
            x = stage(x)
            if count in take:
                intermediates.append(self.outgoing(count - 1, x) if norm else x)
        if intermediates_only:
            return intermediates
        return self.finish(x) if not stop_early else x, intermediates

    def _stages_up_to(self, index: int) -> int:
        """How many stages have run when entry ``index`` of ``feature_info`` is there."""
        module = self.feature_info[index]["module"]
        return 0 if module == "stem" else int(module.split(".")[1]) + 1

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen intermediates do not need; return their indices.

        Args:
            indices: as in :meth:`forward_intermediates`.
            prune_norm: drop the last norm, where the network has one of its own.
            prune_head: drop the classifier and what stands before it.
        """
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        self.stages = self.stages[: self._stages_up_to(last)]
        if prune_head:
            self.drop_finish()
            self.reset_classifier(0, "")
        return wanted
