"""Evaluation: FID, Inception Score, precision and recall of a set of images (paper, section 5).

    python fid.py samples                                         # built-in demo: CPU, a minute, no download
    python fid.py samples --ref imagenet256                       # gFID by the ADM protocol, as in the paper
    python fid.py reconstructions --ref imagenet/val --crop 256   # rFID
    python fid.py imagenet/train --crop 256 --save-stats ref.npz  # a reference, computed once

A set is a folder of images, an .npz of images (arr_0, uint8 (N,H,W,3)) or an .npz of statistics (mu, sigma).
--ref imagenet256 and imagenet512 mean ADM's reference batches, even where a file or folder is named so.
A protocol leads from image to network input: adm (OpenAI's TensorFlow evaluator, the paper's), pytorch-fid or
clean (clean-fid). Numbers of other protocols, networks or counts do not compare.

Letters in shapes: B batch, N and M images, D width of the features.
"""

import argparse
import contextlib
import ctypes
import difflib
import hashlib
import json
import os
import re
import signal
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image, ImageOps, PngImagePlugin
from safetensors.torch import load_file
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader, Dataset
from torchvision.models.inception import BasicConv2d, Inception3, InceptionE
from torchvision.transforms.functional import crop, normalize, pil_to_tensor
from tqdm import tqdm

# What belongs to the demo is used for the demo alone; fid.py trains nothing, so no other preset differs.
DEMO = {"ref": "data/demo", "inception_weights": "random", "num": 200, "ref_num": 200}
# ADM's reference batches: mu and sigma of ImageNet, and 10,000 of its images (Dhariwal & Nichol 2021)
REFERENCES = {
    "imagenet256": "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz",
    "imagenet512": "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/512/VIRTUAL_imagenet512.npz",
}
# Its name ends in the first digits of its SHA-256.
HUB_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# A whole picture is read whatever its metadata: Pillow refuses PNG text and colour profiles over 1 MB.
PngImagePlugin.MAX_TEXT_CHUNK = 2**28
PngImagePlugin.MAX_TEXT_MEMORY = 2**28


def parse_args(argv=None):
    """The flags. Raises SystemExit, in one line, for flags and values that can't be meant."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    presets = ["demo", "small", "imagenet256", "imagenet512"]
    protocols = ["adm", "pytorch-fid", "clean"]
    add("--preset", choices=presets, help="demo: data/demo, random weights; the default for its samples")

    # The sets
    add("samples", nargs="?", default="samples", help="the set to evaluate (%(default)s)")
    add("--ref", help="the set to compare with; imagenet256, imagenet512: ADM's batches, fetched once")
    add("--crop", type=count, help="centre-crop the reference to this size; without --ref, the samples")
    add("--num", type=count, help="take the first so many samples; default: all; demo: 200")
    add("--ref-num", type=count, help="take so many of the reference, evenly spread; default: all; demo: 200")

    # What is computed of them
    add("--metrics", type=metrics, help="some of fid,is,prec,rec; default: all that the sets allow")
    add("--protocol", choices=protocols, default="adm", help="from image to Inception's input (%(default)s)")
    add("--inception-weights", default="hub", help="FILE, hub or, for tests, random (%(default)s)")
    add("--features", help="a timm model instead of Inception; dinov2-large gives FD-DINOv2")
    add(
        "--features-weights",
        default="hub",
        help="FILE with timm's keys, hub:OWNER/REPO/PATH, or hub (%(default)s)",
    )

    # What changes no result
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    workers = min(8, os.cpu_count())
    add("--batch-size", type=count, default=32, help="images a step; does not change results (%(default)s)")
    add("--workers", type=whole, default=workers, help="processes that decode images (%(default)s)")
    add("--device", type=device, default=cuda, help="cuda, cpu, mps, xpu (%(default)s)")
    npz = bounded(str, writable, "an .npz in a folder that can be written into")
    add("--save-stats", type=npz, help="write the samples' mu, sigma, features: a later --ref")
    add("--json", action="store_true", help="one JSON line: numbers, sets, counts, what made the features")

    args = parser.parse_args(argv)
    if args.features and (args.protocol != "adm" or args.inception_weights != "hub"):
        parser.error("--protocol and --inception-weights are of Inception, not of --features")
    # ADM's mu and sigma stand for its images, but not to other features.
    if args.ref in REFERENCES and (args.features or args.protocol != "adm") and not args.ref_num:
        problem = f"--ref {args.ref}: its mu and sigma are of Inception and --protocol adm"
        parser.error(f"{problem}; --ref-num 10000 takes its images")
    named = args.preset or args.ref or args.save_stats
    if args.preset == "demo" or (not named and made_by_demo(args.samples)):
        parser.set_defaults(**DEMO)  # a flag that is given wins
        args = parser.parse_args(argv)

    if args.features_weights != "hub" and not args.features:
        parser.error("--features-weights needs --features NAME, the model that they are of")
    if not (args.ref or args.metrics or args.save_stats):
        parser.error("--ref is missing: name a folder or an .npz to compare with, or --metrics is")
    return args


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake ends in one line, which names the nearest flag."""

    def __init__(self, **options):
        # Most flags and their help share a line, and no list of all flags comes before them.
        layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28)
        usage = "%(prog)s [--flag value ...]"
        super().__init__(formatter_class=layout, usage=usage, allow_abbrev=False, **options)

    def error(self, message):
        # argparse names the nearest choice of a value, but not the nearest flag.
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            flags = re.findall(r"--[\w-]+", self.format_help())
            near = difflib.get_close_matches(unknown[1].replace("_", "-"), flags, n=1)
            message += f" (perhaps {near[0]}?)" if near else ""
        raise SystemExit(f"{self.prog}: {message}; --help lists the flags")


def bounded(convert, fits, expected):
    """An argparse type: convert(text) where that fits, else an error that says what was expected."""

    # argparse shows the message of an ArgumentTypeError, but of a ValueError only the function's name.
    def parse(text):
        with contextlib.suppress(ValueError):
            value = convert(text)
            if fits(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")

    return parse


count = bounded(int, lambda value: value >= 1, "a whole number from 1")
whole = bounded(int, lambda value: value >= 0, "a whole number from 0")
METRICS = {"fid", "is", "prec", "rec"}
metrics = bounded(lambda text: text.lower().split(","), METRICS.issuperset, "some of fid,is,prec,rec")


def writable(path):
    return path.endswith(".npz") and os.access(os.path.dirname(path) or ".", os.W_OK)


def device(text):
    """Flag type: a device of this machine."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError):  # the latter of a torch built without CUDA
        raise argparse.ArgumentTypeError(f"{text}: no such device on this machine") from None


def made_by_demo(folder):
    """Whether sample.py wrote that the folder's images are of the demo's decoder."""
    try:
        return json.loads(Path(folder, "settings.json").read_bytes())["demo"] is True
    except (OSError, ValueError, LookupError, TypeError):  # no folder of sample.py's
        return False


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
        weights = []
        for size in x.shape[2:]:
            source = torch.arange(299.0) * (size / 299)
            offset = source.clamp(max=size - 1).view(299, 1) - torch.arange(size)
            weights.append((1 - offset.abs()).clamp(min=0).to(x.device))  # (299,H), then (299,W)
        x = weights[0] @ x @ weights[1].T  # (B,3,299,299)
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
        self.model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": state})
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
        config = self.model.pretrained_cfg
        return self.model(normalize(x, config["mean"], config["std"]))  # (B,3,224,224) -> (B,D)


@contextlib.contextmanager
def whole_file(path):
    """A temporary name for what becomes `path` at the end: nobody ever reads half a file."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def check_reference(path):
    """Raises ValueError, or what zipfile meets, where a reference batch is cut or is something else."""
    with zipfile.ZipFile(path) as archive:
        if not {"mu.npy", "sigma.npy", "arr_0.npy"}.issubset(archive.namelist()) or archive.testzip():
            raise ValueError("not a whole .npz of mu, sigma and arr_0")


def fetch(url, flag, hash_prefix=None):
    """-> the path of a copy in torch.hub's folder, fetched once. Raises SystemExit where it can't be had."""
    folder = f"{torch.hub.get_dir()}/checkpoints"
    path = f"{folder}/{os.path.basename(url)}"
    if os.path.exists(path):
        return path
    # Named before it starts: without a network it may take long to fail.
    print(f"fetching {url}", file=sys.stderr)
    try:
        os.makedirs(folder, exist_ok=True)
        with whole_file(path) as temporary:
            torch.hub.download_url_to_file(url, temporary, hash_prefix)
            if path.endswith(".npz"):  # torch.hub does not notice that a file is cut
                check_reference(temporary)
    except Exception as error:  # of the network, the disk, the file
        raise SystemExit(f"{flag}: {url}: {error!r:.200}; {flag} FILE takes a local copy") from None
    return path


def local_file(weights):
    """-> the path of a file of weights; hub:OWNER/REPO/PATH is fetched into the hub's own cache."""
    if not weights.startswith("hub:"):
        return weights
    owner, repository, name = weights.removeprefix("hub:").split("/", 2)
    # Said at once: without a network the hub's tools try again in silence.
    print(f"fetching {weights}", file=sys.stderr, flush=True)
    return hf_hub_download(f"{owner}/{repository}", name)


def read_weights(path):
    """-> the state dict in a .safetensors or .pt file, read without running code."""
    if path.endswith(".safetensors"):
        return load_file(path)
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def load_inception(protocol, weights):
    """-> Inception of `hub`, `random` or a file, and what its features rest on."""
    network = Inception(protocol)
    digest = "random"
    if weights != "random":
        path = fetch(HUB_URL, "--inception-weights", HUB_URL[-12:-4]) if weights == "hub" else weights
        network.load_state_dict(read_weights(path))  # a plain dict may lack num_batches_tracked
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]
    return network.fold(), f"{protocol} inception {digest}"


def load_timm(name, weights):
    """-> TimmFeatures of `hub` or a file, and what they rest on."""
    network = TimmFeatures(name, None if weights == "hub" else read_weights(weights))
    # Of the weights, not of a file: a local copy of the hub's is the same network.
    digest = hashlib.sha256()
    for value in network.state_dict().values():
        digest.update(value.numpy())
    return network, f"224px {name} {digest.hexdigest()[:8]}"


def load_network(features, protocol, weights):
    """-> the network, and what its features rest on: resize rule, name, digits of its weights' SHA-256.

    features: the name of a timm model, or None for Inception. weights: `hub`, a file, for Inception `random`.
    Raises SystemExit where they can't be had.
    """
    flag = f"--features {features} --features-weights" if features else "--inception-weights"
    try:
        path = local_file(weights)
        return load_timm(features, path) if features else load_inception(protocol, path)
    except Exception as error:  # the hub, torch, safetensors and timm raise many kinds
        # Cut before torch's advice to run the code in a file.
        raise SystemExit(f"{flag} {weights}: {error!r:.150}; FILE is timm's weights or {HUB_URL}") from None


def natural_order(names):
    """Names sorted with numbers by value; ties, as of `1` and `01` or `a` and `A`, by the plain string."""
    # Padded to the longest that a name can have, behind a character that sorts before any text.
    pad = partial(re.compile("[0-9]+").sub, lambda digits: "\0" + digits[0].zfill(255))
    return sorted(sorted(names), key=lambda name: pad(name.lower()))  # sorting leaves ties as they are


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
    left_out = {"files of other kinds": 0, "folders without images": 0, "folders listed before": 0}
    listed = set()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in listed:
            left_out["folders listed before"] += 1
            subfolders.clear()  # a link to itself or a parent ends here
            continue
        listed.add(real)

        # os.walk goes on with what is left in this list, in its order.
        subfolders[:] = natural_order(name for name in subfolders if name[0] != ".")
        files = [name for name in files if name[0] != "."]
        images = [name for name in files if name.lower().endswith(EXTENSIONS)]
        left_out["files of other kinds"] += len(files) - len(images)
        if not images:
            left_out["folders without images"] += not subfolders
            continue

        # A folder is followed by what is below it: comparing with the class before finds all mixtures.
        relative = folder[len(os.path.join(root, "")) :]
        if classes and relative.startswith(os.path.join(classes[-1], "")):
            beside = os.path.join(root, classes[-1], os.fsdecode(names[-1][0]))
            mixture = f"{beside} lies beside the class folder {folder}"
            raise SystemExit(f"{flag} {root}: {mixture}; move it into a folder of its own, or away")
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
    # In place Pillow turns the pixels first, and only then meets what is broken in other metadata.
    with contextlib.suppress(Exception):  # of many kinds, in a picture that is whole
        ImageOps.exif_transpose(image, in_place=True)

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
    # Halved first, as ADM has it: one large bicubic step is of lower quality.
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width = round(image.width * scale)
    height = round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return crop(image, (height - size) // 2, (width - size) // 2, size, size)


def map_npz(path):
    """arr_0 of an .npz, uint8 (N,H,W,3), mapped where it lies in the file: its 10 GB need no memory.

    Raises ValueError where arr_0 is anything else, and whatever zipfile and numpy meet in a damaged file.
    """
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        entry = archive.getinfo("arr_0.npy")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("arr_0 is compressed, write it with np.savez")

        # Between the entry's place and the array there is a header of zip, of some 50 bytes.
        file.seek(entry.header_offset)
        zip_header = file.read(512).find(b"\x93NUMPY")
        file.seek(entry.header_offset + zip_header)
        np.lib.format.read_magic(file)
        shape, transposed, dtype = np.lib.format.read_array_header_1_0(file)
        start = file.tell()  # bytes
    if dtype != np.uint8 or transposed or shape[3:] != (3,) or min(shape) < 1:
        raise ValueError(f"arr_0 is {dtype} {shape}, not uint8 (N,H,W,3)")
    return np.memmap(path, np.uint8, "r", start, shape)


class Images(Dataset):
    """Of a folder or an .npz: images[i] is uint8 (3,H,W), or a line of text that says what is wrong with it.

    crop: see center_crop, or None. num: take so many, the first or, with spread, evenly over their order.
    Raises SystemExit where a folder can't be listed or the first image can't be read, and as map_npz.
    """

    def __init__(self, path, flag, crop=None, num=None, spread=False):
        self.path = path
        self.crop = crop
        self.left_out = ""
        if path.endswith(".npz"):
            items = range(len(map_npz(path)))
        else:
            classes, names, labels, self.left_out = list_images(path, flag)
            files = zip(labels, map(os.fsdecode, names), strict=True)
            items = [os.path.join(path, classes[label], name) for label, name in files]

        num = min(num or len(items), len(items))
        step = len(items) / num if spread else 1
        self.items = [items[int(i * step)] for i in range(num)]  # paths, or numbers in the .npz

        self.shape = None
        first = self[0]
        if isinstance(first, str):
            raise SystemExit(first)
        self.shape = first.shape  # that all others must have

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        item = self.items[i]
        try:
            if self.path.endswith(".npz"):
                # Mapped anew each time: a kept map would be copied whole into workers that are not forked.
                image = Image.fromarray(map_npz(self.path)[item])
            else:
                with Image.open(item) as file:
                    image = to_rgb(file)
        except Exception as error:  # Pillow's decoders raise many kinds
            return f"{item!r}: not a readable image ({error!r}); repair or remove it"

        if self.crop:
            image = center_crop(image, self.crop)
        pixels = pil_to_tensor(image)  # (3,H,W)
        if self.shape not in (None, pixels.shape):
            sizes = f"{item!r} is {[*pixels.shape]}, {self.items[0]!r} is {[*self.shape]}"
            return f"{sizes}; --crop makes those of the reference, or of the only set, equal"
        return pixels


class Statistics(NamedTuple):
    """What FID needs of a set, and the features that it was computed from."""

    mu: np.ndarray | torch.Tensor  # (D,), float64
    sigma: np.ndarray | torch.Tensor  # (D,D), float64
    features: torch.Tensor  # (N,D), float32; N is 0 where they are not known


def read_statistics(path, width, made_by):
    """Statistics of an .npz. Raises ValueError where they are not of `width` features made by `made_by`."""
    with np.load(path) as arrays:
        mu = arrays["mu"]
        sigma = arrays["sigma"]
        features = torch.from_numpy(arrays.get("features", np.empty((0, width))))
        # Files of others, ADM's reference batches too, don't say who made them: they are taken as asked for.
        by = str(arrays.get("made_by", made_by))
    if by != made_by or mu.shape != (width,) or sigma.shape != (width, width):
        raise ValueError(f"mu {mu.shape}, sigma {sigma.shape} by {by}; not of {width} features by {made_by}")
    if not np.isfinite(mu.sum() + sigma.sum()):
        raise ValueError("mu, sigma are not finite")
    return Statistics(mu, sigma, features.float())


def open_set(path, flag, width, made_by, crop=None, num=None, spread=False):
    """-> Images and Statistics of a folder or an .npz, which `flag` names; None for what it does not hold.

    width, made_by: see read_statistics. crop, num, spread: see Images.
    Raises SystemExit where that leaves nothing to evaluate.
    """
    images = None
    statistics = None
    arrays = ["arr_0.npy"]
    try:
        if path.endswith(".npz"):
            with zipfile.ZipFile(path) as archive:
                arrays = archive.namelist()
        if "arr_0.npy" in arrays:
            images = Images(path, flag, crop, num, spread)
        if "mu.npy" in arrays and not num:  # they are of all images
            statistics = read_statistics(path, width, made_by)
    except Exception as error:  # zipfile and numpy raise many kinds
        wanted = "expected a whole .npz of arr_0, or of mu and sigma"
        raise SystemExit(f"{flag} {path}: {error!r:.250}; {wanted}") from None

    if statistics and crop:
        raise SystemExit(f"{flag} {path}: --crop {crop} can't crop what its mu and sigma are of")
    if num and images is None:
        raise SystemExit(f"{flag} {path}: has no images to take {num} of; leave --num, --ref-num out")
    number = len(images) if images else 0
    if statistics is None and number < 4:  # a third neighbour must exist
        raise SystemExit(f"{flag} {path}: {number} images, at least 4 are needed")
    return images, statistics


def choose_metrics(asked, sets, inception):
    """-> the metrics asked for, or all that the sets allow. Raises SystemExit where a metric lacks something.

    sets: Images and Statistics of the samples and of a reference, if there is one.
    inception: whether the features are Inception's; other networks have no classes.
    """
    by_image = [len(images or known.features) > 0 for images, known in sets]
    possible = ["fid"] if len(sets) == 2 else []
    if by_image[0] and inception:
        possible.append("is")
    if by_image == [True, True]:
        possible += ["prec", "rec"]
    if not set(possible).issuperset(asked or possible):
        needs = "fid needs --ref; is needs images and Inception; prec and rec need images of both"
        raise SystemExit(f"--metrics: these sets allow {','.join(possible) or 'none'} ({needs})")
    return asked or possible


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
def extract(images, network, batch_size, workers, device):
    """Features (N,D), fp32, of all images, on the CPU. Raises SystemExit at an image that can't be used."""
    batches = DataLoader(
        images, batch_size, num_workers=workers, collate_fn=collate, worker_init_fn=ignore_interrupt
    )  # uint8 (B,3,H,W)
    network.to(device)
    features = torch.empty(len(images), network.width)
    # `with` closes the bar before an error's line is printed.
    with tqdm(total=len(images), desc=images.path, unit="image") as bar:
        for rows, batch in zip(features.split(batch_size), batches, strict=True):
            if isinstance(batch, str):
                raise SystemExit(batch)
            rows.copy_(network(batch.to(device)))  # (B,D)
            bar.update(len(batch))
    if not features.isfinite().all():
        raise SystemExit(f"{images.path}: its features are not finite; are the weights the network's?")
    return features


def measure(images, known, by_image, *options):
    """-> Statistics of Images, known or not from their file. by_image: with features, FID or not."""
    if known and (len(known.features) or not by_image or images is None):
        return known
    features = extract(images, *options)
    # The mu and sigma of ADM's reference batches are of more images than they hold.
    return known._replace(features=features) if known else Statistics(*moments(features), features)


def save_statistics(path, statistics, made_by):
    """Writes an .npz that open_set reads. Raises SystemExit where it can't be written, as to a full disk."""
    try:
        # An open file: np.savez would add .npz to a name.
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, made_by=made_by, **statistics._asdict())
    except OSError as error:
        raise SystemExit(f"--save-stats {path}: {error.strerror}") from None


def evaluate(metrics, network, samples, reference=None):
    """-> {metric: number} of the Statistics of samples and reference; prec and rec come together."""
    results = {}
    if "fid" in metrics:
        results["fid"] = frechet_distance(*samples[:2], *reference[:2])  # of mu, sigma
    if "is" in metrics:
        results["is"] = inception_score(samples.features, network.fc.weight.cpu())
    if "prec" in metrics or "rec" in metrics:
        results["prec"], results["rec"] = precision_recall(samples.features, reference.features)
    return results


def keep_freed_memory(device):
    """glibc gives large blocks back at every free; new pages cost a CPU 10 to 20 % of a training step."""
    if sys.platform == "linux" and device.type == "cpu":
        libc = ctypes.CDLL(None)
        # Before glibc 2.35 so high a threshold is refused, and its own, which moves, is better left alone.
        if libc.mallopt(-3, 2**31 - 1):  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2**29)  # M_TRIM_THRESHOLD


def main(argv=None):
    args = parse_args(argv)
    keep_freed_memory(args.device)
    torch.backends.cudnn.allow_tf32 = False  # it moves features by 1e-3

    # What is compared, and by what: everything is opened and checked before any work.
    weights = args.features_weights if args.features else args.inception_weights
    network, made_by = load_network(args.features, args.protocol, weights)
    own_crop = None if args.ref else args.crop
    sets = [open_set(args.samples, "the set", network.width, made_by, own_crop, args.num)]
    if args.ref:
        ref = fetch(REFERENCES[args.ref], "--ref") if args.ref in REFERENCES else args.ref
        sets.append(open_set(ref, "--ref", network.width, made_by, args.crop, args.ref_num, spread=True))
    metrics = choose_metrics(args.metrics, sets, inception=not args.features)

    # The first line, with what to keep in mind; not known is how many images ADM's mu and sigma are of.
    counts = [len(known.features if known else images) or None for images, known in sets]
    ref_num = counts[1] if args.ref else None
    about = {"samples": args.samples, "num": counts[0], "ref": args.ref, "ref_num": ref_num, "by": made_by}
    notes = [f"{key} {value}" for key, value in about.items()] + [f"fp32 on {args.device}"]
    notes += [f"{images.path} {images.left_out}" for images, _ in sets if images and images.left_out]
    if any(count and count < 2048 for count in counts):
        notes.append("FID of fewer than 2048 images is biased")
    if weights == "random":
        notes.append("an untrained network, as the demo's: its numbers compare with nothing")
    print("; ".join(notes), file=sys.stderr)

    # Features, and what follows from them
    options = (metrics != ["fid"], network, args.batch_size, args.workers, args.device)
    measured = [measure(images, known, *options) for images, known in sets]
    results = evaluate(metrics, network, *measured)
    if args.save_stats:
        save_statistics(args.save_stats, measured[0], made_by)
    lines = [f"{metric} {value:.6g}" for metric, value in results.items()]
    print(json.dumps(results | about) if args.json else "\n".join(lines))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; nothing was written, the same command starts anew", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as shells have it
