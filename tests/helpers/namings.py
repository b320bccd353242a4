"""The other published networks, written a second time: their entries, and their embeddings by plain functions of them.

IR of AdaFace and CVLface, MobileFaceNet and ViT of insightface.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.published import bn_entries

Entries = dict[str, tuple[int, ...]]

IR_COUNTS = {"ir18": (2, 2, 2, 2), "ir34": (3, 4, 6, 3), "ir50": (3, 4, 14, 3), "ir100": (3, 13, 30, 3),
             "ir_se50": (3, 4, 14, 3)}
VITS = {"vit_t": (256, 12), "vit_s": (512, 12), "vit_b": (512, 24), "vit_l": (768, 24)}  # width, depth


def statistics_entries(name: str, channels: int) -> Entries:
    return {f"{name}.running_mean": (channels,), f"{name}.running_var": (channels,), f"{name}.num_batches_tracked": ()}


def ir_entries(arch: str, features: int = 512) -> Entries:
    entries = {"input_layer.0.weight": (64, 3, 3, 3), **bn_entries("input_layer.1", 64), "input_layer.2.weight": (64,)}
    c_in, number = 64, 0
    for c, count in zip((64, 128, 256, 512), IR_COUNTS[arch]):
        for _ in range(count):
            p = f"body.{number}"
            if c_in != c:
                entries |= {f"{p}.shortcut_layer.0.weight": (c, c_in, 1, 1), **bn_entries(f"{p}.shortcut_layer.1", c)}
            entries |= {**bn_entries(f"{p}.res_layer.0", c_in), f"{p}.res_layer.1.weight": (c, c_in, 3, 3)}
            entries |= {**bn_entries(f"{p}.res_layer.2", c), f"{p}.res_layer.3.weight": (c,)}
            entries |= {f"{p}.res_layer.4.weight": (c, c, 3, 3), **bn_entries(f"{p}.res_layer.5", c)}
            if arch == "ir_se50":
                entries |= {f"{p}.res_layer.se_block.fc1.weight": (c // 16, c, 1, 1),
                            f"{p}.res_layer.se_block.fc2.weight": (c, c // 16, 1, 1)}
            c_in, number = c, number + 1
    entries |= {**bn_entries("output_layer.0", 512), "output_layer.3.weight": (features, 512 * 7 * 7),
                "output_layer.3.bias": (features,)}
    return entries | statistics_entries("output_layer.4", features)


def mbf_entries(arch: str, features: int = 512) -> Entries:
    scale, blocks = {"mbf": (2, (1, 4, 6, 2)), "mbf_large": (4, (2, 8, 12, 4))}[arch]
    entries: Entries = {}

    def convolution(name: str, out: int, per_group: int, kernel: int, prelu: bool = True) -> None:
        nonlocal entries
        entries |= {f"{name}.layers.0.weight": (out, per_group, kernel, kernel), **bn_entries(f"{name}.layers.1", out)}
        if prelu:
            entries |= {f"{name}.layers.2.weight": (out,)}

    def depthwise(name: str, c_in: int, c_out: int, width: int) -> None:
        convolution(f"{name}.layers.0", width, c_in, 1)
        convolution(f"{name}.layers.1", width, 1, 3)
        convolution(f"{name}.layers.2", c_out, width, 1, prelu=False)

    a, b = 64 * scale, 128 * scale
    convolution("layers.0", a, 3, 3)
    if blocks[0] == 1:
        convolution("layers.1", a, a // 64, 3)
    for block in range(blocks[0] if blocks[0] > 1 else 0):
        depthwise(f"layers.1.layers.{block}", a, a, 128)
    for stage, (c_in, c, first, width) in enumerate(((a, a, 128, 128), (a, b, 256, 256), (b, b, 512, 256)), start=1):
        depthwise(f"layers.{2 * stage}", c_in, c, first)
        for block in range(blocks[stage]):
            depthwise(f"layers.{2 * stage + 1}.layers.{block}", c, c, width)
    convolution("conv_sep", 512, b, 1)
    convolution("features.layers.0", 512, 1, 7, prelu=False)
    return entries | {"features.layers.2.weight": (features, 512), **bn_entries("features.layers.3", features)}


def vit_entries(arch: str, features: int = 512) -> Entries:
    width, depth = VITS[arch]
    entries: Entries = {"pos_embed": (1, 144, width), "mask_token": (1, 1, width),
                        "patch_embed.proj.weight": (width, 3, 9, 9), "patch_embed.proj.bias": (width,)}
    for p in (f"blocks.{number}" for number in range(depth)):
        for name, shape in (("norm1", ()), ("attn.proj", (width,)), ("norm2", ()), ("mlp.fc2", (4 * width,))):
            entries |= {f"{p}.{name}.weight": (width, *shape), f"{p}.{name}.bias": (width,)}
        entries |= {f"{p}.attn.qkv.weight": (3 * width, width), f"{p}.mlp.fc1.weight": (4 * width, width),
                    f"{p}.mlp.fc1.bias": (4 * width,)}
    entries |= {"norm.weight": (width,), "norm.bias": (width,), "feature.0.weight": (width, 144 * width)}
    entries |= {**bn_entries("feature.1", width), "feature.2.weight": (features, width)}
    return entries | bn_entries("feature.3", features)


def entries_of(arch: str, features: int = 512) -> Entries:
    return {"i": ir_entries, "m": mbf_entries, "v": vit_entries}[arch[0]](arch, features)


def norm(w: dict[str, Tensor], x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
    """BatchNorm with the stored statistics."""
    return F.batch_norm(x, w[f"{name}.running_mean"], w[f"{name}.running_var"], w.get(f"{name}.weight"),
                        w.get(f"{name}.bias"), training=False, eps=eps)


def plain_ir(w: dict[str, Tensor], images: Tensor) -> Tensor:
    """`images` in the order of colors that the weights expect."""
    x = F.prelu(norm(w, F.conv2d(images, w["input_layer.0.weight"], padding=1), "input_layer.1"),
                w["input_layer.2.weight"])
    number, sizes = 0, {64: 56, 128: 28, 256: 14, 512: 7}
    while (p := f"body.{number}.res_layer") + ".1.weight" in w:
        channels = w[f"{p}.1.weight"].shape[0]
        stride = 1 if x.shape[2] == sizes[channels] else 2
        out = F.prelu(norm(w, F.conv2d(norm(w, x, f"{p}.0"), w[f"{p}.1.weight"], padding=1), f"{p}.2"),
                      w[f"{p}.3.weight"])
        out = norm(w, F.conv2d(out, w[f"{p}.4.weight"], stride=stride, padding=1), f"{p}.5")
        if f"{p}.se_block.fc1.weight" in w:
            mean = F.adaptive_avg_pool2d(out, 1)
            hidden = F.conv2d(mean, w[f"{p}.se_block.fc1.weight"]).relu()
            out = out * F.conv2d(hidden, w[f"{p}.se_block.fc2.weight"]).sigmoid()
        shortcut = f"body.{number}.shortcut_layer"
        if f"{shortcut}.0.weight" in w:
            x = norm(w, F.conv2d(x, w[f"{shortcut}.0.weight"], stride=stride), f"{shortcut}.1")
        else:
            x = F.max_pool2d(x, 1, stride)
        x, number = x + out, number + 1
    x = norm(w, x, "output_layer.0").reshape(len(images), -1)
    return norm(w, x @ w["output_layer.3.weight"].T + w["output_layer.3.bias"], "output_layer.4")


def plain_mbf(w: dict[str, Tensor], images: Tensor) -> Tensor:
    def convolution(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = w[f"{name}.layers.0.weight"]
        padding = 1 if weight.shape[2] == 3 else 0
        x = norm(w, F.conv2d(x, weight, stride=stride, padding=padding, groups=x.shape[1] // weight.shape[1]),
                 f"{name}.layers.1")
        return F.prelu(x, w[f"{name}.layers.2.weight"]) if f"{name}.layers.2.weight" in w else x

    def depthwise(x: Tensor, name: str, stride: int) -> Tensor:
        out = convolution(convolution(convolution(x, f"{name}.layers.0"), f"{name}.layers.1", stride),
                          f"{name}.layers.2")
        return out if stride == 2 else x + out

    x = convolution(images, "layers.0", 2)
    for number in range(1, 8):
        if number % 2 == 0:
            x = depthwise(x, f"layers.{number}", 2)
        elif f"layers.{number}.layers.0.weight" in w:
            x = convolution(x, f"layers.{number}")
        else:
            block = 0
            while f"layers.{number}.layers.{block}.layers.0.layers.0.weight" in w:
                x, block = depthwise(x, f"layers.{number}.layers.{block}", 1), block + 1
    x = convolution(convolution(x, "conv_sep"), "features.layers.0")
    return norm(w, x.flatten(1) @ w["features.layers.2.weight"].T, "features.layers.3")


def plain_vit(w: dict[str, Tensor], images: Tensor) -> Tensor:
    def layer_norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=9)
    x = x.reshape(*x.shape[:2], 144).transpose(1, 2) + w["pos_embed"]
    n, tokens, width = x.shape
    number = 0
    while f"{(p := f'blocks.{number}')}.norm1.weight" in w:
        q, k, v = linear(layer_norm(x, f"{p}.norm1"), f"{p}.attn.qkv").split(width, dim=2)
        heads = []
        for head in range(8):
            part = slice(head * width // 8, (head + 1) * width // 8)
            scores = q[:, :, part] @ k[:, :, part].transpose(1, 2) / (width // 8) ** 0.5
            heads.append(scores.softmax(2) @ v[:, :, part])
        x = x + linear(torch.cat(heads, dim=2), f"{p}.attn.proj")
        x = x + linear(linear(layer_norm(x, f"{p}.norm2"), f"{p}.mlp.fc1").clamp(0, 6), f"{p}.mlp.fc2")
        number += 1
    x = norm(w, layer_norm(x, "norm").reshape(n, -1) @ w["feature.0.weight"].T, "feature.1", 2e-5)
    return norm(w, x @ w["feature.2.weight"].T, "feature.3", 2e-5)
