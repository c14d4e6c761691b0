"""The CPU and the GPU: who chooses, and that both compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import TINY

from fedkd_utils import clients, cohorts, experiments, networks, parallel
from fedkd_utils.device import compute_device, computes_mixed, device_title, precision_title, repeatable
from fedkd_utils.methods import ROWS

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def test_the_variable_chooses_and_wrong_words_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDKD_DEVICE", "cpu")
    assert compute_device() == torch.device("cpu") and device_title(compute_device()) == "cpu"
    monkeypatch.setenv("FEDKD_DEVICE", "toaster")
    with pytest.raises(ValueError, match="FEDKD_DEVICE is 'toaster': it must be cpu or cuda"):
        compute_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("FEDKD_DEVICE", "cuda")
    with pytest.raises(ValueError, match="finds no GPU"):
        compute_device()
    monkeypatch.delenv("FEDKD_DEVICE")
    assert compute_device().type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert compute_device().type == "cuda"


def test_mixed_precision_is_for_a_gpu_that_has_it_and_can_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.delenv("FEDKD_PRECISION", raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert computes_mixed(gpu) and not computes_mixed(cpu)
    assert precision_title(gpu) == "mixed (bfloat16)" and precision_title(cpu) == "float32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert not computes_mixed(gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setenv("FEDKD_PRECISION", "float32")
    assert not computes_mixed(gpu) and precision_title(gpu) == "float32"
    monkeypatch.setenv("FEDKD_PRECISION", "half")
    with pytest.raises(ValueError, match="FEDKD_PRECISION is 'half': it must be mixed or float32"):
        computes_mixed(cpu)


def test_a_gpu_trains_one_client_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.os, "cpu_count", lambda: 64)
    assert parallel.default_workers() > 1
    monkeypatch.setenv("FEDKD_DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parallel.default_workers() == 1


def test_a_network_in_mixed_precision_gives_float32_and_its_copy_lies_as_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = networks.build_network(TINY, 0).eval()
    x = torch.randn((1, 1, *TINY.grid_shape), generator=torch.Generator().manual_seed(0))
    logits, features = network.forward_with_features(x)
    before = networks.copy_state(network)
    monkeypatch.setattr(networks, "computes_mixed", lambda device: True)  # a CPU has bfloat16, too
    networks.place(network, torch.device("cpu"))
    kernels = [p for p in network.parameters() if p.ndim == 5 and min(p.shape[:2]) > 1 and max(p.shape[2:]) > 1]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in kernels)
    mixed, mixed_features = network.forward_with_features(x)
    assert {mixed.dtype, mixed_features.dtype} == {torch.float32}
    assert not torch.equal(mixed, logits)  # it did compute with fewer digits, and not with many fewer
    assert torch.allclose(mixed, logits, atol=0.05 * float(logits.detach().abs().max()))
    assert torch.allclose(mixed_features, features, atol=0.05 * float(features.detach().abs().max()))
    after = networks.copy_state(network)
    assert all(torch.equal(after[name], tensor) and after[name].is_contiguous() for name, tensor in before.items())


def test_repeatable_leaves_the_global_flags_as_they_were() -> None:
    flags = torch.backends.cudnn
    before = (flags.deterministic, flags.benchmark, flags.allow_tf32)
    with repeatable():
        assert flags.deterministic and not flags.benchmark and not flags.allow_tf32
    assert (flags.deterministic, flags.benchmark, flags.allow_tf32) == before


def test_only_training_volumes_move(cache: Path) -> None:
    site = experiments.load_clients(cohorts.make_cohort(TINY, "paper_like", root=cache), TINY)[0]
    moved = site.to(torch.device("meta"))
    assert {moved.labelled_images.device.type, moved.labels.device.type, moved.unlabelled_images.device.type} == {
        "meta"
    }
    assert moved.test is site.test and moved.validation is site.validation and site.labels.device.type == "cpu"


def _on_cpu_and_twice_on_gpu(row: str, cache: Path) -> list[clients.Update]:
    """A client's first round on the CPU, on the GPU, and once more on the GPU."""
    method = ROWS[row]
    settings = method.adapt(TINY)
    site = experiments.load_clients(cohorts.make_cohort(TINY, "paper_like", root=cache), TINY)[0]
    teacher = networks.build_network(settings, 1).eval() if method.distils else None
    state = networks.copy_state(networks.build_student(settings, 0))
    with repeatable():
        return [
            clients.client_update(state, where, method, settings, 1, 0, teacher=teacher)
            for where in (site, *[site.to(torch.device("cuda"))] * 2)
        ]


@GPU
@pytest.mark.parametrize("row", [name for name, method in ROWS.items() if method.objective is not None])
def test_a_client_on_a_gpu_sends_what_one_on_the_cpu_sends(
    row: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDKD_PRECISION", "float32")
    here, there, again = _on_cpu_and_twice_on_gpu(row, cache)
    assert all(tensor.device.type == "cpu" for tensor in {**there.state, **there.kept}.values())
    assert all(torch.equal(there.state[name], again.state[name]) for name in there.state)
    assert there.metrics["loss"] == pytest.approx(here.metrics["loss"], rel=1e-3)
    for name, tensor in here.state.items():
        assert torch.allclose(
            there.state[name].double(), tensor.double(), rtol=0, atol=0.1 * ROWS[row].adapt(TINY).learning_rate * 3
        )


@GPU
@pytest.mark.parametrize("row", ["fedavg", "dual_kd", "uamt"])
def test_in_mixed_precision_a_client_learns_the_same_and_repeats_itself(row: str, cache: Path) -> None:
    here, there, again = _on_cpu_and_twice_on_gpu(row, cache)
    assert all(tensor.dtype == here.state[name].dtype for name, tensor in there.state.items())
    assert all(torch.equal(there.state[name], again.state[name]) for name in there.state)
    assert there.metrics["loss"] == pytest.approx(here.metrics["loss"], rel=0.02)
    assert there.metrics["loss"] != here.metrics["loss"]


@GPU
def test_a_run_on_a_gpu_equals_one_on_the_cpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setenv("FEDKD_PRECISION", "float32")
    for device in ("cpu", "cuda"):
        monkeypatch.setenv("FEDKD_DEVICE", device)
        found.append(experiments.run_row("dual_kd", "paper_like", 0, TINY, cache, keep=False, show_progress=False))
    losses = [result.history_frame()["loss"] for result in found]
    assert losses[1].to_numpy() == pytest.approx(losses[0].to_numpy(), rel=1e-3)
    assert found[0].messages == found[1].messages
