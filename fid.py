"""Evaluation: FID, Inception Score, precision and recall of a set of images (paper, section 5).

    python fid.py samples                                         # built-in demo: CPU, a minute, no download
    python fid.py samples --ref VIRTUAL_imagenet256_labeled.npz   # gFID by the ADM protocol, as in the paper
    python fid.py reconstructions --ref imagenet/val --crop 256   # rFID
    python fid.py imagenet/train --crop 256 --save-stats ref.npz  # a reference, computed once

A set is a folder of images, an .npz of images (arr_0, uint8 (N,H,W,3)) or an .npz of statistics (mu, sigma).
A protocol leads from image to network input: adm (OpenAI's TensorFlow evaluator, the paper's), pytorch-fid or
clean (clean-fid). Numbers of other protocols, networks or counts do not compare.

Letters in shapes: B batch, N and M images, D width of the features.
"""

import argparse
import ctypes
import difflib
import hashlib
import json
import os
import pickle
import re
import signal
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import ExifTags, Image, PngImagePlugin
from safetensors.torch import load_file
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.models.inception import BasicConv2d, Inception3, InceptionE
from tqdm import tqdm

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Its name ends in the first digits of its SHA-256.
HUB_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"

# What belongs to the demo is used for the demo alone; fid.py trains nothing, so no other preset differs.
DEMO = {"ref": "data/demo", "inception_weights": "random", "num": 400, "ref_num": 400}

# A whole picture is read whatever its metadata: Pillow refuses PNG text and colour profiles over 1 MB.
PngImagePlugin.MAX_TEXT_CHUNK = 2**28
PngImagePlugin.MAX_TEXT_MEMORY = 2**28

UPRIGHT = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Parser(argparse.ArgumentParser):
    """Ends in one line, without the usage that argparse puts before it."""

    def error(self, message):
        raise SystemExit(f"{message}; see --help")


def count(text):
    """Flag type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1")
    return int(text)


def whole(text):
    """Flag type: a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 0")
    return int(text)


def metric_list(text):
    """Flag type: names of metrics, in any case."""
    metrics = text.lower().split(",")
    if not {"fid", "is", "prec", "rec"}.issuperset(metrics):
        raise argparse.ArgumentTypeError(f"{text}: expected some of fid,is,prec,rec")
    return metrics


def npz_path(text):
    """Flag type: an .npz that can be written, which is asked before the work."""
    folder = os.path.dirname(text) or "."
    if not text.endswith(".npz") or os.path.isdir(text) or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: expected an .npz in a folder that can be written into")
    return text


def device(text):
    """Flag type: a device that is here."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError):  # the latter of a torch built without CUDA
        raise argparse.ArgumentTypeError(f"{text}: no such device on this machine") from None


def made_by_demo(folder):
    """Whether sample.py wrote that the folder's images are of the demo's decoder."""
    try:
        settings = json.loads(Path(folder, "settings.json").read_bytes())
    except (OSError, ValueError):  # no folder of sample.py's
        return False
    return isinstance(settings, dict) and settings.get("demo") is True


def parse_args(argv=None):
    """The flags. Raises SystemExit, in one line, for flags and values that can't be meant."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    presets = ["demo", "small", "imagenet256", "imagenet512"]
    protocols = ["adm", "pytorch-fid", "clean"]
    workers = min(8, os.cpu_count() or 1)
    cuda = "cuda" if torch.cuda.is_available() else "cpu"

    # The sets
    add("samples", nargs="?", default="samples", help="the set to evaluate (%(default)s)")
    add(
        "--preset", choices=presets, help="demo: random weights, data/demo (where the samples are the demo's)"
    )
    add("--ref", help="the set that FID, precision and recall compare with (none; demo: data/demo)")
    add("--crop", type=count, help="centre-crop the reference to this size; without --ref, the samples (off)")
    add("--num", type=count, help="take the first so many samples (all; demo: 400)")
    add("--ref-num", type=count, help="take so many reference images, evenly spread (all; demo: 400)")

    # What is computed of them
    add("--metrics", type=metric_list, help="some of fid,is,prec,rec (all that the sets allow)")
    add("--protocol", choices=protocols, default="adm", help="from image to Inception's input (%(default)s)")
    add("--save-stats", type=npz_path, help="write the samples' mu, sigma, features: a later --ref (off)")
    add("--inception-weights", help="a file; or hub, fetched once; or random, for tests (hub; demo: random)")
    add("--features", help="a timm model instead of Inception; dinov2-large gives FD-DINOv2 (off)")
    add("--features-weights", default="hub", help="a file with timm's keys, or hub (%(default)s)")

    # What changes no result
    add("--batch-size", type=count, default=32, help="images a step; does not change results (%(default)s)")
    add("--workers", type=whole, default=workers, help="processes that decode images (%(default)s)")
    add("--device", type=device, default=cuda, help="cuda, cpu, mps, xpu (%(default)s)")
    add(
        "--json",
        action="store_true",
        help="print one JSON line: numbers, sets, counts, what the features are by (off)",
    )

    # argparse would not say which flag was meant.
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = ["--" + name.replace("_", "-") for name in vars(args)]
        nearest = difflib.get_close_matches(unknown[0], flags, 1)
        advice = f"did you mean {nearest[0]}?" if nearest else "see --help"
        raise SystemExit(f"argument {unknown[0]}: no such flag; {advice}")
    if args.features_weights != "hub" and not args.features:
        raise SystemExit("argument --features-weights: needs --features NAME, the model that they are of")

    # A flag that is given wins over the demo's value.
    unspecific = args.preset is None and args.ref is None and args.save_stats is None
    demo = args.preset == "demo" or (unspecific and made_by_demo(args.samples))
    defaults = DEMO if demo else {"inception_weights": "hub"}
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**vars(args) | defaults | given)


def moments(features):
    """features (N,D) -> mean (D,), unbiased covariance (D,D), float64. Two passes: nothing cancels."""
    mu = features.mean(0, dtype=torch.float64)
    sigma = torch.zeros(len(mu), len(mu), dtype=torch.float64)
    for rows in features.split(1024):  # blocks bound the memory
        centred = rows - mu  # (1024,D), float64
        sigma += centred.T @ centred
    return mu, sigma / (len(features) - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017); mu (D,), sigma (D,D), float64.

    With S1 = R R^T the symmetric R^T S2 R has S1 S2's eigenvalues: real, and right for singular ones too.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    eigenvalues, vectors = scipy.linalg.eigh(sigma1)
    # Rounding makes eigenvalues near 0 negative.
    root = vectors * np.sqrt(eigenvalues.clip(min=0))  # (D,D)
    eigenvalues = scipy.linalg.eigvalsh(root.T @ sigma2 @ root)
    trace_root = np.sqrt(eigenvalues.clip(min=0)).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_root
    return max(float(distance), 0.0)  # in this order NaN stays NaN


def inception_score(features, class_weight, split_size=5000):
    """exp(E KL(p(y|x) || p(y))), averaged over splits in order, the last as it comes (Salimans et al. 2016).

    features (N,2048), class_weight (1008,2048); no bias, as in the TensorFlow evaluators.
    """
    scores = []
    for rows in features.split(split_size):
        log_p = (rows.double() @ class_weight.double().T).log_softmax(1)  # (n,1008)
        p = log_p.exp()  # p(y|x), whose mean over the rows is p(y)
        divergence = (p * (log_p - p.mean(0).log())).sum(1)  # (n,)
        scores.append(divergence.mean().exp().item())
    return sum(scores) / len(scores)


def precision_recall(samples, reference, neighbours=3, block=256):
    """Share of samples in the reference's manifold, and the reverse (Kynkaanniemi et al. 2019, eq. 1).

    samples (N,D), reference (M,D), more than `neighbours` of each. A manifold: balls around points, each to
    its point's 3rd neighbour, itself not counted. Blocks of rows bound the memory.
    """

    def share_inside(points, centres):
        distances = (torch.cdist(rows, centres) for rows in centres.split(block))  # each (block,M)
        # One further than the neighbour asked for: the nearest to a point is itself.
        radii = torch.cat([distance.kthvalue(neighbours + 1).values for distance in distances])
        inside = [
            (torch.cdist(rows, centres) <= radii).any(1) for rows in points.split(block)
        ]  # each (block,)
        return torch.cat(inside).double().mean().item()

    return share_inside(samples, reference), share_inside(reference, samples)


def inception_input(images, protocol):
    """uint8 (B,3,H,W) -> (B,3,299,299) in [-1,1] as the evaluator that `protocol` names does it."""
    x = images.float()
    if protocol == "pytorch-fid":  # half-pixel centres, no antialias
        return 2 * F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) - 1
    if protocol == "clean":  # Pillow's bicubic of float images: it computes in float64
        x = F.interpolate(x.double(), (299, 299), mode="bicubic", align_corners=False, antialias=True)
        x = x.clamp(0, 255).float()
    else:  # adm, TensorFlow 1's bilinear: source = index * in/out, without half-pixel centres
        for axis in (3, 2):
            source = torch.arange(299.0, device=x.device) * (x.shape[axis] / 299)
            low = source.long()
            left, right = (x.index_select(axis, i.clamp(max=x.shape[axis] - 1)) for i in (low, low + 1))
            fraction = (source - low).view(-1, *[1] * (3 - axis))
            x = left + (right - left) * fraction  # (B,3,H,299), then (B,3,299,299)
    return (x - 128) / 128


def padding_not_counted(_module, inputs):
    """torchvision's averages of 3 x 3 pixels count the zeros around the image, TensorFlow's do not."""
    x = inputs[0]
    share = F.avg_pool2d(torch.ones_like(x[:1, :1]), 3, stride=1, padding=1)  # (1,1,H,W), below 1 at edges
    return x.div_(share)  # in place: nothing else reads x, and a copy would be large


class LastBlock(InceptionE):
    """Mixed_7c: as the block before it, with a maximum where that has an average."""

    def forward(self, x):
        *branches, _ = self._forward(x)
        pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        return torch.cat([*branches, self.branch_pool(pooled)], 1)


class Inception(Inception3):
    """The FID network: images uint8 (B,3,H,W) -> features (B,2048); class scores are features @ fc.weight.T.

    TensorFlow's graph of 2015 as pytorch-fid ported it: torchvision's, but for the pooling in its blocks and
    the number of classes. A new one is untrained, the same every time.
    """

    def __init__(self, protocol="adm"):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        self.protocol = protocol
        self.width = 2048
        for block in self.children():
            if hasattr(block, "branch_pool"):
                block.branch_pool.register_forward_pre_hook(padding_not_counted)
        self.Mixed_7c = LastBlock(2048)

        generator = torch.Generator().manual_seed(0)
        for weight in self.parameters():
            if weight.ndim > 1:  # He et al. 2015: the features keep their scale through 94 convolutions
                nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
        self.eval().requires_grad_(False)

    def fold(self):
        """Merge batch norms into convolutions, go channels-last: 1.7 times faster. Renames the state dict."""
        for module in self.modules():
            if isinstance(module, BasicConv2d):
                module.conv = fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = nn.Identity()
        return self.to(memory_format=torch.channels_last)

    def forward(self, images):
        x = inception_input(images, self.protocol)
        x = x.contiguous(memory_format=torch.channels_last)  # as `fold` made the weights
        for layer in list(self.children())[:-3]:  # all but average, dropout and classifier
            x = layer(x)  # at the end (B,2048,8,8)
        return x.mean((2, 3))


class TimmFeatures(nn.Module):
    """A timm model's features of uint8 (B,3,H,W) at 224 px. FD-DINOv2 (Stein et al. 2023): no registers.

    state: its weights, or None for timm's own from the hub.
    """

    def __init__(self, name, state):
        super().__init__()
        import timm  # a second that Inception does not wait for

        name = re.sub(r"^dinov2-(\w+)$", r"vit_\1_patch14_dinov2.lvd142m", name)
        if not timm.is_model(name):
            raise SystemExit(f"--features {name}: no model that timm knows")
        overlay = None if state is None else {"state_dict": state}
        self.model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
        self.model.reset_classifier(0)  # not earlier: without its classifier timm takes any file

        native = getattr(self.model, "pos_embed", None)
        if hasattr(self.model, "set_input_size"):
            self.model.set_input_size(224)
        if "patch14_dinov2" in name:  # resized as by its authors; timm's way moves the features by 5 %
            grid = native[:, 1:].unflatten(1, (37, 37)).movedim(3, 1)  # (1,C,37,37)
            grid = F.interpolate(grid, scale_factor=16.1 / 37, mode="bicubic")  # to 16 x 16
            self.model.pos_embed.data = torch.cat([native[:, :1], grid.flatten(2).mT], 1)
        self.eval()
        self.width = self.model.head_hidden_size

    def forward(self, images):
        x = F.interpolate(images.float(), (224, 224), mode="bicubic", align_corners=False, antialias=True)
        x = x.clamp(0, 255).round() / 255  # rounded, as Pillow's images are
        mean, std = (x.new_tensor(self.model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        return self.model((x - mean) / std)  # (B,3,224,224) -> (B,D)


def fetch_inception():
    """-> the path of pytorch-fid's weights, fetched once to torch.hub's folder, their hash checked."""
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(HUB_URL))
    if not os.path.exists(path):
        # Named before it starts: without a network it may take long to fail.
        print(f"fetching {HUB_URL}", file=sys.stderr)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.hub.download_url_to_file(HUB_URL, path, hash_prefix=HUB_URL[-12:-4])
    return path


def read_weights(path):
    """-> the state dict in a .safetensors or .pt file, read without running code; digits of its SHA-256."""
    state = load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    return dict(state), hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]


def load_inception(protocol, weights):
    """-> Inception of `hub`, `random` or a file, and what its features rest on."""
    network = Inception(protocol)
    digest = weights
    if weights != "random":
        path = fetch_inception() if weights == "hub" else weights
        state, digest = read_weights(path)
        network.load_state_dict(state)  # a plain dict may lack num_batches_tracked
    return network.fold(), f"{protocol} inception {digest}"


def load_timm(name, weights):
    """-> TimmFeatures of `hub` or a file, and what they rest on."""
    state = None if weights == "hub" else read_weights(weights)[0]
    network = TimmFeatures(name, state)
    # Of the weights, not of a file: a local copy of the hub's is the same network.
    digest = hashlib.sha256()
    for value in network.state_dict().values():
        digest.update(value.numpy().tobytes())
    return network, f"224px {name} {digest.hexdigest()[:8]}"


def load_network(features, protocol, weights):
    """-> the network, and what its features rest on: resize rule, name, digits of its weights' SHA-256.

    features: the name of a timm model, or None for Inception. weights: `hub`, a file, for Inception `random`.
    Raises SystemExit where they can't be had.
    """
    flag = "--features-weights" if features else "--inception-weights"
    wanted = f"weights of timm's {features}" if features else f"a copy of {HUB_URL}"
    try:
        return load_timm(features, weights) if features else load_inception(protocol, weights)
    except FileNotFoundError:
        reason = "no such file"
    except pickle.UnpicklingError:  # its own text advises to run the code in the file
        reason = "not a file of weights alone"
    except Exception as error:  # the hub, torch, safetensors and timm raise many kinds
        reason = repr(error)[:200]
    raise SystemExit(f"{flag} {weights}: {reason}; FILE is {wanted}")


def natural_order(names):
    """Names sorted with numbers by value; ties, as of `1` and `01` or `a` and `A`, by the plain string."""
    split = re.compile("([0-9]+)").split

    def key(name):
        parts = split(name.lower())  # text and digits take turns
        parts[1::2] = map(int, parts[1::2])
        return parts

    return sorted(sorted(names), key=key)  # sorting leaves ties as they are


def list_images(root, flag):
    """The images below the folder `root`, which `flag` names -> classes, names, labels, left_out.

    classes: the folders with images, relative to root (root itself is ""), each level in natural order. names
    (N,), bytes: the file names, class by class, each in natural order. labels (N,), int32: the class of each.
    left_out: what was not taken, in words, or "". Links are followed, each real folder is listed once, and
    names that begin with a dot are skipped. Raises SystemExit where a folder can't be read, where images lie
    beside class folders, and where there is no image.
    """

    def refuse(error):
        raise SystemExit(f"{flag} {error.filename}: {error.strerror}; expected a folder of images")

    classes = []
    names = []  # an array a class: a million strings would take 100 MB
    left_out = Counter()
    listed = set()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in listed:  # a link to itself or a parent, too
            left_out["folders listed before"] += 1
            subfolders.clear()
            continue
        listed.add(identity)

        # os.walk goes on with what is left in its list, in that order.
        subfolders[:] = natural_order(name for name in subfolders if name[0] != ".")
        files = [name for name in files if name[0] != "."]
        images = [name for name in files if name.lower().endswith(EXTENSIONS)]
        left_out["files of other kinds"] += len(files) - len(images)
        if not images:
            left_out["folders without images"] += not subfolders
            continue

        # What is below a folder follows it at once: comparing neighbours finds all mixtures.
        relative = folder[len(os.path.join(root, "")) :]
        if classes and relative.startswith(os.path.join(classes[-1], "")):
            image = os.path.join(root, classes[-1], os.fsdecode(names[-1][0]))
            raise SystemExit(
                f"{flag} {root}: image {image} lies beside class folder {folder}; move one of them"
            )
        classes.append(relative)
        names.append(np.array([os.fsencode(name) for name in natural_order(images)]))

    counts = ", ".join(f"{kind} ({count})" for kind, count in left_out.items() if count)
    if not classes:
        raise SystemExit(f"{flag} {root}: no {' '.join(EXTENSIONS)} in it; left out: {counts}")
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(array) for array in names])
    return classes, np.concatenate(names), labels, f"left out: {counts}" if counts else ""


def to_rgb(image):
    """An open Pillow image -> RGB, 8 bit: upright by its EXIF tag, 16 bits scaled, transparency on white.

    Raises whatever Pillow meets in broken pixels; broken metadata is passed over.
    """
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of many kinds, in a picture that is whole
        orientation = None
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])

    # Pillow's own conversion of 16-bit grey clips at 255.
    if image.mode.startswith("I"):
        levels = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(levels.round().astype(np.uint8))

    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def center_crop(image, size):
    """Pillow image -> its centre, size x size, as ADM evaluates (Dhariwal & Nichol 2021)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width = round(image.width * scale)
    height = round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left = (width - size) // 2
    top = (height - size) // 2
    return image.crop((left, top, left + size, top + size))


class FolderImages:
    """The images of a folder, by number in the order of list_images."""

    def __init__(self, root, flag):
        self.root = root
        self.classes, self.names, self.labels, self.left_out = list_images(root, flag)

    def __len__(self):
        return len(self.names)

    def name(self, index):
        folder = self.classes[self.labels[index]]
        return os.path.join(self.root, folder, os.fsdecode(self.names[index]))

    def read(self, index):
        with Image.open(self.name(index)) as image:
            return to_rgb(image)


class NpzImages:
    """arr_0 of an .npz, uint8 (N,H,W,3), mapped where it lies in the file: its 10 GB need no memory.

    Raises ValueError where arr_0 is anything else, and whatever zipfile and numpy meet in a damaged file.
    """

    left_out = ""

    def __init__(self, path):
        self.path = path
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo("arr_0.npy")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("arr_0 is compressed, write it with np.savez")

        # Between the entry's place and the array there is a header of zip, of some 50 bytes.
        with open(path, "rb") as file:
            file.seek(entry.header_offset)
            zip_header = file.read(512).find(b"\x93NUMPY")
            file.seek(entry.header_offset + zip_header)
            np.lib.format.read_magic(file)
            self.shape, transposed, dtype = np.lib.format.read_array_header_1_0(file)
            self.start = file.tell()  # bytes
        if dtype != np.uint8 or transposed or self.shape[3:] != (3,) or min(self.shape) < 1:
            raise ValueError(f"arr_0 is {dtype} {self.shape}, not uint8 (N,H,W,3)")
        self.read(0)  # raises where the file is too short

    def __len__(self):
        return self.shape[0]

    def name(self, index):
        return f"{self.path} image {index}"

    def read(self, index):
        # Mapped anew each time, in 30 us: a kept map would be copied whole into workers that are not forked.
        images = np.memmap(self.path, np.uint8, "r", self.start, self.shape)
        return Image.fromarray(images[index])


class Images(Dataset):
    """What the network takes: images[i] is uint8 (3,H,W), or a line of text that says what is wrong with it.

    source: FolderImages or NpzImages. crop: see center_crop, or None.
    Raises SystemExit where the first image can't be read.
    """

    def __init__(self, source, crop=None):
        self.source = source
        self.crop = crop
        self.shape = None
        first = self[0]
        if isinstance(first, str):
            raise SystemExit(first)
        self.shape = first.shape  # that all others must have

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        name = self.source.name(index)
        try:
            image = self.source.read(index)
        except Exception as error:  # Pillow's decoders raise many kinds
            return f"{name!r}: not a readable image ({error!r}); repair or remove it"
        if self.crop:
            image = center_crop(image, self.crop)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (H,W,3) -> (3,H,W)
        if self.shape not in (None, pixels.shape):
            first = self.source.name(0)
            return f"{name!r} is {[*pixels.shape]}, {first!r} is {[*self.shape]}; --crop makes them equal"
        return pixels


class Statistics(NamedTuple):
    """What FID needs of a set, and the features that it was computed of."""

    mu: np.ndarray  # (D,), float64
    sigma: np.ndarray  # (D,D), float64
    features: torch.Tensor  # (N,D), float32; N is 0 where they are not known
    made_by: str  # as load_network has it, or ""


def read_statistics(path):
    """Statistics of an .npz. Raises ValueError where they can't be meant, and whatever numpy meets."""
    with np.load(path) as arrays:
        mu = arrays["mu"].astype(np.float64)
        sigma = arrays["sigma"].astype(np.float64)
        features = arrays.get("features", np.empty((0, len(mu)))).astype(np.float32)
        made_by = str(arrays.get("made_by", ""))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or features.shape[1:] != mu.shape:
        raise ValueError("mu, sigma, features are not of shapes (D,), (D,D), (N,D)")
    if not np.isfinite(mu.sum() + sigma.sum() + features.sum()):
        raise ValueError("mu, sigma, features are not finite")
    return Statistics(mu, sigma, torch.from_numpy(features), made_by)


def open_npz(path, flag):
    """-> NpzImages and Statistics of an .npz, None for what it lacks. Raises SystemExit if it is damaged."""
    if not os.path.isfile(path):
        raise SystemExit(f"{flag} {path}: no such file; expected a folder or an .npz")
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = archive.namelist()
        images = NpzImages(path) if "arr_0.npy" in arrays else None
        statistics = read_statistics(path) if "mu.npy" in arrays else None
    except Exception as error:  # zipfile and numpy raise many kinds
        wanted = "a whole .npz of arr_0, or of mu and sigma"
        raise SystemExit(f"{flag} {path}: {error!r:.200}; expected {wanted}") from None
    return images, statistics


class EvaluationSet(NamedTuple):
    """One side of a comparison: images, statistics, or both."""

    name: str
    images: Dataset | None
    statistics: Statistics | None
    rows: int  # images whose features are known or can be computed
    count: int | None  # images that FID rests on, where that is known
    left_out: str


def open_set(path, flag, crop=None, num=None, spread=False):
    """-> EvaluationSet of a folder or an .npz, which `flag` names.

    crop: see Images. num: take so many images, the first or, with spread, evenly over their order.
    Raises SystemExit where that leaves nothing to evaluate.
    """
    name = f"{flag} {path}"
    source, statistics = open_npz(path, flag) if path.endswith(".npz") else (FolderImages(path, flag), None)
    if statistics and crop:
        raise SystemExit(f"{name}: --crop {crop} can't crop what its mu and sigma are of")
    if num:
        statistics = None  # they are of all images

    images = None
    rows = 0
    if source:
        rows = min(num or len(source), len(source))
        step = len(source) / rows if spread else 1
        images = Subset(Images(source, crop), [int(i * step) for i in range(rows)])
    if statistics is None and rows < 2:
        raise SystemExit(f"{name}: {rows} images, at least 2 are needed")

    # The count behind mu and sigma is known where their features are, as --save-stats writes them.
    count = rows
    if statistics:
        count = len(statistics.features) or None
        rows = count or rows
    return EvaluationSet(name, images, statistics, rows, count, source.left_out if source else "")


def choose_metrics(asked, samples, reference, inception, saving):
    """-> the metrics asked for, or all that the sets allow. Raises SystemExit where a metric lacks something.

    inception: whether the features are Inception's. saving: whether statistics are wanted, with no metric.
    """
    if reference is None and not saving and asked != ["is"]:
        raise SystemExit("--ref is missing: name a folder or an .npz to compare with (or --metrics is)")

    possible = []
    if reference:
        possible.append("fid")  # open_set gives nothing that it can't be computed of
    if samples.rows and inception:  # other networks have no classes
        possible.append("is")
    if reference and min(samples.rows, reference.rows) > 3:  # so that a third neighbour exists
        possible += ["prec", "rec"]

    if asked and not set(asked) <= set(possible):
        needs = "fid needs --ref, is images and Inception, prec and rec more than 3 images of both"
        allowed = ",".join(possible) or "none"
        raise SystemExit(f"--metrics {','.join(asked)}: these sets allow {allowed} ({needs})")
    return asked or possible


def check_comparable(sets, network, made_by):
    """-> what made all the features. Raises SystemExit where that is not one network and resize rule."""
    makers = {s.name: (s.statistics.made_by, len(s.statistics.mu)) for s in sets if s.statistics}
    if network:
        makers["this run"] = (made_by, network.width)

    # Who made ADM's reference batches is not written in them; their width tells.
    names = {name for name, _ in makers.values() if name}
    widths = {width for _, width in makers.values()}
    if len(names) > 1 or len(widths) > 1:
        each = [f"{name} has {width} features by {by or '?'}" for name, (by, width) in makers.items()]
        raise SystemExit(f"not comparable: {', '.join(each)}")
    return next(iter(names), "unknown")


def ignore_interrupt(_worker):
    """Ctrl-C reaches every process of the terminal; the one that runs main answers for all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def collate(samples):
    """Images of a batch -> (B,3,H,W), or the first text of one that can't be used: errors travel as text.

    An exception would leave a worker together with its traceback.
    """
    errors = [sample for sample in samples if isinstance(sample, str)]
    return errors[0] if errors else torch.stack(samples)


@torch.inference_mode()
def extract(images, network, name, batch_size, workers, device):
    """Features (N,D), fp32, of all images, on the CPU. Raises SystemExit at an image that can't be used."""
    options = {"num_workers": workers, "worker_init_fn": ignore_interrupt, "collate_fn": collate}
    network.to(device)
    features = torch.empty(len(images), network.width)
    done = 0
    # `with` closes the bar before an error's line is printed.
    with tqdm(total=len(images), desc=name, unit="image") as bar:
        for batch in DataLoader(images, batch_size, **options):  # uint8 (B,3,H,W)
            if isinstance(batch, str):
                raise SystemExit(batch)

            features[done : done + len(batch)] = network(batch.to(device)).float()  # (B,D)
            done += len(batch)
            bar.update(len(batch))
    if not features.isfinite().all():
        raise SystemExit(f"{name}: its features are not finite; are the weights the network's?")
    return features


def with_features(one, by_image, network, made_by, batch_size, workers, device):
    """The Statistics of an EvaluationSet; by_image: with features, whether or not FID needs them."""
    known = one.statistics
    if known and (len(known.features) or not by_image):
        return known
    features = extract(one.images, network, one.name, batch_size, workers, device)
    if known:  # ADM's reference batches: mu and sigma are of more images than they hold
        return known._replace(features=features)
    return Statistics(*moments(features), features, made_by)


def save_statistics(path, statistics, made_by):
    """Writes an .npz that open_set reads. Raises SystemExit where it can't be written, as to a full disk."""
    arrays = statistics._asdict() | {"made_by": made_by}
    # Under another name first: a reader never sees half a file.
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        # An open file: np.savez would add .npz to a name.
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise SystemExit(f"--save-stats {path}: {error.strerror}") from None


def evaluate(metrics, samples, reference, network):
    """-> {metric: number} of the Statistics of samples and reference."""
    results = {}
    if "fid" in metrics:
        results["fid"] = frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma)
    if "is" in metrics:
        results["is"] = inception_score(samples.features, network.fc.weight.cpu())
    if "prec" in metrics or "rec" in metrics:
        results["prec"], results["rec"] = precision_recall(samples.features, reference.features)
    return {metric: results[metric] for metric in metrics}  # in the order asked for


def exact_and_fast():
    """fp32 as it is: TF32 moves features by 1e-3. And freed memory is kept."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if sys.platform == "linux":  # glibc returns large blocks at every free; new pages cost 15 % of the time
        ctypes.CDLL(None).mallopt(-1, 2**29)  # M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD


def announce(about, sets, device):
    """The first line: what is compared, and what to keep in mind."""
    parts = [f"{key} {value}" for key, value in about.items()]
    parts.append(f"fp32 on {device.type}")
    if about["by"].endswith("random"):
        parts.insert(0, "the demo's untrained network, whose numbers compare with nothing")
    if any(s.count and s.count < 2048 for s in sets):
        parts.append("FID of fewer than 2048 images is biased")
    parts += [f"{s.name} {s.left_out}" for s in sets if s.left_out]
    print("; ".join(parts), file=sys.stderr)


def main(argv=None):
    args = parse_args(argv)
    exact_and_fast()

    # What is compared: everything is opened and checked before any work.
    samples = open_set(args.samples, "the set", None if args.ref else args.crop, args.num)
    reference = open_set(args.ref, "--ref", args.crop, args.ref_num, spread=True) if args.ref else None
    sets = [samples, reference] if reference else [samples]
    metrics = choose_metrics(args.metrics, samples, reference, not args.features, args.save_stats is not None)

    # The network, unless statistics are enough
    network = None
    made_by = ""
    if metrics != ["fid"] or any(s.statistics is None for s in sets):
        weights = args.features_weights if args.features else args.inception_weights
        network, made_by = load_network(args.features, args.protocol, weights)
    about = {
        "samples": args.samples,
        "num": samples.count,
        "ref": args.ref,
        "ref_num": reference.count if reference else None,
        "by": check_comparable(sets, network, made_by),
    }
    announce(about, sets, args.device)

    # Features, and what follows from them
    manifolds = "prec" in metrics or "rec" in metrics
    options = (network, made_by, args.batch_size, args.workers, args.device)
    measured = with_features(samples, manifolds or "is" in metrics, *options)
    against = with_features(reference, manifolds, *options) if reference else None
    results = evaluate(metrics, measured, against, network)
    if args.save_stats:
        save_statistics(args.save_stats, measured, about["by"])
    lines = [f"{metric} {value:.6g}" for metric, value in results.items()]
    print(json.dumps(results | about) if args.json else "\n".join(lines))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; nothing was written, the same command starts anew", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as shells have it
