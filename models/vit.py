"""ViT of insightface (recognition/arcface_torch), with the names and shapes of its weights.

A vision transformer (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929) without a class token: 12 x 12 patches
of 9 x 9 pixels (the last 4 rows and columns are not seen), pre-norm blocks with ReLU6, and an embedding from all tokens
together. In training a part of the tokens is left out, and a learnt token stands for them in the embedding.

Shapes: n images, T tokens, w width, d embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpointing import Block
from models.precision import at_least_float32
from models.randomness import draw_keys, drop_path, random_integers

PATCH, TOKENS, HEADS, MLP_RATIO = 9, (112 // 9) ** 2, 8, 4
INITIAL_STD = 0.02
HEAD_EPS = 2e-5  # of the BatchNorms


@dataclass(frozen=True)
class Variant:
    """A published network; its rates take part in training only."""

    width: int
    depth: int
    masked: float = 0.1  # of the tokens
    drop_path: float = 0.1  # of the last block; it rises linearly from 0 at the first


# insightface's names; vit_l is short for the one ViT-L there. Weights of one width and depth fit all of their names,
# and are recognised as the first.
VIT_VARIANTS: dict[str, Variant] = {
    "vit_t": Variant(256, 12), "vit_t_dp005_mask0": Variant(256, 12, masked=0.0, drop_path=0.05),
    "vit_s": Variant(512, 12), "vit_s_dp005_mask_0": Variant(512, 12, masked=0.0, drop_path=0.05),
    "vit_b": Variant(512, 24), "vit_b_dp005_mask_005": Variant(512, 24, masked=0.05, drop_path=0.05),
    "vit_l": Variant(768, 24, masked=0.05, drop_path=0.05),
    "vit_l_dp005_mask_005": Variant(768, 24, masked=0.05, drop_path=0.05),
}


class Attention(nn.Module):
    """softmax(q k^T / sqrt(w / heads)) v of each head, then proj: (n, T, w) -> (n, T, w). At least float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(q.dtype, torch.float32)
            x = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype))
        return self.proj(x.transpose(1, 2).reshape(n, tokens, width))


class MLP(nn.Module):
    """fc2(relu6(fc1(x))), (n, T, w) -> (n, T, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu6(self.fc1(x)))


class TransformerBlock(Block):
    """y = x + attn(norm1(x)), then y + mlp(norm2(y)): (n, T, w) -> (n, T, w). Each sum may drop its second part.

    number: of this block; its random numbers have streams of their own.
    """

    def __init__(self, width: int, number: int, drop_path: float) -> None:
        super().__init__()
        self.number, self.drop_path = number, drop_path
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """keys: int64 (n,) in training, else None. A block in evaluation mode, which --freeze keeps, drops nothing."""
        for part, branch in enumerate((lambda x: self.attn(self.norm1(x)), lambda x: self.mlp(self.norm2(x)))):
            out = branch(x)
            if keys is not None and self.training:
                out = drop_path(out, keys, 2 * self.number + part + 1, self.drop_path)
            x = x + out
        return x


class PatchEmbedding(nn.Module):
    """proj of each patch: (n, 3, 112, 112) -> (n, T, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """Embedding = feature(norm(blocks(patch_embed(images) + pos_embed)) of all tokens). variant: of VIT_VARIANTS."""

    takes_keys = True

    def __init__(self, variant: Variant, embedding_size: int = 512) -> None:
        super().__init__()
        self.embedding_size, width = embedding_size, variant.width
        self.kept = int(TOKENS * (1 - variant.masked))
        self.pos_embed = nn.Parameter(torch.empty(1, TOKENS, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embed = PatchEmbedding(width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, number, variant.drop_path * number / max(variant.depth - 1, 1))
            for number in range(variant.depth))
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(TOKENS * width, width, bias=False), nn.BatchNorm1d(width, eps=HEAD_EPS),
            nn.Linear(width, embedding_size, bias=False), nn.BatchNorm1d(embedding_size, eps=HEAD_EPS))
        # insightface truncates these values at +-2, a hundred standard deviations, which changes none.
        nn.init.normal_(self.mask_token, std=INITIAL_STD)
        nn.init.normal_(self.pos_embed, std=INITIAL_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INITIAL_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """images: (n, 3, 112, 112) float in [-1, 1] -> embedding (n, d), not L2-normalised.

        keys: int64 (n,), from which masks are drawn in training; None: torch's generator draws them.
        """
        x = self.patch_embed(images) + self.pos_embed
        if not self.training:
            for block in self.blocks:
                x = block(x, None)
            return self._embedding(self.norm(x))
        keys = draw_keys(images) if keys is None else keys
        seen = random_integers(keys, 0, TOKENS).argsort(dim=1, stable=True)[:, :self.kept]
        seen = seen[:, :, None].expand(-1, -1, x.shape[2])
        x = x.gather(1, seen)
        for block in self.blocks:
            x = block(x, keys)
        x = self.norm(x)
        x = self.mask_token.to(x.dtype).expand(len(x), TOKENS, -1).scatter(1, seen, x)
        return self._embedding(x)

    def _embedding(self, x: Tensor) -> Tensor:
        first_linear, first_norm, last_linear, last_norm = self.feature
        return at_least_float32(first_norm(first_linear(x.flatten(1))), last_linear, last_norm)
