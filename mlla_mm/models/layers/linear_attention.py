# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Linear attention with the designs of Mamba, each a switch (arXiv 2405.16605)."""

import math
from typing import Callable, Dict, Optional

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ... import ops
from ...arch import check_choice, check_flags, check_int
from ...ops.naive import (
    at_least_float32,
    mean_over_tokens,
    normaliser,
    product_dtype,
)
from ...ops.scan import causal_normaliser, decayed_scan
from .token_mixer import TokenMixer

#: The feature maps phi of queries and keys, by name.
FEATURE_MAPS: Dict[str, Callable[[Tensor], Tensor]] = {
    'elu+1': lambda x: F.elu(x) + 1,
    'relu': F.relu,
    'identity': lambda x: x,
}
#: The order of the tokens in the recurrence: row by row, or column by column.
SCAN_ORDERS = ('rows', 'columns')


class Delta(nn.Module):
    """Mamba's step, a positive number for each token and channel.

    ::

        Delta = Softplus(x W_1 W_2 + b)

    Args:
        embed_dims (int): Number of channels C, of the input and of the steps.
        hidden_dims (int, optional): Columns C_0 of W_1. None takes Mamba's, C / 16
            rounded up. Defaults to None.
        bias (bool): Whether b is there. Defaults to True.
        mamba_init (bool): Whether to start like Mamba: W_2 uniform within
            +-C_0^(-1/2), and b so that Softplus(b) is log-uniform in [1e-3, 1e-1].
            Else W_2 starts like other linear layers and b at 0, which makes the steps
            Softplus(0) = 0.69 or so. Defaults to False.
    """

    def __init__(
        self,
        embed_dims: int,
        hidden_dims: Optional[int] = None,
        bias: bool = True,
        mamba_init: bool = False,
    ) -> None:
        super().__init__()
        hidden = hidden_dims or math.ceil(embed_dims / 16)
        self.w1 = nn.Linear(embed_dims, hidden, bias=False)
        self.w2 = nn.Linear(hidden, embed_dims, bias=False)
        self.bias = nn.Parameter(torch.zeros(embed_dims)) if bias else None
        self.mamba_init = mamba_init
        self.init_weights()

    def init_weights(self) -> None:
        """Start W_2 and b like Mamba, if ``mamba_init`` says so."""
        if not self.mamba_init:
            return
        bound = self.w2.in_features**-0.5
        nn.init.uniform_(self.w2.weight, -bound, bound)
        if self.bias is not None:
            low, high = math.log(1e-3), math.log(1e-1)
            step = torch.empty_like(self.bias).uniform_(low, high).exp_()
            # The inverse of Softplus.
            self.bias.data.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C), float32 or float64."""
        steps = at_least_float32(self.w2(self.w1(x)))
        # No bias of w2: autocast would round the sum to half precision. Near -7 the
        # numbers of bfloat16 are 1/32 apart, and the logarithms of Delta would be, too.
        if self.bias is not None:
            steps = steps + self.bias
        return F.softplus(steps)


@MODELS.register_module()
class LinearAttention(TokenMixer):
    """Linear attention, and five of the six designs that make it a selective SSM.

    With phi a feature map, Q = phi(x W_Q), K = phi(x W_K), V = x W_V, for each head and
    token i of n (Eq. 2 of arXiv 2405.16605)::

        y_i = Q_i sum_j(K_j^T V_j) / (Q_i sum_j(K_j^T))

    Every switch changes this alone, and they combine:

    - ``input_gate``: Delta_j o V_j takes the place of V_j, with :class:`Delta` of x.
    - ``forget_gate``: the sums run over the tokens so far, and decay (Eqs. 4 and 10),
      ``S_i = exp(A o Delta_i) o S_(i-1) + K_i^T V_i``. See
      :func:`mlla_mm.ops.scan.decayed_scan`. Both gates share one Delta, as in Mamba.
    - ``shortcut``: ``D o V_i`` is added, with a parameter D for each channel.
    - ``normalization=False``: there is no denominator. The sum over all tokens is then
      divided by n; one that decays is not, as in Mamba.
    - ``num_heads=1`` with ``qk_head_dims=32``: a single head, whose queries and keys
      have 32 channels.
    - ``lepe``: a 3x3 depthwise convolution of V is added.
    - ``rope``: queries and keys of the numerator are rotated by their position.

    All of the first four, a single head and ``feature_map='identity'`` make a selective
    SSM: :func:`mlla_mm.ops.selective_ssm.selective_ssm`.

    Args:
        embed_dims (int): Number of channels C.
        num_heads (int): Number of heads, a divisor of C.
        v_proj (bool): Whether values are projected. Defaults to True.
        qkv_bias (bool): Whether the projections have a bias. Defaults to True.
        qk_head_dims (int, optional): Channels of the queries and keys of a head. None
            takes C / num_heads. Defaults to None.
        feature_map (str): phi, a name of :data:`FEATURE_MAPS`. The paper leaves it
            open; the authors' MLLA has ELU + 1. Defaults to 'elu+1'.
        input_gate (bool): Defaults to False.
        forget_gate (bool): Defaults to False.
        shortcut (bool): Defaults to False.
        normalization (bool): Defaults to True.
        lepe (bool): Defaults to False.
        rope (bool): Defaults to False.
        gate_dims (int, optional): Columns of Delta's W_1. None takes Mamba's, C / 16
            rounded up. Defaults to None.
        gate_bias (bool): Whether Delta has Mamba's bias; the paper's formula shows
            none. Defaults to True.
        gate_init (str, optional): 'mamba' or 'linear', see :class:`Delta`. None takes
            Mamba's with a forget gate, and else the other. Defaults to None.
        scan_order (str): Order of the tokens under a forget gate, one of
            :data:`SCAN_ORDERS`. Defaults to 'rows'.
        decayed_normalizer (bool): Whether the sum of keys decays like the values', at
            the cost of a second scan. Defaults to False.
        shortcut_of (str): What the shortcut scales: 'values' V_i, or the 'input' x_i.
            Defaults to 'values'.

    Raises:
        ValueError: If an argument is impossible, or is for a switch that is off.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        v_proj: bool = True,
        qkv_bias: bool = True,
        qk_head_dims: Optional[int] = None,
        feature_map: str = 'elu+1',
        input_gate: bool = False,
        forget_gate: bool = False,
        shortcut: bool = False,
        normalization: bool = True,
        lepe: bool = False,
        rope: bool = False,
        gate_dims: Optional[int] = None,
        gate_bias: bool = True,
        gate_init: Optional[str] = None,
        scan_order: str = 'rows',
        decayed_normalizer: bool = False,
        shortcut_of: str = 'values',
    ) -> None:
        super().__init__(embed_dims, num_heads, v_proj, qkv_bias, qk_head_dims)
        check_flags(
            input_gate=input_gate,
            forget_gate=forget_gate,
            shortcut=shortcut,
            normalization=normalization,
            lepe=lepe,
            rope=rope,
            gate_bias=gate_bias,
            decayed_normalizer=decayed_normalizer,
        )
        check_choice('feature_map', feature_map, FEATURE_MAPS)
        check_choice('gate_init', gate_init, (None, 'mamba', 'linear'))
        check_choice('scan_order', scan_order, SCAN_ORDERS)
        check_choice('shortcut_of', shortcut_of, ('values', 'input'))
        if gate_dims is not None:
            check_int('gate_dims', gate_dims, 1)
        _refuse_idle(
            'input_gate or forget_gate',
            input_gate or forget_gate,
            gate_dims=gate_dims is not None,
            gate_bias=not gate_bias,
            gate_init=gate_init is not None,
        )
        _refuse_idle(
            'forget_gate',
            forget_gate,
            scan_order=scan_order != 'rows',
            decayed_normalizer=decayed_normalizer,
        )
        _refuse_idle(
            'normalization', normalization, decayed_normalizer=decayed_normalizer
        )
        _refuse_idle('shortcut', shortcut, shortcut_of=shortcut_of != 'values')
        self.feature_map = feature_map
        self.input_gate = input_gate
        self.normalization = normalization
        self.rope = rope
        self.scan_order = scan_order
        self.decayed_normalizer = decayed_normalizer
        self.shortcut_of = shortcut_of
        self.delta = self.A_log = self.D = self.lepe = None
        if rope and num_heads * self.qk_head_dims % 4:
            raise ValueError(
                'rope pairs the channels of queries and keys on two axes: '
                f'{num_heads} heads of {self.qk_head_dims} are no multiple of 4.'
            )
        if input_gate or forget_gate:
            mamba_init = (gate_init or ('mamba' if forget_gate else '')) == 'mamba'
            self.delta = Delta(embed_dims, gate_dims, gate_bias, mamba_init)
        if forget_gate:
            # A = -1, -2, ..., -d in every channel, as in Mamba.
            rates = torch.arange(1, self.qk_head_dims + 1).log()
            self.A_log = nn.Parameter(rates.repeat(embed_dims, 1))
        if shortcut:
            self.D = nn.Parameter(torch.ones(embed_dims))
        if lepe:
            self.lepe = nn.Conv2d(
                embed_dims, embed_dims, 3, padding=1, groups=embed_dims
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C)."""
        phi = FEATURE_MAPS[self.feature_map]
        q, k = (phi(at_least_float32(t)) for t in self.qk(x).chunk(2, dim=-1))
        v = x if self.v is None else self.v(x)
        delta = None if self.delta is None else self.delta(x)
        gated = delta * v if self.input_gate and delta is not None else v
        if self.A_log is None or delta is None:
            y = self._sum_over_all(q, k, gated.to(product_dtype(v)))
        else:
            y = self._sum_over_past(q, k, gated, delta, -self.A_log.exp())
        if self.D is not None:
            y = y + self.D * (v if self.shortcut_of == 'values' else x)
        if self.lepe is not None:
            y = y + ops.depthwise_conv(v, self.lepe)
        return y.to(v.dtype)

    def _sum_over_all(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every token attends to all tokens (Eq. 2), (N, H, W, C)."""
        y = mean_over_tokens(self._rotate(q), self._rotate(k), v, self.num_heads)
        if self.normalization:
            # Rotations are for the numerator alone.
            y = y / normaliser(q, k, self.num_heads)
        return y.flatten(-2)

    def _sum_over_past(
        self, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor
    ) -> Tensor:
        """Every token attends to itself and those before (Eqs. 4, 10), (N, H, W, C)."""
        height, width = v.shape[1:3]
        a = a.unflatten(0, (self.num_heads, -1))
        q_rotated, k_rotated, q, k, v, delta = map(
            self._tokens, (self._rotate(q), self._rotate(k), q, k, v, delta)
        )
        y = decayed_scan(q_rotated, k_rotated, v, delta, a)
        if self.normalization and self.decayed_normalizer:
            y = y / (decayed_scan(q, k, torch.ones_like(v), delta, a) + ops.EPS)
        elif self.normalization:
            y = y / (height * width * causal_normaliser(q, k))
        y = y.flatten(-2)
        if self.scan_order == 'columns':
            return y.unflatten(1, (width, height)).transpose(1, 2)
        return y.unflatten(1, (height, width))

    def _rotate(self, x: Tensor) -> Tensor:
        return ops.rotary_embedding(x) if self.rope else x

    def _tokens(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, L, heads, C / heads), in the order of the scan."""
        x = x.transpose(1, 2) if self.scan_order == 'columns' else x
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, -1))


def _refuse_idle(switch: str, is_on: bool, **changed: bool) -> None:
    """Refuse changed options of a switch that is off: they would change nothing."""
    for name, is_changed in changed.items():
        if is_changed and not is_on:
            raise ValueError(
                f'{name} is for {switch}. Leave it out, or set {switch} to True.'
            )
