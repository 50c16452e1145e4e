"""Blocks of Swin that see their tokens window by window from their first norm to their last sum.

In the blocks of transformers only attention sees windows; norms, feed-forward and residual stream have the order of the
picture. Calibration pairs the rows of linears with those of the stream, so both need one order. Norms and feed-forward
work token by token: the outputs are the same in any order.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.swin.modeling_swin import SwinLayer, window_partition, window_reverse


class WindowedLayer(SwinLayer):  # type: ignore[misc]  # transformers is not typed
    """A block of Swin in evaluation mode, for pictures that its windows fill."""

    def forward(
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """The hidden states (samples, patches, width) behind the block, and the factors of attention."""
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        samples, patches, width = hidden_states.shape
        picture = self.cyclic_shift(hidden_states.view(samples, *input_dimensions, width))
        stream = window_partition(picture, self.window_size).view(-1, self.window_size**2, width)
        mask = self.get_attn_mask(*input_dimensions, dtype=stream.dtype, device=stream.device)
        attended, factors = self.attention(self.layernorm_before(stream), mask, **options)
        stream = stream + attended
        stream = stream + self.mlp(self.layernorm_after(stream))
        windows = stream.view(-1, self.window_size, self.window_size, width)
        picture = self.cyclic_shift(window_reverse(windows, self.window_size, *input_dimensions), reverse=True)
        return picture.reshape(samples, patches, width), factors


def in_windows(model: nn.Module) -> None:
    """Gives a Swin model these blocks. Its tensors and outputs stay the same."""
    for module in model.modules():
        if type(module) is SwinLayer:
            module.__class__ = WindowedLayer
