# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Convolution at chosen pixels, as guided anchoring (Wang et al., CVPR 2019) does."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Gather the inputs of a convolution of stride 1 at K output pixels.

    Args:
        im (Tensor): Image of shape (1, C, H, W).
        mask_h_idx (Tensor): Rows of the output pixels, int64, of shape (K, ).
        mask_w_idx (Tensor): Columns of the output pixels, int64, of shape (K, ).
        col (Tensor): Output of shape (C * kernel_h * kernel_w, K).
        kernel_h (int): Height of the kernel in pixels.
        kernel_w (int): Width of the kernel in pixels.
        pad_h (int): Rows of zeros above and below the image.
        pad_w (int): Columns of zeros left and right of the image.
    """
    padded = pad(im[0], (pad_w, pad_w, pad_h, pad_h))
    rows = mask_h_idx + torch.arange(kernel_h, device=im.device)[:, None, None]
    columns = mask_w_idx + torch.arange(kernel_w, device=im.device)[:, None]
    col.copy_(padded[:, rows, columns].flatten(0, 2))


def masked_col2im_forward(
    col: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    im: Tensor,
    height: int,
    width: int,
    channels: int,
) -> None:
    """Put K output pixels where they belong, and leave the others as they are.

    Args:
        col (Tensor): Output pixels, of shape (C, K).
        mask_h_idx (Tensor): Their rows, int64, of shape (K, ).
        mask_w_idx (Tensor): Their columns, int64, of shape (K, ).
        im (Tensor): Output of shape (1, C, H, W).
        height (int): H.
        width (int): W.
        channels (int): C.
    """
    im[0, :, mask_h_idx, mask_w_idx] = col.to(im.dtype)  # autocast halves col alone
