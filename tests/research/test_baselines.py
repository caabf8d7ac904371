"""The baselines: parameter counts of the originals, shapes, and what goes into them."""

import numpy as np
import pytest
import torch
from small_studies import SLABS, small_chest, small_studies

from pe_app.ct.lungs import lung_range
from pe_app.ct.slabs import SlabConfig, study_slabs
from pe_app.ct.volume import Volume, axial_affine
from pe_app.ct.volume_io import read_volume
from pe_app.research.baselines.cnn3d import CNN3D, CNN3DConfig, InflatedInception, cnn3d_planes
from pe_app.research.baselines.penet import PENet, PENetConfig, penet_windows
from pe_app.research.baselines.slab_pooling import maximum_of_slabs, mean_of_slabs
from pe_app.research.baselines.training import Windows
from pe_app.training.datasets import prepare_slabs, read_sources

SMALL_PENET = PENetConfig(
    slices=8, resize=48, crop=32, stride=8, width=16, groups=4, blocks=(1, 1, 2, 1), final_survival=1.0
)
SMALL_CNN = CNN3DConfig(width=8, filters=4, dropout=0.0)


def parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def chest(slices: int, rows: int = 48) -> Volume:
    voxels = np.random.default_rng(0).integers(-1000, 1000, (slices, rows, rows)).astype(np.int16)
    return Volume(voxels, axial_affine((2.0, 0.7, 0.7)))


def test_penet_has_the_parameters_of_the_original():
    with torch.device("meta"):
        assert parameters(PENet()) == 28_398_705


def test_inflated_inception_has_the_parameters_of_i3d():
    with torch.device("meta"):
        assert parameters(InflatedInception(channels=3)) == 12_287_264


def test_penet_reads_windows_of_24_slices_of_192_pixels():
    windows = penet_windows(chest(30, rows=64))
    assert windows.shape == (2, 24, 192, 192)
    with torch.device("meta"):
        assert PENet().eval()(torch.empty(windows.shape)).shape == (2,)


def test_penet_sees_hounsfield_units_from_minus_100_to_900():
    voxels = np.zeros((8, 48, 48), np.int16)
    voxels[:4], voxels[4], voxels[5], voxels[6] = -1024, -100, 400, 3000
    windows = penet_windows(Volume(voxels, axial_affine((1.0, 1.0, 1.0))), SMALL_PENET)
    assert windows[0, :, 16, 16] == pytest.approx(np.array([0, 0, 0, 0, 0, 0.5, 1, 0.1]) - 0.15897, abs=1e-6)


@pytest.mark.parametrize(("slices", "expected"), [(5, [0]), (8, [0]), (16, [0, 8]), (19, [0, 8, 11])])
def test_penet_windows_cover_every_slice_and_the_last_one_ends_with_the_study(slices, expected):
    volume = chest(slices)
    windows = penet_windows(volume, SMALL_PENET)
    assert len(windows) == len(expected)
    low = np.clip((volume.voxels.astype(float) + 100) / 1000, 0, 1)[:, 8:40, 8:40] - 0.15897
    for window, start in zip(windows, expected, strict=True):
        piece = low[start : start + 8]
        assert np.allclose(window[: len(piece)], piece, atol=1e-5)
        assert np.allclose(window[len(piece) :], -0.15897)


@pytest.mark.parametrize("make", [lambda: PENet(SMALL_PENET), lambda: CNN3D(SMALL_CNN)])
def test_a_network_learns_a_bright_ball_and_every_parameter_gets_a_gradient(make):
    torch.manual_seed(0)
    network = make()
    inputs = torch.zeros(4, 8, 32, 32)
    inputs[::2, 3:6, 10:20, 10:20] = 1
    truth = torch.tensor([1.0, 0.0, 1.0, 0.0])
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(network(inputs), truth)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    for _ in range(30):
        optimizer.zero_grad()
        step = torch.nn.functional.binary_cross_entropy_with_logits(network(inputs), truth)
        step.backward()
        optimizer.step()
    assert step < 0.5 * loss


def test_the_3d_cnn_depends_on_the_order_of_the_slices():
    torch.manual_seed(0)
    network = CNN3D(SMALL_CNN).eval()
    study = torch.rand(1, 24, 32, 32)
    assert network(study).shape == (1,)
    assert not torch.allclose(network(study), network(study.flip(1)), atol=1e-6)


def test_inflated_inception_keeps_an_eighth_of_the_slices_and_a_32nd_of_the_rows():
    with torch.device("meta"):
        assert InflatedInception()(torch.empty(1, 1, 64, 192, 192)).shape == (1, 1024, 8, 6, 6)


def test_slab_probabilities_are_pooled_by_mean_and_maximum():
    assert mean_of_slabs([0.1, 0.2, 0.9]) == pytest.approx(0.4)
    assert maximum_of_slabs([0.1, 0.2, 0.9]) == 0.9
    with pytest.raises(ValueError, match="from 0 to 1"):
        mean_of_slabs([0.1, 1.2])
    with pytest.raises(ValueError, match="from 0 to 1"):
        maximum_of_slabs([])


def test_stochastic_depth_leaves_out_bottlenecks_in_training_only():
    torch.manual_seed(0)
    network = PENet(PENetConfig(slices=8, crop=32, width=16, groups=4, blocks=(2, 2), final_survival=0.0))
    window = torch.rand(1, 8, 32, 32)
    assert len({round(network(window).item(), 5) for _ in range(12)}) > 1
    network.eval()
    assert network(window) == network(window)


def test_every_window_of_penet_holds_the_slice_of_its_slab(tmp_path):
    studies = small_studies(tmp_path / "studies", count=4)
    sources = read_sources(studies)
    slabs = prepare_slabs(sources, SLABS, tmp_path / "slabs")
    config = PENetConfig(slices=8, resize=64, crop=64, stride=8, width=16, groups=4)
    numbered = []
    for source in sources:
        path = tmp_path / f"{source.study.study}.npy"
        slices = len(read_volume(source.study.path).voxels)
        np.save(path, np.broadcast_to(np.arange(slices, dtype=np.float16)[:, None, None], (slices, 2, 2)))
        numbered.append(path)
    images = {file.study: file.image_sha256 for file in slabs.files}
    planes = {images[s.study.study]: path for s, path in zip(sources, numbered, strict=True) if s.study.study in images}
    windows = Windows(slabs, planes, config, seed=0)
    assert len(windows) == len(slabs)
    offsets = set()
    for item, index, label in zip(windows, slabs.slices, slabs.labels, strict=True):
        shown = item.features[:, 0, 0].tolist()
        assert len(shown) == 8
        assert int(index) in shown
        assert int(item.label) == label
        offsets.add(shown.index(int(index)))
    assert len(offsets) > 3


def test_the_3d_cnn_reads_the_lung_range_in_200_slices_of_192_pixels():
    volume, _ = small_chest(0, 2)
    planes = cnn3d_planes(volume, SLABS)
    assert planes.shape == (24, 32, 32)  # 6 slabs 4 slices apart, half of 64 pixels
    slabs = study_slabs(volume, lung_range(volume), SLABS)
    middle = slabs.pixels[2, 3].reshape(32, 2, 32, 2).mean((1, 3))
    assert np.allclose(planes[2 * 4 + 3], middle, atol=1e-6)
    full = SlabConfig()
    assert (full.range_slices, full.crop // 2) == (200, 192)
