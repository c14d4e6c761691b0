"""Networks: the tap against a second pass, seeds, dropout, summaries, and checkpoints that survive faults."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from dataclasses import replace

import pytest
import torch
from monai.networks.nets import VNet
from torch import nn

from fedkd_utils import networks
from fedkd_utils.networks import CheckpointError
from fedkd_utils.settings import QUICK, Settings

TINY = replace(QUICK, name="tiny", grid_shape=(4, 16, 16), channels=(4, 8), dropout=0.3)
VNET = replace(QUICK, architecture="vnet", grid_shape=(16, 16, 32))


def volumes(settings: Settings, count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn((count, 1, *settings.grid_shape), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("settings", [TINY, QUICK, VNET], ids=["tiny", "quick", "vnet"])
def test_features_are_those_of_the_bottleneck_and_come_from_the_same_pass(settings: Settings) -> None:
    network = networks.build_network(settings, 0).eval()
    x = volumes(settings)
    calls: list[int] = []
    bottleneck = network.body.get_submodule(network.blocks[network.tap])
    recorded: list[torch.Tensor] = []
    hook = bottleneck.register_forward_hook(lambda m, i, o: (calls.append(1), recorded.append(o.clone()))[0])
    logits, features = network.forward_with_features(x)
    hook.remove()
    assert len(calls) == 1  # no recomputation
    assert logits.shape == (2, 4, *settings.grid_shape)
    assert features.shape[2:] == tuple(n // s for n, s in zip(settings.grid_shape, network.strides, strict=True))
    assert torch.equal(features, recorded[0])
    assert torch.equal(logits, network(x))
    assert network._tap.features is None  # nothing is kept alive


@pytest.mark.parametrize("settings", [TINY, VNET], ids=["unet", "vnet"])
def test_weights_are_gone_with_the_last_network_that_uses_them(settings: Settings) -> None:
    """Without the garbage collector: a thousand students one after the other need the memory of one."""
    gc.disable()
    try:
        network = networks.build_network(settings, 0)
        logits, features = network.forward_with_features(volumes(settings))
        (logits.sum() + features.sum()).backward()
        weights = [weakref.ref(parameter) for parameter in network.parameters()]
        del network, logits, features
        assert all(weight() is None for weight in weights)
    finally:
        gc.enable()


def test_gradient_of_the_features_reaches_the_encoder_only() -> None:
    network = networks.build_network(TINY, 0)
    network.forward_with_features(volumes(TINY))[1].square().sum().backward()
    touched = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    encoder = {n for n, _ in network.named_parameters() if ".2." not in n}
    assert touched == encoder and touched


def test_same_seed_same_weights_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    a, b, c = (networks.build_network(QUICK, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters(), strict=True))


def test_dropout_drops_whole_channels_with_its_own_seed_and_keeps_the_mean() -> None:
    layer = networks.ChannelDropout(0.25, torch.Generator().manual_seed(0))
    x = torch.ones(200, 50, 2, 2, 2)
    y = layer(x)
    by_channel = y.flatten(2)
    assert torch.equal(by_channel.amin(2), by_channel.amax(2))
    assert by_channel[..., 0].unique().tolist() == pytest.approx([0, 4 / 3])
    assert abs(y.mean().item() - 1) < 4 * (0.25 / 0.75 / 10_000) ** 0.5
    assert torch.equal(layer.eval()(x), x)
    network = networks.build_network(TINY, 0).train()
    before = torch.get_rng_state()
    outputs = []
    for seed in (1, 1, 2):
        network.seed_dropout(seed)
        outputs.append(network(volumes(TINY)))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert torch.equal(torch.get_rng_state(), before)
    assert not [m for m in network.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]


def test_a_copy_of_a_network_has_a_tap_and_a_generator_of_its_own() -> None:
    network = networks.build_network(TINY, 0).train()
    twin = copy.deepcopy(network)
    network.seed_dropout(5)
    twin.seed_dropout(5)
    first, features = twin.forward_with_features(volumes(TINY))
    second, others = network.forward_with_features(volumes(TINY))
    assert torch.equal(first, second) and torch.equal(features, others)
    assert twin.dropout_generator is not network.dropout_generator


def test_strides_follow_the_spacing_and_never_shrink_slices_too_far() -> None:
    assert networks.unet_strides(QUICK) == ((1, 2, 2), (2, 2, 2), (2, 2, 2))
    assert networks.unet_strides(TINY) == ((1, 2, 2),)
    cube = replace(QUICK, grid_shape=(32, 32, 32), grid_spacing_mm=(1.0, 1.0, 1.0))
    assert networks.unet_strides(cube) == ((2, 2, 2), (2, 2, 2), (1, 2, 2))  # slices at most 4 in all


def test_vnet_is_monais_with_a_quarter_of_the_width() -> None:
    ours = networks.build_network(VNET, 0).body
    monai = VNet(spatial_dims=3, in_channels=1, out_channels=4)
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in monai.named_modules()]
    assert sum(p.numel() for p in ours.parameters()) == 2_854_812  # the release: 2.86 M
    wide = networks._NarrowVNet(16, 4, 0.5)
    assert {k: v.shape for k, v in wide.state_dict().items()} == {k: v.shape for k, v in monai.state_dict().items()}
    wide.load_state_dict(monai.state_dict())
    x = volumes(VNET, 1)
    with torch.no_grad():
        assert torch.equal(wide.eval()(x), monai.eval()(x))


def test_summary_lists_every_parameter_once_and_changes_nothing() -> None:
    for settings in (QUICK, VNET):
        network = networks.build_network(settings, 0).train()
        before = networks.copy_state(network)
        table = networks.model_summary(network, settings.grid_shape)
        assert list(table.columns) == ["module", "output shape", "parameters"]
        assert table["parameters"].iloc[:-1].sum() == table["parameters"].iloc[-1]
        assert table["parameters"].iloc[-1] == sum(p.numel() for p in network.parameters())
        assert table["output shape"].iloc[-1] == (4, *settings.grid_shape)
        assert table["module"].str.contains("(tap)", regex=False).sum() == 1
        assert network.training and all(torch.equal(before[k], v) for k, v in network.state_dict().items())
        assert not any(m._forward_hooks for n, m in network.body.named_modules() if n != network.blocks[network.tap])


def test_unknown_architecture_and_unfit_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="'unet' or 'vnet'"):
        networks.build_network(replace(QUICK, architecture="transformer"), 0)
    with pytest.raises(ValueError, match="multiples of"):
        networks.build_network(replace(VNET, grid_shape=(20, 80, 80)), 0)
    with pytest.raises(ValueError, match="does not fit"):
        networks.build_network(QUICK, 0)(torch.zeros(1, 1, 20, 80, 81))
    with pytest.raises(ValueError, match="Dropout"):
        networks.build_network(replace(TINY, dropout=1.0), 0)


@pytest.fixture()
def saved(tmp_path):
    network = networks.build_network(VNET, 1)  # has floats and integer counters
    path = networks.save_checkpoint(tmp_path / "deep" / "a.safetensors", network.state_dict(), {"dice": 0.5, "n": [1]})
    return network, path


def test_checkpoint_returns_bits_types_and_metadata(saved) -> None:
    network, path = saved
    state, metadata = networks.load_checkpoint(path)
    assert metadata == {"dice": 0.5, "n": [1]}
    own = network.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[k], own[k]) and state[k].dtype == own[k].dtype for k in own)
    assert networks.nbytes(state) == sum(t.numel() * t.element_size() for t in own.values())
    other = networks.build_network(VNET, 2)
    networks.load_state(other, state)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), network.parameters(), strict=True))


def test_every_damage_is_noticed(saved) -> None:
    _, path = saved
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    altered = bytearray(whole)
    altered[-3] ^= 1
    swapped = whole.replace(b'\\"dice\\": 0.5', b'\\"dice\\": 0.9')
    assert swapped != whole
    faults = [b"", whole[:100], whole[: 8 + header + 10], bytes(altered), swapped, b"not a checkpoint at all" * 10]
    for content in faults:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="a.safetensors.*[Dd]elete"):
            networks.load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="Train it first"):
        networks.load_checkpoint(path.parent / "none.safetensors")


def test_nan_is_refused_and_a_failed_write_leaves_the_old_file(saved, monkeypatch) -> None:
    network, path = saved
    whole = path.read_bytes()
    broken = networks.copy_state(network)
    name = next(iter(broken))
    broken[name].view(-1)[0] = float("nan")
    with pytest.raises(CheckpointError, match=name):
        networks.save_checkpoint(path, broken, {})
    with pytest.raises(ValueError):
        networks.save_checkpoint(path, network.state_dict(), {"dice": float("nan")})
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        networks.save_checkpoint(path, network.state_dict(), {"other": 1})
    assert path.read_bytes() == whole
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no leftovers


def test_a_state_of_another_architecture_is_refused_and_nothing_changes() -> None:
    network = networks.build_network(TINY, 0)
    before = networks.copy_state(network)
    with pytest.raises(CheckpointError, match="the file.*another architecture.*missing.*unknown"):
        networks.load_state(network, networks.build_network(VNET, 0).state_dict(), "the file")
    wider = networks.build_network(replace(TINY, channels=(4, 16)), 0)
    with pytest.raises(CheckpointError, match="has shape"):
        networks.load_state(network, wider.state_dict(), "the file")
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_a_state_keeps_its_float_type() -> None:
    network = networks.build_network(TINY, 0)
    exact = {k: v.double() for k, v in networks.build_network(TINY, 1).state_dict().items()}
    networks.load_state(network, exact)
    assert network(volumes(TINY).double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("settings", "last"), [(QUICK, "body.model.2.conv.bias"), (VNET, "body.out_tr.conv2.bias")], ids=["unet", "vnet"]
)
def test_a_new_network_expects_classes_as_often_as_they_are(settings: Settings, last: str) -> None:
    network = networks.build_network(settings, 3).eval()
    assert network.state_dict()[last].softmax(dim=0).tolist() == pytest.approx(networks.CLASS_FREQUENCY)
    with torch.inference_mode():
        seen = network(volumes(settings)).softmax(dim=1).mean(dim=(0, 2, 3, 4))
    assert seen[0] > 0.8  # untrained, it already calls most of a volume background


@pytest.mark.parametrize("architecture", ["unet", "vnet"])
@pytest.mark.parametrize(
    ("kind", "layer", "tensors"),
    [("batch", nn.BatchNorm3d, 5), ("group", nn.GroupNorm, 2), ("instance", nn.InstanceNorm3d, 0)],
)
def test_another_normalisation_replaces_every_layer_and_leaves_the_initial_weights(
    architecture: str, kind: str, layer: type[nn.Module], tensors: int
) -> None:
    base = replace(VNET, architecture=architecture)
    plain, other = networks.build_network(base, 3), networks.build_network(replace(base, normalisation=kind), 3)
    found = [m for m in other.modules() if "Norm" in type(m).__name__]
    assert found and all(type(m) is layer for m in found)
    assert len(networks.normalisation_names(other)) == tensors * len(found)
    local = networks.normalisation_names(other) | networks.normalisation_names(plain)
    weights = {k for k in plain.state_dict() if k not in local}
    assert weights and all(torch.equal(plain.state_dict()[k], other.state_dict()[k]) for k in weights)
    with pytest.raises(ValueError, match="normalisation must be"):
        networks.build_network(replace(base, normalisation="layer"), 0)


def test_a_shrunk_student_is_narrower_at_every_level() -> None:
    small = networks.build_student(replace(QUICK, student_shrink=4), 0)
    narrow = networks.build_network(replace(QUICK, channels=(4, 8, 16, 32)), 0)
    assert all(torch.equal(small.state_dict()[k], v) for k, v in narrow.state_dict().items())
    wide = networks.build_student(QUICK, 0).state_dict()
    assert networks.nbytes(wide) > 15 * networks.nbytes(small.state_dict())
    with pytest.raises(ValueError, match="does not divide the channels"):
        networks.build_student(replace(VNET, student_shrink=2), 0)
