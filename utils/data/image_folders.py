"""Dataset files on disk: folders of image files, one folder per class."""

import itertools
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from utils.data.disk_layouts import Raw, Size, Split, listing
from utils.data.images import Picture, is_grey, read_image, suffixes, unlimited
from utils.data.watching import Watch
from utils.errors import UserError, note, number_of, one_line, some_of, unknown_name
from utils.files import load, read_text, reading
from utils.memory import check_host_memory, empty_on_host

NORMAL_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# WordNet ids; the position is the label.
IMAGENET_SUBSETS = dict(
    imagenette="n01440764 n02102040 n02979186 n03000684 n03028079 n03394916 n03417042 n03425413 n03445777 n03888257",
    imagewoof="n02096294 n02093754 n02111889 n02088364 n02086240 n02089973 n02087394 n02115641 n02099601 n02105641",
    imagemeow="n02123045 n02123159 n02123394 n02123597 n02124075 n02129165 n02129604 n02128925 n02128757 n02127052",
    imagesquawk="n01806143 n02007558 n01818515 n02051845 n02056570 n01614925 n01843383 n01518878 n01860187 n01819313",
    imagefruit="n07753275 n07753592 n07745940 n07747607 n07749582 n07768694 n07753113 n07720875 n07718472 n07742313",
    imageyellow="n02206856 n12057211 n07753592 n07749582 n12144580 n04146614 n03530642 n02129165 n01773157 n01531178",
)


class Notes:
    """What may surprise a user about a dataset's files: counted while they are found and read, printed once."""

    def __init__(self, name: str, passed_over: Collection[str] = ()) -> None:
        """
        Args:
            name: of the dataset.
            passed_over: suffixes of its files that are not images; these are not counted.
        """
        self.name, self._passed_over = name, passed_over
        self._left_out, self._images = Counter(), Counter()
        self._first: dict[str, Path] = {}

    def left_out(self, why: str, path: Path) -> None:
        if why not in self._passed_over:
            self._left_out[why] += 1
            self._first.setdefault(why, path)

    def image(self, remark: str, path: Path) -> None:
        self._images[remark] += 1
        self._first.setdefault(remark, path)

    def why_left_out(self) -> str:
        """3 × .txt, 1 × broken link (PATH), where PATH is the first .txt file; empty if no file is left out."""
        if not self._left_out:
            return ""
        kinds = self._left_out.most_common()
        return f"{some_of([f'{count} × {why}' for why, count in kinds])} ({self._first[kinds[0][0]]})"

    def say(self) -> None:
        if self._left_out:
            count = self._left_out.total()
            self.tell(f"{count} file{'s are' if count > 1 else ' is'} left out: {self.why_left_out()}")
        for remark, count in self._images.items():
            self.tell(f"{count} image{'s are' if count > 1 else ' is'} {remark} ({self._first[remark]})")

    def tell(self, text: str) -> None:
        note(one_line(f"{self.name}: {text}"))


@unlimited()
def tiny(data_path: Path, subset: str, size: Size, watch: Watch) -> Raw:
    """Tiny ImageNet, 3×64×64: `data_path` is tiny-imagenet-200 or the folder that holds it.

    train/<wnid>/images/* (the archive) or train/<wnid>/*; val/images/* with val/val_annotations.txt (the archive),
    val/images/<wnid>/* or val/<wnid>/*. Classes are sorted by WordNet id.
    """
    expected = "expected tiny-imagenet-200 with train/ and val/, as in http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    root = next((root for root in (data_path, data_path / "tiny-imagenet-200") if (root / "train").is_dir()), None)
    if root is None:
        raise UserError(f"Tiny: no train/ in {data_path} ({listing(data_path)}); {expected}, unpacked there")
    notes = Notes("Tiny", passed_over=(".txt",))  # the archive has them beside its images
    train = _class_files(notes, root / "train", suffixes())
    flat, annotations = root / "val" / "images", root / "val" / "val_annotations.txt"
    if _subfolders(flat):
        test = _class_files(notes, flat, suffixes())
    elif flat.is_dir() and (there := _files(notes, flat, suffixes())):
        if not annotations.is_file():
            raise UserError(f"Tiny: {flat} holds images but {annotations}, which says their classes, is missing; take "
                            "it from the archive, or sort the images into val/images/<wnid>/")
        test = {}
        with reading(annotations, "take it from the archive"):
            listed = dict(line.split("\t")[:2] for line in read_text(annotations).splitlines() if line.strip())
        for file, wnid in listed.items():
            test.setdefault(wnid, []).append(flat / file)
        test = {wnid: sorted(paths) for wnid, paths in test.items()}  # as where they are sorted into folders
        for path in there:
            if path.name not in listed:
                notes.left_out("not in val_annotations.txt", path)
    else:
        test = _class_files(notes, root / "val", suffixes())
    read = partial(read_image, size=(64, 64), resize=False)
    return _raw(notes, watch, root, train, test, sorted(train), (3, 64, 64), NORMAL_IMAGENET, read)


@unlimited()
def imagenet(data_path: Path, subset: str, size: Size, watch: Watch) -> Raw:
    """Ten classes of ImageNet: train/<wnid>/* and val/<wnid>/*, with folders for all thousand classes or, as in the
    Imagenette download, for the ten.

    Images are resized to the smallest that covers `size` (default 128×128) and centre-cropped.
    """
    if subset not in IMAGENET_SUBSETS:
        raise unknown_name("ImageNet subset", subset, IMAGENET_SUBSETS)
    chosen = IMAGENET_SUBSETS[subset].split()
    notes, size = Notes("ImageNet"), size or (128, 128)
    expected = (f"the ten WordNet ids of {subset}, as its own download or torchvision.datasets.ImageNet(root, split) "
                "unpacks them: folders")
    train, test = (_class_files(notes, data_path / split, suffixes(), chosen, expected) for split in ("train", "val"))
    return _raw(notes, watch, data_path, train, test, chosen, (3, *size), NORMAL_IMAGENET,
                partial(read_image, size=size))


@unlimited()
def image_folder(data_path: Path, subset: str, size: Size, watch: Watch) -> Raw:
    """A user's own images: train/<class>/* and test/<class>/* (else val/<class>/*), read as one channel if all are
    grey, else as RGB.

    Images are resized to the smallest that covers `size` (default 32×32) and centre-cropped. Mean and std are measured
    on the training images.
    """
    second = next((split for split in ("test", "val") if (data_path / split).is_dir()), None)
    if second is None or not (data_path / "train").is_dir():
        raise UserError(f"ImageFolder: {data_path} needs train/<class>/* and test/<class>/* or val/<class>/* "
                        f"({listing(data_path)}); make these folders, one per class, with images in them")
    notes, size = Notes("ImageFolder"), size or (32, 32)
    if second == "test" and (data_path / "val").is_dir():
        notes.tell(f"{data_path / 'val'} is not used, since test/ exists")
    train, test = (_class_files(notes, data_path / split, suffixes()) for split in ("train", second))
    channels = 1 if _all_grey([*itertools.chain(*train.values(), *test.values())], watch) else 3
    return _raw(notes, watch, data_path, train, test, sorted(train), (channels, *size), None,
                partial(read_image, size=size, channels=channels))


def imagenet_1k(data_path: Path, subset: str, size: Size, watch: Watch) -> Raw:
    """train/<class>/*.pt and val/<class>/*.pt: one tensor [3, 64, 64] each, uint8 or floats in [0, 1]."""
    notes = Notes("ImageNet1K")
    train, test = (_class_files(notes, data_path / split, (".pt",)) for split in ("train", "val"))
    classes = sorted(train)
    dtype = _load_tensor(train[classes[0]][0]).dtype  # the first file decides: all bytes or all floats
    dtype = torch.uint8 if dtype == torch.uint8 else torch.float32
    return _raw(notes, watch, data_path, train, test, classes, (3, 64, 64), NORMAL_IMAGENET,
                lambda path: Picture(_load_tensor(path, dtype)), dtype)


def _all_grey(paths: Sequence[Path], watch: Watch) -> bool:
    with watch("looking for colours", len(paths)) as advance:
        for path in paths:
            if not is_grey(path):
                return False
            advance(1)
    return True


def _raw(notes: Notes, watch: Watch, root: Path, train: dict[str, list[Path]], test: dict[str, list[Path]],
         classes: Sequence[str], shape: tuple[int, int, int], normal, read: Callable[[Path], Picture],
         dtype: torch.dtype = torch.uint8) -> Raw:
    for has, lacks, where in ((test, train, "train"), (train, test, "the test or val folder")):
        lost = sorted(set(has) - set(lacks))
        if lost:
            raise UserError(f"{notes.name}: in {root}, {where} has no images of {some_of(lost)}; both need the same "
                            "classes: add the images or remove the class")
    with watch("reading the images", sum(map(len, (*train.values(), *test.values())))) as advance:
        train, test = (_read_files(notes, files, classes, shape, dtype, read, advance) for files in (train, test))
    notes.say()
    return Raw(train, test, tuple(classes), normal)


def _subfolders(folder: Path) -> dict[str, Path]:
    """Name → path of the visible folders in `folder`; empty if it does not exist."""
    if not folder.is_dir():
        return {}
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")}


def _files(notes: Notes, folder: Path, suffixes: Collection[str], above: tuple[os.stat_result, ...] = ()) -> list[Path]:
    """The visible files with these suffixes in a folder, sorted by name, then those in its subfolders."""
    here = folder.stat()
    if any(os.path.samestat(here, each) for each in above):
        notes.left_out("circular link", folder)
        return []
    with os.scandir(folder) as entries:
        entries = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    files, folders = [], []
    for entry in entries:
        suffix = os.path.splitext(entry.name)[1].lower()
        # scandir already knows the type of an entry; only links need a stat. A Path treats a link to itself as broken.
        entry_or_path = Path(entry) if entry.is_symlink() else entry
        if entry_or_path.is_dir():
            folders.append(folder / entry.name)
        elif suffix in suffixes and entry_or_path.is_file():
            files.append(folder / entry.name)
        else:
            is_file = entry_or_path.is_file()
            other = "broken link" if entry.is_symlink() else "special file"
            kind = (suffix or "without a suffix") if is_file else other
            notes.left_out(kind, folder / entry.name)
    return files + [file for each in folders for file in _files(notes, each, suffixes, (*above, here))]


def _class_files(notes: Notes, folder: Path, suffixes: Collection[str], classes: Sequence[str] | None = None,
                 expected: str = "one folder per class") -> dict[str, list[Path]]:
    """Class → files in <class>/ and below, for these classes; None: for every folder."""
    kind = "image" if ".png" in suffixes else "/".join(suffixes)
    folders = _subfolders(folder)
    if classes is None:
        classes = list(folders)
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.suffix.lower() in suffixes and path.name not in folders and not path.name.startswith("."):
                notes.left_out("outside the classes' folders", path)
    missing = [c for c in classes if c not in folders]
    if missing or not classes:
        raise UserError(f"{notes.name}: {folder} has no folder for {some_of(missing) if missing else 'any class'} "
                        f"({listing(folder)}); expected {expected} with {kind} files in it")
    above = (folder.stat(), folder.parent.stat())  # a link to these would bring other classes' images
    files = {c: _files(notes, folders[c], suffixes, above) for c in classes}
    empty = [c for c in classes if not files[c]]
    if empty:
        there = notes.why_left_out()
        raise UserError(f"{notes.name}: no {kind} file in {folders[empty[0]]} ({len(empty)} of {len(classes)} class "
                        f"folders have none{f'; left out: {there}' if there else ''}); add images or remove the folder")
    return files


def _read_files(notes: Notes, files: dict[str, list[Path]], classes: Sequence[str], shape: tuple[int, int, int],
                dtype: torch.dtype, read: Callable[[Path], Picture], advance: Callable[[float], object]) -> Split:
    """Reads all files, class by class, with one thread per core: decoding releases the GIL."""
    paths = [path for c in classes for path in files[c]]
    need = len(paths) * math.prod(shape) * (4 + dtype.itemsize)  # as read, plus a float32 copy
    check_host_memory(need, f"{len(paths)} images of {'×'.join(map(str, shape))}, {paths[0]} the first")
    images, refused = empty_on_host((len(paths), *shape), dtype), {}

    def read_some(start: int) -> list[tuple[str, Path]]:
        remarks = []
        for row, path in enumerate(paths[start:start + 64], start):
            try:
                images[row], found = read(path)
            except UserError as error:
                refused[path] = error
            else:
                remarks += [(remark, path) for remark in found]
        return remarks

    starts = range(0, len(paths), 64)
    # The threads' own use of it, as in torch.load, is not thread-safe and would leave its filters set.
    with warnings.catch_warnings(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for start, remarks in zip(starts, pool.map(read_some, starts)):
            for remark, path in remarks:
                notes.image(remark, path)
            advance(min(64, len(paths) - start))
    if refused:
        first, *others = sorted(refused)
        also = f" (and {number_of(len(others), 'other file')}: {some_of(list(map(str, others)))})" if others else ""
        raise UserError(f"{refused[first]}{also}")
    counts = torch.tensor([len(files[c]) for c in classes])
    return Split(images, torch.arange(len(classes)).repeat_interleave(counts))


def _load_tensor(path: Path, dtype: torch.dtype | None = None) -> Tensor:
    """A .pt file → [3, 64, 64] of `dtype` (None: as it is)."""
    tensor = load(path, "image tensor")
    if not isinstance(tensor, Tensor) or tensor.shape != (3, 64, 64):
        what = f"a tensor of shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise UserError(f"{path} holds {what}, expected a tensor [3, 64, 64]; write it again")
    tensor, whole = tensor.detach(), tensor.dtype == torch.uint8
    if not whole and tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise UserError(f"{path} holds {tensor.dtype}, expected uint8 or floats in [0, 1]; write it again")
    if not whole and not (0 <= tensor.min() and tensor.max() <= 1):
        raise UserError(f"{path} holds {tensor.dtype} values from {tensor.min():g} to {tensor.max():g}, expected uint8 "
                        "or floats in [0, 1], not normalised; write it again")
    if dtype is not None and whole != (dtype == torch.uint8):
        raise UserError(f"{path} holds {tensor.dtype}, other files do not; write all as uint8 or all as floats")
    return tensor if dtype is None else tensor.to(dtype)
