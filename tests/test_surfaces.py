"""Meshes against spheres, slabs and shells; pictures of them; what a surface view shows, stores and refuses."""

from __future__ import annotations

import io
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, sparse

from fedkd_utils import acquisition, anatomy, cohorts, figures, meshes, rendering, surfaces, viewer
from fedkd_utils.opened import opened
from fedkd_utils.settings import QUICK
from fedkd_utils.site_folder import Item

matplotlib.use("Agg")
LATTICES = [((60, 60, 60), (1.0, 1.0, 1.0)), ((30, 60, 60), (2.0, 1.0, 1.0)), ((16, 50, 50), (4.0, 1.2, 1.2))]


def radii(shape, spacing):
    """Distance of every voxel from the middle, in mm, and the middle."""
    middle = (np.array(shape) - 1) / 2 * spacing
    lattice = np.stack(np.indices(shape), axis=-1) * spacing - middle
    return np.linalg.norm(lattice, axis=-1), middle


# ------------------------------------------------------------------------------------------------------------ meshes
@pytest.mark.parametrize(("shape", "spacing"), LATTICES)
def test_the_surface_of_a_ball(shape, spacing):
    distance, middle = radii(shape, spacing)
    mesh = meshes.mesh_of(distance < 20, spacing)
    r = np.linalg.norm(mesh.vertices - middle, axis=1)
    assert r.mean() == pytest.approx(20, abs=0.25) and r.std() < 0.15 * spacing[0]
    assert mesh.volume_mm3 == pytest.approx(4 / 3 * np.pi * 20**3, rel=0.03)
    outwards = ((mesh.vertices - middle) / r[:, None] * mesh.normals).sum(axis=1)
    assert np.median(outwards) > 0.98 and np.allclose(np.linalg.norm(mesh.normals, axis=1), 1)
    edges = np.sort(mesh.faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
    assert (np.unique(edges, axis=0, return_counts=True)[1] == 2).all(), "closed: every edge has two triangles"


def test_a_mask_at_the_border_is_closed_and_an_empty_one_refused():
    mask = np.ones((4, 10, 10), bool)
    assert meshes.mesh_of(mask, (2, 1, 1)).volume_mm3 == pytest.approx(800, rel=0.1)
    with pytest.raises(ValueError, match="mask is empty"):
        meshes.mesh_of(~mask, (2, 1, 1))


def test_a_thin_oblique_sheet_through_thick_slices_stays_in_one_piece():
    x, _, z = np.indices((12, 30, 40)) * np.array([4.0, 1.2, 1.2])[:, None, None, None]
    sheet = np.abs(z - 10 - 0.5 * x) < 1.3
    mesh = meshes.mesh_of(sheet, (4, 1.2, 1.2))
    assert mesh.volume_mm3 == pytest.approx(sheet.sum() * 4 * 1.2**2, rel=0.15)
    edges = mesh.faces[:, [0, 1]]
    links = sparse.csr_array((np.ones(len(edges)), edges.T), shape=(len(mesh.vertices),) * 2)
    _, piece = sparse.csgraph.connected_components(links, directed=False)
    assert np.bincount(piece).max() > 0.97 * len(piece)


@pytest.mark.parametrize(("shape", "spacing"), LATTICES[:2])
def test_the_signed_distance_between_two_balls(shape, spacing):
    distance, _ = radii(shape, spacing)
    small, large = (meshes.mesh_of(distance < r, spacing) for r in (19, 22))
    for mesh, truth, expected in ((large, small, 3), (small, large, -3), (small, small, 0)):
        found = meshes.signed_distance_mm(mesh, truth)
        assert found.mean() == pytest.approx(expected, abs=0.1) and found.std() < 0.25


@pytest.mark.parametrize(("shape", "spacing"), LATTICES[:2])
@pytest.mark.parametrize("thickness", [3, 5])
def test_the_thickness_of_a_shell(shape, spacing, thickness):
    distance, _ = radii(shape, spacing)
    shell = meshes.mesh_of((distance < 24) & (distance >= 24 - thickness), spacing)
    found = meshes.thickness_mm(shell)
    assert np.median(found) == pytest.approx(thickness, abs=0.2)
    assert np.percentile(found, 10) > thickness - 0.7 and np.percentile(found, 95) < thickness + 0.7


@pytest.mark.parametrize("voxels", [2, 3, 6])
def test_the_thickness_of_a_slab(voxels):
    mask = np.zeros((30, 40, 20), bool)
    mask[4:-4, 5:-5, 7 : 7 + voxels] = True
    slab = meshes.mesh_of(mask, (1.5, 1.0, 1.0))
    found = meshes.thickness_mm(slab)
    inner = (np.abs(slab.vertices[:, :2] - (21.75, 19.5)) < 8).all(axis=1)
    assert found[inner] == pytest.approx(voxels, abs=0.25)
    assert found.max() < voxels + 1, "no ball at the rim is larger than the slab"


# --------------------------------------------------------------------------------------------------------- rendering
def ball(radius=10, colour=(1.0, 0.0, 0.0), opacity=1.0, centre=(0, 0, 0)):
    distance, middle = radii((40, 40, 40), (1, 1, 1))
    mesh = meshes.mesh_of(distance < radius, (1, 1, 1))
    moved = meshes.Mesh(mesh.vertices - middle + centre, mesh.faces, mesh.normals)
    return rendering.Body(moved, np.array(colour), opacity)


def test_a_ball_is_drawn_as_a_lit_disc_without_holes():
    picture = rendering.render([ball()], rendering.camera(0, 0), np.zeros(3), 20, 200)
    red = (picture[..., 0] - picture[..., 1]) > 0.2
    assert red.mean() == pytest.approx(np.pi / 16, rel=0.05)
    assert (ndimage.binary_fill_holes(red) == red).all()
    light = picture[..., 0]
    assert light[70, 70] > light[130, 130] + 0.1, "the lamp hangs at the upper left"


def test_from_the_front_the_right_of_the_patient_is_on_the_left_and_the_top_above():
    right, up, eye = rendering.camera(0, 0)
    assert right == pytest.approx([-1, 0, 0]) and up == pytest.approx([0, 0, 1]) and eye == pytest.approx([0, 1, 0])
    assert rendering.camera(90, 0)[2] == pytest.approx([-1, 0, 0]), "from the left"
    bodies = [ball(5, centre=(10, 0, 0)), ball(5, (0, 0, 1), centre=(0, 0, 10))]
    picture = rendering.render(bodies, rendering.camera(0, 0), np.zeros(3), 20, 100)
    red, blue = (np.argwhere(picture[..., c] - picture[..., 1] > 0.2).mean(axis=0) for c in (0, 2))
    assert red == pytest.approx([50, 25], abs=2) and blue == pytest.approx([25, 50], abs=2)


def test_what_is_in_front_hides_and_what_is_translucent_tints():
    near, far = ball(8, (0, 0, 1), centre=(0, 12, 0)), ball(8)
    middle = rendering.render([far, near], rendering.camera(0, 0), np.zeros(3), 20, 50)[25, 25]
    assert middle[2] > middle[0] + 0.3
    through = replace(near, opacity=0.3)
    seen = rendering.render([through, far], rendering.camera(0, 0), np.zeros(3), 20, 50)[25, 25]
    assert seen[0] > seen[2] > 0.1
    behind = rendering.render([replace(through), far], rendering.camera(180, 0), np.zeros(3), 20, 50)[25, 25]
    assert behind[2] < 0.35 and behind[0] > 0.6


# ------------------------------------------------------------------------------------------------------ surface view
SPACING = (2.0, 1.0, 1.0)


def label():
    """Three slabs: femoral 4 mm, tibial 3 mm, patellar 3 mm thick."""
    out = np.zeros((20, 40, 40), np.uint8)
    out[3:17, 5:35, 25:29], out[3:17, 5:35, 12:15], out[6:14, 33:36, 30:38] = 1, 2, 3
    return out


@pytest.fixture
def shown(monkeypatch):
    found = []
    monkeypatch.setattr(viewer, "display", lambda bundle, **more: found.append(bundle))
    yield found
    assert not figures.plt.get_fignums()


def test_one_label_is_shown_by_class(shown):
    live = surfaces.show_surfaces(label(), SPACING, title="Slabs")
    assert [trace.name for trace in live.data] == ["femoral", "tibial", "patellar"]
    assert [trace.color for trace in live.data] == list(figures.CLASS_COLOURS.values())
    (bundle,) = shown
    assert bundle["text/plain"] == (
        "Slabs: surfaces of femoral, tibial, patellar cartilage, from the front and from below, coloured by class."
    )
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == live.model_id
    picture = Image.open(io.BytesIO(bundle["image/png"])).convert("RGB")
    assert picture.width > 250 and len(bundle["image/png"]) < 100_000
    pixels = np.asarray(picture).astype(int)
    for c in (0, 1, 2):
        assert ((pixels[..., c] - np.delete(pixels, c, axis=-1).max(axis=-1)) > 30).sum() > 200


def test_methods_stand_side_by_side_with_their_distances(shown):
    thicker = label()
    thicker[3:17, 5:35, 29:31] = 1
    labels = {"truth": label(), "too thick": thicker, "nothing": 0 * label()}
    live = surfaces.show_surfaces(labels, SPACING, "distance", title="Two")
    drawn = {trace.scene: trace for trace in live.data if trace.name == "femoral"}
    assert drawn["scene"].intensity is None
    top = drawn["scene2"].intensity[np.asarray(drawn["scene2"].z) > 29.5]
    assert np.median(top) == pytest.approx(2, abs=0.1)
    assert np.median(np.abs([t.intensity for t in live.data if t.scene == "scene2"][1])) == pytest.approx(0, abs=0.01)
    titles = [note.text for note in live.layout.annotations]
    assert "mean" in titles[1] and "draws no cartilage" in titles[2]
    assert "of truth, too thick, nothing" in shown[0]["text/plain"]
    assert shown[0]["text/plain"].endswith("coloured by distance to the truth.")


def test_all_scenes_follow_the_one_that_is_turned(shown):
    live = surfaces.show_surfaces({"a": label(), "b": label(), "c": label()}, SPACING)
    live.layout.scene2.camera = {"eye": {"x": 1, "y": 2, "z": 3}}
    assert live.layout.scene.camera.eye.z == live.layout.scene3.camera.eye.z == 3


def test_a_thickness_map(shown):
    live = surfaces.show_surfaces(label(), SPACING, "thickness")
    for trace, expected in zip(live.data, (4, 3, 3), strict=True):
        assert np.percentile(trace.intensity, 80) == pytest.approx(expected, abs=0.5)
    assert "thickness" in live.layout.coloraxis.colorbar.title.text


@pytest.mark.parametrize(
    ("labels", "more", "words"),
    [
        (0 * label(), {}, "no cartilage in the label"),
        ({"a": label(), "b": label()}, {"colour": "distance"}, "measured from the truth"),
        ({"truth": label()}, {"colour": "distance"}, "measured from the truth"),
        ({"truth": label(), "a": label()[1:]}, {"colour": "distance"}, "a has another shape or spacing"),
        (label(), {"colour": "red"}, "choose class, distance or thickness"),
        (label() + 3, {}, "label holds"),
        (label()[0], {}, "2 axes"),
        (label(), {"bones": np.zeros((2, 2, 2))}, "on one grid"),
        ("gone.nii.gz", {}, "no such file"),
    ],
)
def test_what_cannot_be_shown_is_named(labels, more, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        surfaces.show_surfaces(labels, None if isinstance(labels, str) else SPACING, **more)


# -------------------------------------------------------------------------------------------------------- made knees
@pytest.fixture(scope="module")
def items(tmp_path_factory):
    few = {name: 1 for name in ("repository_training", "repository_validation", "repository_test", "client_labelled")}
    few |= {"client_unlabelled": 0, "client_validation": 0, "client_test": 0, "clients": 3}
    settings = replace(QUICK, **few)
    root = tmp_path_factory.mktemp("knees")
    sites = [
        cohorts.make_repository(settings, root=root, workers=1, progress=False),
        cohorts.make_repository(settings, "random", root=root, workers=1, progress=False),
        *cohorts.make_clients(settings, "heterogeneous", root=root, workers=1, progress=False),
    ]
    return [site.training[0] for site in sites]


@pytest.mark.parametrize("number", range(5))
def test_the_bones_of_a_made_knee_fit_its_label(items, number):
    held, bones = opened(items[number]), surfaces.made_bones(items[number])
    assert bones.shape == held.label.shape
    cartilage = held.label > 0
    shared = (bones & cartilage).sum()
    assert shared < 0.12 * cartilage.sum()
    for axis, by in ((0, 2), (1, 5), (1, -5), (2, 5), (2, -5)):
        assert (np.roll(bones, by, axis) & cartilage).sum() > shared, "elsewhere they would fit worse"
    near = ndimage.distance_transform_edt(~bones, sampling=held.spacing_mm)[cartilage]
    assert np.percentile(near, 90) < 5, "cartilage lies on bone"


def test_an_item_is_shown_with_its_bones(items, shown):
    live = surfaces.show_surfaces(items[0], bones=surfaces.made_bones(items[0]))
    assert live.data[-1].name == "bones" and live.data[-1].opacity < 0.5
    assert shown[0]["text/plain"].endswith("the bones translucent.")
    scanner = acquisition.SCANNERS["repository_dess"]
    tissue = anatomy.tissue_map(anatomy.draw_knee(1), scanner.shape, scanner.spacing_mm)
    assert surfaces.show_surfaces(anatomy.LABEL_OF_TISSUE[tissue], scanner.spacing_mm, bones=tissue).data[-1].x.size


def test_bones_of_a_real_knee_are_not_known(tmp_path):
    item = Item("mine", 1, tmp_path / "site" / "imagesTr" / "mine.nii.gz", None, (1, 2, 3))
    with pytest.raises(ValueError, match="not a made knee"):
        surfaces.made_bones(item)
    with pytest.raises(ValueError, match="mine: this item has no label"):
        surfaces.show_surfaces(item)
