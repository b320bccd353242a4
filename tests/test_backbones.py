"""Backbones in other programs' namings: names, values, colors, masks of images, activation checkpointing."""

from __future__ import annotations

import copy
import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.commands import load_script
from helpers.exported import export_to
from helpers.namings import entries_of, plain_ir, plain_mbf, plain_vit
from helpers.published import images, random_weights, relative_error, shapes
from helpers.training import RandomFaces, RecordingLog, make_run
from torch import Tensor, nn

import main
import valid
from data.loader import GlobalBatchSampler, build_train_loader
from models import BACKBONES, build_backbone
from models.checkpointing import Block, checkpoint_activations
from models.ir import IR, IRBlock
from models.iresnet import IBasicBlock
from models.mbf import DepthWise
from models.mobilefacenet import Bottleneck
from models.randomness import drop_path, dropout, image_keys, random_integers, random_uniform
from models.vit import TransformerBlock, Variant, ViT
from utils import build
from utils.checkpoint.weights import open_weights
from utils.dist.context import DistContext
from utils.errors import UserError
from utils.options import parse_options
from utils.planner import measure_backbone
from utils.preflight import check_sync_bn

export, embed = load_script("export"), load_script("embed")

# IR-50 and IR-101 are published as 43.59 and 65.15 million (AdaFace); the others are the sums of the tables' shapes.
PARAMETERS = {
    "ir18": 24_020_352, "ir34": 34_134_080, "ir50": 43_585_600, "ir100": 65_150_912, "ir_se50": 43_808_320,
    "mbf": 2_059_520, "mbf_large": 6_314_880,
    "vit_t": 19_137_792, "vit_s": 76_023_296, "vit_b": 113_833_472, "vit_l": 255_684_352,
}


@pytest.mark.parametrize("arch", PARAMETERS)
@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
def test_names_shapes_and_recognition(tmp_path, arch):
    with torch.device("meta"):
        model = build_backbone(arch)
    assert shapes(model) == entries_of(arch)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[arch]
    # One number per entry, expanded: the file is small. And the network is made without memory.
    weights = {name: torch.full((1,), 0.5).expand(shape) if shape else torch.tensor(0)
               for name, shape in entries_of(arch, 24).items()}
    torch.save(weights, tmp_path / "weights.pth")

    def without_memory(*arguments):
        with torch.device("meta"):
            return build_backbone(*arguments)

    with mock.patch("utils.checkpoint.weights.build_backbone", without_memory):
        found = open_weights(str(tmp_path / "weights.pth"))
    assert (found.arch, found.backbone.embedding_size) == (arch, 24)
    assert found.channel_order == ("bgr" if arch.startswith("ir") else "rgb") and found.order_is_assumed


# The other names of ViTs -> the name that their weights are recognised as, and the rates of masks and DropPath
OTHER_VITS = {"vit_t_dp005_mask0": ("vit_t", 0, 0.05), "vit_s_dp005_mask_0": ("vit_s", 0, 0.05),
              "vit_b_dp005_mask_005": ("vit_b", 0.05, 0.05), "vit_l_dp005_mask_005": ("vit_l", 0.05, 0.05)}


def test_every_arch_is_in_a_table():
    assert PARAMETERS.keys() | OTHER_VITS.keys() == {
        arch for arch in BACKBONES if not arch.startswith(("iresnet", "mobilefacenet"))}


@pytest.mark.parametrize(("arch", "rates"), [
    ("vit_t", (0.1, 0.1)), ("vit_s", (0.1, 0.1)), ("vit_b", (0.1, 0.1)), ("vit_l", (0.05, 0.05)),
    *((arch, rates) for arch, (_, *rates) in OTHER_VITS.items())])
def test_vits_of_one_size_differ_by_their_rates(arch, rates):
    with torch.device("meta"):
        model = build_backbone(arch)
    assert shapes(model) == entries_of(OTHER_VITS.get(arch, (arch,))[0])
    assert model.kept == int(144 * (1 - rates[0]))
    assert model.blocks[0].drop_path == 0 and model.blocks[-1].drop_path == rates[1]


@pytest.fixture(scope="module")
def ir18():
    return random_weights(entries_of("ir18", 16))


def embedding(path, pictures: Tensor, **how) -> Tensor:
    with torch.no_grad():
        return open_weights(str(path), **how).backbone(pictures)


@pytest.mark.slow
def test_adafaces_weights_take_bgr_unless_the_user_says_otherwise(tmp_path, ir18):
    pictures = images(1)
    path = tmp_path / "adaface.ckpt"
    torch.save({"state_dict": {**{f"model.{name}": value for name, value in ir18.items()},
                               "head.kernel": torch.zeros(16, 9), "head.t": torch.zeros(1)}, "epoch": 3}, path)
    bgr, rgb = plain_ir(ir18, pictures.flip(1)), plain_ir(ir18, pictures)
    assert relative_error(embedding(path, pictures), bgr) < 1e-5
    assert relative_error(embedding(path, pictures, channel_order="bgr"), bgr) < 1e-5
    assert relative_error(embedding(path, pictures, channel_order="rgb"), rgb) < 1e-5
    assert open_weights(str(path)).describe("FILE") == (
        "ir18 (weights for BGR images, as AdaFace's do; --channel-order rgb if these do not) of FILE")
    # CVLface's prefix, without information about the colors
    torch.save({f"net.{name}": value for name, value in ir18.items()}, path)
    assert relative_error(embedding(path, pictures), bgr) < 1e-5


@pytest.mark.slow
def test_exports_keep_the_colors(tmp_path, ir18):
    torch.save(ir18, source := tmp_path / "weights.pth")
    bare = export_to(source, "insightface", tmp_path / "bare.pth")
    found = torch.load(bare)
    assert found.keys() == ir18.keys() and all(torch.equal(found[name], ir18[name]) for name in ir18)
    before = embedding(source, images(1))
    safe = export_to(source, "safetensors", tmp_path / "backbone.safetensors")
    weights = open_weights(str(safe))
    assert (weights.arch, weights.channel_order, weights.order_is_assumed) == ("ir18", "rgb", False)
    assert torch.equal(embedding(safe, images(1)), before)
    with pytest.raises(UserError, match="takes RGB images, but --channel-order says bgr"):
        open_weights(str(safe), channel_order="bgr")


@pytest.mark.parametrize("arch, plain", [("mbf", plain_mbf), pytest.param("vit_t", plain_vit, marks=pytest.mark.slow)])
def test_insightfaces_weights_give_their_embedding(tmp_path, arch, plain):
    weights = random_weights(entries_of(arch, 16))
    torch.save(weights, path := tmp_path / "model.pt")
    assert relative_error(embedding(path, images(2)), plain(weights, images(2))) < 1e-5


def test_squeeze_and_excitation_equals_plain_functions():
    block = IRBlock(16, 32, 2, True).double().eval()
    w = random_weights({f"body.0.{name}": shape for name, shape in shapes(block).items()})
    block.load_state_dict({name.removeprefix("body.0."): value for name, value in w.items()})
    w = {name: value.double() for name, value in w.items()}
    p, x = "body.0.res_layer", torch.randn(2, 16, 6, 6, dtype=torch.float64)

    def norm(x, name):
        return F.batch_norm(x, w[f"{name}.running_mean"], w[f"{name}.running_var"], w[f"{name}.weight"],
                            w[f"{name}.bias"])

    out = F.prelu(norm(F.conv2d(norm(x, f"{p}.0"), w[f"{p}.1.weight"], padding=1), f"{p}.2"), w[f"{p}.3.weight"])
    out = norm(F.conv2d(out, w[f"{p}.4.weight"], stride=2, padding=1), f"{p}.5")
    gate = torch.einsum("oi,ni->no", w[f"{p}.se_block.fc1.weight"][:, :, 0, 0], out.mean((2, 3))).relu()
    gate = torch.einsum("oi,ni->no", w[f"{p}.se_block.fc2.weight"][:, :, 0, 0], gate).sigmoid()
    shortcut = norm(F.conv2d(x, w["body.0.shortcut_layer.0.weight"], stride=2), "body.0.shortcut_layer.1")
    torch.testing.assert_close(block(x), shortcut + out * gate[:, :, None, None])


@pytest.mark.slow
@pytest.mark.parametrize("network", ["ir", "vit"])
def test_onnx_computes_the_same(tmp_path, network):
    torch.manual_seed(0)
    backbone = (IR((1, 1, 1, 1), True, 16) if network == "ir" else ViT(Variant(32, 1), 16)).eval()
    options, images = export.Options("", "onnx", ""), torch.zeros(2, 3, 112, 112, dtype=torch.uint8)
    export.export_onnx(backbone, str(tmp_path / "backbone.onnx"), export.to_input(images, options))
    assert export.largest_difference(backbone, str(tmp_path / "backbone.onnx"), options) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers


def splitmix64(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def test_random_numbers_of_an_image_depend_on_seed_step_and_index_only():
    def true_uniform(seed, step, index, stream, place):
        key = 0
        for number, word in enumerate((seed, step, 2**32, index)):
            key = word if number == 0 else splitmix64(key) ^ word
        key = splitmix64(splitmix64(splitmix64(key) ^ stream) + place)
        return (key >> 40) / 2**24

    indices = torch.tensor([5, 0, 70_000_000])
    found = random_uniform(image_keys(2**62 + 9, 3, indices), 4, 7)
    for row, index in enumerate(indices.tolist()):
        assert found[row].tolist() == [true_uniform(2**62 + 9, 3, index, 4, place) for place in range(7)]
    one = random_uniform(image_keys(2**62 + 9, 3, indices[2:]), 4, 7)
    assert torch.equal(one[0], found[2])
    many = random_uniform(image_keys(1, 1, torch.arange(100)), 0, 2000)
    assert 0 <= many.min() and many.max() < 1 and abs(many.mean() - 0.5) < 0.005 and abs(many.var() - 1 / 12) < 0.001
    assert abs(np.corrcoef(many[:, :1000].flatten(), many[:, 1000:].flatten())[0, 1]) < 0.02
    kept = dropout(torch.ones(100, 20, 10), image_keys(1, 2, torch.arange(100)), 0, 0.4)
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / 0.6).item()} and abs(kept.mean() - 1) < 0.02
    dropped = drop_path(torch.ones(1000, 3), image_keys(1, 2, torch.arange(1000)), 0, 0.25)
    assert abs((dropped == 0).float().mean() - 0.25) < 0.05 and (dropped == dropped[:, :1]).all()


def test_vit_shows_the_mask_token_in_place_of_the_tokens_it_leaves_out():
    torch.manual_seed(0)
    model = ViT(Variant(16, 1, masked=0.25, drop_path=0.0), 8).train()
    nn.init.zeros_(model.blocks[0].attn.proj.weight)
    nn.init.zeros_(model.blocks[0].mlp.fc2.weight)
    seen = []
    model.feature[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].view(-1, 144, 16)))
    keys = image_keys(1, 2, torch.arange(3))
    model(images(3), keys)
    tokens = model.norm(model.patch_embed(images(3)) + model.pos_embed)
    masked = (seen[0] == model.mask_token[0, 0]).all(2)
    assert masked.sum(1).tolist() == [36, 36, 36] and len({tuple(row.tolist()) for row in masked}) == 3
    torch.testing.assert_close(seen[0][~masked], tokens[~masked])
    assert masked.nonzero()[:36, 1].tolist() == sorted(random_integers(keys, 0, 144)[0].argsort()[108:].tolist())


def test_a_frozen_block_drops_nothing():
    block, x, keys = TransformerBlock(16, 1, 0.9), torch.randn(8, 4, 16), image_keys(1, 2, torch.arange(8))
    assert not torch.equal(block(x, keys), block(x, None))
    assert torch.equal(block.eval()(x, keys), block(x, None))


# ---------------------------------------------------------------------------------------------------------------------
# Training


class ToyBlock(Block):
    """BatchNorm, a mask of the image, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv, self.prelu = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1), nn.PReLU(6)

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        return x + dropout(self.prelu(self.conv(self.bn(x))), keys, 1, 0.4)


class Toy(nn.Module):
    takes_keys, embedding_size = True, 24

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 6, 3), nn.ModuleList([ToyBlock(), ToyBlock()])
        self.fc, self.features = nn.Linear(6 * 12 * 12, 24, bias=False), nn.BatchNorm1d(24)

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        x = self.stem(F.avg_pool2d(x, 8))
        for block in self.blocks:
            x = block(x, keys)
        return self.features(self.fc(x.flatten(1)))


NETWORKS = {"toy": Toy, "vit": lambda: ViT(Variant(16, 2, masked=0.3, drop_path=0.3), 24)}


def run_steps(rank: int, world_size: int, network: str, flags: list[str]):
    """Losses and weights of three of main.py's steps with 12 images."""
    options = parse_options(["unused", "--num-classes", "7", "--embedding-size", "24", "-b", "12", "--augment", "none",
                             "--sync-bn", "--precision", "float64", "--lr", "0.1", "--scale", "8", *flags])
    context, dataset = DistContext(rank, world_size, world_size, torch.device("cpu")), RandomFaces(7)
    with mock.patch.object(build, "build_backbone", lambda arch, embedding_size: NETWORKS[network]()):
        state, model = build.build_training(context, options, 3, len(dataset), 12)
    assert state.classifier.weight.shape[1] == 24
    sampler = GlobalBatchSampler(len(dataset), 12, options.accumulation_steps, rank, world_size, 3)
    loader, log = build_train_loader(dataset, sampler, workers=0, pin_memory=False), RecordingLog()
    main.train_one_epoch(make_run(context, options, state, model, sampler.steps_per_epoch, log), loader, 3)
    losses = torch.stack([step["loss"].double() for step in log.steps])
    dist.all_reduce(losses)
    weights = {name: value.numpy().copy() for name, value in state.backbone.state_dict().items()}
    return losses.numpy() / world_size, weights


@pytest.mark.slow
def test_masks_and_checkpointing_give_the_same_training_at_every_number_of_processes(pools):
    """Dropout, token masks and stochastic depth; BatchNorm in blocks that are computed twice, over all ranks."""
    for network, accumulation in ("toy", ["--accumulation-steps", "2"]), ("vit", []):
        (truth, true_weights), = pools(1).run(run_steps, network, accumulation)
        assert len(set(truth)) == 3
        for world_size in (1, 2, 3):
            for losses, weights in pools(world_size).run(
                    run_steps, network, [*accumulation, "--checkpoint-activations", "--enable-model-parallel"]):
                np.testing.assert_allclose(losses, truth, rtol=1e-9)
                for name, value in true_weights.items():
                    np.testing.assert_allclose(weights[name], value, rtol=1e-9, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("block", [
    lambda: IBasicBlock(16, 32, 2), lambda: IRBlock(16, 32, 2, True), lambda: DepthWise(16, 16, 24, 1, True),
    lambda: Bottleneck(16, 16, 2, 1),
], ids=["iresnet", "ir", "mbf", "mobilefacenet"])
def test_checkpointed_blocks_are_equal_to_the_bit_and_update_statistics_once(block):
    torch.manual_seed(0)
    plain = nn.Sequential(block()).double().train()
    twice, x = checkpoint_activations(copy.deepcopy(plain)), torch.randn(4, 16, 6, 6, dtype=torch.float64)
    results = []
    for network in (plain, twice):
        leaf = x.clone().requires_grad_()
        for _ in range(2):
            network(leaf).square().sum().backward()
        results.append((leaf.grad, [p.grad for p in network.parameters()], list(network.buffers())))
    assert plain.state_dict().keys() == twice.state_dict().keys()
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert {int(value) for name, value in twice.named_buffers() if "tracked" in name} == {2}
    with torch.no_grad():
        assert torch.equal(twice.eval()(x), plain.eval()(x))


def test_checkpointing_keeps_the_inputs_of_blocks_only():
    plain, twice = (measure_backbone(lambda: build_backbone("mobilefacenet"), device_type="cpu", autocast_dtype=None,
                                     checkpointed=checkpointed) for checkpointed in (False, True))
    assert twice.trained == plain.trained
    assert 0.2 < twice.activations_per_image / plain.activations_per_image < 0.6


def checkpointed_blocks(rank, world_size, flags):
    options = parse_options(["unused", "-a", "mobilefacenet", "--num-classes", "5", "-b", "4", *flags])
    state, _ = build.build_training(DistContext(0, 1, 1, torch.device("cpu")), options, 0, 8, 4)
    return {"forward" in vars(block) for block in state.backbone.modules() if isinstance(block, Block)}


def test_the_flag_checkpoints_every_block_of_a_run(pools):
    assert pools(1).run(checkpointed_blocks, ["--checkpoint-activations"]) == [{True}]
    assert pools(1).run(checkpointed_blocks, []) == [{False}]


PROGRAMS = {
    "main.py": (main, ["DIR", "-a", "mobilefacenet", "--embedding-size", "8", "--init-from"]),
    "main.py --evaluate": (main, ["--evaluate", "--imgs-root", "{faces}/lfw/imgs", "--pair-list",
                                  "{faces}/lfw/pair.list", "--resume"]),
    "valid.py": (valid, ["--imgs-root", "{faces}/lfw/imgs", "--pair-list", "{faces}/lfw/pair.list", "--resume"]),
    "embed.py": (embed, ["{faces}/lfw/imgs", "--output", "{out}/e.npy", "--resume"]),
    "export.py": (export, ["--format", "insightface", "--output", "{out}/b.pth", "--resume"]),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_uses_its_channel_order(program, faces, tmp_path, monkeypatch):
    """It can contradict what a file says, and is an error then."""
    torch.save({"arch": "mobilefacenet", "channel_order": "rgb",
                "state_dict": build_backbone("mobilefacenet", 8).state_dict()}, path := tmp_path / "rgb.pth")
    module, arguments = PROGRAMS[program]
    arguments = [argument.format(faces=faces, out=tmp_path) for argument in arguments]
    monkeypatch.setattr(sys, "argv", [program, *arguments, str(path), "--channel-order", "bgr"])
    with pytest.raises(UserError, match="takes RGB images, but --channel-order says bgr"):
        module.main()


def init_ir(rank, world_size, path, flags):
    options = parse_options(["unused", "-a", "ir18", "--embedding-size", "16", "--num-classes", "5", "-b", "4",
                             "--init-from", path, *flags])
    state, _ = build.build_training(DistContext(0, 1, 1, torch.device("cpu")), options, 0, 8, 4)
    said = main.set_starting_point(state, options, None, 1)
    return said, state.backbone.state_dict()["input_layer.0.weight"].numpy()


@pytest.mark.slow
def test_training_starts_from_adafaces_weights(pools, tmp_path, ir18):
    torch.save({"state_dict": {f"model.{name}": value for name, value in ir18.items()}}, path := tmp_path / "a.ckpt")
    (said, convolution), = pools(1).run(init_ir, str(path), [])
    assert said.startswith(f", starting from {path}: backbone (weights for BGR images, as AdaFace's do;")
    np.testing.assert_array_equal(convolution, ir18["input_layer.0.weight"].flip(1).numpy())
    (_, convolution), = pools(1).run(init_ir, str(path), ["--channel-order", "rgb"])
    np.testing.assert_array_equal(convolution, ir18["input_layer.0.weight"].numpy())


# ---------------------------------------------------------------------------------------------------------------------
# timm, and mistakes


class BatchNormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d, which many of its networks have."""

    def forward(self, x):
        return F.relu(super().forward(x))


class FakeTimm(types.ModuleType):
    """Networks with dropout: one must know the image's size, one reads values while it is built, as older versions
    of timm do.
    """

    __version__ = "1"

    def is_model(self, name):
        return name in ("conv", "sized", "act", "reads")

    def list_models(self, pattern):
        return ["conv"] if pattern == "*conf*" else []

    def create_model(self, name, num_classes, **sizes):
        assert num_classes == 0
        if name == "conv" and sizes:
            raise TypeError("unexpected keyword argument 'img_size'")
        assert name == "conv" or sizes == {"img_size": 112}
        if name == "reads":
            torch.linspace(0, 0.1, 3)[1].item()
        norm = BatchNormAct(4) if name == "act" else nn.BatchNorm2d(4)
        return nn.Sequential(nn.Conv2d(3, 4, 3, 8), norm, nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2))


def test_networks_of_timm(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", FakeTimm("timm"))
    for name in ("conv", "sized"):
        model = build_backbone(f"timm:{name}", 10)
        assert model.fc.weight.shape == (10, 16) and model.training and model.embedding_size == 10
        assert torch.equal(model(images(2)), model(images(2)))  # no dropout
        with torch.autocast("cpu", torch.bfloat16):
            assert model(images(2)).dtype == torch.float32
    weights = random_weights(shapes(model))
    torch.save({"arch": "timm:sized", "state_dict": {f"module.{name}": value for name, value in weights.items()}},
               path := tmp_path / "weights.pth")
    found = open_weights(str(path))
    assert (found.arch, found.channel_order, found.backbone.embedding_size) == ("timm:sized", "rgb", 10)
    assert torch.equal(found.backbone.state_dict()["body.0.weight"], weights["body.0.weight"])
    assert parse_options(["DATA", "-a", "timm:conv"]).training_arch == "timm:conv"
    torch.save({"arch": "timm:none", "state_dict": {f"body.{name}": torch.ones(1) for name in "ab"}}, path)
    with pytest.raises(UserError, match=f"{path}: --arch timm:none: timm 1 has no network"):
        open_weights(str(path))
    with pytest.raises(UserError, match="timm 1 has no network of this name; similar ones: conv"):
        parse_options(["DATA", "-a", "timm:confnext"])
    with torch.device("meta"):  # as the checks before the start do
        assert {weight.device.type for weight in build_backbone("timm:reads").parameters()} == {"meta"}
    check_sync_bn(parse_options(["DATA", "-a", "timm:conv", "--sync-bn"]))
    with pytest.raises(UserError, match="--sync-bn with --arch timm:act: its BatchNorm layers include activations"):
        check_sync_bn(parse_options(["DATA", "-a", "timm:act", "--sync-bn"]))
    with pytest.raises(UserError, match="--checkpoint-activations with --arch timm:conv"):
        parse_options(["DATA", "-a", "timm:conv", "--checkpoint-activations"])


def test_timm_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="--arch timm:resnet18: the package timm is missing.*pip install timm"):
        parse_options(["DATA", "-a", "timm:resnet18"])


@pytest.mark.parametrize("argv, words", [
    (["-a", "ir_101"], "--arch ir_101: choose one of .*ir100.*timm:NAME"),
    (["--embedding-size", "0"], "--embedding-size 0: give a number of at least 1"),
    (["--channel-order", "bgr"], "--channel-order bgr: is for weights of another program"),
    (["--checkpoint-activations", "--compile"], "--checkpoint-activations with --compile"),
])
def test_mistakes(argv, words):
    with pytest.raises(UserError, match=words):
        parse_options(["DATA", *argv])
