"""Student and teacher: MONAI networks with a tap at the bottleneck, and their checkpoints on disk."""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from monai.networks.nets import UNet, VNet
from monai.networks.nets.vnet import DownTransition, InputTransition, OutputTransition, UpTransition
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fedkd_utils.device import computes_mixed
from fedkd_utils.files import write_atomically
from fedkd_utils.provenance import state_hash
from fedkd_utils.seeds import seeded
from fedkd_utils.settings import CLASS_NAMES, Settings

State = dict[str, Tensor]

#: About how often each class meets a voxel of the common grid. The last bias starts at its logarithm (Lin et al., arXiv
#: 1708.02002): a network that first calls every voxel a cartilage spends its first hundred steps on unlearning that.
CLASS_FREQUENCY = (0.981, 0.011, 0.005, 0.003)

#: Base width of the V-Net in the authors' release (MONAI's own is fixed at 16 and has 45.6 M parameters).
VNET_WIDTH = 4

#: Thick slices are not halved more often than this in all: a quarter of 20 slices is 5.
MAX_SLICE_STRIDE = 4


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the message names the file, the fault and the remedy."""


class ChannelDropout(nn.Module):
    """Dropout of whole channels (Tompson et al., arXiv 1411.4280) that draws from a generator of its own.

    PyTorch's dropout draws from the global generator, so its masks depend on everything drawn before and on
    other threads. Dropping channels, as MONAI's V-Net does, also costs next to nothing on a CPU: one number
    per channel in the place of one per voxel.
    """

    def __init__(self, p: float, generator: torch.Generator) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"Dropout must be at least 0 and below 1, not {p}.")
        self.p = p
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, ...): channels zeroed with probability p, the others divided by 1 - p."""
        if not self.training or self.p == 0:
            return x
        kept = torch.rand(x.shape[:2], generator=self.generator) >= self.p  # on the CPU, wherever x is
        return x * (kept.to(x) / (1 - self.p)).view(*x.shape[:2], *([1] * (x.ndim - 2)))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class _Tap:
    """Listens at a block. It does not know the network, so a network nobody uses any more is gone at once."""

    def __init__(self) -> None:
        self.listening = False
        self.features: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if self.listening:
            self.features = output


class TappedNetwork(nn.Module):
    """A segmentation network whose bottleneck can be read in the same pass.

    Attributes:
        body: the network from (B, 1, D, H, W) to logits (B, 4, D, H, W).
        blocks: readable names of its parts, in the order of the data, to their paths in ``body``.
        tap: the block whose output are the features of distillation, the end of the encoder.
        strides: how much smaller the bottleneck is along (D, H, W); grids must be multiples of it.
    """

    def __init__(self, body: nn.Module, blocks: Mapping[str, str], tap: str, strides: tuple[int, int, int]) -> None:
        super().__init__()
        self.dropout_generator = torch.Generator()
        _use_channel_dropout(body, self.dropout_generator)
        self.body = body
        self.blocks = dict(blocks)
        self.tap = tap
        self.strides = strides
        self._tap = _Tap()
        body.get_submodule(self.blocks[tap]).register_forward_hook(self._tap)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, D, H, W) -> logits (B, 4, D, H, W)."""
        if x.ndim != 5 or any(size % stride for size, stride in zip(x.shape[2:], self.strides, strict=True)):
            raise ValueError(
                f"A volume of shape {tuple(x.shape)} does not fit: (B, 1, D, H, W) with D, H, W multiples of "
                f"{self.strides} is needed. Choose such a grid_shape in the settings."
            )
        with torch.autocast(x.device.type, torch.bfloat16, enabled=computes_mixed(x.device)):
            logits: Tensor = self.body(x)
        return logits.to(x.dtype)

    def forward_with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, 4, D, H, W) and the bottleneck (B, F, d, h, w), from one pass."""
        self._tap.listening = True
        try:
            logits = self(x)
            features = self._tap.features
        finally:
            self._tap.listening, self._tap.features = False, None
        assert features is not None  # the hook ran, or forward raised
        return logits, features.to(logits.dtype)

    def seed_dropout(self, seed: int) -> None:
        """Start the masks of every dropout layer anew."""
        self.dropout_generator.manual_seed(seed)


def place(network: TappedNetwork, device: torch.device) -> TappedNetwork:
    """Move a network in place; on a GPU that computes in mixed precision its kernels lie channels last.

    That is the layout of the 16-bit convolutions of a GPU; activations follow the kernels.
    """
    mixed = computes_mixed(device)
    return network.to(device, memory_format=torch.channels_last_3d if mixed else torch.contiguous_format)  # type: ignore[call-overload]


def _use_channel_dropout(body: nn.Module, generator: torch.Generator) -> None:
    for module in list(body.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.modules.dropout._DropoutNd):
                setattr(module, name, ChannelDropout(child.p, generator))


class _NarrowVNet(VNet):
    """MONAI's V-Net (Milletari et al., arXiv 1606.04797) with a base width other than 16."""

    def __init__(self, width: int, classes: int, dropout: float) -> None:
        nn.Module.__init__(self)
        act = ("elu", {"inplace": True})
        w = width
        self.in_tr = InputTransition(3, 1, w, act)
        self.down_tr32 = DownTransition(3, w, 1, act)
        self.down_tr64 = DownTransition(3, 2 * w, 2, act)
        self.down_tr128 = DownTransition(3, 4 * w, 3, act, dropout_prob=dropout)
        self.down_tr256 = DownTransition(3, 8 * w, 2, act, dropout_prob=dropout)
        self.up_tr256 = UpTransition(3, 16 * w, 16 * w, 2, act, dropout_prob=(dropout, dropout))
        self.up_tr128 = UpTransition(3, 16 * w, 8 * w, 2, act, dropout_prob=(dropout, dropout))
        self.up_tr64 = UpTransition(3, 8 * w, 4 * w, 1, act, dropout_prob=(None, dropout))
        self.up_tr32 = UpTransition(3, 4 * w, 2 * w, 1, act, dropout_prob=(None, dropout))
        self.out_tr = OutputTransition(3, 2 * w, classes, act)


def unet_strides(settings: Settings) -> tuple[tuple[int, int, int], ...]:
    """The strides of each level of the UNet, by nnU-Net's rule (doi:10.1038/s41592-020-01008-z).

    At each level an axis is halved unless its voxels are already twice as long as the shortest, or its size is
    odd, or, for the slices, :data:`MAX_SLICE_STRIDE` is reached.
    """
    size, spacing = list(settings.grid_shape), list(settings.grid_spacing_mm)
    levels = []
    for _ in settings.channels[1:]:
        shortest = min(spacing)
        stride = [2 if s < 2 * shortest and n % 2 == 0 else 1 for n, s in zip(size, spacing, strict=True)]
        if settings.grid_shape[0] // size[0] >= MAX_SLICE_STRIDE:
            stride[0] = 1
        size = [n // k for n, k in zip(size, stride, strict=True)]
        spacing = [s * k for s, k in zip(spacing, stride, strict=True)]
        levels.append((stride[0], stride[1], stride[2]))
    return tuple(levels)


def bottleneck_width(settings: Settings) -> int:
    """The channels of the network's bottleneck, without building it."""
    return settings.channels[-1] if settings.architecture == "unet" else 16 * VNET_WIDTH


def build_network(settings: Settings, seed: int) -> TappedNetwork:
    """The network of a profile, that of the teacher, with initial weights from ``seed``.

    ``"unet"``: MONAI's UNet of ``settings.channels`` with instance normalisation and leaky rectifiers; at the
    first level it works at half the resolution in the plane. ``"vnet"``: the V-Net of the release, base width
    4, 2.85 M parameters, batch normalisation. ``settings.normalisation`` puts another one in the place of its
    own; the initial weights stay the same. Instance normalisation has neither parameters nor statistics here,
    batch and group normalisation have a gain and a shift per channel, and batch normalisation also statistics.

    Raises:
        ValueError: an architecture or a normalisation of another name, or a grid it cannot halve often enough.
    """
    if settings.architecture == "unet":
        strides = unet_strides(settings)
        depth = len(strides)
        with seeded(seed):
            unet = UNet(
                spatial_dims=3,
                in_channels=1,
                out_channels=len(CLASS_NAMES),
                channels=settings.channels,
                strides=strides,  # type: ignore[arg-type]  # MONAI takes a stride per axis too
                norm="instance",
                act=("leakyrelu", {"inplace": True, "negative_slope": 0.01}),
                dropout=settings.dropout,
                bias=False,  # a shift before a normalisation is lost
            )
        # MONAI's constructor leaves a cycle of references to the UNet: without its shell, weights are gone with the
        # last network that uses them and need not wait for the garbage collector.
        body: nn.Module = nn.Sequential(OrderedDict(model=unet.model))
        del unet.model
        last = body.get_submodule("model.2.conv")
        last.bias = nn.Parameter(torch.empty(len(CLASS_NAMES)))
        path = ["model" + ".1.submodule" * level for level in range(depth + 1)]
        blocks = {f"encoder {i + 1}": f"{path[i]}.0" for i in range(depth)}
        blocks["bottleneck"] = path[depth]
        blocks |= {f"decoder {i + 1}": f"{path[i]}.2" for i in reversed(range(depth))}
        total = tuple(math.prod(axis) for axis in zip(*strides, strict=True))
        network = TappedNetwork(body, blocks, "bottleneck", (total[0], total[1], total[2]))
    elif settings.architecture == "vnet":
        with seeded(seed):
            body = _NarrowVNet(VNET_WIDTH, len(CLASS_NAMES), settings.dropout)
        last = body.get_submodule("out_tr.conv2")
        paths = ["in_tr", "down_tr32", "down_tr64", "down_tr128", "down_tr256"]
        blocks = {f"encoder {i + 1}": path for i, path in enumerate(paths[:-1])} | {"bottleneck": paths[-1]}
        decoders = ["up_tr256", "up_tr128", "up_tr64", "up_tr32"]
        blocks |= {f"decoder {4 - i}": path for i, path in enumerate(decoders)} | {"output": "out_tr"}
        network = TappedNetwork(body, blocks, "bottleneck", (16, 16, 16))
    else:
        raise ValueError(f"architecture must be 'unet' or 'vnet', not {settings.architecture!r}.")
    with torch.no_grad():
        last.bias.copy_(torch.tensor(CLASS_FREQUENCY).log())  # type: ignore[operator]
    if settings.normalisation != "own":
        _normalise_with(body, settings.normalisation)
    if any(size % stride for size, stride in zip(settings.grid_shape, network.strides, strict=True)):
        raise ValueError(
            f"The {settings.architecture} needs a grid whose sizes are multiples of {network.strides}, not "
            f"{settings.grid_shape}: change grid_shape in the settings."
        )
    return network


_NORMALISATIONS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


def _normalise_with(body: nn.Module, kind: str) -> None:
    """Replace every normalisation layer; groups hold 8 channels where that goes (Wu and He, arXiv 1803.08494)."""
    layers: dict[str, Any] = {
        "batch": nn.BatchNorm3d,
        "instance": nn.InstanceNorm3d,
        "group": lambda channels: nn.GroupNorm(channels // 8 if channels % 8 == 0 else 1, channels),
    }
    if kind not in layers:
        raise ValueError(f"normalisation must be 'own', 'batch', 'group' or 'instance', not {kind!r}.")
    for module in list(body.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, _NORMALISATIONS):
                setattr(module, name, layers[kind](getattr(child, "num_features", 0) or child.num_channels))


def normalisation_names(network: nn.Module) -> frozenset[str]:
    """The names of all parameters and statistics of normalisation layers, as they stand in the state."""
    return frozenset(
        f"{path}.{name}"
        for path, module in network.named_modules()
        if isinstance(module, _NORMALISATIONS)
        for name in module.state_dict()
    )


def class_axes(network: TappedNetwork) -> dict[str, int]:
    """The tensors of the last layer, as they stand in the state, and the axis of each along which the classes lie."""
    path, last = [
        (path, module)
        for path, module in network.body.named_modules()
        if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)) and module.bias is not None
    ][-1]
    axis = 1 if isinstance(last, nn.ConvTranspose3d) else 0
    return {f"body.{path}.weight": axis, f"body.{path}.bias": 0}


def build_student(settings: Settings, seed: int) -> TappedNetwork:
    """The student: the network of the profile, ``settings.student_shrink`` times narrower.

    Raises:
        ValueError: see :func:`build_network`; also a width that cannot be divided so.
    """
    shrink = settings.student_shrink
    if shrink == 1:
        return build_network(settings, seed)
    if settings.architecture != "unet" or any(width % shrink for width in settings.channels):
        raise ValueError(
            f"student_shrink {shrink} does not divide the channels {settings.channels} of the "
            f"{settings.architecture}: choose a divisor of all of them, and the UNet."
        )
    return build_network(replace(settings, channels=tuple(width // shrink for width in settings.channels)), seed)


def model_summary(network: TappedNetwork, shape: tuple[int, int, int]) -> pd.DataFrame:
    """One line per block for a volume (D, H, W): its name, its output (C, D, H, W) and its parameters.

    The last line is the sum. The weights and the statistics of the network stay as they are.
    """
    outputs: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            outputs[name] = tuple(output.shape[1:])

        return hook

    parts = {name: network.body.get_submodule(path) for name, path in network.blocks.items()}
    hooks = [part.register_forward_hook(note(name)) for name, part in parts.items()]
    was_training = network.training
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros((1, 1, *shape), dtype=next(network.parameters()).dtype))
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    rows = [
        {
            "module": name + (" (tap)" if name == network.tap else ""),
            "output shape": outputs[name],
            "parameters": _parameters(part),
        }
        for name, part in parts.items()
    ]
    whole = {
        "module": "in all",
        "output shape": rows[-1]["output shape"],
        "parameters": _parameters(network),
    }
    return pd.DataFrame([*rows, whole])


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def copy_state(network: nn.Module) -> State:
    """Every parameter and buffer, detached and copied to the CPU: training on does not change it."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in network.state_dict().items()
    }


def load_state(network: nn.Module, state: Mapping[str, Tensor], source: str = "this state") -> None:
    """Copy a state into a network of the same architecture, which takes over its float type.

    Raises:
        CheckpointError: names or shapes belong to another architecture; the network is left as it was.
    """
    check_layout(state, network.state_dict(), source)
    floats = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(floats) == 1:
        network.to(floats.pop())
    network.load_state_dict(dict(state))


def check_layout(state: Mapping[str, Tensor], like: Mapping[str, Tensor], source: str) -> None:
    """Refuse a state whose names or shapes are not those of ``like``.

    Raises:
        CheckpointError: names the source and the first tensor at fault.
    """
    missing, unknown = sorted(like.keys() - state.keys()), sorted(state.keys() - like.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{source} belongs to another architecture: {len(missing)} tensors are missing{_first(missing)} and "
            f"{len(unknown)} are unknown{_first(unknown)}. Use the settings it was made with."
        )
    for name, tensor in state.items():
        if tensor.shape != like[name].shape:
            raise CheckpointError(
                f"{source} belongs to another architecture: {name} has shape {tuple(tensor.shape)}, here "
                f"{tuple(like[name].shape)}. Use the settings it was made with."
            )


def _first(names: list[str]) -> str:
    return f" (first {names[0]})" if names else ""


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Refuse NaN and infinity in any tensor.

    Raises:
        CheckpointError: names the source and the tensor.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{source}: {name} holds NaN or infinite numbers. Training went astray: lower the learning rate."
            )


def largest_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest absolute difference between two states of one layout."""
    return max(float((one[name].double() - tensor.double()).abs().max()) for name, tensor in other.items())


def nbytes(state: Mapping[str, Tensor]) -> int:
    """The bytes of the tensors of a state, which is what a message with it costs."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def save_checkpoint(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write tensors and JSON metadata to one safetensors file, completely or not at all.

    The file carries a SHA-256 of both, so damage is noticed by :func:`load_checkpoint`.

    Raises:
        CheckpointError: NaN or infinity in a tensor; nothing is written.
        ValueError: metadata that JSON cannot hold.
    """
    path = Path(path)
    check_finite(state, str(path))
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}
    text = json.dumps(dict(metadata), sort_keys=True, allow_nan=False)
    return write_atomically(path, save(tensors, {"fedkd": text, "sha256": _checksum(tensors, text)}))


def load_checkpoint(path: str | Path) -> tuple[State, dict[str, Any]]:
    """Tensors and metadata of :func:`save_checkpoint`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: truncated, altered, of another program, or with NaN; names the file and the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint. Train it first, or check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            names = list(file.keys())
            state = {name: file.get_tensor(name) for name in names}
        text, checksum = header["fedkd"], header["sha256"]
    except (SafetensorError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged, or not a checkpoint of this course ({error}). Delete the file and make it again."
        ) from error
    if _checksum(state, text) != checksum:
        raise CheckpointError(f"{path}: its content does not fit its checksum. Delete it and make it again.")
    check_finite(state, str(path))
    metadata: dict[str, Any] = json.loads(text)
    return state, metadata


def _checksum(state: Mapping[str, Tensor], text: str) -> str:
    return hashlib.sha256((state_hash(state) + text).encode()).hexdigest()
