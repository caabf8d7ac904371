"""Bad inputs: files that lie, are cut off or unpack to more than a disk, and words that are no JSON, name or number."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import safetensors.numpy
from conftest import dicom_slice

from campaign.journal import HEADER
from campaign.world import chest

BOMB_MIB = 2048
"""What the bombs unpack to."""

WRONG_SIZES = {
    "width": [10**9, -8, "8", None],
    "crop": [10**9, 7],
    "slab_count": [10**9],
    "slices_per_slab": [4],
    "filters": [10**9],
    "spacing_mm": [0],
}
"""Of a model's networks and slabs."""


def volumes() -> Iterator[tuple[str, bytes]]:
    """File name and content of volumes that no study is; the name begins with what is wrong."""
    hu = chest(0).voxels
    yield from _nrrds(hu)
    yield from _niftis(hu)
    for ending in ("nrrd", "nii", "nii.gz"):
        for name, content in _no_images():
            yield f"{name}.{ending}", content


def _nrrd(hu: np.ndarray, header: str = "", payload: bytes | None = None, **fields: str | None) -> bytes:
    slices, rows, columns = hu.shape
    text = HEADER.format(slices=slices, rows=rows, columns=columns, dx=5, dy=5, dz=5, x=0, y=0, z=0)
    lines = text.replace("uint8", "int16").strip().split("\n")
    for key, value in fields.items():
        name = key.replace("_", " ")
        lines = [line for line in lines if not line.startswith(f"{name}:")]
        if value is not None:
            lines.append(f"{name}: {value}")
    data = gzip.compress(hu.tobytes(), 1) if payload is None else payload
    return ("\n".join(lines) + "\n" + header + "\n").encode("utf-8", "surrogateescape") + data


def _nrrds(hu: np.ndarray) -> Iterator[tuple[str, bytes]]:
    whole = _nrrd(hu)
    for share in (0.0005, 0.001, 0.002, 0.01, 0.3, 0.9, 0.9999):
        yield f"nrrd cut off at {share}.nrrd", whole[: int(len(whole) * share)]
    sizes = ("64 64 33", "64 64 3200", "0 64 32", "-64 64 32", "64 64", "64 64 32 1", "x y z", "1e9 1e9 1e9",
             "64 64 nan", "9999999999 9999999999 9999999999", "2147483647 2 1", "64 64 1", "", "64,64,32")  # fmt: skip
    for size in sizes:
        yield f"nrrd sizes {size}.nrrd", _nrrd(hu, sizes=size)
    for kind in ("double", "float", "block", "complex", "", "int17", "uint8", "text", "longlong"):
        yield f"nrrd type {kind}.nrrd", _nrrd(hu, type=kind)
    for encoding in ("raw", "bzip2", "ascii", "hex", "zstd", "", "gzip gzip", "../raw"):
        yield f"nrrd encoding {encoding}.nrrd", _nrrd(hu, encoding=encoding)
    bad = ("none none none", "(0,0,0) (0,5,0) (0,0,5)", "(nan,0,0) (0,5,0) (0,0,5)", "(inf,0,0) (0,5,0) (0,0,5)",
           "(5,0,0) (5,0,0) (0,0,5)", "(1e30,0,0) (0,1e30,0) (0,0,1e30)", "(1e-30,0,0) (0,5,0) (0,0,5)", "(5,0) (0,5)",
           "(5,0,0) (3,5,0) (0,0,5)", "(5,0,0) (0,5,0)", "5 5 5", "((5,0,0)", "(5,0,0) (0,5,0) (0,0,)")  # fmt: skip
    for directions in bad:
        yield f"nrrd directions {directions}.nrrd", _nrrd(hu, space_directions=directions)
    yield "nrrd without directions.nrrd", _nrrd(hu, space_directions=None)
    for space in ("", "scanner-xyz", "left-posterior", "4", "\udcff\udcfe", "left-posterior-superior-time"):
        yield f"nrrd space {space!a}.nrrd", _nrrd(hu, space=space)
    yield "nrrd without space.nrrd", _nrrd(hu, space=None)
    for origin in ("(nan,0,0)", "(inf,0,0)", "(1e300,0,0)", "(0,0)", "x"):
        yield f"nrrd origin {origin}.nrrd", _nrrd(hu, space_origin=origin)
    for dimension in ("0", "2", "4", "17", "-1", "x", "99999999999"):
        yield f"nrrd dimension {dimension}.nrrd", _nrrd(hu, dimension=dimension)
    for file in ("/etc/passwd", "../study0.nrrd", "LIST", "study0.nrrd", "slice%03d.raw 1 100 1", "\x00"):
        yield f"nrrd data file {file!a}.nrrd", _nrrd(hu, header=f"data file: {file}\n", payload=b"")
        yield f"nrrd data file {file!a} and data.nrrd", _nrrd(hu, header=f"data file: {file}\n")
    for skip in ("999999999", "-999", "x"):
        yield (
            f"nrrd byte skip {skip}.nrrd",
            _nrrd(hu, header=f"byte skip: {skip}\n", encoding="raw", payload=hu.tobytes()),
        )
    yield "nrrd colour.nrrd", _nrrd(hu, dimension="4", sizes="3 64 64 32", kinds="RGB-color domain domain domain",
                                    space_directions="none (5,0,0) (0,5,0) (0,0,5)")  # fmt: skip
    yield "nrrd endless header.nrrd", b"NRRD0004\n" + b"# nothing\n" * 300_000
    yield "nrrd one long line.nrrd", b"NRRD0004\ncontent: " + b"x" * 5_000_000
    yield "nrrd of NUL.nrrd", b"NRRD0004\n" + bytes(4096)
    yield "nrrd sum is wrong.nrrd", whole[:-8] + b"\x00\x01\x02\x03" + whole[-4:]
    yield (
        "nrrd byte flipped.nrrd",
        whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 255]) + whole[len(whole) // 2 + 1 :],
    )
    yield "nrrd bomb behind the data.nrrd", _nrrd(hu, payload=gzip.compress(hu.tobytes(), 1) + bomb())
    yield "nrrd bomb as large as it says.nrrd", _nrrd(hu, sizes=f"1024 1024 {BOMB_MIB // 2}", payload=bomb())
    yield "nrrd bomb of bzip2.nrrd", _nrrd(hu, encoding="bzip2", payload=bz2.compress(bytes(64 << 20)))
    for value, kind in ((np.nan, "float"), (np.inf, "float"), (-np.inf, "float"), (1e30, "float")):
        voxels = hu.astype(np.float32)
        voxels[3, 3, 3] = value
        yield f"nrrd holds {value}.nrrd", _nrrd(voxels, type=kind)
    for name, voxels in _not_hu(hu):
        kind = {"i": "int", "u": "uint", "f": "float"}[voxels.dtype.kind] + ("" if voxels.dtype.kind == "f" else "16")
        yield f"nrrd {name}.nrrd", _nrrd(voxels, type=kind)


def _niftis(hu: np.ndarray) -> Iterator[tuple[str, bytes]]:
    whole = _nifti(hu)
    for share in (0.0001, 0.001, 0.0013, 0.01, 0.5, 0.9999):
        cut = whole[: int(len(whole) * share)]
        yield f"nifti cut off at {share}.nii", cut
        yield f"nifti cut off at {share}.nii.gz", gzip.compress(cut, 1)
        yield f"nifti gz cut off at {share}.nii.gz", gzip.compress(whole, 1)[: int(len(whole) * share / 4)]
    lies = {
        "sizeof_hdr 0": (0, "<i", 0), "sizeof_hdr 349": (0, "<i", 349), "dim0 0": (40, "<h", 0),
        "dim0 2": (40, "<h", 2), "dim0 4": (40, "<h", 4), "dim0 8": (40, "<h", 8),
        "dim1 -64": (42, "<h", -64), "dim1 32767": (42, "<h", 32767),
        "dim3 0": (46, "<h", 0), "dim3 33": (46, "<h", 33), "dim3 32767": (46, "<h", 32767), "dim3 1": (46, "<h", 1),
        "datatype 0": (70, "<h", 0), "datatype 1": (70, "<h", 1), "datatype 32": (70, "<h", 32),
        "datatype 64": (70, "<h", 64), "datatype 128": (70, "<h", 128), "datatype 1536": (70, "<h", 1536),
        "datatype 2048": (70, "<h", 2048), "datatype 999": (70, "<h", 999), "bitpix 0": (72, "<h", 0),
        "bitpix 1": (72, "<h", 1), "bitpix -16": (72, "<h", -16), "pixdim1 0": (80, "<f", 0.0),
        "pixdim1 nan": (80, "<f", np.nan), "pixdim1 1e30": (80, "<f", 1e30), "pixdim1 -5": (80, "<f", -5e5),
        "vox_offset -1": (108, "<f", -1.0), "vox_offset 1e30": (108, "<f", 1e30), "vox_offset nan": (108, "<f", np.nan),
        "vox_offset inf": (108, "<f", np.inf), "vox_offset 100000000": (108, "<f", 1e8),
        "slope nan": (112, "<f", np.nan), "slope inf": (112, "<f", np.inf), "slope 1e30": (112, "<f", 1e30),
        "magic": (344, "<i", 0), "magic of a pair": (344, "<i", 0x0031696E), "extension": (348, "<i", 0x01010101),
    }  # fmt: skip
    for name, (offset, form, value) in lies.items():
        content = bytearray(whole)
        struct.pack_into(form, content, offset, value)
        yield f"nifti {name}.nii", bytes(content)
        yield f"nifti {name}.nii.gz", gzip.compress(bytes(content), 1)
    for bits in (0, 1, 8, -16):
        cut = bytearray(whole[: len(whole) * 6 // 10])
        struct.pack_into("<h", cut, 72, bits)
        yield f"nifti cut off, bitpix {bits}.nii", bytes(cut)
        yield f"nifti cut off, bitpix {bits}.nii.gz", gzip.compress(bytes(cut), 1)
    placeless = bytearray(whole)
    struct.pack_into("<hh", placeless, 252, 0, 0)
    yield "nifti without a place.nii", bytes(placeless)
    for name, rows in (
        ("singular", np.zeros(12)),
        ("nan", np.full(12, np.nan)),
        ("sheared", [5, 4, 0, 0, 0, 5, 0, 0, 0, 0, 5, 0]),
    ):
        content = bytearray(whole)
        struct.pack_into("<hh", content, 252, 0, 2)
        struct.pack_into("<12f", content, 280, *rows)
        yield f"nifti sform {name}.nii", bytes(content)
    yield "nifti not packed.nii.gz", whole
    yield "nifti packed.nii", gzip.compress(whole, 1)
    yield "nifti packed twice.nii.gz", gzip.compress(gzip.compress(whole, 1), 1)
    packed = bytearray(gzip.compress(whole, 1))
    packed[-6] ^= 255
    yield "nifti gz sum is wrong.nii.gz", bytes(packed)
    large = bytearray(whole[:352])
    struct.pack_into("<8h", large, 40, 3, 1024, 1024, BOMB_MIB // 2, 1, 1, 1, 1)
    yield "nifti bomb as large as it says.nii.gz", gzip.compress(bytes(large), 1) + bomb()
    yield "nifti bomb behind the data.nii.gz", gzip.compress(whole, 1) + bomb()
    for name, voxels in _not_hu(hu):
        yield f"nifti {name}.nii.gz", gzip.compress(_nifti(voxels), 1)
    yield "nifti colour.nii", _nifti(np.zeros((*hu.shape, 3), np.int16))
    yield "nifti 5-D.nii", _nifti(np.zeros((4, 4, 4, 1, 3), np.int16))
    yield "nifti plane.nii", _nifti(hu[0])
    yield "nifti complex.nii", _nifti(hu.astype(np.complex64))


def _nifti(voxels: np.ndarray) -> bytes:
    image = nibabel.Nifti1Image(voxels.T, np.diag([-5.0, -5.0, 5.0, 1.0]))
    return image.to_bytes()


def _not_hu(hu: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    yield "all zero", np.zeros_like(hu)
    yield "windowed", hu.clip(-160, 240)
    yield "shifted to 0", (hu + 1024).astype(np.uint16)
    yield "one slice", hu[:1]
    yield "scaled to 1", (hu / 1024).clip(0, 1).astype(np.float32)


def _no_images() -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "one byte", b"N"
    yield "zeros", bytes(10_000)
    yield "text", b"study,path\n1,2\n" * 50
    yield "png", b"\x89PNG\r\n\x1a\n" + bytes(200)
    yield "html", b"<!doctype html><script>alert(1)</script>"
    yield "pickle", b"cos\nsystem\n(S'touch /tmp/pe-campaign-was-here'\ntR."
    yield "gzip of nothing", gzip.compress(b"")
    yield "gzip bomb", bomb()
    yield "zip", archive_zip({"../evil.txt": b"x"})
    yield "noise", np.random.default_rng(5).bytes(50_000)


_bomb: list[bytes] = []


def bomb() -> bytes:
    """A gzip stream of 2 GiB of zeros in 2 MB: one member of 16 MiB many times."""
    if not _bomb:
        _bomb.append(gzip.compress(bytes(16 << 20)) * (BOMB_MIB // 16))
    return _bomb[0]


def archive_zip(members: dict[str, bytes]) -> bytes:
    """A zip archive with these names."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target.getvalue()


def archives() -> Iterator[tuple[str, bytes]]:
    """Archives that would write elsewhere or fill the disk."""
    yield "up.zip", archive_zip({"../../victim/evil.txt": b"x"})
    yield "absolute.zip", archive_zip({"/tmp/pe-campaign-was-here": b"x"})
    yield "bomb.zip", archive_zip({"a.nrrd": bytes(64 << 20)})
    yield "names.zip", archive_zip({"a/" * 300 + "x": b"x", "\\..\\evil": b"x"})
    for name, member in (
        ("up", "../../victim/evil.txt"),
        ("absolute", "/tmp/pe-campaign-was-here"),
        ("plain", "x.nrrd"),
    ):
        target = io.BytesIO()
        with tarfile.open(fileobj=target, mode="w:gz") as archive:
            entry = tarfile.TarInfo(member)
            entry.size = 4
            archive.addfile(entry, io.BytesIO(b"evil"))
        yield f"{name}.tar.gz", target.getvalue()
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)
    yield "link.tar", target.getvalue()


def dicom_folders(root: Path) -> Iterator[Path]:
    """Folders that are no whole CT series; the folder's name is what is wrong."""
    positions = [(-100.0, -100.0, 5.0 * k) for k in range(8)]
    stored = (chest(0).voxels[4:12] + 1024).astype(np.uint16)

    def series(name: str, edit: object = None, planes: object = range(8), **tags: object) -> Path:
        folder = root / name
        folder.mkdir(parents=True)
        for k in planes:  # type: ignore[attr-defined]
            dataset = dicom_slice(stored[k % 8], positions[k % 8], InstanceNumber=k, **tags)
            if edit:
                edit(k, dataset)  # type: ignore[operator]
            dataset.save_as(folder / f"{k:02d}.dcm", enforce_file_format=True)
        return folder

    def at(k: int, **tags: object) -> object:
        def edit(index: int, dataset: object) -> None:
            if index == k:
                for keyword, value in tags.items():
                    if value is None:
                        delattr(dataset, keyword)
                    else:
                        setattr(dataset, keyword, value)

        return edit

    yield series("a slice is missing", planes=(0, 1, 2, 4, 5, 6, 7))
    yield series("one slice", planes=(3,))
    yield series("two at one place", at(4, ImagePositionPatient=[-100, -100, 15]))
    yield series("uneven", at(4, ImagePositionPatient=[-100, -100, 17]))
    yield series("all at one place", lambda k, d: setattr(d, "ImagePositionPatient", [0, 0, 0]))
    yield series("drifts aside", lambda k, d: setattr(d, "ImagePositionPatient", [5 * k, 0, 5 * k]))
    yield series("tilted", ImageOrientationPatient=[1, 0, 0, 0, 0.8, -0.6])
    yield series("coronal", ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    yield series("orientation of zeros", ImageOrientationPatient=[0, 0, 0, 0, 0, 0])
    yield series("orientation not upright", ImageOrientationPatient=[1, 0, 0, 1, 0, 0])
    yield series("no orientation", ImageOrientationPatient=None)
    yield series("no position", ImagePositionPatient=None)
    yield series("one without a position", at(3, ImagePositionPatient=None))
    yield series("no spacing", PixelSpacing=None)
    yield series("spacing 0", PixelSpacing=[0, 0])
    yield series("spacing negative", PixelSpacing=[-1, 1])
    yield series("spacing 1e9", PixelSpacing=[1e9, 1e9])
    yield series("other spacing inside", at(3, PixelSpacing=[2, 2]))
    yield series("magnetic resonance", Modality="MR")
    yield series("no modality", Modality=None)
    yield series("colour", SamplesPerPixel=3, PhotometricInterpretation="RGB")
    yield series("slope 0", RescaleSlope=0)
    yield series("no slope", RescaleSlope=None)
    yield series("intercept 1e9", RescaleIntercept=1e9)
    yield series("rows lie", lambda k, d: setattr(d, "Rows", 128))
    yield series("rows 0", lambda k, d: setattr(d, "Rows", 0))
    yield series("rows 65535", lambda k, d: (setattr(d, "Rows", 65535), setattr(d, "Columns", 65535)))
    yield series(
        "one of another size",
        lambda k, d: k == 3 and (setattr(d, "Rows", 32), setattr(d, "PixelData", bytes(32 * 64 * 2))),
    )
    yield series("pixels cut off", lambda k, d: setattr(d, "PixelData", d.PixelData[:1000]))
    yield series("no pixels", at(3, PixelData=None))
    yield series("no pixels at all", lambda k, d: delattr(d, "PixelData"))
    yield series("bits 1", BitsAllocated=1, BitsStored=1, HighBit=0)
    yield series("bits stored 20", BitsStored=20, HighBit=19)
    yield series("localizer", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    yield series("no series", SeriesInstanceUID=None)
    yield series("every slice a series", lambda k, d: setattr(d, "SeriesInstanceUID", f"1.2.{k}"))
    yield series("says JPEG 2000", lambda k, d: _encapsulated(d, "1.2.840.10008.1.2.4.90"))
    yield series("says JPEG", lambda k, d: _encapsulated(d, "1.2.840.10008.1.2.4.70"))
    yield series("says run lengths", lambda k, d: _encapsulated(d, "1.2.840.10008.1.2.5"))

    whole = series("files cut off")
    for number, file in enumerate(sorted(whole.iterdir())):
        content = file.read_bytes()
        file.write_bytes(content[: max(200, len(content) * number // 8)])
    yield whole
    lying = series("element longer than the file")
    for file in lying.iterdir():
        content = file.read_bytes()
        place = content.rfind(b"\xe0\x7f\x10\x00OW")
        file.write_bytes(content[: place + 8] + struct.pack("<I", 0xFFFFFFF0) + content[place + 12 :])
    yield lying
    deflated = series("deflated bomb")
    for file in deflated.iterdir():
        content = file.read_bytes().replace(b"1.2.840.10008.1.2.1\x00", b"1.2.840.10008.1.2.1.99"[:20])
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        file.write_bytes(content[:400] + packer.compress(bytes(64 << 20)) + packer.flush())
    yield deflated
    for name, files in (
        ("empty", {}),
        ("text only", {"readme.txt": b"hello"}),
        ("prefix only", {"a.dcm": bytes(128) + b"DICM"}),
        ("noise behind the prefix", {"a.dcm": bytes(128) + b"DICM" + np.random.default_rng(1).bytes(5000)}),
        ("directory only", {"DICOMDIR": bytes(128) + b"DICM" + bytes(64)}),
        ("zeros", {"a.dcm": bytes(100_000)}),
    ):
        folder = root / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_bytes(content)
        yield folder
    pipe = root / "a pipe"
    pipe.mkdir()
    os.mkfifo(pipe / "a.dcm")
    yield pipe
    loop = root / "links in a circle"
    loop.mkdir()
    (loop / "again").symlink_to(loop, target_is_directory=True)
    (loop / "gone.dcm").symlink_to(loop / "nothing")
    yield loop
    deep = root / "deep"
    (deep / "/".join(["d"] * 300)).mkdir(parents=True)
    yield deep


def _encapsulated(dataset: object, syntax: str) -> None:
    from pydicom.encaps import encapsulate

    dataset.file_meta.TransferSyntaxUID = syntax  # type: ignore[attr-defined]
    dataset.PixelData = encapsulate([b"\xff\x4f\xff\x51" + bytes(200)])  # type: ignore[attr-defined]
    dataset["PixelData"].is_undefined_length = True  # type: ignore[index]


def weights(model: bytes) -> Iterator[tuple[str, bytes]]:
    """Files that are no detector."""
    size = struct.unpack("<Q", model[:8])[0]
    header, data = json.loads(model[8 : 8 + size]), model[8 + size :]
    name = next(key for key, entry in header.items() if entry.get("dtype") == "F32")

    def changed(data: bytes = data, **entries: object) -> bytes:
        text = json.dumps({**header, **entries}).encode()
        return struct.pack("<Q", len(text)) + text + data

    def said(edit: object) -> bytes:
        words = json.loads(header["__metadata__"]["detector"])
        edit(words)  # type: ignore[operator]
        return changed(__metadata__={**header["__metadata__"], "detector": json.dumps(words)})

    yield "empty", b""
    yield "pickle", b"\x80\x04\x95cposix\nsystem\n."
    yield "torch zip", archive_zip({"archive/data.pkl": b"cos\nsystem\n(S'true'\ntR."})
    yield "text", b"model\n" * 100
    yield "cut off in the header", model[: 8 + size // 2]
    yield "cut off in the data", model[:-100]
    yield "one byte more", model + b"x"
    yield "header of 2^63 bytes", struct.pack("<Q", 2**63) + model[8:]
    yield "header of 100 MB", struct.pack("<Q", 100 << 20) + model[8:]
    yield "header no JSON", struct.pack("<Q", 100) + b"{" * 100 + data
    yield "header deep", struct.pack("<Q", 20000) + b"[" * 10000 + b"]" * 10000
    yield "no metadata", changed(__metadata__={})
    yield "metadata no JSON", changed(__metadata__={"format": "pt", "detector": "{"})
    yield "metadata a list", changed(__metadata__={"format": "pt", "detector": "[]"})
    yield "metadata deep", changed(__metadata__={"format": "pt", "detector": "[" * 100000})
    yield "other shape", changed(**{name: {**header[name], "shape": [1, *header[name]["shape"]]}})
    yield "other kind", changed(**{name: {**header[name], "dtype": "I8"}})
    yield "offsets overlap", changed(**{name: {**header[name], "data_offsets": [0, 2**40]}})
    tensors = safetensors.numpy.load(model)
    words = header["__metadata__"]
    yield "a tensor less", safetensors.numpy.save({k: v for k, v in tensors.items() if k != name}, words)
    yield "a tensor more", safetensors.numpy.save({**tensors, "more": np.zeros(3, np.float32)}, words)
    yield "not a number", safetensors.numpy.save({**tensors, name: np.full_like(tensors[name], np.nan)}, words)
    yield "infinite", safetensors.numpy.save({**tensors, name: np.full_like(tensors[name], np.inf)}, words)
    for key, values in WRONG_SIZES.items():
        for value in values:
            yield f"{key} {value}", said(lambda words, key=key, value=value: _set(words, key, value))


def _set(words: object, key: str, value: object) -> None:
    if isinstance(words, dict):
        for name, inner in words.items():
            if name == key:
                words[name] = value
            _set(inner, key, value)


def names() -> tuple[str, ...]:
    """Words that name nothing, or a path."""
    return (
        "../study0", "../../victim/evil", "/etc/passwd", "study0/../study1", "labels/final/study0", ".", "..", "", " ",
        "study0\x00", "study0\n", ".pe", ".lock", "datastore_v2.json", "x" * 300, "x" * 5000, "‮study0", "study０",
        "study0.nrrd", "..%2fstudy0", "%2e%2e", "a\\b", "C:\\x", "~", "*", "$(id)", "link", "'; drop table",
    )  # fmt: skip


def texts() -> tuple[str, ...]:
    """What is no finite JSON object."""
    return (
        "", "{", "[1, 2]", "5", '"x"', "null", "true", "NaN", '{"p": NaN}', '{"p": Infinity}', '{"p": 1e999}',
        '{"p": -1e999}', "[" * 100_000, '{"a":' * 50_000, "{'a': 1}", '{"a": 1,}', "\x00", '{"a": "\\ud800"}',
        '{"a": 1}{"b": 2}', "{" + '"a": 1, ' * 3 + "}", "١", '{"p": ' + "9" * 5000 + "}",
    )  # fmt: skip
