"""The CPU and the GPU: who chooses, and that both compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import TINY

from fedkd_utils import clients, cohorts, experiments, networks
from fedkd_utils.device import compute_device, device_title, repeatable
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


@GPU
@pytest.mark.parametrize("row", [name for name, method in ROWS.items() if method.objective is not None])
def test_a_client_on_a_gpu_sends_what_one_on_the_cpu_sends(row: str, cache: Path) -> None:
    method = ROWS[row]
    settings = method.adapt(TINY)
    site = experiments.load_clients(cohorts.make_cohort(TINY, "paper_like", root=cache), TINY)[0]
    teacher = networks.build_network(settings, 1).eval() if method.distils else None
    state = networks.copy_state(networks.build_student(settings, 0))
    here, there, again = (
        _one_round(state, where, method, settings, teacher) for where in (site, *[site.to(torch.device("cuda"))] * 2)
    )
    assert all(tensor.device.type == "cpu" for tensor in {**there.state, **there.kept}.values())
    assert all(torch.equal(there.state[name], again.state[name]) for name in there.state)
    assert there.metrics["loss"] == pytest.approx(here.metrics["loss"], rel=1e-3)
    for name, tensor in here.state.items():
        assert torch.allclose(
            there.state[name].double(), tensor.double(), rtol=0, atol=0.1 * settings.learning_rate * 3
        )


def _one_round(state, site, method, settings, teacher):  # type: ignore[no-untyped-def]
    with repeatable():
        return clients.client_update(state, site, method, settings, 1, 0, teacher=teacher)


@GPU
def test_a_run_on_a_gpu_equals_one_on_the_cpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for device in ("cpu", "cuda"):
        monkeypatch.setenv("FEDKD_DEVICE", device)
        found.append(experiments.run_row("dual_kd", "paper_like", 0, TINY, cache, keep=False, show_progress=False))
    losses = [result.history_frame()["loss"] for result in found]
    assert losses[1].to_numpy() == pytest.approx(losses[0].to_numpy(), rel=1e-3)
    assert found[0].messages == found[1].messages
